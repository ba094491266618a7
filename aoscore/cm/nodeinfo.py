"""What is known about the nodes: IAM tells what they are, their SM what they can run (cm-orchestration §3)."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from typing import Protocol

import msgspec

from aoscore.common.aio import Broadcast, comes_within, log_and_continue
from aoscore.common.errors import DeadlineError, to_error_info
from aoscore.common.log import kv
from aoscore.common.types import NodeInfo, NodeState, ResourceInfo, RuntimeInfo, SMInfo

_log = logging.getLogger(__name__)

REFRESH_PERIOD_S = 60.0
"""AosCore 9.1's IAM may lose change notifications when nodes change together (observed.md, defect 9)."""


class UnitNodeInfo(msgspec.Struct, frozen=True):
    """A node as the Unit shows it. State and error of `info` count a missing SM as a fault."""

    info: NodeInfo
    runtimes: tuple[RuntimeInfo, ...] = ()
    resources: tuple[ResourceInfo, ...] = ()
    is_connected: bool = False
    """As the cloud sees it: a node that needs no SM counts as connected."""
    has_sm_link: bool = False
    """Whether the node's SM can be asked."""

    @property
    def node_id(self) -> str:
        """Id of the node."""
        return self.info.node_id

    @property
    def is_usable(self) -> bool:
        """Whether instances can be run there now."""
        return self.has_sm_link and self.info.state is NodeState.PROVISIONED

    @property
    def is_paused(self) -> bool:
        """Whether nothing may run there, and its SM can be told so (iam.md §6)."""
        return self.has_sm_link and self.info.state is NodeState.PAUSED


class _Record(msgspec.Struct):
    iam: NodeInfo | None = None
    sm: SMInfo | None = None
    changed_s: float = 0.0
    """When the record was made, its SM came or went."""

    @property
    def has_sm(self) -> bool:
        """Whether the node runs an SM; assumed until IAM has told."""
        return self.iam is None or "sm" in self.iam.components

    @property
    def misses_sm(self) -> bool:
        """Whether an SM should be connected and is not."""
        awaited = self.iam is None or self.iam.state in (NodeState.PROVISIONED, NodeState.PAUSED)
        return self.has_sm and awaited and self.sm is None


class NodeTable:
    """Joins both sides. Pure: times are passed in, seconds of any steady clock."""

    def __init__(self, sm_timeout_s: float) -> None:
        self._sm_timeout_s = sm_timeout_s
        self._records: dict[str, _Record] = {}

    def set_iam_info(self, info: NodeInfo, now_s: float) -> None:
        """IAM's word on a node."""
        self._record(info.node_id, now_s).iam = info

    def set_sm_info(self, info: SMInfo, now_s: float) -> None:
        """The node's SM is connected and told what it has."""
        record = self._record(info.node_id, now_s)
        record.sm = info
        record.changed_s = now_s

    def set_sm_lost(self, node_id: str, now_s: float) -> None:
        """The stream of the node's SM ended."""
        record = self._record(node_id, now_s)
        record.sm = None
        record.changed_s = now_s

    def view(self, node_id: str, now_s: float) -> UnitNodeInfo:
        """The joined record (cm-orchestration §3.2)."""
        record = self._records[node_id]
        info = record.iam or NodeInfo(node_id)
        sm = record.sm
        if record.misses_sm and now_s - record.changed_s >= self._sm_timeout_s:
            error = to_error_info(DeadlineError("SM connection timeout"))
            info = msgspec.structs.replace(info, state=NodeState.ERROR, error=error)
        # Without SM, and before provisioning, there is nobody whose connection could be missed.
        needs_none = not record.has_sm or (record.iam is not None and record.iam.state is NodeState.UNPROVISIONED)
        is_connected = needs_none or (record.iam is not None and sm is not None)
        return UnitNodeInfo(
            info, sm.runtimes if sm else (), sm.resources if sm else (), is_connected, has_sm_link=sm is not None
        )

    def views(self, now_s: float) -> list[UnitNodeInfo]:
        """All nodes, by id."""
        return [self.view(node_id, now_s) for node_id in sorted(self._records)]

    def next_deadline_s(self, now_s: float) -> float | None:
        """When the next missing SM becomes a fault."""
        deadlines = [
            record.changed_s + self._sm_timeout_s
            for record in self._records.values()
            if record.misses_sm and now_s - record.changed_s < self._sm_timeout_s
        ]
        return min(deadlines, default=None)

    def _record(self, node_id: str, now_s: float) -> _Record:
        return self._records.setdefault(node_id, _Record(changed_s=now_s))


