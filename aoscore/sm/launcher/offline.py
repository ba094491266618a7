"""How long the Unit has been without the cloud (sm.md §4.5). Pure: time comes in as arguments.

Wall-clock time is only used across restarts; while the process lives a monotonic clock counts, so that setting the
clock after a boot without battery does not look like years offline.
"""

from collections.abc import Mapping
from datetime import UTC, datetime

from aoscore.common.types import InstanceIdent

CM_LOSS_GRACE_S = 60.0
"""A CM that is away longer than this counts as "cloud not reached": it could not tell us (sm.md §12, D3)."""

# A start time before this comes from a clock that was not set.
_CLOCK_EPOCH = datetime(2024, 1, 1, tzinfo=UTC)


class OfflineClock:
    """Counts offline time. `since` is what must be stored to go on counting after a restart."""

    def __init__(self, since: datetime | None, wall: datetime, now_s: float) -> None:
        """The state at start, which counts as offline; `since` as stored, `now_s` from a monotonic clock."""
        known = since is not None and _CLOCK_EPOCH <= since <= wall
        self.since: datetime | None = since if since is not None and known else wall
        self._began_s: float | None = now_s - ((wall - since).total_seconds() if since is not None and known else 0.0)
        self._lost_s: float | None = None

    def cloud(self, connected: bool, wall: datetime, now_s: float) -> None:
        """CM told whether it has the cloud."""
        self._lost_s = None
        if connected:
            self.since = self._began_s = None
        elif self._began_s is None:
            self.since, self._began_s = wall, now_s

    def cm(self, connected: bool, now_s: float) -> None:
        """The link to CM came up or broke; after it came up CM tells about the cloud."""
        if connected:
            self._lost_s = None
        elif self._lost_s is None:
            self._lost_s = now_s

    def tick(self, wall: datetime, now_s: float) -> None:
        """Let the grace time of a lost CM run out."""
        if self._began_s is None and self._lost_s is not None and now_s >= self._lost_s + CM_LOSS_GRACE_S:
            self.since, self._began_s = wall, now_s

    def expired(self, ttls_s: Mapping[InstanceIdent, float], now_s: float) -> set[InstanceIdent]:
        """Instances whose allowed offline time is over. A time of 0 is unlimited."""
        if self._began_s is None:
            return set()
        return {ident for ident, ttl_s in ttls_s.items() if ttl_s > 0 and now_s >= self._began_s + ttl_s}

    def next_s(self, ttls_s: Mapping[InstanceIdent, float]) -> float | None:
        """When to look again, on the monotonic clock; None when nothing is pending."""
        if self._began_s is None:
            return None if self._lost_s is None else self._lost_s + CM_LOSS_GRACE_S
        limits = [ttl_s for ttl_s in ttls_s.values() if ttl_s > 0]
        return self._began_s + min(limits) if limits else None
