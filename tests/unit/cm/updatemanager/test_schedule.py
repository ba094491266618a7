"""When an update may start: rules, time of the week, time limit."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aoscore.cm.updatemanager.schedule import (
    Day,
    Kind,
    Place,
    Rule,
    Slot,
    Start,
    State,
    check,
    decide,
    kind_of,
    look_again_in,
    opens_in,
)
from aoscore.common.errors import InvalidArgumentError
from aoscore.common.types import Duration, ItemType

MONDAY = datetime(2026, 11, 23, tzinfo=UTC)
NIGHTS = Rule(
    type=Start.TIMETABLE,
    timetable=(Day(1, (Slot("01:00", "03:30"), Slot("23:00", "24:00"))), Day(4, (Slot("02:00:30", "02:01"),))),
)
FORCE, TRIGGER = Rule(), Rule(type=Start.TRIGGER)


def at(days: int = 0, **time: float) -> datetime:
    return MONDAY + timedelta(days=days, **time)


@pytest.mark.parametrize(
    ("now", "seconds"),
    [
        (at(), 3600),
        (at(hours=1), 0),
        (at(hours=3, minutes=29, seconds=59), 0),
        (at(hours=3, minutes=30), 19.5 * 3600),
        (at(hours=23, minutes=59), 0),
        (at(1), 2 * 86400 + 7230),
        (at(3, hours=2, seconds=30), 0),
        (at(3, hours=2, minutes=1), 4 * 86400 - 3660),
        (at(6, hours=23), 7200),
    ],
)
def test_a_timetable_opens_in_its_slots(now: datetime, seconds: float) -> None:
    assert opens_in(NIGHTS, now, triggered=False) == seconds


def test_force_opens_at_once_and_a_trigger_when_asked() -> None:
    assert opens_in(FORCE, at(), triggered=False) == 0
    assert opens_in(TRIGGER, at(), triggered=False) is None
    assert opens_in(TRIGGER, at(), triggered=True) == 0
    assert opens_in(NIGHTS, at(), triggered=True) == 0


@given(st.integers(0, 14 * 86400))
def test_the_time_told_is_the_time_it_opens(second: int) -> None:
    now = at(seconds=second)
    wait_s = opens_in(NIGHTS, now, triggered=False)
    assert wait_s is not None
    assert opens_in(NIGHTS, now + timedelta(seconds=wait_s), triggered=False) == 0
    if wait_s > 1:
        assert opens_in(NIGHTS, now + timedelta(seconds=wait_s - 1), triggered=False) == 1


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        ({"type": Start.TIMETABLE}, "timetable is empty"),
        ({"ttl": Duration(0)}, "ttl must be positive"),
        ({"timetable": (Day(0, (Slot("01:00", "02:00"),)),)}, "dayOfWeek must be 1"),
        ({"timetable": (Day(8, (Slot("01:00", "02:00"),)),)}, "dayOfWeek must be 1"),
        ({"timetable": (Day(1, ()),)}, "day 1 has no timeSlots"),
        ({"timetable": (Day(1, (Slot("1:00", "02:00"),)),)}, "'1:00' is no time of day"),
        ({"timetable": (Day(1, (Slot("01:00", "24:01"),)),)}, "'24:01' is no time of day"),
        ({"timetable": (Day(1, (Slot("02:00", "02:00"),)),)}, "does not end after its start"),
    ],
)
def test_wrong_rules_are_refused(rule: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidArgumentError, match=text):
        check(Rule(**rule))


def test_good_rules_are_taken() -> None:
    for rule in (FORCE, TRIGGER, NIGHTS):
        check(rule)


def test_each_kind_has_its_own_time() -> None:
    rules = {Kind.FOTA: NIGHTS, Kind.SOTA: FORCE}
    places = decide(rules, {kind: Place(at()) for kind in Kind}, at())
    assert {kind: place.state for kind, place in places.items()} == {Kind.FOTA: State.WAITING, Kind.SOTA: State.OPEN}
    assert look_again_in(rules, places, at()) == 3600
    assert decide(rules, places, at(hours=2))[Kind.FOTA].state is State.OPEN


def test_what_waits_too_long_is_given_up() -> None:
    rules = {Kind.FOTA: Rule(type=Start.TRIGGER, ttl=Duration(100))}
    places = {Kind.FOTA: Place(at())}
    assert look_again_in(rules, places, at(seconds=99)) == 1
    assert decide(rules, places, at(seconds=99)) == places
    assert decide(rules, places, at(-1)) == places  # the clock was set back
    given_up = decide(rules, places, at(seconds=100))
    assert given_up[Kind.FOTA].state is State.EXPIRED
    assert decide(rules, given_up, at(-1)) == given_up
    assert look_again_in(rules, given_up, at()) is None


def test_components_are_firmware() -> None:
    assert kind_of(ItemType.COMPONENT) is Kind.FOTA
    assert kind_of(ItemType.SERVICE) is Kind.SOTA
