"""Which channel sends the next frame. Pure."""

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

PATIENCE_TURNS = 32
"""A channel that was passed over so often goes next: urgent traffic without end must not stop a download for good."""


class Burst(NamedTuple):
    """Frames of one channel that are sent in one go, and how many they are."""

    port: int
    frames: bytes
    number: int


class Scheduler:
    """Frames that wait to be sent, in order within a channel.

    `order` are the ports, most urgent first. One burst per turn: the most urgent channel goes, so that a bulk transfer
    delays it by one burst at most; nothing in the queue of another channel ever stands before it.
    """

    def __init__(self, order: Sequence[int]) -> None:
        self._queues: dict[int, deque[Burst]] = {port: deque() for port in order}
        self._bytes = dict.fromkeys(order, 0)
        self._passed = dict.fromkeys(order, 0)

    def push(self, port: int, frames: bytes, count: int) -> None:
        """Queue frames of a channel that may be sent in one go, `count` of them."""
        self._queues[port].append(Burst(port, frames, count))
        self._bytes[port] += len(frames)

    def pop(self) -> Burst | None:
        """What to send now, None when nothing waits."""
        waiting = [port for port, queue in self._queues.items() if queue]
        if not waiting:
            return None
        chosen = waiting[0]
        if len(waiting) > 1:
            chosen = next((port for port in waiting if self._passed[port] >= PATIENCE_TURNS), chosen)
            for port in waiting:
                self._passed[port] += 1
        self._passed[chosen] = 0
        burst = self._queues[chosen].popleft()
        self._bytes[chosen] -= len(burst.frames)
        return burst

    def drop(self, port: int) -> None:
        """Forget what waits of a channel."""
        self._queues[port].clear()
        self._bytes[port] = 0
        self._passed[port] = 0

    def pending_bytes(self, port: int) -> int:
        """What waits of a channel."""
        return self._bytes[port]
