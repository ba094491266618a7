"""Monitoring data on its way from the nodes to the cloud (cm-orchestration §7.1)."""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Final, Generic, NamedTuple, Protocol, TypeVar

import apsw

from aoscore.cm.communication import messages
from aoscore.cm.communication.envelope import from_json, to_json
from aoscore.cm.communication.messages import Identity, instance_members
from aoscore.cm.communication.outbox import Change
from aoscore.cm.launcher.model import UnitInstanceStatus
from aoscore.cm.nodeinfo import UnitNodeInfo
from aoscore.cm.rows import ident_of, ident_values
from aoscore.common.aio import Broadcast, log_and_continue
from aoscore.common.db import Database
from aoscore.common.errors import InvalidArgumentError
from aoscore.common.log import kv
from aoscore.common.types import InstanceIdent, InstanceState, MonitoringData, NodeMonitoring, NodeState

_log = logging.getLogger(__name__)

T = TypeVar("T")

RING_SIZE: Final = 16
"""Samples and state changes kept per node and instance: what the cloud takes in one message."""
KEEP_PERIODS: Final = 5
"""Without a connection the rings go to disk once in so many send periods at most,"""
KEEP_BYTES_PER_S: Final = 512
"""and so seldom that it is no more than this on average, however large the Unit: 44 MB a day."""


class CloudLink(Protocol):
    """The cloud as far as those need it who tell it something."""

    @property
    def connected(self) -> bool: ...

    async def send(self, message: messages.Message) -> object: ...


class Link(CloudLink, Protocol):
    """The cloud, for what waits on disk until there is a connection."""

    async def send(self, message: messages.Message, *, also: Change | None = None) -> bool: ...

    async def keep(self, kind: type[messages.Message]) -> None: ...


class _Ring(Generic[T]):
    """Keeps the newest entries and counts the lost ones."""

    def __init__(self) -> None:
        self.entries: deque[T] = deque(maxlen=RING_SIZE)
        self.dropped = 0

    def add(self, entry: T) -> None:
        self.dropped += len(self.entries) == RING_SIZE
        self.entries.append(entry)


class Rings(NamedTuple):
    """What waits of one node, or of one instance on it."""

    node_id: str
    ident: InstanceIdent | None
    entries: messages.NodeMonitoring | messages.InstanceMonitoring
    dropped: int
    """How many older entries are lost."""


