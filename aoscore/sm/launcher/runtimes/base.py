"""What the launcher, monitoring and the log provider know about a runtime.

A runtime owns everything between "start this instance" and the processes that follow from it: preparation, supervision,
restart of what died, clean-up, adoption of what an earlier SM process left running. The launcher decides *what* runs.

Who does what about failures:

* ``start_instance`` raises when the instance could not be brought up at all (missing resource, bad image, no network).
  Nothing is left behind; the launcher decides when to try again.
* An instance that came up and ended later is the runtime's: it reports ``failed`` with the exit code and restarts it
  with capped back-off, for ever, until ``stop_instance``.

Every state change goes through ``changed``; it is the only source of an instance's state (sm.md §12, D7 and D8).
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import msgspec

from aoscore.common.aio import Broadcast
from aoscore.common.errors import InvalidArgumentError
from aoscore.common.types import InstanceIdent, InstanceInfo, InstanceStatus, NodeInfo, RuntimeInfo

if TYPE_CHECKING:
    from aoscore.sm.imagemanager.model import InstalledImage

_NAMESPACE = uuid.NAMESPACE_OID


def instance_id(ident: InstanceIdent) -> str:
    """The instance's name on this machine: container, cgroup, network namespace, bundle (sm.md §4.1).

    AosCore 9.1 computes the same, so each can adopt what the other started.
    """
    return str(uuid.uuid3(_NAMESPACE, f"{ident.item_id}:{ident.subject_id}:{ident.instance}"))


def is_instance_id(text: str) -> bool:
    """Whether a name can be one of ours: version 3 UUIDs in the usual form, which others rarely use."""
    try:
        return uuid.UUID(text).version == 3 and str(uuid.UUID(text)) == text
    except ValueError:
        return False


def runtime_id(runtime_type: str, node_id: str) -> str:
    """The runtime's id towards CM (sm.md §4.1)."""
    return str(uuid.uuid3(_NAMESPACE, f"{runtime_type}-{node_id}"))


def runtime_info(runtime_type: str, node: NodeInfo, *, max_instances: int) -> RuntimeInfo:
    """What CM is told about a runtime (sm-runtime.md §1.2). Raises InvalidArgumentError for a node without CPUs."""
    if not node.cpus:
        raise InvalidArgumentError(f"node {node.node_id} names no CPU, so no architecture can be announced")
    return RuntimeInfo(
        runtime_id=runtime_id(runtime_type, node.node_id),
        type=runtime_type,
        max_instances=max_instances,
        os_info=node.os_info,
        arch_info=node.cpus[0].arch_info,
    )


class SampleTarget(msgspec.Struct, frozen=True):
    """Where monitoring finds the figures of one running instance."""

    instance_id: str
    ident: InstanceIdent
    info: InstanceInfo
    cgroup: str
    """Path of the instance's cgroup below the cgroup mount, with a leading slash."""
    pid: int
    """First process of the instance."""
    netns: Path | None
    """Bind mount of its network namespace; None for an instance without one of its own."""
    partitions: tuple[tuple[str, Path], ...] = ()
    """Name (``storages``, ``states``) and host path of what the instance fills."""


class RunningInstance(msgspec.Struct, frozen=True):
    """An instance that runs now, started by this process or adopted."""

    ident: InstanceIdent
    instance_id: str
    adopted: bool
    status: InstanceStatus


class Runtime(Protocol):
    """One way of running instances. Also a ``Service``: ``run`` supervises; the calls work after ``started()``."""

    @property
    def info(self) -> RuntimeInfo:
        """What CM is told about this runtime."""
        ...

    @property
    def changed(self) -> Broadcast[InstanceStatus]:
        """Every state change of every instance of this runtime."""
        ...

    @property
    def reboot_due(self) -> asyncio.Event:
        """Set when the node must be rebooted for this runtime's sake: `reboot` is called when nothing else is to do."""
        ...

    async def run(self, started: Callable[[], None]) -> None:
        """Work until cancelled. Cancelling ends supervision only: instances go on running, to be adopted later."""
        ...

    async def adopt(self, stored: Sequence[InstanceInfo]) -> list[RunningInstance]:
        """Called once, before the first start: take over what runs and is in ``stored``, clean away the rest."""
        ...

    def running(self) -> list[RunningInstance]:
        """The instances of this runtime that are active or activating now."""
        ...

    async def start_instance(self, info: InstanceInfo, image: InstalledImage) -> None:
        """Bring the instance up and return when it has settled (active, or failed and under restart: see ``changed``).

        Repeatable: running with the same parameters is success without touching it, with others it is restarted.
        Raises AosError when it could not be brought up.
        """
        ...

    async def stop_instance(self, ident: InstanceIdent, *, restart: bool = False) -> None:
        """End it gracefully, then by force, and clean up. An unknown instance is success.

        With `restart` it is to be started again by the same runtime, with other parameters: what would only be made
        anew may stay. Should that start never come, it is stopped again without.
        """
        ...

    def sample_targets(self) -> list[SampleTarget]:
        """The active instances that can be measured."""
        ...

    async def reboot(self) -> None:
        """Reboot the machine for this runtime's sake. NotSupportedError where the runtime never asks for it."""
        ...
