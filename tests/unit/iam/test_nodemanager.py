import asyncio
from datetime import UTC, datetime, timedelta

import pytest

from aoscore.common.aio import Worker
from aoscore.common.errors import NotFoundError, OutOfMemoryError
from aoscore.common.types import ErrorInfo, NodeInfo, NodeState, OSInfo
from aoscore.iam.database import IamDatabase
from aoscore.iam.nodemanager import MAX_UNPROVISIONED, NodeManager, stale_nodes
from tests.support.running import running, until

LINUX = OSInfo("linux")
OWN = NodeInfo("a", os_info=LINUX)
T0 = datetime(2026, 1, 1, tzinfo=UTC)


def node(node_id: str, state: NodeState = NodeState.PROVISIONED, title: str = "") -> NodeInfo:
    return NodeInfo(node_id, title=title, state=state, os_info=LINUX)


async def manager(database: IamDatabase, **more: float) -> NodeManager:
    nodes = NodeManager(database, OWN, **more)
    await nodes.load()
    return nodes


async def test_current_node_comes_first_and_wins_over_the_stored_one(database: IamDatabase) -> None:
    for stored in (node("b", title="stored"), node("a", title="stored")):
        await database.save_node(stored)
    nodes = await manager(database)
    assert nodes.ids() == ["a", "b"]
    assert (nodes.get("a").title, nodes.get("b").title) == ("", "stored")
    with pytest.raises(NotFoundError, match="'c'"):
        nodes.get("c")
    assert nodes.find("c") is None


async def test_defect_9_quick_changes_of_two_nodes_all_arrive(database: IamDatabase) -> None:
    """One slot for all Nodes lost all but the last (observed.md, defect 9)."""
    nodes = await manager(database)
    subscribers = [nodes.changes.values() for _ in range(3)]
    for number in range(20):
        await nodes.connect(node(f"n{number}"))
    nodes.update_current(node("a", title="new"))
    for changes in subscribers:
        seen = [await asyncio.wait_for(anext(changes), 5) for _ in range(21)]
        assert {one.node_id for one in seen} == {"a", *(f"n{number}" for number in range(20))}


async def test_changes_of_one_node_are_told_once_with_the_newest_value(database: IamDatabase) -> None:
    nodes = await manager(database)
    changes = nodes.changes.values()
    for title in ("1", "2", "3"):
        await nodes.connect(node("b", title=title))
    assert (await anext(changes)).title == "3"
    nodes.update_current(OWN)
    await nodes.connect(node("b", title="3"))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(anext(changes), 0.01)


async def test_being_connected_is_told_and_not_stored(database: IamDatabase) -> None:
    nodes = await manager(database)
    await nodes.connect(node("b"))
    changes = nodes.changes.values()
    assert await anext(changes) == node("b")
    stored = await database.nodes()
    before = await database._database.select("SELECT total_changes()")
    await nodes.disconnect("b")
    assert await anext(changes) == node("b")
    await nodes.connect(node("b"))
    assert await anext(changes) == node("b")
    assert await database.nodes() == stored
    assert await database._database.select("SELECT total_changes()") == before
    await nodes.disconnect("unknown")


async def test_nodes_in_service_survive_a_restart_and_new_ones_do_not(database: IamDatabase) -> None:
    nodes = await manager(database)
    await nodes.connect(node("b"))
    await nodes.connect(node("c", NodeState.UNPROVISIONED))
    await nodes.set_state("b", NodeState.PAUSED)
    assert (await manager(database)).ids() == ["a", "b"]
    assert (await manager(database)).get("b").state is NodeState.PAUSED
    await nodes.set_state("c", NodeState.PROVISIONED)
    await nodes.set_state("b", NodeState.UNPROVISIONED)
    assert nodes.ids() == ["a", "b", "c"], "an unprovisioned node stays known until the restart"
    assert (await manager(database)).ids() == ["a", "c"]
    with pytest.raises(NotFoundError):
        await nodes.set_state("x", NodeState.PAUSED)


