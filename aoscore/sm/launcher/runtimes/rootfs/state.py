"""decide(what is found) -> what to do: how SM reads the files that it shares with the initramfs. Pure.

The files are the contract of sm-runtime.md §3.3; what they say together, at the start of SM (``x``: is there):

    failed  pending  updated  do_apply  do_update
      x        ?        x        ?         ?        the trial went wrong and is not reverted yet   REVERT
      x        x                 x         ?        the initramfs could not apply, it tries again  REBOOT
      x        x                           ?        it went wrong and the old root runs            FAILED
      x                                             leftovers                                      CLEAN
               ?        x                  ?        the new root runs from its image, on trial     CHECK
               x        ?        x         ?        confirmed, the reboot that applies is due      REBOOT
               x                           x        prepared, the reboot that tries is due         REBOOT
               x                                    applied if it was confirmed, else cut off      INSTALLED, CLEAN
                                 ?         ?        nobody's                                       CLEAN

`failed` always wins (sm-runtime.md §7, D32). Nothing counts as tried or installed unless the version file of the
running system says so. A reboot that changed nothing is asked for again, a few times.
"""

from enum import StrEnum

import msgspec

MAX_REBOOTS = 3
"""Boots without effect after which an update is given up."""


class Found(msgspec.Struct, frozen=True):
    """What there is when SM starts."""

    running: str
    """Version of the running system."""
    pending: str | None = None
    """Version of the pending record, None without one."""
    confirmed: bool = False
    """SM found the trial good and asked for `do_apply`."""
    reboots: int = 0
    """Boots since the last request that left everything as it was."""
    failed: str | None = None
    """Content of the file, None without it."""
    updated: bool = False
    do_apply: bool = False
    do_update: bool = False


class Action(StrEnum):
    """What SM does about it."""

    CLEAN = "clean"
    """Nothing is under way: delete leftovers. An update that was cut off is begun anew by the launcher."""
    REBOOT = "reboot"
    """The update goes on with the next boot: ask for it."""
    CHECK = "check"
    """Trial: check the health, then confirm or refuse."""
    REFUSE = "refuse"
    """Trial of something that must not be kept: tell the initramfs, ask for a reboot."""
    REVERT = "revert"
    """It failed: report; the old root comes with the next boot, ask for it."""
    FAILED = "failed"
    """It failed and the old root runs: report and clean."""
    STUCK = "stuck"
    """It failed, and rebooting does not bring the old root back: report, leave the files to the initramfs."""
    INSTALLED = "installed"
    """The pending version is the installed one now."""


class Decision(msgspec.Struct, frozen=True):
    """An action, and what failed."""

    action: Action
    reason: str = ""


def decide(found: Found) -> Decision:
    """See the module text."""
    again = found.reboots < MAX_REBOOTS
    if found.failed is not None:
        reason = found.failed or "the initramfs gave no reason"
        if found.updated:
            return Decision(Action.REVERT if again else Action.STUCK, reason)
        if found.pending is None:
            return Decision(Action.CLEAN)
        return Decision(Action.REBOOT if found.do_apply and again else Action.FAILED, reason)
    if found.pending is None:
        return Decision(Action.REFUSE, "there is no record of this update") if found.updated else Decision(Action.CLEAN)
    if found.updated and found.running != found.pending:
        return Decision(Action.REFUSE, f"the image of version {found.pending} holds {found.running}")
    if found.updated and not found.do_apply:
        return Decision(Action.CHECK)
    if found.do_apply or found.do_update:
        if again:
            return Decision(Action.REBOOT)
        what = "applied" if found.do_apply else "tried"
        return Decision(
            Action.REFUSE if found.updated else Action.FAILED, f"not {what} by the initramfs in {found.reboots} boots"
        )
    if not found.confirmed:
        return Decision(Action.CLEAN)
    if found.running != found.pending:
        return Decision(Action.FAILED, f"version {found.pending} was applied, but {found.running} runs")
    return Decision(Action.INSTALLED)
