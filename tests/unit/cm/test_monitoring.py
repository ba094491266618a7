"""Monitoring data for the cloud."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest

from aoscore.cm import monitoring as module
from aoscore.cm.communication.envelope import from_json, to_json
from aoscore.cm.communication.messages import Message, MonitoringData
from aoscore.cm.communication.outbox import Change, Outbox, StoredMessage
from aoscore.cm.database import OWN_TABLES
from aoscore.cm.launcher.model import UnitInstanceStatus
from aoscore.cm.monitoring import RING_SIZE, Monitoring, MonitoringCache, MonitoringStore, Rings
from aoscore.cm.nodeinfo import UnitNodeInfo
from aoscore.common import types
from aoscore.common.aio import Broadcast
from aoscore.common.db import Database, Schema
from aoscore.common.errors import InvalidArgumentError, NoSpaceError
from aoscore.common.types import (
    InstanceIdent,
    InstanceMonitoring,
    InstanceState,
    InstanceStatus,
    ItemType,
    NodeMonitoring,
    NodeState,
)
from tests.support.running import running, until
from tests.unit.cm.fakes import FakeLink, unit_node

NOW = datetime(2026, 3, 1, tzinfo=UTC)
IDENT = InstanceIdent("item", "subject", 0)


def sample(second: int, ident: InstanceIdent = IDENT) -> NodeMonitoring:
    data = types.MonitoringData(
        NOW + timedelta(seconds=second), ram=1, cpu=2, partitions=(types.PartitionUsage("aos", 3),), download=4
    )
    return NodeMonitoring(data, (InstanceMonitoring(ident, data),))


def test_message() -> None:
    cache = MonitoringCache()
    cache.set_node_state("n", NodeState.PROVISIONED, True, NOW)
    cache.set_instance_state(IDENT, "n", InstanceState.ACTIVE, NOW)
    cache.add_sample("n", sample(1), NOW)
    message, dropped = cache.take()
    assert message is not None
    assert dropped == 0
    node, instance = message.nodes[0], message.instances[0]
    assert (node.node.codename, node.node_states[0].is_connected) == ("n", True)
    assert (node.items[0].cpu, node.items[0].partitions[0].used_size) == (2, 3)
    assert (instance.item.id, instance.node.codename, len(instance.items)) == ("item", "n", 1)
    assert instance.item_states[0].state is InstanceState.ACTIVE
    assert cache.take() == (None, 0)


def test_only_changes_of_state_count_even_after_sending() -> None:
    cache = MonitoringCache()
    for _ in range(2):
        cache.set_node_state("n", NodeState.PROVISIONED, True, NOW)
        cache.set_instance_state(IDENT, "n", InstanceState.ACTIVE, NOW)
    message, _ = cache.take()
    assert message is not None
    assert (len(message.nodes[0].node_states), len(message.instances[0].item_states)) == (1, 1)
    cache.set_node_state("n", NodeState.PROVISIONED, True, NOW)
    cache.set_instance_state(IDENT, "n", InstanceState.ACTIVE, NOW)
    assert cache.take() == (None, 0)
    cache.set_node_state("n", NodeState.PROVISIONED, False, NOW)
    assert cache.take()[0] is not None


def test_newest_samples_are_kept_and_losses_counted() -> None:
    cache = MonitoringCache()
    for second in range(RING_SIZE + 3):
        cache.add_sample("n", sample(second), NOW)
    message, dropped = cache.take()
    assert message is not None
    assert [item.timestamp.second for item in message.nodes[0].items] == list(range(3, RING_SIZE + 3))
    assert dropped == 6


def test_rings_are_taken_up_with_the_states_that_are_known() -> None:
    first, second = MonitoringCache(), MonitoringCache()
    first.set_node_state("n", NodeState.PROVISIONED, True, NOW)
    first.set_instance_state(IDENT, "n", InstanceState.ACTIVE, NOW)
    for second_of_time in range(RING_SIZE + 1):
        first.add_sample("n", sample(second_of_time), NOW)
    rings = first.rings()
    assert [one.dropped for one in rings] == [1, 1]
    for one in rings:
        second.restore(one)
    assert second.rings() == rings
    second.set_node_state("n", NodeState.PROVISIONED, True, NOW)
    second.set_instance_state(IDENT, "n", InstanceState.ACTIVE, NOW)
    assert second.take() == first.take()
    with pytest.raises(InvalidArgumentError, match="without its name"):
        second.restore(rings[1]._replace(ident=None))


class StoringLink(FakeLink):
    """Keeps messages as the real one does: what comes with a change of the database, and what it is asked to keep."""

    def __init__(self, database: Database) -> None:
        super().__init__()
        self.outbox = Outbox(database)
        self.unacked: list[Message] = []
        """What `keep` finds."""
        self.ends_after_keeping = False

    async def send(self, message: Message, *, also: Change | None = None) -> bool:
        if also is not None:
            await self.outbox.put(StoredMessage(MonitoringData, str(len(self.sent)), to_json(message)), also)
        await super().send(message)
        if self.ends_after_keeping:
            await asyncio.Event().wait()
        return also is not None

    async def keep(self, kind: type[Message]) -> None:
        for number, message in enumerate(self.unacked):
            await self.outbox.put(StoredMessage(kind, f"unacked {number}", to_json(message)))
        self.unacked.clear()


class Bench:
    """Processes of one CM, one after the other."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.link = StoringLink(database)
        self.link.connected = False
        self.store = MonitoringStore(database)
        self.nodes: Broadcast[UnitNodeInfo] = Broadcast("nodes")
        self.instances: Broadcast[list[UnitInstanceStatus]] = Broadcast("instances")
        self.alerts: list[str] = []

    def process(self) -> Monitoring:
        return Monitoring(
            self.link,
            self.store,
            nodes=self.nodes,
            instances=self.instances,
            send_period_s=0.01,
            alert=self.alerts.append,
        )

    def sent_seconds(self) -> list[list[int]]:
        """Times of the node's samples in each message."""
        messages = [message for message in self.link.sent if isinstance(message, MonitoringData)]
        return [[item.timestamp.second for node in message.nodes for item in node.items] for message in messages]

    async def stored_seconds(self) -> list[int]:
        """Times of the node's samples on disk."""
        return [item.timestamp.second for one in await self.store.load() if not one.ident for item in one.entries.items]

    async def changes(self) -> int:
        """Rows that were ever written or removed."""
        return await self.database.read(lambda connection: connection.total_changes())


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    async with Database(tmp_path / "cm.db", Schema(create=OWN_TABLES)) as database:
        yield Bench(database)


