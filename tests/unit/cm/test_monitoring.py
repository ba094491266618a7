"""Monitoring data for the cloud."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from aoscore.cm.communication.messages import MonitoringData
from aoscore.cm.database import OWN_TABLES
from aoscore.cm.launcher.model import UnitInstanceStatus
from aoscore.cm.monitoring import RING_SIZE, Monitoring, MonitoringCache, MonitoringStore
from aoscore.cm.nodeinfo import UnitNodeInfo
from aoscore.common import types
from aoscore.common.aio import Broadcast
from aoscore.common.db import Database, Schema
from aoscore.common.types import (
    InstanceIdent,
    InstanceMonitoring,
    InstanceState,
    InstanceStatus,
    NodeMonitoring,
    NodeState,
)
from tests.support.running import running, until
from tests.unit.cm.fakes import FakeLink, unit_node

NOW = datetime(2026, 3, 1, tzinfo=UTC)
IDENT = InstanceIdent("item", "subject", 0)


def sample(second: int) -> NodeMonitoring:
    data = types.MonitoringData(
        NOW + timedelta(seconds=second), ram=1, cpu=2, partitions=(types.PartitionUsage("aos", 3),), download=4
    )
    return NodeMonitoring(data, (InstanceMonitoring(IDENT, data),))


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


class Bench:
    """Processes of one CM, one after the other."""

    def __init__(self, database: Database) -> None:
        self.link = FakeLink()
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
        await asyncio.sleep(0.05)
        assert link.sent == []
        link.connected = True
        await until(lambda: link.sent)
        (message,) = link.sent
        assert isinstance(message, MonitoringData)
        assert (len(message.nodes[0].node_states), len(message.nodes[0].items)) == (1, 1)
        assert (len(message.instances[0].item_states), len(message.instances[0].items)) == (1, 1)
    assert await bench.store.take() == []


async def test_what_waits_when_cm_is_stopped_is_sent_by_the_next_one_and_the_oldest_goes(bench: Bench) -> None:
    for second in range(3):
        monitoring = bench.process()
        async with running(monitoring):
            monitoring.on_sample("n", sample(second))
    bench.link.connected = True
    async with running(bench.process()):
        await until(lambda: len(bench.link.sent) == 2)
    assert bench.sent_seconds() == [[1], [2]]
    assert await bench.store.take() == []


async def test_losses_are_told(bench: Bench) -> None:
    monitoring = bench.process()
    async with running(monitoring):
        for second in range(RING_SIZE + 2):
            monitoring.on_sample("n", sample(second))
        bench.link.connected = True
        await until(lambda: bench.link.sent)
    assert bench.alerts == ["4 entries of monitoring data were dropped while waiting for the cloud"]
