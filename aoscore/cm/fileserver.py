"""Gives blobs to the SMs over plain HTTP: `/blobs/sha256/<hex>` and nothing else (cm-cloud.md §9)."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from aoscore.common.blobstore import check_digest
from aoscore.common.errors import ConfigError
from aoscore.common.fileserver import FileServer
from aoscore.common.log import kv
from aoscore.common.rpc import plain_ip

_log = logging.getLogger(__name__)

_PREFIX: Final = "/blobs/sha256/"
_ALL: Final = frozenset({"0.0.0.0", "::"})  # noqa: S104 - where they are meant
_RESOLVE_TIMEOUT_S: Final = 2.0


def listen_addresses(host: str, resolved: Collection[str], more: Sequence[str]) -> Collection[str]:
    """IP addresses to listen at. Pure.

    Those that `host`, to which SMs are sent, has on this machine (`resolved`), and `more`, which the configuration
    names: a node often has its own name for itself at a loopback address, where others do not reach it. Is that all
    that is known of a name, it is all addresses. An address for all in `more` stands for them alone.
    """
    if any(ipaddress.ip_address(one).is_unspecified for one in more):
        return _ALL
    loopback = all(ipaddress.ip_address(one).is_loopback for one in resolved)
    if resolved and loopback and not more and host != "localhost" and host not in resolved:
        return _ALL
    return {plain_ip(one) for one in (*resolved, *more)}


class BlobServer:
    """Where SMs get blobs. `address` is `fileServerUrl` of the configuration: host:port or a URL."""

    def __init__(
        self,
        address: str,
        blob_path: Callable[[str], Path],
        *,
        is_node: Callable[[str], bool],
        listen_at: Sequence[str] = (),
    ) -> None:
        """`blob_path` gives the file of a digest or raises NotFoundError.

        `is_node` tells whether an IP address is one of a node of the Unit; only those are served, and this machine.
        `listen_at` are IP addresses of this machine beside those that the name in `address` has here.
        """
        url = address if "://" in address else f"http://{address}"
        parts = urlsplit(url)
        try:
            port = parts.port or 80
        except ValueError as error:
            raise ConfigError(f"fileServerUrl {address!r} has no usable port") from error
        if parts.scheme != "http":
            raise ConfigError(f"fileServerUrl {address!r} is no http URL")
        self._base = f"http://{parts.netloc}{parts.path.rstrip('/')}" if parts.hostname else f"http://localhost:{port}"
        self._blob_path = blob_path
        self._host = parts.hostname or "localhost"
        self._listen_at = listen_at
        self._resolved: Collection[str] = ()
        self._failure = ""
        self.server = FileServer(f":{port}", self._resolve, allow=is_node, find=self._addresses)

    def url(self, digest: str) -> str:
        """URL of a blob that is here. Raises NotFoundError."""
        self._blob_path(digest)
        return f"{self._base}{_PREFIX}{digest.removeprefix('sha256:')}"

    async def _addresses(self) -> Collection[str]:
        try:
            ipaddress.ip_address(self._host)
        except ValueError:
            await self._look_up()
        else:
            self._resolved = [self._host]
        return listen_addresses(self._host, self._resolved, self._listen_at)

    async def _look_up(self) -> None:
        """What cannot be asked any more has not changed."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(_RESOLVE_TIMEOUT_S):
                found = await loop.getaddrinfo(self._host, None, type=socket.SOCK_STREAM)
        except (OSError, TimeoutError) as error:
            failure = str(error) or "no answer in time"
            if failure != self._failure:
                _log.warning(kv("Can't find the address of the file server", host=self._host, error=failure))
            self._failure = failure
        else:
            self._failure = ""
            self._resolved = [str(address[0]).partition("%")[0] for *_, address in found]

    def _resolve(self, target: str) -> Path | None:
        if not target.startswith(_PREFIX):
            return None
        return self._blob_path(check_digest(f"sha256:{target.removeprefix(_PREFIX)}"))
