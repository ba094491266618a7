"""Monitoring data for the cloud."""

import asyncio
from datetime import UTC, datetime, timedelta

from aoscore.cm.communication.messages import MonitoringData
from aoscore.cm.launcher.model import UnitInstanceStatus
from aoscore.cm.monitoring import RING_SIZE, Monitoring, MonitoringCache
from aoscore.cm.nodeinfo import UnitNodeInfo
from aoscore.common import types
from aoscore.common.aio import Broadcast
from aoscore.common.types import (
    InstanceIdent,
    InstanceMonitoring,
    InstanceState,
    InstanceStatus,
    NodeMonitoring,
    NodeState,
)
from tests.support.running import running
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


async def test_sends_only_while_connected() -> None:
    link = FakeLink()
    link.connected = False
    nodes: Broadcast[UnitNodeInfo] = Broadcast("nodes")
    instances: Broadcast[list[UnitInstanceStatus]] = Broadcast("instances")
    monitoring = Monitoring(link, nodes=nodes, instances=instances, send_period_s=0.01)
    async with running(monitoring):
        monitoring.on_sample("n", sample(0))
        nodes.publish(unit_node("n"))
        instances.publish([UnitInstanceStatus(InstanceStatus(IDENT, "1.0.0", InstanceState.ACTIVE), "n")])
        await asyncio.sleep(0.05)
        assert link.sent == []
        link.connected = True
        await asyncio.sleep(0.05)
        (message,) = link.sent
        assert isinstance(message, MonitoringData)
        assert (len(message.nodes[0].node_states), len(message.nodes[0].items)) == (1, 1)
        assert (len(message.instances[0].item_states), len(message.instances[0].items)) == (1, 1)
