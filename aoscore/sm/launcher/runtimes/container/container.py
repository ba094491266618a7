"""One running container: its state, its end, its restarts."""

import asyncio
import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime

import msgspec

from aoscore.common.aio import Worker, log_and_continue
from aoscore.common.errors import AosError, FailedError, to_error_info
from aoscore.common.log import kv
from aoscore.common.types import ErrorInfo, InstanceInfo, InstanceState, InstanceStatus
from aoscore.sm.launcher.runtimes.container.bundle import Bundle, BundleRecord
from aoscore.sm.launcher.runtimes.container.config import ContainerConfig
from aoscore.sm.launcher.runtimes.container.crun import describe_exit
from aoscore.sm.launcher.runtimes.container.engine import Engine
from aoscore.sm.launcher.runtimes.container.history import Run, RunHistory
from aoscore.sm.launcher.runtimes.container.output import ContainerOutput
from aoscore.sm.launcher.runtimes.container.restarts import RestartPolicy
from aoscore.sm.launcher.runtimes.container.spec import override_statuses
from aoscore.sm.processes import ProcessWatch

_log = logging.getLogger(__name__)


class Tools(msgspec.Struct, frozen=True):
    """What every container of a runtime works with."""

    config: ContainerConfig
    engine: Engine
    output: ContainerOutput
    history: RunHistory
    worker: Worker
    publish: Callable[[InstanceStatus], None]


class Container:
    """A container that runs or is under restart; `supervise` is its task."""

    def __init__(self, tools: Tools, bundle: Bundle, record: BundleRecord, *, adopted_pid: int | None = None) -> None:
        self._tools = tools
        self.bundle = bundle
        self.record = record
        self.adopted = adopted_pid is not None
        self.pid = adopted_pid or 0
        self.settled = asyncio.Event()
        """Set when it has been active or has ended for the first time."""
        self.watch: asyncio.Task[None] | None = None
        self._state = InstanceState.ACTIVE if self.adopted else InstanceState.ACTIVATING
        self._error: ErrorInfo | None = None
        self._policy = restart_policy(record, tools.config)

    @property
    def id(self) -> str:
        """Instance id."""
        return self.bundle.path.name

    @property
    def info(self) -> InstanceInfo:
        """What it was started with."""
        return self.record.info

    @property
    def is_active(self) -> bool:
        """Whether its process runs and has settled."""
        return self._state is InstanceState.ACTIVE

    def status(self) -> InstanceStatus:
        """Its present status."""
        return instance_status(self.info, self._state, self._error)

    def report(self, state: InstanceState, error: ErrorInfo | None = None) -> None:
        """Change its state and tell everybody."""
        self._state, self._error = state, error
        self._tools.publish(self.status())

    async def start(self) -> None:
        """Afterwards its process runs."""
        # What a process writes at once belongs to its run.
        started = time.time()
        self.pid = await self._tools.engine.run(self.id, self.bundle.path, self._tools.output)
        self.record = msgspec.structs.replace(self.record, started=started)

    async def supervise(self, *, ended: bool = False) -> None:
        """Report what becomes of it, and start it again whenever it ends, until cancelled.

        `ended`: we have ended it ourselves, to be started again at once.
        """
        settle_s = 0.0 if self.adopted else float(self._tools.config.settle_time_s)
        while True:
            pause_s = 0.0
            if not ended:
                with ProcessWatch(self.pid) as process:
                    if not await process.ended(settle_s):
                        self.report(InstanceState.ACTIVE)
                        self.settled.set()
                        await process.ended()
                pause_s = await self._on_end()
            ended = False
            while True:
                await asyncio.sleep(pause_s)
                try:
                    await self._restart()
                    break
                except (AosError, OSError) as error:
                    pause_s = self._policy.ended(0.0)
                    _log.error(kv("Can't restart instance", id=self.id, error=error, retry_in_s=round(pause_s, 1)))
                    self.report(InstanceState.FAILED, to_error_info(error))
            settle_s = float(self._tools.config.settle_time_s)

    async def _restart(self) -> None:
        """The same bundle again."""
        await self._tools.engine.delete(self.id)
        await self._tools.worker.run(self.bundle.mount_rootfs, self.record.overlays)
        self.report(InstanceState.ACTIVATING)
        await self.start()
        # Another process of ours may have to judge this run (sm-runtime.md §7, D34).
        self.record = msgspec.structs.replace(self.record, restarts=self._policy.restarts)
        await self._tools.worker.run(self.bundle.write_record, self.record)

    async def _on_end(self) -> float:
        """Report and note the end of a run; returns the pause before the next, seconds."""
        end = await self._tools.engine.exit(self.id, self.bundle.path)
        code, reason = end.code, describe_exit(end.code, out_of_memory=end.out_of_memory)
        pause_s = self._policy.ended(time.time() - self.record.started)
        restarts = self._policy.restarts - 1
        message = f"{reason}, {restarts} restarts" if restarts else reason
        _log.warning(kv("Instance ended", id=self.id, reason=message, restart_in_s=round(pause_s, 1)))
        self.report(InstanceState.FAILED, ErrorInfo(FailedError.aos_code, 1 if code is None else code, message))
        self.settled.set()
        with log_and_continue(_log, f"Can't note end of instance {self.id}"):
            run = ended_run(self.record, code, reason, crashed=True)
            await self._tools.worker.run(self._tools.history.note_end, self.id, run)
        return pause_s


def restart_policy(record: BundleRecord, config: ContainerConfig) -> RestartPolicy:
    """The policy of an instance, as its record left it (sm-runtime.md §7, D34)."""
    return RestartPolicy(record.run_parameters, limit_s=float(config.restart_limit_s), restarts=record.restarts)


def ended_run(record: BundleRecord, code: int | None, reason: str, *, crashed: bool) -> Run:
    """A line of the history for a run that has ended now."""
    return Run(datetime.fromtimestamp(record.started, UTC), datetime.now(UTC), code, reason, crashed)


def instance_status(info: InstanceInfo, state: InstanceState, error: ErrorInfo | None = None) -> InstanceStatus:
    """The status of an instance, with the results of its override variables."""
    return InstanceStatus(
        ident=info.ident,
        version=info.version,
        state=state,
        runtime_id=info.runtime_id,
        manifest_digest=info.manifest_digest,
        env_vars=override_statuses(info.env_vars),
        error=error,
    )
