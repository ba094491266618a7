"""Brings the Unit to the desired status: stores each phase, runs its step, goes on after a restart (cm-cloud.md §3).

Decisions are in `plan` and `phases`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Collection, Sequence
from typing import Final, Protocol

import msgspec

from aoscore.cm.communication.envelope import Received
from aoscore.cm.communication.messages import (
    CertificateChain,
    DesiredItem,
    DesiredNodeState,
    DesiredStatus,
    ErrorInfo,
    ItemState,
    SigningCertificate,
    UnitConfig,
    UnitConfigStatus,
)
from aoscore.cm.imagemanager.store import Item
from aoscore.cm.launcher.model import RunRequest, UnitInstanceStatus
from aoscore.cm.nodeinfo import UnitNodeInfo
from aoscore.cm.updatemanager import plan
from aoscore.cm.updatemanager.gate import UpdateGate
from aoscore.cm.updatemanager.phases import Outcome, Phase, next_phase
from aoscore.cm.updatemanager.plan import Limits, Tried
from aoscore.cm.updatemanager.schedule import Kind, kind_of
from aoscore.cm.updatemanager.store import UpdateStore
from aoscore.common import types
from aoscore.common.aio import Backoff, Broadcast, comes_within, log_and_continue
from aoscore.common.errors import AosError, DeadlineError, InvalidArgumentError, first_cause, to_error_info
from aoscore.common.log import kv
from aoscore.common.types import ConfigState

_log = logging.getLogger(__name__)

STEP_ATTEMPTS: Final = 5
RETRY_GROWTH: Final = 30.0
_RECHECK_S: Final = 1.0
# How long it looks at nothing after it has looked at all instances.
_REST_PER_LOOK: Final = 10.0


class Images(Protocol):
    """The image manager."""

    def statuses(self) -> Sequence[Item]: ...

    async def download(
        self,
        items: Sequence[DesiredItem],
        certificates: Sequence[SigningCertificate],
        chains: Sequence[CertificateChain],
    ) -> None: ...

    async def fail(self, item_id: str, version: str, error: AosError) -> None: ...

    async def install(self, wanted: Collection[tuple[str, str]], keep: Collection[tuple[str, str]]) -> None: ...


class Launcher(Protocol):
    """Runs instances on nodes."""

    changed: Broadcast[list[UnitInstanceStatus]]

    async def run_instances(self, requests: list[RunRequest]) -> None: ...

    def requests(self) -> Sequence[RunRequest]: ...

    def statuses(self) -> Sequence[UnitInstanceStatus]: ...


class UnitConfigs(Protocol):
    """The unit config and its way to the nodes."""

    def status(self) -> UnitConfigStatus: ...

    def current(self) -> UnitConfig | None: ...

    async def check(self, config: UnitConfig) -> None: ...

    async def update(self, config: UnitConfig) -> None: ...


class Nodes(Protocol):
    """The nodes of the Unit."""

    def nodes(self) -> Sequence[UnitNodeInfo]: ...


class NodeControl(Protocol):
    """IAM, which pauses and resumes nodes."""

    async def pause_node(self, node_id: str) -> None: ...

    async def resume_node(self, node_id: str) -> None: ...


class Subjects(Protocol):
    """The subjects active on the Unit."""

    def subjects(self) -> Sequence[str]: ...


class Reporter(Protocol):
    """Tells the cloud."""

    async def send_full(self) -> None: ...

    def set_node_errors(self, errors: dict[str, types.ErrorInfo]) -> None: ...

    def set_unit_config_attempt(self, attempt: UnitConfigStatus) -> None: ...


class UpdateSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What the configuration says; times in seconds."""

    activating_s: float
    placement_s: float
    retry_pause_s: float = 60.0
    """A run that left something undone (a full disk, a blob that the cloud did not have) is repeated after it."""
    max_remove_percent: int = 100
    absent_means_keep: bool = False


