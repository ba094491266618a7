"""decide(what is found) -> what to do: where a boot update stands when SM starts. Pure.

    phase      runs from   what it means                                        action
    writing    old         the image was cut off                                DROP
    written    old         ready; BootNext may or may not be set                TRY
    trial      old, same boot as the request: the reboot is to come             TRY
    trial      old, another boot: the new one did not come up                   FAILED
    written,
    trial      new         it came up, on trial                                 CHECK
    confirmed  new         it is well; taking it over was cut off               FINISH
    confirmed  old         the same, and the firmware does not know it yet      SWITCH, FAILED after some reboots
    failed     new         the old one comes with the next boot                 BACK, STUCK after some reboots
    failed     old         report, make both partitions equal                   FAILED

Nothing is confirmed before the health check, and each boot of a new version is tried once (sm-runtime.md §7, D33).
"""

from enum import StrEnum

import msgspec

MAX_REBOOTS = 3
"""Boots that came up with the wrong version, after which no more are asked for."""


class Phase(StrEnum):
    """Where an update stands; written before what comes next is done."""

    WRITING = "writing"
    WRITTEN = "written"
    TRIAL = "trial"
    CONFIRMED = "confirmed"
    FAILED = "failed"


class Action(StrEnum):
    """What SM does about it."""

    DROP = "drop"
    """Make both partitions equal; the launcher begins anew if CM still wants it."""
    TRY = "try"
    """Name the new one in BootNext, ask for a reboot."""
    CHECK = "check"
    """Check the health, then confirm or go back."""
    SWITCH = "switch"
    """Put the new one first in BootOrder, ask for a reboot."""
    FINISH = "finish"
    """Put the new one first in BootOrder, copy it over the old one."""
    BACK = "back"
    """Name the old one in BootNext, ask for a reboot."""
    STUCK = "stuck"
    """Report; the firmware does not go back."""
    FAILED = "failed"
    """Report, then make both partitions equal."""


class Decision(msgspec.Struct, frozen=True):
    """An action, and what failed."""

    action: Action
    reason: str = ""


def decide(phase: Phase, *, runs_new: bool, is_installed: bool, same_boot: bool, reboots: int, error: str) -> Decision:
    """See the module text.

    `is_installed`: the new version is already recorded as installed, which comes after the copying. `reboots`: boots
    without effect since SM asked for one. `error`: as stored with the phase.
    """
    if phase is Phase.CONFIRMED:
        if runs_new or is_installed:
            return Decision(Action.FINISH)
        if reboots < MAX_REBOOTS:
            return Decision(Action.SWITCH)
        return Decision(Action.FAILED, "confirmed, but the node comes up from the old boot partition")
    if phase is Phase.FAILED:
        if not runs_new:
            return Decision(Action.FAILED, error)
        return Decision(Action.BACK if reboots < MAX_REBOOTS else Action.STUCK, error)
    if phase is Phase.WRITING:
        return Decision(Action.BACK, "half of it was booted") if runs_new else Decision(Action.DROP)
    if runs_new:
        return Decision(Action.CHECK)
    if phase is Phase.WRITTEN or same_boot:
        return Decision(Action.TRY)
    return Decision(Action.FAILED, "the node came up from the old boot partition")
