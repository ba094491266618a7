"""Monitoring data on its way from the nodes to the cloud (cm-orchestration §7.1)."""

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Generic, Protocol, TypeVar

from aoscore.cm.communication import messages
from aoscore.cm.communication.envelope import from_json, to_json
from aoscore.cm.communication.messages import Identity, instance_members
from aoscore.cm.launcher.model import UnitInstanceStatus
from aoscore.cm.nodeinfo import UnitNodeInfo
from aoscore.common.aio import Broadcast, log_and_continue
from aoscore.common.db import Database
from aoscore.common.log import kv
from aoscore.common.types import InstanceIdent, InstanceState, MonitoringData, NodeMonitoring, NodeState

_log = logging.getLogger(__name__)

T = TypeVar("T")

RING_SIZE = 16
"""Samples and state changes kept per node and instance: what the cloud takes in one message."""


class CloudLink(Protocol):
    """The cloud as far as monitoring needs it."""

    @property
    def connected(self) -> bool: ...

    async def send(self, message: messages.Message) -> object: ...


class _Ring(Generic[T]):
    """Keeps the newest entries and counts the lost ones."""

    def __init__(self) -> None:
        self.entries: deque[T] = deque(maxlen=RING_SIZE)
        self.dropped = 0

    def add(self, entry: T) -> None:
        self.dropped += len(self.entries) == RING_SIZE
        self.entries.append(entry)


class MonitoringCache:
    """Collects samples and state changes until they are sent. Pure."""

    def __init__(self) -> None:
        self._nodes: dict[str, tuple[_Ring[messages.NodeStateChange], _Ring[messages.Sample]]] = {}
        self._instances: dict[
            tuple[InstanceIdent, str], tuple[_Ring[messages.InstanceStateChange], _Ring[messages.Sample]]
        ] = {}
        self._node_states: dict[str, tuple[NodeState, bool]] = {}
        self._instance_states: dict[tuple[InstanceIdent, str], InstanceState] = {}

    def add_sample(self, node_id: str, sample: NodeMonitoring, now: datetime) -> None:
        """A sample of a node and of the instances on it."""
        self._node(node_id)[1].add(_sample(sample.node, now))
        for instance in sample.instances:
            self._instance(instance.ident, node_id)[1].add(_sample(instance.data, now))

    def set_node_state(self, node_id: str, state: NodeState, is_connected: bool, now: datetime) -> None:
        """Remember a node's state if it is another one."""
        if self._node_states.get(node_id) != (state, is_connected):
            self._node_states[node_id] = (state, is_connected)
            change = messages.NodeStateChange(timestamp=now, state=state, is_connected=is_connected)
            self._node(node_id)[0].add(change)

    def set_instance_state(self, ident: InstanceIdent, node_id: str, state: InstanceState, now: datetime) -> None:
        """Remember an instance's state if it is another one."""
        key = (ident, node_id)
        if self._instance_states.get(key) is not state:
            self._instance_states[key] = state
            self._instance(ident, node_id)[0].add(messages.InstanceStateChange(timestamp=now, state=state))

    def take(self) -> tuple[messages.MonitoringData | None, int]:
        """The message with all that was collected, None when there is nothing; and how many entries were lost."""
        if not self._nodes and not self._instances:
            return None, 0
        message = messages.MonitoringData(
            nodes=tuple(
                messages.NodeMonitoring(
                    node=Identity.of_codename(node_id), node_states=tuple(states.entries), items=tuple(samples.entries)
                )
                for node_id, (states, samples) in self._nodes.items()
            ),
            instances=tuple(
                messages.InstanceMonitoring(
                    **instance_members(ident),
                    node=Identity.of_codename(node_id),
                    item_states=tuple(states.entries),
                    items=tuple(samples.entries),
                )
                for (ident, node_id), (states, samples) in self._instances.items()
            ),
        )
        dropped = sum(states.dropped + samples.dropped for states, samples in self._nodes.values())
        dropped += sum(states.dropped + samples.dropped for states, samples in self._instances.values())
        self._nodes.clear()
        self._instances.clear()
        return message, dropped

    def _node(self, node_id: str) -> tuple[_Ring[messages.NodeStateChange], _Ring[messages.Sample]]:
        return self._nodes.setdefault(node_id, (_Ring(), _Ring()))

    def _instance(
        self, ident: InstanceIdent, node_id: str
    ) -> tuple[_Ring[messages.InstanceStateChange], _Ring[messages.Sample]]:
        return self._instances.setdefault((ident, node_id), (_Ring(), _Ring()))