async def test_new_state_clears_the_error(database: IamDatabase) -> None:
    nodes = await manager(database)
    broken = NodeInfo("b", state=NodeState.ERROR, error=ErrorInfo(5, 5, "bad file"), os_info=LINUX)
    await nodes.connect(broken)
    await nodes.set_state("b", NodeState.PROVISIONED)
    assert nodes.get("b") == node("b")


async def test_storage_error_leaves_everything_as_it_was(database: IamDatabase) -> None:
    nodes = await manager(database)
    await nodes.connect(node("b"))
    changes = nodes.changes.values()
    await anext(changes)
    await database._database.execute("DROP TABLE nodeinfo")
    with pytest.raises(Exception, match="no such table"):
        await nodes.set_state("b", NodeState.PAUSED)
    assert nodes.get("b").state is NodeState.PROVISIONED
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(anext(changes), 0.01)


async def test_unprovisioned_nodes_are_limited_and_absent_ones_make_room(database: IamDatabase) -> None:
    nodes = await manager(database)
    for number in range(MAX_UNPROVISIONED - 1):
        await nodes.connect(node(f"n{number}", NodeState.UNPROVISIONED))
    with pytest.raises(OutOfMemoryError):
        await nodes.connect(node("more", NodeState.UNPROVISIONED))
    await nodes.connect(node("in service"))
    await nodes.connect(node("n3", NodeState.UNPROVISIONED, title="known ones may go on"))
    await nodes.disconnect("n5")
    await nodes.connect(node("more", NodeState.UNPROVISIONED))
    assert "n5" not in nodes.ids() and "more" in nodes.ids() and "a" in nodes.ids()
    newcomer = nodes.changes.values()
    assert "n5" not in {(await anext(newcomer)).node_id for _ in range(MAX_UNPROVISIONED)}


def test_stale_nodes() -> None:
    seen = {"old": T0, "back": T0, "fresh": T0 + timedelta(days=20), "future": T0 + timedelta(days=99)}
    assert stale_nodes(seen, {"back"}, T0 + timedelta(days=31), timedelta(days=30)) == ["old"]


async def test_defect_8_a_stale_node_is_forgotten(database: IamDatabase, worker: Worker) -> None:
    """A Node that never comes back blocked every update (observed.md, defect 8)."""
    now = T0

    def clock() -> datetime:
        return now

    for gone in ("gone", "back"):
        await database.save_node(node(gone))
    first = NodeManager(database, OWN, now=clock)
    await first.load()
    now += timedelta(days=31)
    nodes = NodeManager(database, OWN, stale_s=30 * 24 * 3600, grace_s=0.2, now=clock)
    await nodes.load()
    changes = nodes.changes.values()
    async with running(nodes):
        assert nodes.ids() == ["a", "gone", "back"], "a node may boot longer than the Main Node"
        await nodes.connect(node("back"))
        assert (await anext(changes)).node_id == "back"
        await until(lambda: nodes.ids() == ["a", "back"])
    assert await anext(changes) == node("gone", NodeState.UNPROVISIONED)
    assert [one.node_id for one in await database.nodes()] == ["back"]
    assert list(await database.nodes_seen()) == ["back"]
    later = nodes.changes.values()
    assert (await anext(later)).node_id == "back"


async def test_presence_is_noted_twice_a_day_at_most(database: IamDatabase) -> None:
    now = T0

    def clock() -> datetime:
        return now

    nodes = NodeManager(database, OWN, now=clock)
    await nodes.load()
    await nodes.connect(node("b"))
    assert await database.nodes_seen() == {"b": T0}
    now += timedelta(hours=1)
    await nodes.disconnect("b")
    assert await database.nodes_seen() == {"b": T0}
    now += timedelta(hours=12)
    await nodes.connect(node("b"))
    assert await database.nodes_seen() == {"b": now}