class UpdateManager:
    """The update run, as a service. `on_desired_status` is the handler of the cloud's message."""

    def __init__(
        self,
        store: UpdateStore,
        settings: UpdateSettings,
        *,
        images: Images,
        launcher: Launcher,
        unit_configs: UnitConfigs,
        nodes: Nodes,
        node_control: NodeControl,
        subjects: Subjects,
        reporter: Reporter,
        gate: UpdateGate,
        alert: Callable[[str], None],
        is_lost: bool = False,
        backoff: Callable[[], Backoff] = lambda: Backoff(1.0, 60.0),
    ) -> None:
        """`backoff` makes the pauses between attempts of one step.

        `is_lost`: the database was damaged. What the cloud wants is then done anew even if it seems to be done.
        """
        self._store = store
        self._settings = settings
        self._images = images
        self._launcher = launcher
        self._unit_configs = unit_configs
        self._nodes = nodes
        self._node_control = node_control
        self._subjects = subjects
        self._reporter = reporter
        self._gate = gate
        self._alert = alert
        self._is_lost = is_lost
        self._backoff = backoff
        self._phase = Phase.NONE
        self._desired: DesiredStatus | None = None
        self._tried = Tried()
        self._refused: DesiredStatus | None = None
        self._retry_pause = Backoff(settings.retry_pause_s, RETRY_GROWTH * settings.retry_pause_s)
        self._retry_at: float | None = None
        """When what did not work in the last run is tried again; None when there is no such thing."""
        self._run = 0
        """Counts desired statuses that were accepted: a step whose number is an older one is outdated."""
        self._kept_back: Received | None = None
        """A desired status that could not be stored yet."""
        self._kept_back_changed = asyncio.Event()
        self._alerted = ""
        self._changed = asyncio.Event()
        self._loaded = asyncio.Event()
        self._lock = asyncio.Lock()
        self.progress: Broadcast[Phase] = Broadcast("update phases")

    @property
    def desired(self) -> DesiredStatus | None:
        """What the Unit is, or is being updated to."""
        return self._desired

    @property
    def phase(self) -> Phase:
        """Where the update run is."""
        return self._phase

    # ---- a desired status arrives

    async def on_desired_status(self, received: Received) -> None:
        """Takes in a desired status: starts a run, replaces the running one, or reports that nothing is to be done."""
        message = received.message
        if not isinstance(message, DesiredStatus):
            raise InvalidArgumentError("not a desired status")
        await self._loaded.wait()
        message, others = plan.without_other_types(message, self._images.statuses())
        received = received._replace(message=message, problems=(*received.problems, *others))
        for problem in received.problems:
            self._alert(f"desired status: {problem}")
            if problem.path.startswith("unitConfig"):
                self._report_unit_config("", InvalidArgumentError(str(problem)))
        for name in ("items", "instances"):
            if getattr(message, name) is None:
                _log.warning(kv("Desired status does not say what it wants", missing=name))
        self._kept_back = None
        try:
            async with self._lock:
                await self._take_in(message, received)
        except AosError as error:
            # The cloud has our ack and says it no second time.
            _log.error("Desired status is taken in later: %s", error)
            if self._alerted != str(error):
                self._alerted = str(error)
                self._alert(f"desired status is taken in later: {error}")
            self._kept_back = received
            self._kept_back_changed.set()
        else:
            self._alerted = ""

    async def _take_in_later(self) -> None:
        """Tries a desired status again that could not be stored, until that works or another one comes."""
        backoff = self._backoff()
        while True:
            if self._kept_back is None:
                backoff.reset()
                await self._kept_back_changed.wait()
            self._kept_back_changed.clear()
            await asyncio.sleep(backoff.next())
            if self._kept_back is not None:
                await self.on_desired_status(self._kept_back)

    async def _take_in(self, message: DesiredStatus, received: Received) -> None:
        """Decides what a desired status leads to.

        The cloud may answer each status of the Unit with its desired status: what is known already must not cause
        another status, or the two would never stop talking.
        """
        desired = plan.complete(
            message, received.problems, self._desired, absent_means_keep=self._settings.absent_means_keep
        )
        same = self._desired is not None and plan.is_same(desired, self._desired)
        if same and self._phase is not Phase.NONE:
            _log.info("Desired status is the one the Unit is being updated to")
            return
        try:
            plan.check_removals(desired, self._images.statuses(), self._settings.max_remove_percent)
        except AosError as error:
            if desired != self._refused:
                self._refused = desired
                _log.error("%s", error)
                self._alert(str(error))
                await self._reporter.send_full()
            return
        if self._phase is Phase.NONE:
            reasons = [*self._reasons(desired), *(["the database was lost"] if self._is_lost else [])]
            if not reasons:
                _log.info("The Unit is as desired")
                return
            if same and self._retry_at is not None:
                _log.info(kv("Desired status is tried again later", reasons="; ".join(reasons)))
                return
            _log.info(kv("Update starts", reasons="; ".join(reasons)))
        else:
            _log.info(kv("Update begins anew, the desired status changed", phase=self._phase))
        if not same:
            self._retry_pause.reset()
        await self._begin(desired)

    def _reasons(self, desired: DesiredStatus) -> list[str]:
        return plan.reasons_to_update(
            desired,
            self._desired,
            self._images.statuses(),
            self._nodes.nodes(),
            self._unit_configs.current(),
            self._tried,
        )

    async def _begin(self, desired: DesiredStatus) -> None:
        """Stores wish and phase together, then wakes the run."""
        await self._store.save(desired, Phase.DOWNLOADING)
        self._desired, self._phase = desired, Phase.DOWNLOADING
        self._refused = self._retry_at = None
        if self._is_lost:
            await self._store.forget_loss()
            self._is_lost = False
        self._run += 1
        self.progress.publish(self._phase)
        self._changed.set()

    # ---- the run

    async def run(self, started: Callable[[], None]) -> None:
        """Goes on where the last process stopped, then runs updates until cancelled."""
        try:
            self._desired, self._phase = await self._store.load()
        except AosError as error:
            # Better no update than one towards nothing: the cloud repeats its wish when it sees our status.
            _log.error("Interrupted update is given up: %s", error)
            self._alert(f"interrupted update is given up: {error}")
            with log_and_continue(_log, "Can't store that the update is given up"):
                await self._store.save_phase(Phase.NONE)
        if self._phase is not Phase.NONE:
            _log.info(kv("Interrupted update goes on", phase=self._phase))
        self._loaded.set()
        started()
        async with asyncio.TaskGroup() as group:
            group.create_task(self._take_in_later(), name="desired status kept back")
            group.create_task(self._run_updates(), name="update runs")

    async def _run_updates(self) -> None:
        backoff = self._backoff()
        while True:
            try:
                if self._phase is Phase.NONE and not await self._is_replaced(self._retry_in()):
                    await self._try_again()
                self._changed.clear()
                await self._step()
            except AosError as error:
                # What was to be stored is not, so the step is done again.
                _log.error("Update can't go on: %s", error)
                if self._alerted != str(error):
                    self._alerted = str(error)
                    self._alert(f"update can't go on: {error}")
                await self._is_replaced(backoff.next())
            else:
                backoff.reset()

    def _retry_in(self) -> float | None:
        if self._retry_at is None:
            return None
        return max(0.0, self._retry_at - asyncio.get_running_loop().time())

    async def _try_again(self) -> None:
        """Begins the run for the present desired status once more, if it has still not been reached."""
        async with self._lock:
            if self._phase is not Phase.NONE or self._desired is None:
                return
            reasons = self._reasons(self._desired)
            if reasons:
                _log.info(kv("Update is tried again", reasons="; ".join(reasons)))
                await self._begin(self._desired)
            self._retry_at = None

    async def _step(self) -> None:
        """Runs the step of the present phase and stores the next one, unless another desired status came."""
        phase, desired, run = self._phase, self._desired, self._run
        if phase is Phase.NONE or desired is None:
            return
        _log.info(kv("Update", phase=phase))
        outcome = await self._perform(phase, desired)
        async with self._lock:
            if run != self._run:
                return  # the phase and the desired status in the store are the new ones
            following = next_phase(phase, outcome) if outcome else Phase.NONE
            if outcome and following is Phase.NONE and await self._left_at_gate(desired):
                following = Phase.PENDING  # the other kind has its own time
            await self._save_phase(following)
            if following is Phase.NONE:
                left = self._reasons(desired)
                _log.info(kv("Update ended", left="; ".join(left)) if left else "Update ended, the Unit is as desired")
                if left:
                    self._retry_at = asyncio.get_running_loop().time() + self._retry_pause.next()
                with log_and_continue(_log, "Can't send unit status"):
                    await self._reporter.send_full()
                with log_and_continue(_log, "Can't keep a copy of the database"):
                    await self._store.keep_copy()

    async def _save_phase(self, phase: Phase) -> None:
        await self._store.save_phase(phase)
        self._phase = phase
        self.progress.publish(phase)

    async def _perform(self, phase: Phase, desired: DesiredStatus) -> Outcome | None:
        """Runs a step, again after a pause when it fails. None: given up, or another desired status came."""
        backoff = self._backoff()
        for attempt in range(STEP_ATTEMPTS):
            task = asyncio.create_task(self._steps[phase](self, desired), name=f"update {phase}")
            try:
                if not await self._finish(task):
                    return None
                return task.result()
            except Exception as error:
                cause = first_cause(error)
                if not isinstance(cause, AosError | OSError):
                    raise
                _log.error(kv("Update step failed", phase=phase, attempt=attempt + 1, error=cause))
                if attempt + 1 == STEP_ATTEMPTS:
                    self._alert(f"update is given up in phase {phase}: {cause}")
                    return None
            if await self._is_replaced(backoff.next()):
                return None
        return None

    async def _finish(self, task: asyncio.Task[Outcome]) -> bool:
        """Waits for a step; False when another desired status came and broke it off."""
        waiter = asyncio.create_task(self._changed.wait())
        try:
            await asyncio.wait({task, waiter}, return_when=asyncio.FIRST_COMPLETED)
            return task.done()
        finally:
            waiter.cancel()
            if not task.done():
                task.cancel()
                await asyncio.wait({task})

    async def _is_replaced(self, wait_s: float | None) -> bool:
        """Waits for another desired status; False when none came in time."""
        return await comes_within(self._changed, wait_s)

    # ---- the steps: each may be run twice

    async def _download(self, desired: DesiredStatus) -> Outcome:
        await self._images.download(desired.items or (), desired.certificates, desired.certificate_chains)
        return Outcome.DONE

    async def _wait_for_schedule(self, desired: DesiredStatus) -> Outcome:
        """The gate: lets through what may be updated now. What waited too long is marked as failed."""
        for kind in await self._gate.wait(plan.identity(desired), self._kinds(desired)):
            error = DeadlineError("update timeout: it was not started in time")
            _log.error(kv("Update is given up", kind=kind, error=error))
            self._alert(f"{kind} update is given up: {error}")
            for item in self._images.statuses():
                if kind_of(item.type) is kind and item.state is ItemState.PENDING:
                    await self._images.fail(item.item_id, item.version, error)
        return Outcome.DONE

    def _kinds(self, desired: DesiredStatus) -> frozenset[Kind]:
        """Kinds of which something is still to be done."""
        return plan.kinds_to_update(
            desired,
            self._images.statuses(),
            self._nodes.nodes(),
            self._unit_configs.current(),
            self._launcher.requests(),
            self._tried,
        )

    async def _left_at_gate(self, desired: DesiredStatus) -> frozenset[Kind]:
        return await self._gate.left(plan.identity(desired), self._kinds(desired))

    async def _part(self, desired: DesiredStatus) -> frozenset[Kind]:
        """Kinds that the gate let through."""
        return await self._gate.part(plan.identity(desired))

    async def updating(self) -> frozenset[Kind]:
        """Kinds that are being updated now."""
        if self._desired is None or self._phase in (Phase.NONE, Phase.DOWNLOADING, Phase.PENDING):
            return frozenset()
        return await self._part(self._desired)

    async def _configure(self, desired: DesiredStatus) -> Outcome:
        """Nodes and unit config. Errors are reported and do not keep the items from being updated."""
        if Kind.SOTA not in await self._part(desired):
            return Outcome.DONE
        errors: dict[str, types.ErrorInfo] = {}
        for node_id, state in plan.node_changes(desired, self._nodes.nodes()):
            try:
                if state is DesiredNodeState.PAUSED:
                    await self._node_control.pause_node(node_id)
                else:
                    await self._node_control.resume_node(node_id)
            except AosError as error:
                _log.error(kv("Can't change node state", nodeID=node_id, state=state, error=error))
                errors[node_id] = to_error_info(error)
        self._reporter.set_node_errors(errors)
        config = desired.unit_config
        failed_config = None
        if config is not None and config != self._unit_configs.current():
            try:
                await self._unit_configs.check(config)
                await self._unit_configs.update(config)
            except (AosError, OSError) as error:
                _log.error(kv("Can't install unit config", version=config.version, error=error))
                self._report_unit_config(config.version, error)
                failed_config = config
            else:
                self._report_unit_config(config.version, None)
        self._tried = Tried(frozenset(errors), failed_config)
        return Outcome.DONE

    def _report_unit_config(self, version: str, error: Exception | None) -> None:
        self._reporter.set_unit_config_attempt(
            UnitConfigStatus(
                version=version,
                state=ConfigState.FAILED if error else ConfigState.INSTALLED,
                error_info=ErrorInfo.of(to_error_info(error)) if error else None,
            )
        )

    async def _launch(self, desired: DesiredStatus) -> Outcome:
        wanted = plan.run_requests(desired, self._images.statuses())
        part = await self._part(desired)
        await self._launcher.run_instances(plan.requests_of_part(part, wanted, self._launcher.requests()))
        return Outcome.DONE

    async def _activate(self, desired: DesiredStatus) -> Outcome:
        """Waits until the instances run. New versions that do not are marked failed, to go back from."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        limits = Limits(activating_s=self._settings.activating_s, placement_s=self._settings.placement_s)
        part = await self._part(desired)
        if not plan.is_launched(part, plan.run_requests(desired, self._images.statuses()), self._launcher.requests()):
            # A restart between "this version does not work" and the launch of its predecessor.
            return Outcome.GO_BACK
        with self._launcher.changed.subscribe() as changes:
            while True:
                look_began = loop.time()
                items = self._images.statuses()
                verdict = plan.judge(
                    plan.requests_of_part(part, plan.run_requests(desired, items), ()),
                    self._launcher.statuses(),
                    self._subjects.subjects(),
                    elapsed_s=loop.time() - began,
                    limits=limits,
                )
                if verdict.settled:
                    break
                rest_s = _REST_PER_LOOK * (loop.time() - look_began)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_RECHECK_S):
                        await changes.get()
                        # Many come at once, and with thousands of instances a look is long.
                        await asyncio.sleep(rest_s)
                while not changes.empty():
                    changes.get_nowait()
        broken = plan.versions_to_give_up(verdict.failed, items)
        for (item_id, version), error in verdict.failed.items():
            _log.error(kv("Instance does not run", itemID=item_id, version=version, error=error))
        for (item_id, version), error in broken.items():
            _log.error(kv("Update goes back to the installed version", itemID=item_id, from_version=version))
            self._alert(f"update of item {item_id} to {version} does not work, going back: {error}")
            await self._images.fail(item_id, version, error)
        return Outcome.GO_BACK if broken else Outcome.DONE

    async def _finalize(self, desired: DesiredStatus) -> Outcome:
        part = await self._part(desired)
        await self._images.install(*plan.versions_of_part(part, desired, self._images.statuses()))
        return Outcome.DONE

    _steps: Final = {
        Phase.DOWNLOADING: _download,
        Phase.PENDING: _wait_for_schedule,
        Phase.INSTALLING: _configure,
        Phase.LAUNCHING: _launch,
        Phase.ACTIVATING: _activate,
        Phase.FINALIZING: _finalize,
    }
