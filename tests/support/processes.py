"""A runtime for tests that need real processes but no containers: instances are sleeping processes that outlive SM."""

import asyncio
import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import msgspec

from aoscore.common.aio import Broadcast, Worker
from aoscore.common.config import from_json, to_json
from aoscore.common.errors import FailedError, NotSupportedError
from aoscore.common.types import (
    InstanceIdent,
    InstanceInfo,
    InstanceNetworkState,
    InstanceState,
    InstanceStatus,
    LogData,
    LogRequest,
    LogStatus,
    MonitoringData,
    NodeMonitoring,
    RuntimeInfo,
)
from aoscore.sm.imagemanager.model import InstalledImage
from aoscore.sm.launcher.runtimes.base import RunningInstance, SampleTarget, instance_id, runtime_id
from aoscore.sm.smclient.network import FirewallUpdate

# So that nothing is left for long when a test was killed.
_LIFE_S = 300


class Record(msgspec.Struct):
    """What is noted of a process."""

    pid: int
    info: InstanceInfo
    content: str
    """The file `app` of the top layer, as the instance saw it."""


class ProcessRuntime:
    """See the module text. Notes are files in a directory; an image without the file `app` cannot be started."""

    def __init__(self, directory: Path, node_id: str) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self.info = RuntimeInfo(runtime_id("test", node_id), "test", max_instances=256)
        self.changed: Broadcast[InstanceStatus] = Broadcast("test runtime")
        self.reboot_due = asyncio.Event()
        self._worker = Worker("runtime")

    async def run(self, started: Callable[[], None]) -> None:
        async with self._worker:
            started()
            await asyncio.Event().wait()

    async def adopt(self, stored: Sequence[InstanceInfo]) -> list[RunningInstance]:
        known = {info.ident: info for info in stored}
        for record in records(self._directory).values():
            if not is_alive(record) or known.get(record.info.ident) != record.info:
                await self.stop_instance(record.info.ident)
        return self.running()

    def running(self) -> list[RunningInstance]:
        return [
            RunningInstance(record.info.ident, name, True, self._status(record.info, InstanceState.ACTIVE))
            for name, record in records(self._directory).items()
            if is_alive(record)
        ]

    async def start_instance(self, info: InstanceInfo, image: InstalledImage) -> None:
        path = self._path(info.ident)
        if path.exists():
            record = read_record(path)
            if record.info == info and is_alive(record):
                self.changed.publish(self._status(info, InstanceState.ACTIVE))
                return
            await self.stop_instance(info.ident)
        content = (image.layers[-1] / "app").read_text()
        if content == "bad":
            raise FailedError("the app is bad")
        name = instance_id(info.ident)
        process = subprocess.Popen(
            ["bash", "-c", f"exec -a aos-{name} sleep {_LIFE_S}"], start_new_session=True, stdin=subprocess.DEVNULL
        )
        path.write_bytes(to_json(Record(process.pid, info, content)))
        self.changed.publish(self._status(info, InstanceState.ACTIVE))

    async def stop_instance(self, ident: InstanceIdent, *, restart: bool = False) -> None:
        path = self._path(ident)
        if not path.exists():
            return
        record = read_record(path)
        await self._worker.run(end, record)
        path.unlink()
        self.changed.publish(self._status(record.info, InstanceState.INACTIVE))

    def sample_targets(self) -> list[SampleTarget]:
        return []

    async def reboot(self) -> None:
        raise NotSupportedError("the test runtime needs no reboot")

    def _path(self, ident: InstanceIdent) -> Path:
        return self._directory / instance_id(ident)

    def _status(self, info: InstanceInfo, state: InstanceState) -> InstanceStatus:
        return InstanceStatus(info.ident, info.version, state, self.info.runtime_id, info.manifest_digest)


def read_record(path: Path) -> Record:
    """One note."""
    return from_json(path.read_bytes(), Record, what=path.name)


def records(directory: Path) -> dict[str, Record]:
    """All notes by instance id."""
    return {path.name: read_record(path) for path in directory.iterdir()}


def is_alive(record: Record) -> bool:
    """Whether the process runs and is the noted one."""
    try:
        command = Path(f"/proc/{record.pid}/cmdline").read_bytes()
        state = Path(f"/proc/{record.pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    # While a process replaces its program it has no command line.
    return state != "Z" and (not command or instance_id(record.info.ident).encode() in command)


def end(record: Record) -> None:
    """Kill the process and wait for its end. It may or may not be a child of ours."""
    while is_alive(record):
        with contextlib.suppress(ProcessLookupError):
            os.kill(record.pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(record.pid, os.WNOHANG)
        time.sleep(0.01)


class NoNetworks:
    """Instances without networks; remembers what it was told."""

    def __init__(self) -> None:
        self.released: list[InstanceIdent] = []
        self.updates: list[FirewallUpdate] = []

    async def release_instance(self, ident: InstanceIdent) -> None:
        self.released.append(ident)

    def states(self) -> Iterable[InstanceNetworkState]:
        return ()

    async def update_firewall(self, update: FirewallUpdate) -> None:
        self.updates.append(update)


class NoMonitoring:
    """Samples as the test publishes them."""

    def __init__(self) -> None:
        self.samples: Broadcast[NodeMonitoring] = Broadcast("samples")

    def average(self) -> NodeMonitoring:
        return NodeMonitoring(MonitoringData(ram=5))


def empty_log(request: LogRequest) -> LogData:
    """The answer to a request for a log without lines."""
    return LogData(request.correlation_id, LogStatus.EMPTY, 1, 1)
