"""Unit status: content, and when a delta leaves."""

from datetime import UTC, datetime

from aoscore.cm.communication.messages import Identity, ItemState, UnitConfigStatus, UnitItem
from aoscore.cm.imagemanager.store import Item
from aoscore.cm.launcher.model import UnitInstanceStatus
from aoscore.cm.nodeinfo import UnitNodeInfo
from aoscore.cm.updatemanager.unitstatus import Delta, full_status, unit_item, unit_node
from aoscore.common.types import (
    ArchInfo,
    ConfigState,
    CPUInfo,
    ErrorInfo,
    InstanceIdent,
    InstanceState,
    InstanceStatus,
    ItemType,
    NodeInfo,
    NodeState,
    OSInfo,
    PartitionInfo,
    ResourceInfo,
    RuntimeInfo,
)

NOW = datetime(2026, 3, 1, tzinfo=UTC)
ERROR = ErrorInfo(10, 0, "bad")
NODE = UnitNodeInfo(
    NodeInfo(
        "n1",
        node_type="main",
        title="Main",
        max_dmips=1000,
        total_ram=2000,
        os_info=OSInfo("linux"),
        cpus=(CPUInfo("m", 2, 4, ArchInfo("arm64")),),
        partitions=(PartitionInfo("p", ("states",), 5, "/p"),),
        attrs={"MainNode": ""},
        state=NodeState.PROVISIONED,
    ),
    runtimes=(RuntimeInfo("r1", "crun", max_dmips=10, os_info=OSInfo("linux"), arch_info=ArchInfo("arm64")),),
    resources=(ResourceInfo("gpu", 1),),
    is_connected=True,
)


def item(version: str, state: ItemState, error: ErrorInfo | None = None) -> Item:
    return Item("a", ItemType.SERVICE, version, "d", state, NOW, error)


def runs(number: int, state: InstanceState, *, preinstalled: bool = False) -> UnitInstanceStatus:
    kind = ItemType.COMPONENT if preinstalled else ItemType.SERVICE
    ident = InstanceIdent("rootfs" if preinstalled else "a", "s", number, kind, preinstalled)
    return UnitInstanceStatus(InstanceStatus(ident, "1.0.0", state, runtime_id="r1"), "n1", "ab")


def test_full_status() -> None:
    status = full_status(
        unit_config=[UnitConfigStatus(state=ConfigState.ABSENT)],
        nodes=[NODE],
        node_errors={"n1": ERROR},
        items=[
            item("1.0.0", ItemState.INSTALLED),
            item("2.0.0", ItemState.FAILED, ERROR),
            item("0.1.0", ItemState.REMOVED),
        ],
        instances=[
            runs(0, InstanceState.ACTIVE),
            runs(1, InstanceState.FAILED),
            runs(0, InstanceState.ACTIVE, preinstalled=True),
        ],
        subjects=["user"],
    )
    assert not status.is_delta_info
    assert status.items is not None and status.instances is not None and status.nodes is not None
    assert [(entry.item.id or entry.item.codename, entry.version, entry.state.value) for entry in status.items] == [
        ("a", "1.0.0", "installed"),
        ("a", "2.0.0", "failed"),
        ("rootfs", "1.0.0", "installed"),
    ]
    assert status.items[1].error_info is not None and status.items[1].error_info.message == "bad"
    first, second = status.instances
    assert first.item == Identity(id="a", type=ItemType.SERVICE) and first.subject == Identity(id="s")
    assert [(entry.instance, entry.state.value) for entry in first.instances] == [(0, "active"), (1, "failed")]
    assert second.item == Identity(codename="rootfs", type=ItemType.COMPONENT)
    assert second.subject == Identity(codename="s")
    (node,) = status.nodes
    assert node.error_info is not None and node.error_info.aos_code == 10
    assert (node.identity.title, node.physical_ram, node.cpus[0].total_num_threads) == ("Main", None, 4)
    assert (node.runtimes[0].max_dmips, node.runtimes[0].allowed_dmips) == (10, None)
    assert status.subjects == (Identity(codename="user"),)


def test_an_empty_unit_has_all_five_lists() -> None:
    status = full_status(unit_config=[], nodes=[], node_errors={}, items=[], instances=[], subjects=[])
    lists = (status.unit_config, status.nodes, status.items, status.instances, status.subjects)
    assert lists == ((), (), (), (), ())


def changed(state: ItemState) -> UnitItem:
    return unit_item(item("1.0.0", state))


def test_the_newest_value_of_each_counts() -> None:
    delta = Delta(10)
    delta.add_item(changed(ItemState.DOWNLOADING), 0)
    delta.add_item(changed(ItemState.PENDING), 1)
    delta.add_instances([runs(0, InstanceState.ACTIVATING), runs(1, InstanceState.ACTIVATING)], 2)
    delta.add_instances([runs(0, InstanceState.ACTIVE)], 3)
    delta.add_node(unit_node(NODE), 4)
    status = delta.take()
    assert status.is_delta_info
    assert status.items is not None and [entry.state for entry in status.items] == [ItemState.PENDING]
    assert status.instances is not None
    assert [(e.instance, e.state.value) for e in status.instances[0].instances] == [(0, "active"), (1, "activating")]
    assert status.nodes is not None and len(status.nodes) == 1
    assert (status.subjects, status.unit_config) == (None, None)
    assert delta.due is None and delta.take().items is None


def test_quiet_time_and_latest_time() -> None:
    delta = Delta(10)
    assert delta.due is None
    delta.add_item(changed(ItemState.PENDING), 100)
    assert delta.due == 110
    delta.add_item(changed(ItemState.PENDING), 105)
    assert delta.due == 115
    for now in range(106, 200):
        delta.add_item(changed(ItemState.PENDING), now)
    assert delta.due == 130  # 9.1 would never send it


def test_subjects_and_unit_config() -> None:
    delta = Delta(10)
    delta.set_subjects([], 0)
    delta.set_unit_config([UnitConfigStatus(version="1", state=ConfigState.FAILED)], 0)
    status = delta.take()
    assert status.subjects == () and status.unit_config is not None
