"""Client of the admin API, for the command line and for tests. Blocking, standard library only."""

import http.client
import json
import os
import socket
from collections.abc import Generator
from pathlib import Path
from typing import Any

from aoscore.common.errors import FailedError

SOCKET_NAME = "admin.sock"


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, directory: Path, timeout_s: float | None) -> None:
        super().__init__("admin", timeout=timeout_s)
        self._directory = directory

    def connect(self) -> None:
        # A path through the directory's descriptor stays within the length limit of socket addresses.
        fd = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self.sock = socket.socket(socket.AF_UNIX)
            self.sock.settimeout(self.timeout)
            self.sock.connect(f"/proc/self/fd/{fd}/{SOCKET_NAME}")
        finally:
            os.close(fd)


class AdminClient:
    """Calls a running cloud by its directory."""

    def __init__(self, directory: Path, timeout_s: float = 120.0) -> None:
        self._directory = directory
        self._timeout_s = timeout_s

    def call(self, name: str, /, **arguments: Any) -> Any:
        """Run one operation of `admin.Operations` and return its result.

        Raises:
            FailedError: no cloud runs on the directory, or it refused; the message is the cloud's.
        """
        connection = _UnixConnection(self._directory, self._timeout_s)
        try:
            response = self._request(connection, name, arguments)
            answer = json.loads(response.read())
        except ValueError as error:
            raise FailedError(f"cloud on {self._directory} answered {name} with no JSON") from error
        finally:
            connection.close()
        if "error" in answer:
            raise FailedError(answer["error"])
        return answer["result"]

    def watch(
        self, unit: str | None = None, *, timeout_s: float | None = None
    ) -> Generator[dict[str, Any], None, None]:
        """Events from now on, of one Unit (system id) or of all, until the cloud stops.

        Raises TimeoutError when there is none for `timeout_s`, without it never.
        """
        connection = _UnixConnection(self._directory, timeout_s)
        response = self._request(connection, "watch", {"unit": unit})

        def events() -> Generator[dict[str, Any], None, None]:
            try:
                while line := response.readline():
                    yield json.loads(line)
            finally:
                connection.close()

        return events()

    def _request(self, connection: _UnixConnection, name: str, arguments: dict[str, Any]) -> http.client.HTTPResponse:
        try:
            connection.request("POST", f"/{name}", json.dumps(arguments), {"Content-Type": "application/json"})
            return connection.getresponse()
        except OSError as error:
            raise FailedError(f"no cloud answers on {self._directory}: {error.strerror or error}") from error
