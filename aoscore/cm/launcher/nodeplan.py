"""What to tell one node so that it runs what it should. Pure (cm-orchestration §4.7, §4.8)."""

import hashlib
from collections.abc import Collection, Mapping, Sequence

import msgspec

from aoscore.common.types import InstanceIdent, InstanceInfo, InstanceState, InstanceStatus


class NodeUpdate(msgspec.Struct, frozen=True):
    """`start` is everything that shall run on the node, also what runs already; `stop` what must go first."""

    start: tuple[InstanceInfo, ...]
    stop: tuple[InstanceIdent, ...]


def list_digest(infos: Sequence[InstanceInfo]) -> str:
    """Names a start list, so that it can be compared across restarts."""
    return hashlib.sha256(msgspec.json.encode(infos)).hexdigest()


def matches(info: InstanceInfo | None, status: InstanceStatus) -> bool:
    """Whether what runs is what is wanted."""
    return info is not None and info.version == status.version and status.runtime_id in ("", info.runtime_id)


def plan_update(
    wanted: Sequence[InstanceInfo],
    running: Mapping[InstanceIdent, InstanceStatus],
    *,
    told: bool,
    retry: Collection[InstanceIdent] = (),
    leave: Collection[InstanceIdent] = (),
) -> NodeUpdate | None:
    """The update that the node needs, None when it needs none.

    `told`: the node has confirmed this very list before. `retry`: failed instances to try again: they are stopped as
    well, since a C++ SM starts an instance whose preparation failed never again otherwise (sm.md §4.3). `leave`: not to
    be stopped although not wanted here.
    """
    by_ident = {info.ident: info for info in wanted}
    stop = [
        status.ident
        for status in running.values()
        if not status.ident.preinstalled
        and status.ident not in leave
        and status.state is not InstanceState.INACTIVE
        and not matches(by_ident.get(status.ident), status)
    ]
    stop += [ident for ident in by_ident if ident in retry and ident not in stop]
    missing = any(not (info.ident in running and matches(info, running[info.ident])) for info in wanted)
    if not stop and not missing and (told or not wanted):
        return None
    return NodeUpdate(tuple(wanted), tuple(stop))
