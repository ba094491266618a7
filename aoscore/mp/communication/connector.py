"""Keeps a link up: makes it, hands it over, and makes it anew after its end (mp.md §5)."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from aoscore.common.aio import Backoff
from aoscore.common.errors import AosError
from aoscore.common.log import kv

_log = logging.getLogger(__name__)


READ_BYTES = 512 * 1024
"""The most that is read from a link at a time."""


class Reader(Protocol):
    """The reading half of a link; a StreamReader of asyncio is one."""

    async def read(self, n: int, /) -> bytes | memoryview:
        """At least one byte and `n` at most, which may change with the next call; none at the end."""


Streams = tuple[Reader, asyncio.StreamWriter]
Handler = Callable[[Reader, asyncio.StreamWriter, str], Awaitable[None]]
"""Has a link, and the name of its other end, to itself until it returns or raises AosError or OSError."""

FIRST_PAUSE_S = 2.0
_LONGEST_PAUSE_S = 30.0
# A link that was up for so long was a good one: the next attempt comes soon again. A peer has less time than that to
# introduce itself.
_GOOD_LINK_S = 10.0
_ALERT_S = 60.0


class Connector:
    """One link, again and again, as a service.

    `connect()` is entered for each link and left at its end; it raises AosError or OSError when there is none.
    """

    def __init__(
        self,
        peer: str,
        connect: Callable[[], AbstractAsyncContextManager[Streams]],
        handler: Handler,
        *,
        backoff: Backoff | None = None,
    ) -> None:
        self._peer = peer
        self._connect = connect
        self._handler = handler
        self._backoff = backoff or Backoff(FIRST_PAUSE_S, _LONGEST_PAUSE_S)

    async def run(self, started: Callable[[], None]) -> None:
        """Work until cancelled. The other end being there is no part of being started."""
        started()
        loop = asyncio.get_running_loop()
        down_s: float | None = loop.time()
        while True:
            began_s = loop.time()
            try:
                async with self._connect() as (reader, writer):
                    began_s = loop.time()
                    await self._handler(reader, writer, self._peer)
                reason = "ended"
            except (AosError, OSError) as error:
                reason = str(error)
            if loop.time() - began_s >= _GOOD_LINK_S:
                self._backoff.reset()
                down_s = loop.time()
            if down_s is not None and loop.time() - down_s >= _ALERT_S:
                # An error in the journal reaches the cloud as a core alert: once until the link was up again.
                _log.error(kv("There has been no link", peer=self._peer, seconds=_ALERT_S, reason=reason))
                down_s = None
            pause_s = self._backoff.next()
            _log.warning(kv("Link is down", peer=self._peer, reason=reason, next_try_s=round(pause_s, 1)))
            await asyncio.sleep(pause_s)
