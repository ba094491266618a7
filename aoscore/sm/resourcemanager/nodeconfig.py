"""Node configuration: the part of the unit configuration that concerns this node (sm.md §5).

CM checks a configuration here first and sets it later; alert rules are what SM itself uses of it.
"""

import logging
from pathlib import Path
from typing import Protocol

import msgspec

from aoscore.common.aio import Broadcast, Worker
from aoscore.common.config import from_json_caseless, to_json
from aoscore.common.errors import AlreadyExistsError, AosError, InvalidArgumentError, WrongStateError, to_error_info
from aoscore.common.files import write_atomic
from aoscore.common.log import kv
from aoscore.common.semver import SemVer
from aoscore.common.types import AlertRules, ConfigState, ErrorInfo, NodeConfigStatus

_log = logging.getLogger(__name__)

MAX_BYTES = 64 * 1024


class _Document(msgspec.Struct, frozen=True, rename="camel", omit_defaults=True):
    """Base of all members."""


class Codename(_Document, frozen=True):
    """A reference by code name."""

    codename: str


class ResourceRatios(_Document, frozen=True):
    """Shares of the node's resources, percent; CM uses them."""

    cpu: float | None = None
    ram: float | None = None
    storage: float | None = None
    state: float | None = None


class NodeConfig(_Document, frozen=True):
    """The document. Ratios, labels and priority are for CM's balancer."""

    node_group_subject: Codename
    version: str = ""
    node: Codename | None = None
    alert_rules: AlertRules | None = None
    resource_ratios: ResourceRatios | None = None
    labels: tuple[str, ...] = ()
    priority: int = 0


class NodeConfigs(Protocol):
    """What others need of the node configuration."""

    @property
    def changed(self) -> Broadcast[NodeConfig]:
        """Each newly set configuration."""
        ...

    @property
    def current(self) -> NodeConfig | None:
        """The configuration in use; None when there is none that can be used."""
        ...


class NodeConfigManager:
    """Holds, checks and replaces the node configuration. Call `load` before anything else."""

    def __init__(self, path: Path, worker: Worker) -> None:
        self._path = path
        self._worker = worker
        self._error: AosError | None = None
        self.current: NodeConfig | None = None
        self.changed: Broadcast[NodeConfig] = Broadcast("node configuration")

    async def load(self) -> None:
        """Read the stored file. A bad one is no reason to stop: CM is told and sends another."""
        try:
            data = await self._worker.run(self._path.read_bytes)
            self.current = _parse(data)
        except FileNotFoundError:
            return
        except (AosError, OSError) as error:
            self._error = error if isinstance(error, AosError) else InvalidArgumentError(f"{self._path}: {error}")
            _log.error(kv("Stored node configuration can't be used", file=self._path, error=error))

    def status(self) -> NodeConfigStatus:
        """The state that CM asks for."""
        if self._error is not None:
            return NodeConfigStatus(ConfigState.FAILED, error=to_error_info(self._error))
        if self.current is None:
            return NodeConfigStatus(ConfigState.ABSENT)
        return NodeConfigStatus(ConfigState.INSTALLED, self.current.version)

    def check(self, document: str, version: str) -> NodeConfigStatus:
        """Whether a configuration could be set now. The state is the present one, the version the asked one."""
        state = self.status().state
        try:
            self._accept(document, version)
        except AosError as error:
            return self._refusal(state, version, error)
        return NodeConfigStatus(state, version)

    async def update(self, document: str, version: str) -> NodeConfigStatus:
        """Set a configuration; on an error the old one stays in use and on disk.

        The state is that before the update, as AosCore 9.1 answers (observed.md, 8).
        """
        state = self.status().state
        try:
            config = self._accept(document, version)
            await self._worker.run(write_atomic, self._path, to_json(config))
        except (AosError, OSError) as error:
            return self._refusal(state, version, error)
        self.current, self._error = config, None
        _log.info(kv("Node configuration set", version=version))
        self.changed.publish(config)
        return NodeConfigStatus(state, version)

    def _accept(self, document: str, version: str) -> NodeConfig:
        config = msgspec.structs.replace(_parse(document.encode()), version=version)
        wanted = SemVer(version)
        if self.current is not None:
            installed = SemVer(self.current.version or "0.0.0")
            if wanted == installed:
                raise AlreadyExistsError(f"node configuration {version} is set already")
            if wanted < installed:
                raise WrongStateError(f"wrong version: node configuration {installed} is newer than {version}")
        return config

    def _refusal(self, state: ConfigState, version: str, error: AosError | OSError) -> NodeConfigStatus:
        _log.error(kv("Node configuration refused", version=version, error=error))
        info: ErrorInfo = to_error_info(error)
        return NodeConfigStatus(state, version, info)


def _parse(data: bytes) -> NodeConfig:
    if len(data) > MAX_BYTES:
        raise InvalidArgumentError(f"node configuration of {len(data)} bytes is too large")
    return from_json_caseless(data, NodeConfig, what="node configuration")
