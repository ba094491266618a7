"""What the runtimes of components share: the record of what is installed, statuses, the reboot (sm-runtime.md §3, §4).

A component runtime has one instance, the installed one, and while an update is under way a second, the pending one.
The first is there from the factory: it is then called by the runtime's type and the node's type, and preinstalled.
"""

import abc
import asyncio
import logging
import os
import re
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import msgspec

from aoscore._speedups.chunker import Digest, copy_file
from aoscore.common.aio import Broadcast, Worker
from aoscore.common.config import from_json, to_json
from aoscore.common.errors import (
    AosError,
    ChecksumError,
    FailedError,
    InvalidArgumentError,
    NotFoundError,
    WrongStateError,
    to_error_info,
)
from aoscore.common.files import fsync_dir, write_atomic
from aoscore.common.log import kv
from aoscore.common.types import InstanceIdent, InstanceInfo, InstanceState, InstanceStatus, ItemType, NodeInfo
from aoscore.sm.imagemanager.model import InstalledImage, Payload
from aoscore.sm.launcher.runtimes.base import RunningInstance, SampleTarget, instance_id, runtime_info

_log = logging.getLogger(__name__)

T = TypeVar("T")

_VERSION = re.compile(r'VERSION\s*=\s*"([^"]*)"')
_MAX_VERSION_FILE_BYTES = 4096


class System(Protocol):
    """What component runtimes need of systemd."""

    async def active_states(self, units: Sequence[str]) -> dict[str, str]:
        """Active state of each unit."""
        ...

    async def reboot(self) -> None:
        """Reboot the node."""
        ...


class Component(msgspec.Struct, frozen=True, rename="camel"):
    """An installed or pending version, in the members that AosCore 9.1 writes too (sm-runtime.md §3.1)."""

    item_id: str
    subject_id: str
    instance: int
    manifest_digest: str = ""
    type: ItemType = ItemType.COMPONENT
    version: str = ""
    preinstalled: bool = False

    @property
    def ident(self) -> InstanceIdent:
        """Identity towards CM."""
        return InstanceIdent(self.item_id, self.subject_id, self.instance, self.type, self.preinstalled)

    def is_for(self, info: InstanceInfo) -> bool:
        """Whether it is what CM means: identity and digest count."""
        return (self.ident, self.manifest_digest) == (info.ident, info.manifest_digest)


class Rejected(msgspec.Struct, frozen=True, rename="camel"):
    """The version that failed last, and why: it is not tried again until CM has asked for something else."""

    component: Component
    error: str


def component_of(info: InstanceInfo) -> Component:
    """The record of what CM wants."""
    ident = info.ident
    return Component(
        item_id=ident.item_id,
        subject_id=ident.subject_id,
        instance=ident.instance,
        manifest_digest=info.manifest_digest,
        type=ident.type,
        version=info.version,
        preinstalled=ident.preinstalled,
    )


def factory_component(runtime_type: str, node: NodeInfo, version: str) -> Component:
    """What is on a node that was never updated."""
    return Component(runtime_type, node.node_type, 0, version=version, preinstalled=True)


