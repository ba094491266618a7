"""The current Node as an object: its info, kept up to date, and the changes of its state."""

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

import msgspec

from aoscore.common.aio import ChangeFeed, Worker
from aoscore.common.errors import NotFoundError, to_error_info
from aoscore.common.log import kv
from aoscore.common.types import NodeInfo, NodeState
from aoscore.iam.config import NodeInfoConfig
from aoscore.iam.currentnode import hardware
from aoscore.iam.currentnode.state import StateStore

_log = logging.getLogger(__name__)


def read_node_info(config: NodeInfoConfig) -> NodeInfo:
    """What the Node is, without its state. Raises when id or RAM can't be read."""
    return NodeInfo(
        node_id=hardware.read_node_id(config.node_id_path),
        node_type=config.node_type,
        title=config.node_name,
        max_dmips=config.max_dmips,
        total_ram=hardware.read_total_ram(config.mem_info_path),
        os_info=hardware.read_os(config),
        cpus=hardware.read_cpus(config),
        partitions=tuple(hardware.read_partition(partition) for partition in config.partitions),
        attrs=config.attrs,
    )


class CurrentNode:
    """`info` is always the present one; `changes` tells each new one."""

    def __init__(self, info: NodeInfo, store: StateStore) -> None:
        self.info = info
        self.changes: ChangeFeed[str, NodeInfo] = ChangeFeed()
        self._listeners: list[Callable[[NodeInfo], None]] = []
        self._store = store
        self._lock = asyncio.Lock()

    @classmethod
    async def load(cls, config: NodeInfoConfig, store: StateStore, worker: Worker) -> "CurrentNode":
        """Read the Node and its state."""
        info = await worker.run(read_node_info, config)
        state = await store.load(info.node_id)
        error = None
        if state is NodeState.ERROR:
            error = to_error_info(NotFoundError(_no_state_text(config.provisioning_state_path)))
        info = msgspec.structs.replace(info, state=state, error=error)
        _log.info(kv("Current Node", nodeID=info.node_id, nodeType=info.node_type, state=state, main=info.is_main))
        if state not in (NodeState.ERROR, NodeState.UNPROVISIONED):
            await store.remember(info)
        return cls(info, store)

    def on_change(self, listener: Callable[[NodeInfo], None]) -> None:
        """Call `listener` at each change, before anybody else can see it."""
        self._listeners.append(listener)

    async def set_state(self, state: NodeState) -> None:
        """Change the state: on disk first, then here, then tell listeners. The same state changes nothing."""
        async with self._lock:
            if state is self.info.state:
                return
            info = msgspec.structs.replace(self.info, state=state, error=None)
            await self._store.save(info)
            self.info = info
            _log.info(kv("Node state changed", nodeID=info.node_id, state=state))
            for listener in self._listeners:
                listener(info)
            self.changes.publish(info.node_id, info)


def _no_state_text(path: Path) -> str:
    return f"no valid node state: write provisioned or paused into {path}, or remove it to provision anew"
