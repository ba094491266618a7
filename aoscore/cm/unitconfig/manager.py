"""Keeps the unit config, checks and applies new ones on the nodes (cm-cloud §10)."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from aoscore.cm.communication.envelope import from_json, to_json
from aoscore.cm.communication.messages import ErrorInfo, NodeConfig, UnitConfig, UnitConfigStatus
from aoscore.cm.nodeinfo import UnitNodeInfo
from aoscore.cm.unitconfig.config import node_config_text, pick_node_config
from aoscore.common.aio import Broadcast, Worker, log_and_continue, unbroken
from aoscore.common.errors import AosError, WrongStateError, from_error_info, to_error_info
from aoscore.common.files import remove_unfinished, write_atomic
from aoscore.common.log import kv
from aoscore.common.semver import SemVer
from aoscore.common.types import ConfigState, NodeConfigStatus

_log = logging.getLogger(__name__)


class NodeConfigLink(Protocol):
    """Requests to the SM of a node."""

    async def get_node_config_status(self, node_id: str) -> NodeConfigStatus: ...

    async def check_node_config(self, node_id: str, config: str, version: str) -> NodeConfigStatus: ...

    async def set_node_config(self, node_id: str, config: str, version: str) -> NodeConfigStatus: ...


class Nodes(Protocol):
    """The nodes of the Unit."""

    changed: Broadcast[UnitNodeInfo]

    def nodes(self) -> Sequence[UnitNodeInfo]: ...


class UnitConfigManager:
    """A service: brings connected nodes to the current config. `check` and `update` are for the update manager."""

    def __init__(self, path: Path, nodes: Nodes, link: NodeConfigLink) -> None:
        self._path = path
        self._nodes = nodes
        self._link = link
        self._worker = Worker("unitconfig")
        self._lock = asyncio.Lock()
        self._config: UnitConfig | None = None
        self._error: AosError | None = None
        self._to_bring: asyncio.Queue[UnitNodeInfo] = asyncio.Queue()
        self._applied: set[str] = set()
        """Nodes known to have the current config; a node leaves when it disconnects."""
        self.changed: Broadcast[UnitConfig] = Broadcast("unit config")

    def status(self) -> UnitConfigStatus:
        """State of the current config."""
        if self._error is not None:
            error = ErrorInfo.of(to_error_info(self._error))
            return UnitConfigStatus(state=ConfigState.FAILED, error_info=error)
        if self._config is None:
            return UnitConfigStatus(state=ConfigState.ABSENT)
        return UnitConfigStatus(version=self._config.version, state=ConfigState.INSTALLED)

    def current(self) -> UnitConfig | None:
        """The installed config."""
        return self._config if self._error is None else None

    def node_config(self, node_id: str, node_type: str) -> NodeConfig:
        """The part of the current config for a node; an empty one when there is no config."""
        return pick_node_config(self._config or UnitConfig(), node_id, node_type)

    async def check(self, config: UnitConfig) -> None:
        """Whether config could be applied: version, and every connected node's opinion. Raises the first objection."""
        if self._is_current(config):
            return
        async with self._lock:
            for node in self._connected():
                await self._check_on(node, config)

    async def update(self, config: UnitConfig) -> None:
        """Apply config on all connected nodes and keep it; when one node refuses, all get the previous one back.

        A node that is not connected gets it when it comes. Does nothing when config is the current one. A call that
        is cancelled has the effect of one that failed, or of one that succeeded.
        """
        if self._is_current(config):
            return
        async with self._lock:
            touched: list[UnitNodeInfo] = []
            try:
                for node in self._connected():
                    touched.append(node)
                    self._applied.discard(node.node_id)
                    await self._set_on(node, config)
                await unbroken(self._keep(config, touched))
            finally:
                # Nodes that connected meanwhile; all of them after an error, or when the caller has left.
                for node in self._connected():
                    if node.node_id not in self._applied:
                        self._to_bring.put_nowait(node)

    async def _keep(self, config: UnitConfig, nodes: Sequence[UnitNodeInfo]) -> None:
        """The nodes have the config: it is the current one."""
        await self._worker.run(self._write, config)
        self._config, self._error = config, None
        self._applied = {node.node_id for node in nodes}
        _log.info(kv("Unit config installed", version=config.version))
        self.changed.publish(config)

    async def run(self, started: Callable[[], None]) -> None:
        """Load the config, then give it to nodes as they connect."""
        try:
            await self._worker.run(self._load)
            with self._nodes.changed.subscribe() as changes:
                started()
                for node in self._nodes.nodes():
                    await self._bring(node)
                self._to_bring = changes
                while True:
                    await self._bring(await changes.get())
        finally:
            self._worker.close()

    def _load(self) -> None:
        remove_unfinished(self._path)
        try:
            text = self._path.read_bytes()
        except FileNotFoundError:
            return
        try:
            self._config, problems = from_json(UnitConfig, text, f"unit config {self._path}")
        except AosError as error:
            _log.error(kv("Can't read unit config", file=self._path, error=error))
            self._error = error
            return
        for problem in problems:
            _log.warning(kv("Part of the unit config was left out", problem=problem))

    def _write(self, config: UnitConfig) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self._path, to_json(config))

    def _is_current(self, config: UnitConfig) -> bool:
        """Whether config is installed already; raises WrongStateError when it must not replace the present one."""
        version = SemVer(config.version)
        if self._config is None or self._error is not None:
            return False
        current = SemVer(self._config.version)
        if version < current:
            raise WrongStateError(f"unit config {config.version} is older than {self._config.version}")
        if version == current and config != self._config:
            raise WrongStateError(f"unit config {config.version} is installed with other content")
        return version == current

    def _connected(self) -> list[UnitNodeInfo]:
        return [node for node in self._nodes.nodes() if node.has_sm_link]

    async def _check_on(self, node: UnitNodeInfo, config: UnitConfig) -> None:
        if _is_applied(await self._link.get_node_config_status(node.node_id), config):
            return
        text = node_config_text(pick_node_config(config, node.node_id, node.info.node_type))
        _raise_refusal(node.node_id, await self._link.check_node_config(node.node_id, text, config.version))

    async def _set_on(self, node: UnitNodeInfo, config: UnitConfig) -> None:
        text = node_config_text(pick_node_config(config, node.node_id, node.info.node_type))
        _raise_refusal(node.node_id, await self._link.set_node_config(node.node_id, text, config.version))

    async def _bring(self, node: UnitNodeInfo) -> None:
        """Give a node that has connected, or has another one, the current config."""
        if not node.has_sm_link:
            self._applied.discard(node.node_id)
            return
        if self._config is None or self._error is not None or node.node_id in self._applied:
            return
        with log_and_continue(_log, f"Can't configure node {node.node_id}"):
            async with self._lock:
                status = await self._link.get_node_config_status(node.node_id)
                if not _is_applied(status, self._config):
                    await self._set_on(node, self._config)
                self._applied.add(node.node_id)


def _is_applied(status: NodeConfigStatus, config: UnitConfig) -> bool:
    return status.version == config.version and from_error_info(status.error) is None


def _raise_refusal(node_id: str, status: NodeConfigStatus) -> None:
    """A C++ SM answers check and set with the state before the request; only the error counts (observed.md, wire 8)."""
    if error := from_error_info(status.error):
        raise type(error)(f"node {node_id}: {error}")
