"""What a desired status means for this Unit (cm-cloud.md §3). Pure: state in, decisions out."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from typing import Final, TypeVar

import msgspec

from aoscore.cm.communication.messages import (
    DesiredInstance,
    DesiredItem,
    DesiredNodeState,
    DesiredStatus,
    DesiredSubject,
    ItemState,
    SubjectType,
    UnitConfig,
)
from aoscore.cm.communication.reader import Problem
from aoscore.cm.imagemanager.store import Item
from aoscore.cm.launcher.model import RunRequest, UnitInstanceStatus
from aoscore.cm.nodeinfo import UnitNodeInfo
from aoscore.cm.updatemanager.schedule import Kind, kind_of
from aoscore.common.config import encode_hook
from aoscore.common.errors import AosError, DeadlineError, FailedError, WrongStateError, from_error_info
from aoscore.common.types import InstanceState, ItemType, NodeState

_USABLE: Final = (ItemState.PENDING, ItemState.INSTALLED)

Entry = DesiredItem | DesiredInstance | DesiredSubject
E = TypeVar("E", bound=Entry)
Version = tuple[str, str]
"""Item id and version."""


# --- what was received


def complete(
    message: DesiredStatus,
    problems: Sequence[Problem],
    previous: DesiredStatus | None,
    *,
    absent_means_keep: bool,
) -> DesiredStatus:
    """A desired status with nothing left open, in the form it is stored.

    Lists that are absent are empty, or as before with `absent_means_keep` (cloud-protocol D17). Where entries could
    not be read nothing is removed: what the previous desired status had and this one does not name stays wanted.
    """
    before = previous or DesiredStatus()
    unread = {problem.path.partition("[")[0] for problem in problems}

    def keep_old(name: str, *, absent: bool) -> bool:
        return absent_means_keep if absent else name in unread

    return msgspec.structs.replace(
        message,
        correlation_id="",
        items=_fill(message.items, before.items, keep_old("items", absent=message.items is None)),
        instances=_fill(message.instances, before.instances, keep_old("instances", absent=message.instances is None)),
        subjects=_fill(message.subjects, before.subjects, keep_old("subjects", absent=False)),
    )


def _fill(new: tuple[E, ...] | None, old: tuple[E, ...] | None, keep_old: bool) -> tuple[E, ...]:
    """The new entries, and those of the old ones that the new ones do not name."""
    if not keep_old:
        return new or ()
    named = {_name(entry) for entry in new or ()}
    return (*(new or ()), *(entry for entry in old or () if _name(entry) not in named))


def _name(entry: Entry) -> tuple[str, ...]:
    if isinstance(entry, DesiredItem):
        return (entry.item_id,)
    if isinstance(entry, DesiredInstance):
        return (entry.item.id, entry.subject.id)
    return (entry.identity.id,)


def without_other_types(message: DesiredStatus, items: Sequence[Item]) -> tuple[DesiredStatus, list[Problem]]:
    """The message without items whose id and version are known as an item of another type, and what was left out.

    The key of their table has no type (database.md §6, item 17).
    """
    types = {item.key: item.type for item in items if item.state in _USABLE}
    good, problems = [], []
    for number, item in enumerate(message.items or ()):
        known = types.get((item.item_id, item.version), item.item_type)
        if known is item.item_type:
            good.append(item)
        else:
            text = f"item {item.item_id} {item.version} is known as {known}, so it can't be a {item.item_type}"
            problems.append(Problem(f"items[{number}].item.type", text))
    return (msgspec.structs.replace(message, items=tuple(good)) if problems else message), problems


def identity(desired: DesiredStatus) -> str:
    """A name for what is desired: statuses that want the same have the same."""
    return hashlib.sha256(msgspec.json.encode(_essence(desired), enc_hook=encode_hook)).hexdigest()


def wanted_versions(desired: DesiredStatus) -> set[Version]:
    """The versions a desired status names."""
    return {(item.item_id, item.version) for item in desired.items or ()}


def check_removals(desired: DesiredStatus, items: Sequence[Item], max_remove_percent: int) -> None:
    """Raises WrongStateError when a desired status would remove too large a part of the installed items."""
    installed = {item.item_id for item in items if item.state is ItemState.INSTALLED}
    removed = installed - {item.item_id for item in desired.items or ()}
    if installed and len(removed) * 100 > max_remove_percent * len(installed):
        raise WrongStateError(
            f"desired status is refused: it would remove {len(removed)} of {len(installed)} items, "
            f"more than {max_remove_percent} percent"
        )


def is_same(first: DesiredStatus, second: DesiredStatus) -> bool:
    """Whether two desired statuses want the same; certificates and chains do not count (§3.2)."""
    return _essence(first) == _essence(second)


def _essence(desired: DesiredStatus) -> tuple[object, ...]:
    return desired.nodes, desired.unit_config, desired.items, desired.instances, desired.subjects


# --- is there anything to do


def node_changes(desired: DesiredStatus, nodes: Sequence[UnitNodeInfo]) -> list[tuple[str, DesiredNodeState]]:
    """Nodes that are not in the desired state. A node nobody knows is among them, so that its error is reported."""
    states = {node.node_id: node.info.state for node in nodes}
    return [
        (entry.item.codename, entry.state)
        for entry in desired.nodes
        if states.get(entry.item.codename) != NodeState(entry.state.value)
    ]


class Tried(msgspec.Struct, frozen=True):
    """What the last run tried in vain, apart from items: not tried again while the same is desired."""

    nodes: frozenset[str] = frozenset()
    unit_config: UnitConfig | None = None


def reasons_to_update(
    desired: DesiredStatus,
    last: DesiredStatus | None,
    items: Sequence[Item],
    nodes: Sequence[UnitNodeInfo],
    unit_config: UnitConfig | None,
    tried: Tried = Tried(),  # noqa: B008 - immutable
) -> list[str]:
    """Why a run is needed, in words for the log; empty when the Unit is as desired.

    What failed for good is no reason while the desired status is the same one: it would only fail again.
    """
    reasons = []
    if last is None or not is_same(desired, last):
        reasons.append("desired status changed")
        tried = Tried()
    signers_changed = last is None or _signers(desired) != _signers(last)
    known = {item.key: item for item in items}
    for wanted in desired.items or ():
        item = known.get((wanted.item_id, wanted.version))
        name = f"{wanted.item_id} {wanted.version}"
        if item is None or item.index_digest != wanted.index_digest:
            reasons.append(f"item {name} is not here")
        elif item.state is ItemState.FAILED and item.final:
            if signers_changed:
                reasons.append(f"item {name} failed, its signers have changed")
        elif item.state is not ItemState.INSTALLED or item.error is not None:
            reasons.append(f"item {name} is {item.state}")
    wanted_ids = {item.item_id for item in desired.items or ()}
    reasons += [
        f"item {item.item_id} is not wanted"
        for item in items
        if item.item_id not in wanted_ids and item.state is not ItemState.REMOVED
    ]
    reasons += [
        f"node {node_id} shall be {state}"
        for node_id, state in node_changes(desired, nodes)
        if node_id not in tried.nodes
    ]
    if desired.unit_config is not None and desired.unit_config not in (unit_config, tried.unit_config):
        reasons.append(f"unit config {desired.unit_config.version} is not installed")
    return reasons


def _signers(desired: DesiredStatus) -> tuple[object, ...]:
    return desired.certificates, desired.certificate_chains


# --- what shall run


def effective_version(item_id: str, version: str, items: Sequence[Item]) -> str | None:
    """The version to run: the wanted one if it is usable, else the installed one, else none."""
    versions = [item for item in items if item.item_id == item_id]
    if any(item.version == version and item.state in _USABLE for item in versions):
        return version
    installed = [item for item in versions if item.state is ItemState.INSTALLED]
    return max(installed, key=lambda item: item.timestamp).version if installed else None


def run_requests(desired: DesiredStatus, items: Sequence[Item]) -> list[RunRequest]:
    """What the launcher shall run (§3.5). Items without a usable version are left out."""
    wanted = {item.item_id: item for item in desired.items or ()}
    subjects = {entry.identity.id: entry for entry in desired.subjects}
    requests = []
    for instance in desired.instances or ():
        item = wanted.get(instance.item.id)
        version = effective_version(item.item_id, item.version, items) if item else None
        if item is None or version is None:
            continue
        subject = subjects.get(instance.subject.id)
        requests.append(
            RunRequest(
                item_id=item.item_id,
                item_type=item.item_type,
                version=version,
                owner_id=item.owner.id,
                subject_id=instance.subject.id,
                subject_type=subject.type if subject else SubjectType.GROUP,
                is_unit_subject=subject.is_reported_from_unit if subject else False,
                priority=instance.priority,
                num_instances=instance.num_instances,
                labels=instance.labels,
            )
        )
    return requests


# --- firmware and software at different times


def kinds_to_update(
    desired: DesiredStatus,
    items: Sequence[Item],
    nodes: Sequence[UnitNodeInfo],
    unit_config: UnitConfig | None,
    requests: Sequence[RunRequest],
    tried: Tried,
) -> frozenset[Kind]:
    """The kinds of which there is something to do once all is downloaded; `requests` is what runs now."""
    wanted = wanted_versions(desired)
    kinds = {kind_of(item.type) for item in items if item.key in wanted and item.state is ItemState.PENDING}
    kinds |= {kind_of(item.type) for item in items if item.key not in wanted and item.state is ItemState.INSTALLED}
    kinds |= {kind_of(request.item_type) for request in _difference(run_requests(desired, items), requests)}
    config_wanted = desired.unit_config is not None and desired.unit_config not in (unit_config, tried.unit_config)
    if config_wanted or {node_id for node_id, _ in node_changes(desired, nodes)} - tried.nodes:
        kinds.add(Kind.SOTA)
    return frozenset(kinds)


def _difference(first: Sequence[RunRequest], second: Sequence[RunRequest]) -> list[RunRequest]:
    return [
        *(request for request in first if request not in second),
        *(request for request in second if request not in first),
    ]


def requests_of_part(
    part: Collection[Kind], wanted: Sequence[RunRequest], present: Sequence[RunRequest]
) -> list[RunRequest]:
    """What shall run while only a part of the kinds is updated: the rest stays as it is."""
    return [
        *(request for request in wanted if kind_of(request.item_type) in part),
        *(request for request in present if kind_of(request.item_type) not in part),
    ]


def is_launched(part: Collection[Kind], wanted: Sequence[RunRequest], present: Sequence[RunRequest]) -> bool:
    """Whether what was launched is what shall run."""
    return not _difference(requests_of_part(part, wanted, present), present)


def versions_of_part(
    part: Collection[Kind], desired: DesiredStatus, items: Sequence[Item]
) -> tuple[set[Version], set[Version]]:
    """The versions to install while only a part of the kinds is updated, and those that wait for their turn."""
    wanted = wanted_versions(desired)
    others = [item for item in items if kind_of(item.type) not in part]
    of_part = {(item.item_id, item.version) for item in desired.items or () if kind_of(item.item_type) in part}
    stay = {item.key for item in others if item.state is ItemState.INSTALLED}
    return of_part | stay, {item.key for item in others if item.key in wanted} - stay


# --- does it work


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """How long to wait, in seconds."""

    activating_s: float
    """For the instances to become active."""
    placement_s: float
    """For a node that an instance could run on."""


class Verdict(msgspec.Struct, frozen=True):
    """Result of `judge`."""

    settled: bool
    """No instance is on its way any more, or time is up."""
    failed: dict[Version, AosError]
    """Versions of which an instance does not run, when settled."""


def judge(
    requests: Sequence[RunRequest],
    statuses: Sequence[UnitInstanceStatus],
    active_subjects: Collection[str],
    *,
    elapsed_s: float,
    limits: Limits,
) -> Verdict:
    """Whether what was launched runs.

    An instance that failed without having a node counts as failed only after a while: nodes may still be connecting.
    """
    waiting = False
    failed: dict[Version, AosError] = {}
    found: dict[tuple[str, str, str], dict[int, UnitInstanceStatus]] = {}
    for status in statuses:
        ident = status.status.ident
        found.setdefault((ident.item_id, ident.subject_id, status.status.version), {})[ident.instance] = status
    for request in requests:
        if request.is_unit_subject and request.subject_id not in active_subjects:
            continue
        present = found.get((request.item_id, request.subject_id, request.version), {})
        everywhere = request.item_type is ItemType.COMPONENT and request.num_instances == 0
        for number in sorted(present) if everywhere else range(request.num_instances):
            error = _failure(present.get(number), elapsed_s, limits)
            if error is not None:
                failed.setdefault((request.item_id, request.version), error)
            elif not _is_active(present.get(number)):
                waiting = True
    return Verdict(not waiting, {} if waiting else failed)


def _is_active(status: UnitInstanceStatus | None) -> bool:
    return status is not None and status.status.state is InstanceState.ACTIVE


def _failure(status: UnitInstanceStatus | None, elapsed_s: float, limits: Limits) -> AosError | None:
    """Why an instance counts as failed; None when it is active or may become so."""
    if _is_active(status):
        return None
    told = from_error_info(status.status.error) if status else None
    if elapsed_s >= limits.activating_s:
        return told or DeadlineError(f"instance did not become active within {limits.activating_s:g} s")
    if status is None or status.status.state is not InstanceState.FAILED:
        return None
    if not status.node_id and elapsed_s < limits.placement_s:
        return None
    return told or FailedError("instance failed")


def versions_to_give_up(failed: dict[Version, AosError], items: Sequence[Item]) -> dict[Version, AosError]:
    """Which of the failed versions to go back from: new ones that have an installed predecessor.

    A new item that does not run has nothing to go back to: it stays, and its nodes go on trying. An installed version
    that does not run is no fault of this update.
    """
    states = {item.key: item.state for item in items}
    has_installed = {item.item_id for item in items if item.state is ItemState.INSTALLED}
    return {
        version: error
        for version, error in failed.items()
        if states.get(version) is ItemState.PENDING and version[0] in has_installed
    }