class IamNodes(Protocol):
    """The part of IAM's public side that knows the nodes."""

    async def get_node_ids(self) -> tuple[str, ...]: ...

    async def get_node(self, node_id: str) -> NodeInfo: ...

    def watch_nodes(self) -> AsyncIterator[NodeInfo]: ...


class NodeInfoProvider:
    """Follows the nodes, as a service. Started once IAM has told about all of them."""

    def __init__(self, iam: IamNodes, *, sm_timeout_s: float, now: Callable[[], float] = time.monotonic) -> None:
        self._iam = iam
        self._now = now
        self._table = NodeTable(sm_timeout_s)
        self._published: dict[str, UnitNodeInfo] = {}
        self._wake = asyncio.Event()
        self.changed: Broadcast[UnitNodeInfo] = Broadcast("nodes")

    def nodes(self) -> list[UnitNodeInfo]:
        """All nodes, by id."""
        return self._table.views(self._now())

    def main_node_id(self) -> str:
        """Id of the Main Node, empty while unknown."""
        return next((node.node_id for node in self.nodes() if node.info.is_main), "")

    def is_provisioned(self, node_id: str) -> bool:
        """Whether a node is known and takes part in the Unit, or has once done so."""
        unprovisioned = NodeState.UNPROVISIONED
        return any(node.node_id == node_id and node.info.state is not unprovisioned for node in self.nodes())

    def on_sm_info(self, info: SMInfo) -> None:
        """An SM has told what its node can run."""
        self._table.set_sm_info(info, self._now())
        self._publish()

    def on_sm_lost(self, node_id: str) -> None:
        """An SM is disconnected."""
        self._table.set_sm_lost(node_id, self._now())
        self._publish()

    async def run(self, started: Callable[[], None]) -> None:
        """Read all nodes, then follow their changes and time-outs."""
        await self._refresh()
        started()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._watch())
            tasks.create_task(self._refresh_again())
            tasks.create_task(self._watch_deadlines())

    async def _refresh(self) -> None:
        for node_id in await self._iam.get_node_ids():
            with log_and_continue(_log, f"Can't get info of node {node_id}"):
                self._take(await self._iam.get_node(node_id))

    async def _refresh_again(self) -> None:
        while True:
            await asyncio.sleep(REFRESH_PERIOD_S)
            with log_and_continue(_log, "Can't refresh nodes"):
                await self._refresh()

    async def _watch(self) -> None:
        async for info in self._iam.watch_nodes():
            self._take(info)

    async def _watch_deadlines(self) -> None:
        while True:
            deadline_s = self._table.next_deadline_s(self._now())
            pause_s = None if deadline_s is None else max(0.0, deadline_s - self._now())
            self._wake.clear()
            if not await comes_within(self._wake, pause_s):
                self._publish()

    def _take(self, info: NodeInfo) -> None:
        self._table.set_iam_info(info, self._now())
        self._publish()

    def _publish(self) -> None:
        """Tell about nodes that look different now."""
        self._wake.set()
        for node in self.nodes():
            before = self._published.get(node.node_id)
            if node == before:
                continue
            self._published[node.node_id] = node
            if before is None or (before.info.state, before.is_connected) != (node.info.state, node.is_connected):
                _log.info(kv("Node changed", nodeID=node.node_id, state=node.info.state, isConnected=node.is_connected))
            self.changed.publish(node)
