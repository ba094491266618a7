"""A line per link in the log, every five minutes and on SIGUSR1 (mp.md §13)."""

import asyncio
import contextlib
import logging
import signal
from collections.abc import Callable, Iterator

from aoscore.common.log import kv
from aoscore.mp.communication.connection import Connection

_log = logging.getLogger(__name__)

PERIOD_S = 300.0


class Status:
    """Knows the present links, as a service that tells of them."""

    def __init__(self, *, period_s: float = PERIOD_S) -> None:
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
            started()
            while True:
                await asyncio.sleep(self._period_s)
                self.tell()
        finally:
            loop.remove_signal_handler(signal.SIGUSR1)

    def tell(self, is_asked: bool = False) -> None:
        """Write the lines; one that says that there is nothing only when somebody asks."""
        now_s = asyncio.get_running_loop().time()
        elapsed_s = max(now_s - self._told_s, 0.001)
        for link, before in self._links.items():
            count = link.counters
            self._links[link] = count.download_bytes
            _log.info(
                kv(
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
                    opened=count.opened,
                    closed=count.closed,
                    queued_bytes=link.queued_bytes,
                    download_kB_s=round((count.download_bytes - before) / elapsed_s / 1000),
                )
            )
        if is_asked and not self._links:
            _log.info("Status of link: there is none")
        self._told_s = now_s
