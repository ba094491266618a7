"""Pauses after failures: growing, capped, never giving up. Pure."""

from collections.abc import Callable, Hashable, Iterable
from typing import Generic, TypeVar

from aoscore.common.aio import Backoff

K = TypeVar("K", bound=Hashable)


class Retries(Generic[K]):
    """Remembers what failed and when it may be tried again."""

    def __init__(self, backoff: Callable[[], Backoff]) -> None:
        self._new_backoff = backoff
        self._entries: dict[K, tuple[Backoff, float]] = {}

    def __contains__(self, key: K) -> bool:
        """Whether it has failed last."""
        return key in self._entries

    def failed(self, key: K, now_s: float) -> float:
        """Note a failure; returns the pause that follows, seconds."""
        backoff = self._entries[key][0] if key in self._entries else self._new_backoff()
        pause_s = backoff.next()
        self._entries[key] = (backoff, now_s + pause_s)
        return pause_s

    def forget(self, keys: Iterable[K]) -> None:
        """A success, or a reason to try at once and to begin with the shortest pause."""
        for key in list(keys):
            self._entries.pop(key, None)

    def hurry(self) -> None:
        """Try everything at once, keeping the lengths of later pauses."""
        self._entries = {key: (backoff, 0.0) for key, (backoff, _) in self._entries.items()}

    def resting(self, now_s: float) -> set[K]:
        """What must not be tried yet."""
        return {key for key, (_, until_s) in self._entries.items() if until_s > now_s}

    def next_s(self, now_s: float) -> float | None:
        """When the first of the pauses ends that had not ended at `now_s`; None when there is none."""
        return min((until_s for _, until_s in self._entries.values() if until_s > now_s), default=None)
