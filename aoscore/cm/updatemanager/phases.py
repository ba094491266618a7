"""The phases of an update run (cm-cloud.md §3.1). Pure.

    none ─► downloading ─► pending ─► installing ─► launching ─► activating ─► finalizing ─► none
                ▲                                       ▲            │
                │ another desired status, in any phase  └────────────┘ a new version does not become active:
                                                                       its predecessor is launched again

The phase is stored before its step runs, and each step may be run twice: after a restart the run goes on with the step
of the stored phase. A newer desired status breaks a step off wherever it is, which is the same to it as a restart.
The words are those of AosCore 9.1.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final


class Phase(StrEnum):
    """Where an update run is."""

    NONE = "none"
    DOWNLOADING = "downloading"
    PENDING = "pending"
    INSTALLING = "installing"
    LAUNCHING = "launching"
    ACTIVATING = "activating"
    FINALIZING = "finalizing"


class Outcome(StrEnum):
    """What became of a step."""

    DONE = "done"
    GO_BACK = "go back"
    """Some new versions do not work; they are marked failed."""


_NEXT: Final = {
    Phase.DOWNLOADING: Phase.PENDING,
    Phase.PENDING: Phase.INSTALLING,
    Phase.INSTALLING: Phase.LAUNCHING,
    Phase.LAUNCHING: Phase.ACTIVATING,
    Phase.ACTIVATING: Phase.FINALIZING,
    Phase.FINALIZING: Phase.NONE,
}


def next_phase(phase: Phase, outcome: Outcome) -> Phase:
    """The phase after a step."""
    if outcome is Outcome.GO_BACK:
        return Phase.LAUNCHING
    return _NEXT[phase]
