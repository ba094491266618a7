"""Disk space is reserved before it is used (cm-cloud.md §7, §18)."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Final

from aoscore.common.errors import NoSpaceError
from aoscore.common.files import available_bytes

SPARE_BYTES: Final = 8 * 1024 * 1024
"""Left free for the database and the logs, which must go on when the disk is full of images."""


class Reservation:
    """Space that a file is going to take; shrinks while the file grows."""

    def __init__(self, device: int, size_bytes: int, written_bytes: int) -> None:
        self.device = device
        self._size_bytes = size_bytes
        self._written_bytes = written_bytes

    @property
    def outstanding_bytes(self) -> int:
        """What has not been written yet, and so still looks free to the file system."""
        return max(0, self._size_bytes - self._written_bytes)

    def written(self, written_bytes: int) -> None:
        """The file has this size now."""
        self._written_bytes = written_bytes


class Space:
    """Free space of the partitions that images use.

    `evict(path, bytes)` is asked to free at least so much on the partition of `path`; it frees what it can.
    """

    def __init__(
        self,
        evict: Callable[[Path, int], Awaitable[None]],
        *,
        available: Callable[[Path], int] = available_bytes,
        spare_bytes: int = SPARE_BYTES,
    ) -> None:
        self._evict = evict
        self._available = available
        self._spare_bytes = spare_bytes
        self._reservations: set[Reservation] = set()

    def _free(self, directory: Path) -> int:
        device = directory.stat().st_dev
        outstanding = sum(entry.outstanding_bytes for entry in self._reservations if entry.device == device)
        return self._available(directory) - outstanding - self._spare_bytes

    async def ensure(self, directory: Path, size_bytes: int, *, written_bytes: int = 0) -> Reservation:
        """Reserves space in `directory` for a file of which a part may be there already.

        Raises NoSpaceError, naming directory and sizes, when the space is not there even after eviction.
        """
        needed = size_bytes - written_bytes
        if self._free(directory) < needed:
            await self._evict(directory, needed - self._free(directory))
        free = self._free(directory)
        if free < needed:
            raise NoSpaceError(f"{needed} bytes needed in {directory}, only {max(free, 0)} are free")
        reservation = Reservation(directory.stat().st_dev, size_bytes, written_bytes)
        self._reservations.add(reservation)
        return reservation

    @contextlib.contextmanager
    def held(self, reservation: Reservation) -> Iterator[Reservation]:
        """Holds a reservation for the length of the block."""
        try:
            yield reservation
        finally:
            self._reservations.discard(reservation)
