"""A speed limit that several transfers share (cm-cloud.md §18). Pure."""

from __future__ import annotations

from typing import Final

BURST_S: Final = 1.0
"""Speed left unused is made up for, but not more than of this time."""


class SpeedLimit:
    """A bucket that fills with `bytes_per_s` and holds `BURST_S` of it.

    Who has taken something out waits until the bucket is no longer overdrawn. As the size of a piece is known only
    when it is there, it may be overdrawn; whoever comes next waits for that too, so that the sum keeps to the limit
    however many there are.
    """

    def __init__(self, bytes_per_s: int) -> None:
        self._bytes_per_s = bytes_per_s
        self._paid_until: float | None = None

    def take(self, size_bytes: int, now: float) -> float:
        """Takes what has been transferred at the time `now`, seconds; how long to pause before the next piece."""
        begin = now if self._paid_until is None else max(self._paid_until, now - BURST_S)
        self._paid_until = begin + size_bytes / self._bytes_per_s
        return max(0.0, self._paid_until - now)
