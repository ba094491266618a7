"""Pauses after failures."""

from aoscore.common.aio import Backoff
from aoscore.sm.launcher.retries import Retries


def retries() -> Retries[str]:
    return Retries(lambda: Backoff(1.0, 4.0, jitter=0.0))


def test_pauses_grow_to_a_limit_and_never_end() -> None:
    some = retries()
    assert [some.failed("a", 0.0) for _ in range(5)] == [1.0, 2.0, 4.0, 4.0, 4.0]
    assert some.resting(3.9) == {"a"}
    assert some.resting(4.0) == set()
    assert some.next_s(0.0) == 4.0
    assert some.next_s(4.0) is None


def test_success_begins_anew() -> None:
    some = retries()
    some.failed("a", 0.0)
    some.failed("a", 0.0)
    some.forget(["a", "unknown"])
    assert some.resting(0.0) == set()
    assert some.failed("a", 0.0) == 1.0


def test_hurry_tries_at_once_but_keeps_the_length() -> None:
    some = retries()
    some.failed("a", 10.0)
    some.hurry()
    assert some.resting(10.0) == set()
    assert some.failed("a", 10.0) == 2.0
