"""Streams over two vchans, whose library is played: short reads and writes, back-pressure, ends."""

import asyncio
import os
import random

import pytest

from aoscore.mp.communication.vchans import open_streams
from tests.support.running import until


class MemoryRing:
    """One end of a vchan in memory; never more than a random part of what could be moved is."""

    def __init__(self, size: int, rng: random.Random) -> None:
        self.size = size
        self.rng = rng
        self.data = bytearray()
        self.event = os.eventfd(0, os.EFD_NONBLOCK)
        self.is_over = False
        self.has_peer = True
        self.other = self

    def fileno(self) -> int:
        return self.event

    def wait(self) -> None:
        os.eventfd_read(self.event)

    def _tell(self) -> None:
        os.eventfd_write(self.other.event, 1)

    def read(self, size: int) -> bytes | None:
        """Of what the other end wrote."""
        if not self.data:
            return None if self.is_over else b""
        count = self.rng.randint(1, min(size, len(self.data)))
        taken = bytes(self.data[:count])
        del self.data[:count]
        self._tell()
        return taken

    def write(self, data: memoryview) -> int:
        if self.is_over:
            raise BrokenPipeError("the other end of the vchan is gone")
        room = min(len(data), self.size - len(self.other.data))
        if room == 0:
            return 0
        count = self.rng.randint(1, room)
        self.other.data += data[:count]
        self._tell()
        return count

    def close(self) -> None:
        self.other.is_over = True
        self._tell()


def pair(size: int, seed: int) -> tuple[MemoryRing, MemoryRing]:
    one, other = (MemoryRing(size, random.Random(seed + number)) for number in range(2))
    one.other, other.other = other, one
    return one, other


@pytest.mark.parametrize(("size", "seed"), [(1, 1), (1024, 2), (65536, 3)])
async def test_bytes_come_as_they_were_sent(size: int, seed: int) -> None:
    left_out, right_in = pair(size, seed)
    right_out, left_in = pair(size, seed + 10)
    left, (left_reader, left_writer) = open_streams(left_in, left_out)
    right, (right_reader, right_writer) = open_streams(right_in, right_out)
    data = os.urandom(size * 40)
    left_writer.write(data)
    right_writer.write(data[::-1])
    assert await right_reader.readexactly(len(data)) == data
    assert await left_reader.readexactly(len(data)) == data[::-1]
    assert left.get_write_buffer_size() == 0
    left.abort()
    right.abort()


async def test_writer_waits_for_room() -> None:
    out, far_in = pair(1024, 5)
    transport, (_, writer) = open_streams(pair(1024, 6)[0], out)
    writer.write(bytes(100_000))
    draining = asyncio.create_task(writer.drain())
    await asyncio.sleep(0.05)
    assert not draining.done()
    taken = 0
    while taken < 100_000:
        taken += len(far_in.read(65536) or b"")
        await asyncio.sleep(0)
    await draining
    assert transport.get_write_buffer_size() == 0
    transport.abort()


async def test_reader_that_is_full_takes_no_more() -> None:
    far_out, near_in = pair(65536, 7)
    transport, (reader, writer) = open_streams(near_in, pair(1024, 8)[0])
    sent = 0
    for _ in range(3000):
        sent += far_out.write(memoryview(bytes(65536)))
        await asyncio.sleep(0)
    # Twice the limit of the reader, and what is in the ring.
    assert sent < 700_000
    far_out.close()
    assert await reader.read(-1) == bytes(sent)
    await until(transport.is_closing)
    assert writer.transport is transport


async def test_end_of_the_other_side() -> None:
    far_out, near_in = pair(1024, 9)
    out, far_in = pair(1024, 10)
    transport, (reader, writer) = open_streams(near_in, out)
    far_out.write(memoryview(b"x"))
    far_in.close()
    assert await reader.read(-1) == b"x"
    assert transport.is_closing()
    writer.write(b"into the void")
    with pytest.raises(ConnectionResetError):
        await writer.drain()
        await writer.drain()