async def test_sends_only_while_connected(bench: Bench) -> None:
    link, monitoring = bench.link, bench.process()
    async with running(monitoring):
        monitoring.on_sample("n", sample(0))
        bench.nodes.publish(unit_node("n"))
        bench.instances.publish([UnitInstanceStatus(InstanceStatus(IDENT, "1.0.0", InstanceState.ACTIVE), "n")])
        while len(await bench.store.load()) < 2:
            pass
        assert link.sent == []
        link.connected = True
        await until(lambda: link.sent)
        (message,) = link.sent
        assert isinstance(message, MonitoringData)
        assert (len(message.nodes[0].node_states), len(message.nodes[0].items)) == (1, 1)
        assert (len(message.instances[0].item_states), len(message.instances[0].items)) == (1, 1)
    assert await bench.store.load() == []


async def test_nothing_is_written_while_connected(bench: Bench) -> None:
    bench.link.connected = True
    before = await bench.changes()
    monitoring = bench.process()
    async with running(monitoring):
        for second in range(20):
            monitoring.on_sample("n", sample(second))
            await until(lambda second=second: len(bench.link.sent) == second + 1)  # type: ignore[misc]
    assert bench.sent_seconds() == [[second] for second in range(20)]
    assert await bench.changes() == before


async def test_writes_are_few_without_a_connection(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """One when it is lost, then none for five periods; none at all when nothing is new; the larger, the fewer."""
    saves: list[float] = []
    original = MonitoringStore.save
    loop = asyncio.get_running_loop()

    async def save(self: MonitoringStore, rings: Sequence[Rings]) -> int:
        saves.append(loop.time())
        return await original(self, rings)

    monkeypatch.setattr(MonitoringStore, "save", save)
    monitoring = bench.process()
    async with running(monitoring):
        await asyncio.sleep(0.1)
        assert saves == []
        monkeypatch.setattr(module, "KEEP_BYTES_PER_S", 1e9)
        for second in range(5):
            if second == 4:
                await asyncio.sleep(0.1)
                assert len(saves) == 4
                monkeypatch.setattr(module, "KEEP_BYTES_PER_S", 1)
            monitoring.on_sample("n", sample(second))
            while len(await bench.stored_seconds()) <= second:
                pass
        assert all(after - before >= 0.05 for before, after in itertools.pairwise(saves))
        monitoring.on_sample("n", sample(5))
        await asyncio.sleep(0.2)
        assert len(saves) == 5  # the next one in ten minutes
    assert len(saves) == 6  # or at an orderly stop
    assert await bench.stored_seconds() == [0, 1, 2, 3, 4, 5]


async def test_rings_go_on_over_restarts_and_the_oldest_entries_go(bench: Bench) -> None:
    component = msgspec.structs.replace(IDENT, type=ItemType.COMPONENT)
    for start in (0, 10):
        monitoring = bench.process()
        async with running(monitoring):
            bench.nodes.publish(unit_node("n"))
            for second in range(start, start + 10):
                monitoring.on_sample("n", sample(second))
                monitoring.on_sample("n", sample(second, component))
            bench.instances.publish([UnitInstanceStatus(InstanceStatus(IDENT, "1.0.0", InstanceState.ACTIVE), "n")])
            cache = monitoring._cache
            await until(lambda cache=cache: cache._node_states and cache._instance_states)  # type: ignore[misc]
        rows = await bench.store.load()
        assert [(one.ident, one.node_id) for one in rows] == [(None, "n"), (IDENT, "n"), (component, "n")]
        assert all(len(one.entries.items) <= RING_SIZE for one in rows)
    bench.link.connected = True
    async with running(bench.process()):
        await until(lambda: bench.link.sent)
    (message,) = bench.link.sent
    assert isinstance(message, MonitoringData)
    assert [len(one.items) for one in (*message.nodes, *message.instances)] == [RING_SIZE] * 3
    assert (len(message.nodes[0].node_states), len(message.instances[0].item_states)) == (1, 1)
    assert bench.sent_seconds() == [[second for second in range(12, 20) for _ in range(2)]]
    assert bench.alerts == ["32 entries of monitoring data were dropped while waiting for the cloud"]
    assert await bench.store.load() == []


async def test_a_process_that_ends_while_it_sends_leaves_the_data_in_one_place(bench: Bench) -> None:
    monitoring = bench.process()
    async with running(monitoring):
        monitoring.on_sample("n", sample(1))
    assert await bench.stored_seconds() == [1]
    bench.link.connected = bench.link.ends_after_keeping = True
    async with running(bench.process()):
        await until(lambda: bench.link.sent)
    assert await bench.store.load() == []
    (kept,) = await bench.link.outbox.load()
    assert from_json(MonitoringData, kept.frame, "kept")[0] == bench.link.sent[0]


async def test_what_was_sent_and_has_no_ack_is_kept_too(bench: Bench) -> None:
    bench.link.unacked = [MonitoringData(nodes=())]
    async with running(bench.process()):
        while not await bench.link.outbox.load():
            pass


async def test_stored_data_that_cannot_be_read_are_passed_over(bench: Bench) -> None:
    monitoring = bench.process()
    async with running(monitoring):
        monitoring.on_sample("n", sample(1))
    for item, kind, text in (("", "", "{"), ("a", "invented", "{}"), ("a", "service", "7")):
        await bench.database.execute(
            "INSERT INTO aoscore_monitoring_rings VALUES (?, '', 0, ?, 0, 'n', ?, 0)", (item, kind, text)
        )
    bench.link.connected = True
    async with running(bench.process()):
        await until(lambda: bench.link.sent)
    assert bench.sent_seconds() == [[1]]
    assert await bench.store.load() == []


async def test_a_stop_in_the_middle_of_a_write_writes_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    original = MonitoringStore.save
    begun = asyncio.Event()

    async def hanging(self: MonitoringStore, rings: Sequence[Rings]) -> int:
        begun.set()
        monkeypatch.setattr(MonitoringStore, "save", original)
        await asyncio.Event().wait()
        return 0

    monkeypatch.setattr(MonitoringStore, "save", hanging)
    monitoring = bench.process()
    async with running(monitoring):
        monitoring.on_sample("n", sample(1))
        await begun.wait()
    assert await bench.stored_seconds() == [1]


async def test_a_full_disk_is_tried_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    original = MonitoringStore.save
    failed = asyncio.Event()

    async def full(self: MonitoringStore, rings: Sequence[Rings]) -> int:
        failed.set()
        raise NoSpaceError("database cm.db: no space left")

    monkeypatch.setattr(MonitoringStore, "save", full)
    monitoring = bench.process()
    async with running(monitoring):
        monitoring.on_sample("n", sample(1))
        await failed.wait()
        monkeypatch.setattr(MonitoringStore, "save", original)
        while not await bench.stored_seconds():
            pass


async def test_losses_are_told(bench: Bench) -> None:
    monitoring = bench.process()
    async with running(monitoring):
        for second in range(RING_SIZE + 2):
            monitoring.on_sample("n", sample(second))
        bench.link.connected = True
        await until(lambda: bench.link.sent)
    assert bench.alerts == ["4 entries of monitoring data were dropped while waiting for the cloud"]
