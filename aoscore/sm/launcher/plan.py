"""plan(situation) -> what to do next: the launcher's decision, free of I/O.

The launcher asks again after everything that happened, so each answer holds only steps that can be taken now, and
taking one twice is harmless. Rules:

* an image is installed before the instance that it replaces is stopped: what runs goes on until its successor is ready;
* stops come before changes of the stored set, these before starts, so a process that dies between two steps finds a
  set that is right;
* stops in ascending, installs and starts in descending priority;
* a step that failed is taken again when its pause is over (`resting`, `held`), for ever.
"""

from collections.abc import Iterable, Mapping, Set

import msgspec

from aoscore.common.types import InstanceIdent, InstanceInfo
from aoscore.sm.imagemanager.model import ItemKey, item_key


class Situation(msgspec.Struct, frozen=True):
    """All that the plan depends on.

    `instances`: the stored set; `changes`: what CM wants different (None = remove).
    `up`: instances that were started or adopted and not stopped since. `started`: those of them that run with their
    stored information. `expired`: stopped because the Unit was offline too long. `resting`: a start or stop failed
    and its pause is not over. `installed`: items ready for use; `held`: items being installed or pausing after a
    failure. `renewed`: instances whose image was replaced while they ran.
    """

    instances: Mapping[InstanceIdent, InstanceInfo]
    changes: Mapping[InstanceIdent, InstanceInfo | None] = {}
    up: Set[InstanceIdent] = frozenset()
    started: Set[InstanceIdent] = frozenset()
    expired: Set[InstanceIdent] = frozenset()
    resting: Set[InstanceIdent] = frozenset()
    installed: Set[ItemKey] = frozenset()
    held: Set[ItemKey] = frozenset()
    renewed: Set[InstanceIdent] = frozenset()


class Plan(msgspec.Struct, frozen=True):
    """Next steps. Installs run beside the rest; of the others only the first kind that is not empty is filled."""

    install: tuple[ItemKey, ...] = ()
    stop: tuple[InstanceIdent, ...] = ()
    apply: Mapping[InstanceIdent, InstanceInfo | None] = {}
    start: tuple[InstanceInfo, ...] = ()
    remove_items: tuple[ItemKey, ...] = ()


def desired(situation: Situation) -> dict[InstanceIdent, InstanceInfo]:
    """The set that CM wants."""
    result = {**situation.instances, **situation.changes}
    return {ident: info for ident, info in result.items() if info is not None}


def plan(situation: Situation) -> Plan:
    """The next steps from the present to the desired set; see the module text for the rules."""
    instances, changes = situation.instances, situation.changes
    wanted = desired(situation)
    # A change can be made when nothing has to be fetched for it.
    ready = {
        ident: info
        for ident, info in changes.items()
        if ident not in situation.resting and (info is None or item_key(info) in situation.installed)
    }
    items = dict.fromkeys(item_key(info) for info in _urgent_first(wanted.values()))
    steps = Plan(install=tuple(key for key in items if key not in situation.installed and key not in situation.held))

    stop = [
        ident
        for ident in situation.up
        if ident not in situation.resting
        and (
            (ident not in instances and ident not in ready)
            or (ident in ready and ready[ident] != instances.get(ident))
            or ident in situation.expired
            or ident in situation.renewed
        )
    ]
    if stop:
        stop.sort(key=lambda ident: (priority(instances.get(ident)), ident))
        return msgspec.structs.replace(steps, stop=tuple(stop))
    if ready:
        return msgspec.structs.replace(steps, apply=ready)
    start = [
        info
        for ident, info in instances.items()
        if ident not in situation.started
        and ident not in situation.expired
        and ident not in situation.resting
        and item_key(info) in situation.installed
    ]
    if start:
        return msgspec.structs.replace(steps, start=tuple(_urgent_first(start)))
    used = {item_key(info) for info in (*instances.values(), *wanted.values())}
    return msgspec.structs.replace(steps, remove_items=tuple(sorted(situation.installed - used - situation.held)))


def priority(info: InstanceInfo | None) -> int:
    """In what order instances end, lowest first; what is not known any more ends before all else."""
    return info.priority if info else -1


def _urgent_first(infos: Iterable[InstanceInfo]) -> list[InstanceInfo]:
    return sorted(infos, key=lambda info: (-info.priority, info.ident))