def _sample(data: MonitoringData, now: datetime) -> messages.Sample:
    return messages.Sample(
        timestamp=data.timestamp or now,
        ram=data.ram,
        cpu=data.cpu,
        download=data.download,
        upload=data.upload,
        partitions=tuple(
            messages.PartitionUsage(name=usage.name, used_size=usage.used_size) for usage in data.partitions
        ),
    )


class MonitoringStore:
    """What waited for a connection when CM was stopped, table aoscore_monitoring.

    Written at an orderly stop only: samples are not worth a write each, day after day.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    async def save(self, message: messages.MonitoringData) -> None:
        """Keeps it."""
        text = to_json(message).decode()
        await self._database.execute("INSERT INTO aoscore_monitoring (message) VALUES (?)", (text,))

    async def take(self) -> list[messages.MonitoringData]:
        """What there is, which is forgotten; what cannot be read is passed over."""
        found = []
        rows = await self._database.execute("DELETE FROM aoscore_monitoring RETURNING message")
        for (text,) in rows:
            with log_and_continue(_log, "Can't read stored monitoring data"):
                found.append(from_json(messages.MonitoringData, text, "stored monitoring data")[0])
        return found


class Monitoring:
    """Sends what was collected every `send_period_s` while the cloud is connected, as a service.

    It follows the states of nodes and instances by itself.
    """

    def __init__(
        self,
        link: CloudLink,
        store: MonitoringStore,
        *,
        nodes: Broadcast[UnitNodeInfo],
        instances: Broadcast[list[UnitInstanceStatus]],
        send_period_s: float,
        alert: Callable[[str], None],
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """`alert` is told how much was lost."""
        self._link = link
        self._store = store
        self._alert = alert
        self._nodes = nodes
        self._instances = instances
        self._send_period_s = send_period_s
        self._now = now
        self._cache = MonitoringCache()
        self._left: list[messages.MonitoringData] = []
        """What the last process could not send."""

    def on_sample(self, node_id: str, sample: NodeMonitoring) -> None:
        """An SM sent a sample."""
        self._cache.add_sample(node_id, sample, self._now())

    async def run(self, started: Callable[[], None]) -> None:
        """Collect states and send periodically."""
        self._left = await self._store.take()
        try:
            with self._nodes.subscribe() as nodes, self._instances.subscribe() as instances:
                started()
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(self._follow_nodes(nodes))
                    tasks.create_task(self._follow_instances(instances))
                    tasks.create_task(self._send_periodically())
        finally:
            with log_and_continue(_log, "Can't store monitoring data"):
                await self._keep()

    async def _keep(self) -> None:
        message, _ = self._cache.take()
        # The newest message of the stop before, and ours: no more than two may wait.
        for one in [*self._left[-1:], *([message] if message is not None else [])]:
            await self._store.save(one)

    async def _follow_nodes(self, changes: asyncio.Queue[UnitNodeInfo]) -> None:
        while True:
            node = await changes.get()
            self._cache.set_node_state(node.node_id, node.info.state, node.is_connected, self._now())

    async def _follow_instances(self, changes: asyncio.Queue[list[UnitInstanceStatus]]) -> None:
        while True:
            for one in await changes.get():
                if one.node_id:  # what has no place has no figures; unit status tells its state
                    self._cache.set_instance_state(one.status.ident, one.node_id, one.status.state, self._now())

    async def _send_periodically(self) -> None:
        while True:
            await asyncio.sleep(self._send_period_s)
            if self._link.connected:
                with log_and_continue(_log, "Can't send monitoring data"):
                    await self._send()

    async def _send(self) -> None:
        while self._left:
            await self._link.send(self._left[0])
            del self._left[0]
        message, dropped = self._cache.take()
        if dropped:
            _log.warning(kv("Monitoring data were dropped while waiting for the cloud", count=dropped))
            self._alert(f"{dropped} entries of monitoring data were dropped while waiting for the cloud")
        if message is not None:
            await self._link.send(message)
