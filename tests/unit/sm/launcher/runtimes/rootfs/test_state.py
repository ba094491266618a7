"""The table of files: every combination."""

import itertools

import pytest

from aoscore.sm.launcher.runtimes.rootfs.state import MAX_REBOOTS, Action, Found, decide

FLAGS = ("failed", "pending", "updated", "do_apply", "do_update")
# x: there, -: absent, ?: either; the first row that fits counts. The running version is the pending one.
TABLE = [
    ("x ? x ? ?", Action.REVERT),
    ("x - - ? ?", Action.CLEAN),
    ("x x - x ?", Action.REBOOT),
    ("x x - - ?", Action.FAILED),
    ("- - x ? ?", Action.REFUSE),
    ("- - - ? ?", Action.CLEAN),
    ("- x x - ?", Action.CHECK),
    ("- x ? x ?", Action.REBOOT),
    ("- x - - x", Action.REBOOT),
    ("- x - - -", Action.CLEAN),
]
COMBINATIONS = list(itertools.product((False, True), repeat=len(FLAGS)))


def found(flags: tuple[bool, ...], *, running: str = "2", confirmed: bool = False, reboots: int = 0) -> Found:
    there = dict(zip(FLAGS, flags, strict=True))
    return Found(
        running=running,
        pending="2" if there.pop("pending") else None,
        confirmed=confirmed,
        reboots=reboots,
        failed="why" if there.pop("failed") else None,
        **there,
    )


def expected(flags: tuple[bool, ...]) -> Action:
    for pattern, action in TABLE:
        if all(mark in ("?", "x" if flag else "-") for mark, flag in zip(pattern.split(), flags, strict=True)):
            return action
    raise AssertionError(f"no row for {flags}")


@pytest.mark.parametrize("flags", COMBINATIONS)
def test_every_combination_of_files(flags: tuple[bool, ...]) -> None:
    assert decide(found(flags)).action is expected(flags)
    confirmed = decide(found(flags, confirmed=True)).action
    only_pending = flags == (False, True, False, False, False)
    assert confirmed is (Action.INSTALLED if only_pending else expected(flags))


EVERYTHING = [
    found(flags, running=running, confirmed=confirmed, reboots=reboots)
    for flags in COMBINATIONS
    for running in ("1", "2")
    for confirmed in (False, True)
    for reboots in (0, MAX_REBOOTS - 1, MAX_REBOOTS, 100)
]


def test_rules_that_hold_always() -> None:
    for situation in EVERYTHING:
        check_rules(situation)


def check_rules(situation: Found) -> None:
    decision = decide(situation)
    if situation.failed is not None:
        assert decision.action not in (Action.CHECK, Action.INSTALLED, Action.REFUSE)
        assert decision.reason == "why" or situation.pending is None
    if decision.action is Action.INSTALLED:
        assert situation.confirmed and situation.running == situation.pending
    if decision.action is Action.CHECK:
        assert situation.updated and situation.running == situation.pending
    if situation.reboots >= MAX_REBOOTS:
        assert decision.action not in (Action.REBOOT, Action.REVERT)
    if decision.action in (Action.FAILED, Action.REFUSE, Action.STUCK):
        assert decision.reason
    if decision.action in (Action.CLEAN, Action.FAILED):
        # Deleting the files of a trial would leave its system without a way back.
        assert not situation.updated


def test_reasons_name_what_was_found() -> None:
    trial = Found(running="1.5", pending="2.0", updated=True)
    assert decide(trial).reason == "the image of version 2.0 holds 1.5"
    never = Found(running="1.0", pending="2.0", do_update=True, reboots=MAX_REBOOTS)
    assert decide(never).reason == "not tried by the initramfs in 3 boots"
    assert decide(Found(running="2.0", pending="2.0", updated=True, do_apply=True, reboots=3)).action is Action.REFUSE
    other = Found(running="1.0", pending="2.0", confirmed=True)
    assert decide(other).reason == "version 2.0 was applied, but 1.0 runs"
    assert decide(Found(running="1.0", pending="2.0", failed="")).reason == "the initramfs gave no reason"
