"""Disk space of the image store: promised before it is used, outdated items given up for it (sm.md §3.5, §3.8)."""

import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable

from aoscore.common.errors import NoSpaceError
from aoscore.common.log import kv

_log = logging.getLogger(__name__)

_KEPT_BYTES = 64 * 1024 * 1024
_KEPT_PART = 20


def kept_bytes(total_bytes: int) -> int:
    """What images leave free of a file system of that size: SM's database and others must go on writing there."""
    return min(_KEPT_BYTES, total_bytes // _KEPT_PART)


class Usage:
    """What the space keeper must know, as functions so that tests can have a small disk."""

    def __init__(self, available: Callable[[], int], total: Callable[[], int], used: Callable[[], int]) -> None:
        """Bytes free for us (below 0 when less is free than is to be kept) and in all on the file system; bytes that
        the store takes."""
        self.available = available
        self.total = total
        self.used = used


class Reservation:
    """Space promised to one step."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self._written_bytes = 0

    def written(self, size_bytes: int) -> None:
        """So much of it is on the disk by now, and thus no longer free anyway."""
        self._written_bytes = size_bytes

    @property
    def open_bytes(self) -> int:
        """What may still be written."""
        return max(0, self.size_bytes - self._written_bytes)


class Space:
    """Grants reservations. `evict` deletes the oldest outdated item and says whether there was one."""

    def __init__(self, usage: Usage, limit_percent: float, evict: Callable[[], Awaitable[bool]]) -> None:
        self._usage = usage
        self._limit_percent = limit_percent
        self._evict = evict
        self._reservations: set[Reservation] = set()

    @contextlib.asynccontextmanager
    async def reserve(self, size_bytes: int, what: str) -> AsyncIterator[Reservation]:
        """Hold `size_bytes` until the block ends. Raises NoSpaceError when even eviction cannot free enough."""
        while (missing_bytes := size_bytes - self.free_bytes()) > 0:
            if not await self._evict():
                raise NoSpaceError(f"{what} needs {size_bytes} bytes of disk, {missing_bytes} are missing")
            _log.info(kv("Outdated item deleted to make room", what=what, missing_bytes=missing_bytes))
        reservation = Reservation(size_bytes)
        self._reservations.add(reservation)
        try:
            yield reservation
        finally:
            self._reservations.discard(reservation)

    def check(self, what: str) -> None:
        """Raise NoSpaceError once the disk is full but for what is kept: what takes more than it said must stop."""
        missing_bytes = -self._usage.available()
        if missing_bytes > 0:
            raise NoSpaceError(f"{what} takes more disk than it said, {missing_bytes} bytes are missing")

    def free_bytes(self) -> int:
        """What can be promised now."""
        free = self._usage.available()
        if self._limit_percent:
            free = min(free, int(self._usage.total() * self._limit_percent / 100) - self._usage.used())
        return free - sum(reservation.open_bytes for reservation in self._reservations)
