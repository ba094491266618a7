"""The offline clock: stored start, clock steps, grace time of a lost CM."""

from datetime import UTC, datetime, timedelta

from aoscore.common.types import InstanceIdent
from aoscore.sm.launcher.offline import CM_LOSS_GRACE_S, OfflineClock

NOW = datetime(2026, 5, 1, tzinfo=UTC)
A, B = InstanceIdent("a", "s", 0), InstanceIdent("b", "s", 0)
TTLS = {A: 30.0, B: 0.0}


def test_start_counts_as_offline() -> None:
    clock = OfflineClock(None, NOW, 100.0)
    assert clock.since == NOW
    assert clock.expired(TTLS, 129.0) == set()
    assert clock.expired(TTLS, 130.0) == {A}
    assert clock.next_s(TTLS) == 130.0


def test_time_before_a_restart_counts() -> None:
    clock = OfflineClock(NOW - timedelta(seconds=20), NOW, 100.0)
    assert clock.next_s(TTLS) == 110.0
    assert clock.since == NOW - timedelta(seconds=20)


def test_clock_that_was_not_set_does_not_look_like_years_offline() -> None:
    assert OfflineClock(datetime(1970, 1, 2, tzinfo=UTC), NOW, 100.0).expired(TTLS, 100.0) == set()
    assert OfflineClock(NOW + timedelta(days=1), NOW, 100.0).expired(TTLS, 100.0) == set()


def test_cloud_connected_forgets() -> None:
    clock = OfflineClock(NOW, NOW, 100.0)
    clock.cloud(True, NOW, 105.0)
    assert clock.since is None
    assert clock.next_s(TTLS) is None
    assert clock.expired(TTLS, 1000.0) == set()
    clock.cloud(False, NOW, 200.0)
    clock.cloud(False, NOW, 210.0)
    assert clock.next_s(TTLS) == 230.0


def test_lost_cm_counts_after_its_grace_time() -> None:
    clock = OfflineClock(None, NOW, 0.0)
    clock.cloud(True, NOW, 1.0)
    clock.cm(False, 100.0)
    clock.cm(False, 130.0)
    assert clock.next_s(TTLS) == 100.0 + CM_LOSS_GRACE_S
    clock.tick(NOW, 159.0)
    assert clock.since is None
    clock.tick(NOW, 160.0)
    assert clock.since == NOW
    assert clock.next_s(TTLS) == 190.0


def test_short_break_of_cm_does_not_count() -> None:
    clock = OfflineClock(None, NOW, 0.0)
    clock.cloud(True, NOW, 1.0)
    clock.cm(False, 100.0)
    clock.cm(True, 120.0)
    clock.tick(NOW, 500.0)
    assert clock.since is None
