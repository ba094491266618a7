"""Reservations of disk space."""

import pytest

from aoscore.common.errors import NoSpaceError
from aoscore.sm.imagemanager.space import Space, Usage, kept_bytes


class Disk:
    """A disk of 1000 bytes with outdated items of 100 bytes."""

    def __init__(self, free: int, outdated: int = 0) -> None:
        self.free, self.outdated, self.used = free, outdated, 0
        self.usage = Usage(lambda: self.free, lambda: 1000, lambda: self.used)

    async def evict(self) -> bool:
        if not self.outdated:
            return False
        self.outdated -= 1
        self.free += 100
        self.used -= 100
        return True


async def test_reservations_add_up_and_end() -> None:
    disk = Disk(free=300)
    space = Space(disk.usage, 0, disk.evict)
    async with space.reserve(200, "a"):
        assert space.free_bytes() == 100
        with pytest.raises(NoSpaceError, match=r"b needs 101 bytes of disk, 1 are missing"):
            async with space.reserve(101, "b"):
                pass
    assert space.free_bytes() == 300


async def test_written_bytes_are_not_counted_twice() -> None:
    disk = Disk(free=300)
    space = Space(disk.usage, 0, disk.evict)
    async with space.reserve(200, "a") as reservation:
        disk.free -= 150
        reservation.written(150)
        assert space.free_bytes() == 100
        reservation.written(1000)
        assert space.free_bytes() == 150


async def test_outdated_items_make_room() -> None:
    disk = Disk(free=50, outdated=5)
    space = Space(disk.usage, 0, disk.evict)
    async with space.reserve(200, "a"):
        assert disk.outdated == 3
    with pytest.raises(NoSpaceError):
        async with space.reserve(1000, "b"):
            pass


async def test_share_of_the_disk() -> None:
    disk = Disk(free=900, outdated=1)
    disk.used = 150
    space = Space(disk.usage, 20, disk.evict)
    assert space.free_bytes() == 50
    async with space.reserve(120, "a"):
        assert disk.outdated == 0


async def test_what_takes_more_than_it_said_is_stopped() -> None:
    disk = Disk(free=300)
    space = Space(disk.usage, 0, disk.evict)
    async with space.reserve(200, "a"):
        disk.free = 0
        space.check("a")
        # Below what is kept for others.
        disk.free = -5
        with pytest.raises(NoSpaceError, match=r"a takes more disk than it said, 5 bytes are missing"):
            space.check("a")


def test_a_part_of_the_disk_is_left_to_others() -> None:
    assert (kept_bytes(100 << 20), kept_bytes(64 << 30)) == (5 << 20, 64 << 20)
