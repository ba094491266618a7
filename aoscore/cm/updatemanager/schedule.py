"""When an update may start: rules of the Unit's maker, for firmware and for software (cm-cloud.md §16). Pure.

Firmware (FOTA) is what runs as a component, software (SOTA) all the rest: services, unit config, states of nodes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime, time, timedelta
from enum import StrEnum
from typing import Final

import msgspec

from aoscore.common.errors import InvalidArgumentError
from aoscore.common.types import Duration, ItemType

_DAY_S: Final = 86_400
_TIME: Final = re.compile(r"([01]\d|2[0-3]):[0-5]\d(:[0-5]\d)?|24:00(:00)?")


class Kind(StrEnum):
    """The two kinds of update."""

    FOTA = "fota"
    SOTA = "sota"


ALL: Final = frozenset(Kind)


def kind_of(item_type: ItemType) -> Kind:
    """The kind that an item belongs to."""
    return Kind.FOTA if item_type is ItemType.COMPONENT else Kind.SOTA


class Start(StrEnum):
    """What starts an update that is downloaded."""

    FORCE = "force"
    """Nothing more, as in AosCore 9.1."""
    TRIGGER = "trigger"
    """A call of the update scheduler's interface."""
    TIMETABLE = "timetable"
    """The time of the week."""


class Slot(msgspec.Struct, frozen=True, rename="camel"):
    """Part of a day, local time: "HH:MM" or "HH:MM:SS", the end not included; "24:00" is the end of the day."""

    start: str
    end: str


class Day(msgspec.Struct, frozen=True, rename="camel"):
    """Slots of one day of the week, 1 = Monday to 7 = Sunday."""

    day_of_week: int
    time_slots: tuple[Slot, ...]


class Rule(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """When updates of one kind may start; after `ttl` of waiting an update is given up."""

    type: Start = Start.FORCE
    ttl: Duration = Duration(30 * _DAY_S)
    timetable: tuple[Day, ...] = ()


def check(rule: Rule) -> None:
    """Raises InvalidArgumentError that says what is wrong with a rule."""
    if rule.type is Start.TIMETABLE and not rule.timetable:
        raise InvalidArgumentError("timetable is empty, so no update would ever start")
    if rule.ttl <= 0:
        raise InvalidArgumentError("ttl must be positive")
    for day in rule.timetable:
        if not 1 <= day.day_of_week <= 7:
            raise InvalidArgumentError(f"dayOfWeek must be 1 (Monday) to 7 (Sunday), not {day.day_of_week}")
        if not day.time_slots:
            raise InvalidArgumentError(f"day {day.day_of_week} has no timeSlots")
        for slot in day.time_slots:
            for text in (slot.start, slot.end):
                if not _TIME.fullmatch(text):
                    raise InvalidArgumentError(f"{text!r} is no time of day, write HH:MM")
            if _seconds(slot.start) >= _seconds(slot.end):
                raise InvalidArgumentError(f"slot {slot.start} to {slot.end} does not end after its start")


def _seconds(text: str) -> int:
    hours, minutes, *seconds = map(int, text.split(":"))
    return hours * 3600 + minutes * 60 + sum(seconds)


def opens_in(rule: Rule, now: datetime, *, triggered: bool) -> float | None:
    """Seconds until an update may start; 0 when it may now, None when that can't be told.

    `now` is local time. A start that was asked for counts whatever the rule is: it is what the user wants.
    """
    if rule.type is Start.FORCE or triggered:
        return 0.0
    if rule.type is Start.TRIGGER:
        return None
    starts = []
    midnight = datetime.combine(now.date(), time(), now.tzinfo)
    for days in range(8):
        date = midnight + timedelta(days=days)
        for day in rule.timetable:
            if day.day_of_week != date.isoweekday():
                continue
            for slot in day.time_slots:
                begin, end = (date + timedelta(seconds=_seconds(text)) for text in (slot.start, slot.end))
                if begin <= now < end:
                    return 0.0
                if begin > now:
                    starts.append((begin - now).total_seconds())
    return min(starts) if starts else None


class State(StrEnum):
    """Where one kind of an update is at the gate."""

    WAITING = "waiting"
    OPEN = "open"
    """May be updated."""
    EXPIRED = "expired"
    """Has waited too long and is given up."""


class Place(msgspec.Struct, frozen=True):
    """One kind of a downloaded update at the gate: since when, and whether a start was asked for."""

    since: datetime
    triggered: bool = False
    state: State = State.WAITING


def decide(rules: Mapping[Kind, Rule], places: Mapping[Kind, Place], now: datetime) -> dict[Kind, Place]:
    """The places after a look at the clock, `now` in local time: of those that wait, some open and some expire."""
    return {kind: _decide(rules[kind], place, now) for kind, place in places.items()}


def _decide(rule: Rule, place: Place, now: datetime) -> Place:
    if place.state is not State.WAITING:
        return place
    if opens_in(rule, now, triggered=place.triggered) == 0.0:
        return msgspec.structs.replace(place, state=State.OPEN)
    if _left_s(rule, place, now) <= 0:
        return msgspec.structs.replace(place, state=State.EXPIRED)
    return place


def look_again_in(rules: Mapping[Kind, Rule], places: Mapping[Kind, Place], now: datetime) -> float | None:
    """Seconds until the clock changes something for one that waits."""
    times: list[float] = []
    for kind, place in places.items():
        if place.state is State.WAITING:
            due_s = opens_in(rules[kind], now, triggered=place.triggered)
            times += [_left_s(rules[kind], place, now), *([due_s] if due_s is not None else [])]
    return min(times) if times else None


def _left_s(rule: Rule, place: Place, now: datetime) -> float:
    return rule.ttl - max(0.0, (now - place.since).total_seconds())
