"""Unit status for the cloud, full and delta (cm-cloud.md §4, cloud-protocol §6.4). Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec

from aoscore.cm.communication.messages import (
    CPU,
    ArchInfo,
    ErrorInfo,
    Identity,
    ItemState,
    NodeIdentity,
    OSInfo,
    Partition,
    Placement,
    Resource,
    Runtime,
    UnitConfigStatus,
    UnitInstance,
    UnitInstances,
    UnitItem,
    UnitNode,
    UnitStatus,
)
from aoscore.cm.imagemanager.store import Item
from aoscore.cm.launcher.model import UnitInstanceStatus
from aoscore.cm.nodeinfo import UnitNodeInfo
from aoscore.common import types

LATEST_FACTOR: Final = 3
"""A delta leaves at the latest so many quiet times after its first change."""


# --- from our types to the cloud's


def _arch(info: types.ArchInfo) -> ArchInfo:
    return ArchInfo(architecture=info.architecture, variant=info.variant)


def _os(info: types.OSInfo) -> OSInfo:
    return OSInfo(os=info.os, version=info.version, features=info.features)


def _runtime(runtime: types.RuntimeInfo) -> Runtime:
    return Runtime(
        identity=Identity.of_codename(runtime.runtime_id),
        runtime_type=runtime.type,
        arch_info=_arch(runtime.arch_info),
        os_info=_os(runtime.os_info),
        max_dmips=runtime.max_dmips or None,
        allowed_dmips=runtime.allowed_dmips or None,
        total_ram=runtime.total_ram or None,
        allowed_ram=runtime.allowed_ram or None,
        max_instances=runtime.max_instances,
    )


def unit_node(node: UnitNodeInfo, request_error: types.ErrorInfo | None = None) -> UnitNode:
    """A node; without an error of its own it shows that of the last attempt to pause or resume it."""
    info = node.info
    return UnitNode(
        identity=NodeIdentity(codename=info.node_id, title=info.title),
        node_group_subject=Identity.of_codename(info.node_type),
        max_dmips=info.max_dmips,
        physical_ram=info.physical_ram or None,
        total_ram=info.total_ram,
        os_info=_os(info.os_info),
        cpus=tuple(
            CPU(
                model_name=cpu.model_name,
                total_num_cores=cpu.num_cores,
                total_num_threads=cpu.num_threads,
                arch_info=_arch(cpu.arch_info),
                max_dmips=cpu.max_dmips or None,
            )
            for cpu in info.cpus
        ),
        attrs=info.attrs,
        partitions=tuple(
            Partition(name=part.name, path=part.path, types=part.types, total_size=part.total_size)
            for part in info.partitions
        ),
        state=info.state,
        is_connected=node.is_connected,
        error_info=ErrorInfo.of(info.error) or ErrorInfo.of(request_error),
        runtimes=tuple(_runtime(runtime) for runtime in node.runtimes),
        resources=tuple(Resource(name=entry.name, shared_count=entry.shared_count) for entry in node.resources),
    )


def unit_item(item: Item) -> UnitItem:
    """A version of an item."""
    return UnitItem(
        item=Identity.of_item(item.item_id, item_type=item.type),
        version=item.version,
        state=item.state,
        error_info=ErrorInfo.of(item.error),
    )


def _group(status: UnitInstanceStatus) -> UnitInstances:
    ident = status.status.ident
    return UnitInstances(
        item=Identity.of_item(ident.item_id, preinstalled=ident.preinstalled, item_type=ident.type),
        subject=Identity.of_subject(ident.subject_id, preinstalled=ident.preinstalled),
        version=status.status.version,
        instances=(),
    )


def _instance(status: UnitInstanceStatus) -> UnitInstance:
    return UnitInstance(
        node=Placement(codename=status.node_id),
        runtime=Placement(codename=status.status.runtime_id),
        instance=status.status.ident.instance,
        state_checksum=status.state_checksum,
        state=status.status.state,
        error_info=ErrorInfo.of(status.status.error),
    )


def instance_groups(statuses: Sequence[UnitInstanceStatus]) -> tuple[UnitInstances, ...]:
    """Instances gathered by item, subject and version; the last status of an instance number counts."""
    groups: dict[UnitInstances, dict[int, UnitInstance]] = {}
    for status in statuses:
        groups.setdefault(_group(status), {})[status.status.ident.instance] = _instance(status)
    return tuple(msgspec.structs.replace(group, instances=tuple(members.values())) for group, members in groups.items())


def preinstalled_items(statuses: Sequence[UnitInstanceStatus]) -> tuple[UnitItem, ...]:
    """Items that are on the nodes without the cloud having sent them."""
    found = {}
    for status in statuses:
        ident = status.status.ident
        if ident.preinstalled:
            item = Identity.of_item(ident.item_id, preinstalled=True, item_type=ident.type)
            found[item, status.status.version] = UnitItem(
                item=item, version=status.status.version, state=ItemState.INSTALLED
            )
    return tuple(found.values())


def full_status(
    *,
    unit_config: Sequence[UnitConfigStatus],
    nodes: Sequence[UnitNodeInfo],
    node_errors: dict[str, types.ErrorInfo],
    items: Sequence[Item],
    instances: Sequence[UnitInstanceStatus],
    subjects: Sequence[str],
) -> UnitStatus:
    """Everything (§4.1). Removed items are not shown."""
    return UnitStatus(
        is_delta_info=False,
        unit_config=tuple(unit_config),
        nodes=tuple(unit_node(node, node_errors.get(node.node_id)) for node in nodes),
        items=(
            *(unit_item(item) for item in items if item.state is not ItemState.REMOVED),
            *preinstalled_items(instances),
        ),
        instances=instance_groups(instances),
        subjects=tuple(Identity.of_codename(subject) for subject in subjects),
    )


# --- delta


class Delta:
    """Changes since the last status, newest value of each (§4.2), and when they are to be sent.

    The delta is due after a quiet time, which each change begins anew, but at the latest three quiet times after the
    first change, so that constant change cannot hold it back.
    """

    def __init__(self, quiet_s: float) -> None:
        self._quiet_s = quiet_s
        self.clear()

    def clear(self) -> None:
        """Forgets everything: a full status says it all."""
        self._nodes: dict[str, UnitNode] = {}
        self._items: dict[tuple[Identity, str], UnitItem] = {}
        self._instances: dict[tuple[object, ...], UnitInstanceStatus] = {}
        self._subjects: tuple[Identity, ...] | None = None
        self._unit_config: tuple[UnitConfigStatus, ...] | None = None
        self._first: float | None = None
        self._last = 0.0

    @property
    def due(self) -> float | None:
        """When the delta is to be sent, in the time of the caller's clock; None when there is none."""
        if self._first is None:
            return None
        return min(self._last + self._quiet_s, self._first + LATEST_FACTOR * self._quiet_s)

    def _touch(self, now: float) -> None:
        self._last = now
        if self._first is None:
            self._first = now

    def add_node(self, node: UnitNode, now: float) -> None:
        """A node changed."""
        self._nodes[node.identity.codename] = node
        self._touch(now)

    def add_item(self, item: UnitItem, now: float) -> None:
        """An item version changed, was removed included."""
        self._items[item.item, item.version] = item
        self._touch(now)

    def add_instances(self, statuses: Sequence[UnitInstanceStatus], now: float) -> None:
        """Instances changed."""
        for status in statuses:
            self._instances[status.status.ident, status.status.version] = status
        if statuses:
            self._touch(now)

    def set_subjects(self, subjects: Sequence[str], now: float) -> None:
        """The subjects of the Unit changed."""
        self._subjects = tuple(Identity.of_codename(subject) for subject in subjects)
        self._touch(now)

    def set_unit_config(self, statuses: Sequence[UnitConfigStatus], now: float) -> None:
        """The unit config changed, or an attempt failed."""
        self._unit_config = tuple(statuses)
        self._touch(now)

    def take(self) -> UnitStatus:
        """The delta; afterwards there is none."""
        status = UnitStatus(
            is_delta_info=True,
            unit_config=self._unit_config,
            nodes=tuple(self._nodes.values()) or None,
            items=tuple(self._items.values()) or None,
            instances=instance_groups(list(self._instances.values())) or None,
            subjects=self._subjects,
        )
        self.clear()
        return status
