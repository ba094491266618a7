"""A line per link: in the log every five minutes and on SIGUSR1, and for whoever asks with `--status` (mp.md §13)."""

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

from aoscore.common.errors import FailedError
from aoscore.common.log import kv
from aoscore.mp.communication.connection import Connection

_log = logging.getLogger(__name__)

PERIOD_S = 300.0
_SOCKET = "status.sock"
_ANSWER_TIMEOUT_S = 5.0


class Status:
    """Knows the present links, as a service that tells of them; it can be asked by a socket in `directory`."""

    def __init__(self, directory: Path | None = None, *, period_s: float = PERIOD_S) -> None:
        self._directory = directory
        self._period_s = period_s
        self._links: dict[Connection, int] = {}
        """Bytes of downloads that each had moved when it was told of last."""
        self._told_s = 0.0

    @contextlib.contextmanager
    def watching(self, connection: Connection) -> Iterator[None]:
        """The link is up for the length of the block."""
        self._links[connection] = 0
        try:
            yield
        finally:
            del self._links[connection]

    async def run(self, started: Callable[[], None]) -> None:
        """Tell until cancelled."""
        loop = asyncio.get_running_loop()
        self._told_s = loop.time()
        loop.add_signal_handler(signal.SIGUSR1, self.tell, True)
        try:
            async with self._answering():
                started()
                while True:
                    await asyncio.sleep(self._period_s)
                    self.tell()
        finally:
            loop.remove_signal_handler(signal.SIGUSR1)

    @contextlib.asynccontextmanager
    async def _answering(self) -> AsyncIterator[None]:
        if self._directory is None:
            yield
            return
        with _at(self._directory) as path, socket.socket(socket.AF_UNIX) as sock:
            os.fchmod(sock.fileno(), 0o600)
            Path(path).unlink(missing_ok=True)
            sock.bind(path)
            server = await asyncio.start_unix_server(self._answer, sock=sock)
            try:
                yield
            finally:
                server.close()
                Path(path).unlink(missing_ok=True)

    async def _answer(self, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write("".join(f"{line}\n" for line in self._lines()).encode())
        writer.close()

    def tell(self, is_asked: bool = False) -> None:
        """Write the lines; one that says that there is nothing only when somebody asks."""
        for line in self._lines() if self._links or is_asked else ():
            _log.info(line)
        for link in self._links:
            self._links[link] = link.counters.download_bytes
        self._told_s = asyncio.get_running_loop().time()

    def _lines(self) -> list[str]:
        elapsed_s = max(asyncio.get_running_loop().time() - self._told_s, 0.001)
        return [_line(link, before, elapsed_s) for link, before in self._links.items()] or [
            "Status of link: there is none"
        ]


def _line(link: Connection, download_bytes_before: int, elapsed_s: float) -> str:
    count = link.counters
    return kv(
        "Status of link",
        nodeID=link.node_id,
        peer=link.peer,
        frames_in=count.frames_in,
        frames_out=count.frames_out,
        bytes_in=count.bytes_in,
        bytes_out=count.bytes_out,
        damaged=count.damaged,
        unknown=count.unknown,
        unexpected=link.unexpected,
        refused=count.refused,
        opened=count.opened,
        closed=count.closed,
        queued_bytes=link.queued_bytes,
        download_kB_s=round((count.download_bytes - download_bytes_before) / elapsed_s / 1000),
    )


def ask(directory: Path) -> str:
    """What the process that works in a directory says of its links. Raises FailedError when there is none."""
    try:
        with _at(directory) as path, socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(_ANSWER_TIMEOUT_S)
            sock.connect(path)
            with sock.makefile("r", encoding="utf-8") as answer:
                return answer.read()
    except OSError as error:
        raise FailedError(f"no MP answers in {directory}: {error.strerror or error}") from error


@contextlib.contextmanager
def _at(directory: Path) -> Iterator[str]:
    """A path of the socket that is short enough for one, however deep the directory lies (unix(7))."""
    fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/{_SOCKET}"
    finally:
        os.close(fd)
