"""All Nodes of the Unit as the Main Node knows them (iam.md §9.3)."""

import asyncio
import logging
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta

import msgspec

from aoscore.common.aio import ChangeFeed, log_and_continue
from aoscore.common.errors import NotFoundError, OutOfMemoryError
from aoscore.common.log import kv
from aoscore.common.types import NodeInfo, NodeState
from aoscore.iam.database import IamDatabase

_log = logging.getLogger(__name__)

# Whoever reaches the public port may call himself an unprovisioned Node.
MAX_UNPROVISIONED = 64
# A Node may boot longer than the Main Node.
STALE_GRACE_S = 600.0
_STALE_CHECK_PERIOD_S = 3600.0
# Being connected is noted this often at most: the flash wears out.
_SEEN_PRECISION = timedelta(hours=12)


class NodeManager:
    """Known Nodes by id; `changes` tells each change of any of them, being connected or not included.

    Nodes in service are stored, the others live in memory. As a service it forgets Nodes that do not come back.
    """

    def __init__(
        self,
        database: IamDatabase,
        current: NodeInfo,
        *,
        stale_s: float = 0,
        grace_s: float = STALE_GRACE_S,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """`current` is this Node as it is now; `stale_s` is how long an absent one is remembered, 0 for ever."""
        self.changes: ChangeFeed[str, NodeInfo] = ChangeFeed()
        self._database = database
        self._own_id = current.node_id
        self._nodes = {current.node_id: current}
        self._connected: set[str] = set()
        self._seen: dict[str, datetime] = {}
        self._lock = asyncio.Lock()
        self._stale_s = stale_s
        self._grace_s = grace_s
        self._now = now

    async def load(self) -> None:
        """Take over the Nodes of the database, before anything else is called."""
        for node in await self._database.nodes():
            self._nodes.setdefault(node.node_id, node)
        self._seen = await self._database.nodes_seen()
        for node_id in self._nodes.keys() - self._seen.keys() - {self._own_id}:
            await self._note_seen(node_id)

    async def run(self, started: Callable[[], None]) -> None:
        """Forget Nodes that have been away for too long: they would block every update (observed.md, defect 8)."""
        started()
        if not self._stale_s:
            await asyncio.Event().wait()
        await asyncio.sleep(self._grace_s)
        while True:
            for node_id in stale_nodes(self._seen, self._connected, self._now(), timedelta(seconds=self._stale_s)):
                with log_and_continue(_log, f"Can't forget node {node_id}"):
                    _log.error(kv("Node has not come back and is forgotten", nodeID=node_id, seen=self._seen[node_id]))
                    await self.remove(node_id)
            await asyncio.sleep(_STALE_CHECK_PERIOD_S)

    def ids(self) -> list[str]:
        """Ids of all Nodes, this one first."""
        return list(self._nodes)

    def get(self, node_id: str) -> NodeInfo:
        """One Node. Raises NotFoundError naming it."""
        try:
            return self._nodes[node_id]
        except KeyError:
            raise NotFoundError(f"node {node_id!r} is not known") from None

    def find(self, node_id: str) -> NodeInfo | None:
        """One Node, None if it is not known."""
        return self._nodes.get(node_id)

    def update_current(self, node: NodeInfo) -> None:
        """Take over a change of this Node, which stores itself."""
        if self._nodes[self._own_id] != node:
            self._nodes[self._own_id] = node
            self.changes.publish(node.node_id, node)

    async def connect(self, node: NodeInfo) -> None:
        """A Node is connected and says this about itself. Raises OutOfMemoryError for one new Node too many."""
        async with self._lock:
            if node.state is NodeState.UNPROVISIONED and node.node_id not in self._nodes:
                self._make_room()
            await self._store(node)
            if node.state is not NodeState.UNPROVISIONED:
                await self._note_seen(node.node_id)
            self._set(node, connected=True)

    async def disconnect(self, node_id: str) -> None:
        """The Node is not connected any more."""
        async with self._lock:
            if node_id not in self._connected:
                return
            node = self._nodes[node_id]
            self._set(node, connected=False)
            if node.state is not NodeState.UNPROVISIONED:
                await self._note_seen(node_id)

    async def set_state(self, node_id: str, state: NodeState) -> None:
        """The state of another Node changed. Raises NotFoundError naming it."""
        async with self._lock:
            node = msgspec.structs.replace(self.get(node_id), state=state, error=None)
            await self._store(node)
            self._set(node, connected=node_id in self._connected)

    async def remove(self, node_id: str) -> None:
        """Forget a Node; who watches sees it as unprovisioned."""
        async with self._lock:
            node = msgspec.structs.replace(self.get(node_id), state=NodeState.UNPROVISIONED)
            await self._database.remove_node(node_id)
            del self._nodes[node_id]
            self._connected.discard(node_id)
            self._seen.pop(node_id, None)
            self.changes.publish(node_id, node)
            self.changes.forget(node_id)

    async def _store(self, node: NodeInfo) -> None:
        if node.state is NodeState.UNPROVISIONED:
            await self._database.remove_node(node.node_id)
            self._seen.pop(node.node_id, None)
        else:
            await self._database.save_node(node)

    def _set(self, node: NodeInfo, *, connected: bool) -> None:
        changed = self._nodes.get(node.node_id) != node or connected != (node.node_id in self._connected)
        self._nodes[node.node_id] = node
        (self._connected.add if connected else self._connected.discard)(node.node_id)
        if changed:
            self.changes.publish(node.node_id, node)

    def _make_room(self) -> None:
        new = [node.node_id for node in self._nodes.values() if node.state is NodeState.UNPROVISIONED]
        if len(new) < MAX_UNPROVISIONED:
            return
        for node_id in new:
            if node_id != self._own_id and node_id not in self._connected:
                del self._nodes[node_id]
                self.changes.forget(node_id)
                return
        raise OutOfMemoryError(f"there are {MAX_UNPROVISIONED} unprovisioned nodes already")

    async def _note_seen(self, node_id: str) -> None:
        now = self._now()
        seen = self._seen.get(node_id)
        # A clock that was set back makes a new note too.
        if seen is None or abs(now - seen) > _SEEN_PRECISION:
            await self._database.save_node_seen(node_id, now)
            self._seen[node_id] = now


def stale_nodes(seen: Mapping[str, datetime], connected: "set[str]", now: datetime, limit: timedelta) -> list[str]:
    """Nodes that are away, and have been for longer than the limit."""
    return [node_id for node_id, when in seen.items() if node_id not in connected and now - when > limit]