class MonitoringCache:
    """Collects samples and state changes until they are sent. Pure."""

    def __init__(self) -> None:
        self._nodes: dict[str, tuple[_Ring[messages.NodeStateChange], _Ring[messages.Sample]]] = {}
        self._instances: dict[
            tuple[InstanceIdent, str], tuple[_Ring[messages.InstanceStateChange], _Ring[messages.Sample]]
        ] = {}
        self._node_states: dict[str, tuple[NodeState, bool]] = {}
        self._instance_states: dict[tuple[InstanceIdent, str], InstanceState] = {}
        self.is_changed = False
        """Something was added; whoever has taken note of it resets this."""

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

    def restore(self, rings: Rings) -> None:
        """Take in what an earlier process has collected, before anything else is added."""
        match rings.entries:
            case messages.NodeMonitoring() as node:
                node_states, samples = self._node(rings.node_id)
                for node_change in node.node_states:
                    node_states.add(node_change)
                    self._node_states[rings.node_id] = (node_change.state, node_change.is_connected)
            case messages.InstanceMonitoring() as instance if rings.ident is not None:
                instance_states, samples = self._instance(rings.ident, rings.node_id)
                for change in instance.item_states:
                    instance_states.add(change)
                    self._instance_states[rings.ident, rings.node_id] = change.state
            case _:
                raise InvalidArgumentError(f"monitoring data of an instance on node {rings.node_id} without its name")
        for sample in rings.entries.items:
            samples.add(sample)
        samples.dropped += rings.dropped

    def rings(self) -> list[Rings]:
        """What was collected, nodes first."""
        nodes = [
            Rings(
                node_id,
                None,
                messages.NodeMonitoring(
                    node=Identity.of_codename(node_id), node_states=tuple(states.entries), items=tuple(samples.entries)
                ),
                states.dropped + samples.dropped,
            )
            for node_id, (states, samples) in self._nodes.items()
        ]
        instances = [
            Rings(
                node_id,
                ident,
                messages.InstanceMonitoring(
                    **instance_members(ident),
                    node=Identity.of_codename(node_id),
                    item_states=tuple(states.entries),
                    items=tuple(samples.entries),
                ),
                states.dropped + samples.dropped,
            )
            for (ident, node_id), (states, samples) in self._instances.items()
        ]
        return [*nodes, *instances]

    def take(self) -> tuple[messages.MonitoringData | None, int]:
        """The message with all that was collected, None when there is nothing; and how many entries were lost."""
        rings = self.rings()
        self._nodes.clear()
        self._instances.clear()
        if not rings:
            return None, 0
        entries = [one.entries for one in rings]
        message = messages.MonitoringData(
            nodes=tuple(one for one in entries if isinstance(one, messages.NodeMonitoring)),
            instances=tuple(one for one in entries if isinstance(one, messages.InstanceMonitoring)),
        )
        return message, sum(one.dropped for one in rings)

    def _node(self, node_id: str) -> tuple[_Ring[messages.NodeStateChange], _Ring[messages.Sample]]:
        self.is_changed = True
        return self._nodes.setdefault(node_id, (_Ring(), _Ring()))

    def _instance(
        self, ident: InstanceIdent, node_id: str
    ) -> tuple[_Ring[messages.InstanceStateChange], _Ring[messages.Sample]]:
        self.is_changed = True
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
    """The rings that wait for a connection, over restarts: table aoscore_monitoring_rings, a row per node and instance.

    They leave it in the transaction in which the link keeps their message: a crash sends nothing twice.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    async def load(self) -> list[Rings]:
        """All of them; what cannot be read is passed over."""
        found = []
        for *names, node_id, text, dropped in await self._database.select(
            "SELECT itemID, subjectID, instance, type, preinstalled, nodeID, entries, dropped"
            " FROM aoscore_monitoring_rings ORDER BY rowid"
        ):
            with log_and_continue(_log, "Can't read stored monitoring data"):
                ident = ident_of(names) if names[0] else None
                entries: messages.NodeMonitoring | messages.InstanceMonitoring
                if ident is None:
                    entries, _ = from_json(messages.NodeMonitoring, text, "stored monitoring data of a node")
                else:
                    entries, _ = from_json(messages.InstanceMonitoring, text, f"stored monitoring data of {ident}")
                found.append(Rings(node_id, ident, entries, dropped))
        return found

    async def save(self, rings: Sequence[Rings]) -> int:
        """Replaces all; how many bytes of entries that are."""

        def change(connection: apsw.Connection) -> int:
            rows = [
                (
                    *(ident_values(one.ident) if one.ident is not None else ("", "", 0, "", 0)),
                    one.node_id,
                    to_json(one.entries).decode(),
                    one.dropped,
                )
                for one in rings
            ]
            self.clear(connection)
            connection.executemany("INSERT INTO aoscore_monitoring_rings VALUES (?, ?, ?, ?, ?, ?, ?, ?)", rows)
            return sum(len(row[-2]) for row in rows)

        return await self._database.write(change)

    @staticmethod
    def clear(connection: apsw.Connection) -> None:
        """The change of the database that removes all."""
        connection.execute("DELETE FROM aoscore_monitoring_rings")


class Monitoring:
    """Sends what was collected every `send_period_s` while the cloud is connected, as a service.

    It follows the states of nodes and instances by itself. Without a connection what waits goes to disk now and then,
    so that a crash loses the newest samples only; with one, nothing is written.
    """

    def __init__(
        self,
        link: Link,
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
        self._is_stored = False
        """Whether there are rings on disk."""

    def on_sample(self, node_id: str, sample: NodeMonitoring) -> None:
        """An SM sent a sample."""
        self._cache.add_sample(node_id, sample, self._now())

    async def run(self, started: Callable[[], None]) -> None:
        """Collect states and send periodically."""
        for rings in await self._store.load():
            self._is_stored = True
            with log_and_continue(_log, "Can't take up stored monitoring data"):
                self._cache.restore(rings)
        self._cache.is_changed = False
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

    async def _keep(self) -> int:
        """Write to disk what is not there yet; how many bytes that were."""
        await self._link.keep(messages.MonitoringData)
        if not self._cache.is_changed:
            return 0
        self._cache.is_changed = False
        try:
            size_bytes = await self._store.save(self._cache.rings())
        except BaseException:
            # Also when it was cut short by the stop, which writes once more.
            self._cache.is_changed = True
            raise
        self._is_stored = True
        return size_bytes

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
        loop = asyncio.get_running_loop()
        keep_at = 0.0
        while True:
            await asyncio.sleep(self._send_period_s)
            if self._link.connected:
                with log_and_continue(_log, "Can't send monitoring data"):
                    await self._send()
            elif loop.time() >= keep_at:
                size_bytes = 0
                with log_and_continue(_log, "Can't store monitoring data"):
                    size_bytes = await self._keep()
                keep_at = loop.time() + max(KEEP_PERIODS * self._send_period_s, size_bytes / KEEP_BYTES_PER_S)

    async def _send(self) -> None:
        message, dropped = self._cache.take()
        if dropped:
            _log.warning(kv("Monitoring data were dropped while waiting for the cloud", count=dropped))
            self._alert(f"{dropped} entries of monitoring data were dropped while waiting for the cloud")
        if message is not None and await self._link.send(message, also=self._store.clear if self._is_stored else None):
            self._is_stored = False