class ComponentRuntime(abc.ABC):
    """Base of the component runtimes: all but how a version gets onto the node. Implements `base.Runtime`.

    `directory` holds the records; nothing here keeps SM from starting: a runtime that can't find out what is installed
    says so when it is asked for an update.
    """

    def __init__(self, runtime_type: str, node: NodeInfo, system: System, directory: Path) -> None:
        self.info = runtime_info(runtime_type, node, max_instances=1)
        self.changed: Broadcast[InstanceStatus] = Broadcast(f"statuses of runtime {runtime_type}")
        self.reboot_due = asyncio.Event()
        self._node = node
        self._system = system
        self._directory = directory
        self._rejected_path = directory / "rejected_instance.json"
        self._worker = Worker(runtime_type)
        self._tasks: asyncio.TaskGroup | None = None
        self._lock = asyncio.Lock()
        self._current: Component | None = None
        self._pending: Component | None = None
        self._rejected: Rejected | None = None
        self._fault = ""
        self._is_tried = False
        """The node runs a version that is neither confirmed nor gone, wanted or withdrawn."""

    @abc.abstractmethod
    async def _recover(self) -> None:
        """Find out what the last boot meant, set `_current`, `_pending` and `_is_tried`, go on from there."""

    @abc.abstractmethod
    async def _install(self, component: Component, payload: Payload) -> None:
        """Make the component the pending one. Raises AosError or OSError, with nothing left of it."""

    @abc.abstractmethod
    async def _withdraw(self) -> None:
        """Give up the pending one, which CM does not want any more."""

    # The service

    async def run(self, started: Callable[[], None]) -> None:
        """Check the health of a version on trial; otherwise there is nothing to do between calls."""
        async with self._worker, asyncio.TaskGroup() as self._tasks:
            await self._worker.run(self._directory.mkdir, mode=0o755, parents=True, exist_ok=True)
            started()
            await asyncio.Event().wait()

    async def adopt(self, stored: Sequence[InstanceInfo]) -> list[RunningInstance]:
        """Find out what the last boot meant and report it."""
        async with self._lock:
            try:
                await self._worker.run(remove_partial_files, self._directory)
                self._rejected = await self._worker.run(load_or_drop, self._rejected_path, Rejected)
                await self._recover()
            except (AosError, OSError) as error:
                self._fault = f"runtime {self.info.type} does not work: {error}"
                _log.error(kv("Component runtime does not work", runtime=self.info.type, error=error))
        known = {info.ident: info for info in stored}
        up = self.running()
        for one in up:
            if one.ident not in known:
                self.changed.publish(one.status)
        return [one for one in up if one.ident in known and _is_same(one, known[one.ident])]

    def sample_targets(self) -> list[SampleTarget]:
        """Components have no processes of their own."""
        return []

    async def reboot(self) -> None:
        """Reboot the node."""
        _log.warning(kv("Rebooting the node for an update", runtime=self.info.type))
        await self._system.reboot()

    # What the launcher asks for

    def running(self) -> list[RunningInstance]:
        """The installed version, and the one that is being installed."""
        found = [(self._current, InstanceState.ACTIVE), (self._pending, InstanceState.ACTIVATING)]
        return [
            RunningInstance(one.ident, instance_id(one.ident), True, self._status(one, state))
            for one, state in found
            if one is not None
        ]

    async def start_instance(self, info: InstanceInfo, image: InstalledImage) -> None:
        """Lay an update ready and ask for a reboot; returns when that is done, with the instance activating.

        What failed before is tried again only after CM has asked for something else: the instance stays stored, so
        the launcher asks for it again and again.
        """
        async with self._lock:
            if self._fault:
                raise FailedError(self._fault)
            for up in self.running():
                if _is_same(up, info):
                    self.changed.publish(up.status)
                    return
            if self._rejected is not None and self._rejected.component.is_for(info):
                raise FailedError(self._rejected.error)
            if len(image.payloads) != 1:
                raise InvalidArgumentError(f"item {image.key} has {len(image.payloads)} layers, a component has one")
            await self._forget_rejected()
            component = component_of(info)
            self._publish(component, InstanceState.ACTIVATING)
            try:
                if self._is_tried:
                    self._await_end_of_trial(component)
                else:
                    await self._install(component, image.payloads[0])
            except (AosError, OSError) as error:
                self._publish(component, InstanceState.FAILED, str(error))
                raise

    async def stop_instance(self, ident: InstanceIdent, *, restart: bool = False) -> None:
        """CM does not want it any more: an update is withdrawn, what is installed goes on running."""
        async with self._lock:
            if self._rejected is not None and self._rejected.component.ident == ident:
                await self._forget_rejected()
            if self._pending is not None and self._pending.ident == ident:
                pending = self._pending
                await self._withdraw()
                self._publish(pending, InstanceState.INACTIVE)
            elif self._current is not None and self._current.ident == ident:
                self._publish(self._current, InstanceState.INACTIVE)

    def _await_end_of_trial(self, component: Component) -> None:
        """Nothing can be installed before the boot that ends the trial; after it the launcher asks again."""
        if self._pending is not None:
            raise WrongStateError("another version is on trial, its end comes with the next boot")
        self._pending = component
        self.reboot_due.set()

    # For the runtimes

    def _begin(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        if self._tasks is None:
            work.close()
            raise FailedError(f"runtime {self.info.type} is not running")
        return self._tasks.create_task(work, name=name)

    async def _reject(self, reason: str) -> None:
        """The pending version failed: remember and report it."""
        if self._pending is not None:
            self._rejected = Rejected(self._pending, reason)
            await self._worker.run(save, self._rejected_path, self._rejected)
            self._publish(self._pending, InstanceState.FAILED, reason)
            self._pending = None

    async def _forget_rejected(self) -> None:
        if self._rejected is not None:
            await self._worker.run(remove_durably, self._rejected_path)
            self._rejected = None

    def _replace_current(self, new: Component) -> None:
        """The update is through."""
        old, self._current, self._pending = self._current, new, None
        _log.info(kv("Component updated", runtime=self.info.type, version=new.version))
        if old is not None and old.ident != new.ident:
            self._publish(old, InstanceState.INACTIVE)
        self._publish(new, InstanceState.ACTIVE)

    def _publish(self, component: Component, state: InstanceState, error: str = "") -> None:
        self.changed.publish(self._status(component, state, error))

    def _status(self, component: Component, state: InstanceState, error: str = "") -> InstanceStatus:
        return InstanceStatus(
            ident=component.ident,
            version=component.version,
            state=state,
            runtime_id=self.info.runtime_id,
            manifest_digest=component.manifest_digest,
            error=to_error_info(FailedError(error)) if error else None,
        )


def _is_same(up: RunningInstance, info: InstanceInfo) -> bool:
    return (up.ident, up.status.manifest_digest) == (info.ident, info.manifest_digest)


# Files. All of these block.


def read_version(path: Path) -> str:
    """Version in a file whose first line holds ``VERSION="…"``. Raises NotFoundError or InvalidArgumentError."""
    try:
        with path.open("rb") as file:
            line = file.readline(_MAX_VERSION_FILE_BYTES).decode(errors="replace")
    except FileNotFoundError:
        raise NotFoundError(f"version file {path} does not exist") from None
    found = _VERSION.search(line)
    if found is None or not found[1]:
        raise InvalidArgumentError(f'version file {path} does not begin with VERSION="…"')
    return found[1]


def read_boot_id() -> str:
    """Different after every boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def load(path: Path, kind: type[T]) -> T | None:
    """A record; None without the file. Raises InvalidArgumentError for a damaged one."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    return from_json(data, kind, what=str(path))


def load_or_drop(path: Path, kind: type[T]) -> T | None:
    """The same, where a damaged record counts as none: SM must come up with what the rest says."""
    try:
        return load(path, kind)
    except InvalidArgumentError as error:
        _log.error(kv("Damaged record dropped", error=error))
        return None


def remove_durably(*paths: Path) -> None:
    """Delete those files of one directory that are there."""
    found = [path for path in paths if path.exists()]
    for path in found:
        path.unlink()
    if found:
        fsync_dir(found[0].parent)


def remove_partial_files(directory: Path) -> None:
    """Delete what writes that were cut off have left."""
    remove_durably(*directory.glob(".*.tmp"))


def save(path: Path, document: msgspec.Struct) -> None:
    """Write a record so that it survives a power cut."""
    write_atomic(path, to_json(document))


def copy_payload(payload: Payload, target: Path) -> None:
    """Copy a component's payload, whole and durable when it returns. Raises ChecksumError for a damaged one."""
    partial = target.with_name(f".{target.name}.tmp")
    digest = Digest()
    with payload.path.open("rb", buffering=0) as source, partial.open("wb", buffering=0) as copy:
        copy_file(source.fileno(), copy.fileno(), digest)
        os.fsync(copy.fileno())
    if digest.text() != payload.digest:
        partial.unlink()
        raise ChecksumError(f"payload {payload.digest} is damaged in the store")
    partial.rename(target)
    fsync_dir(target.parent)
