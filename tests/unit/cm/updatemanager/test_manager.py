"""Update runs: phases on disk, steps repeated after a crash, going back, cancelling, errors of every step."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest

from aoscore.cm.communication.envelope import Received
from aoscore.cm.communication.messages import (
    AlertRules,
    CertificateChain,
    DesiredInstance,
    DesiredItem,
    DesiredNode,
    DesiredNodeState,
    DesiredStatus,
    DesiredSubject,
    Identity,
    ItemState,
    NodeConfig,
    PartitionRule,
    PercentRule,
    PointRule,
    ResourceRatios,
    SigningCertificate,
    SubjectType,
    UnitConfig,
    UnitConfigStatus,
)
from aoscore.cm.communication.reader import Problem
from aoscore.cm.database import UPDATE_GATE_TABLES, UPDATE_MANAGER_TABLES
from aoscore.cm.imagemanager.store import Item
from aoscore.cm.launcher.model import RunRequest, UnitInstanceStatus
from aoscore.cm.nodeinfo import UnitNodeInfo
from aoscore.cm.updatemanager.gate import GateStore, UpdateGate
from aoscore.cm.updatemanager.manager import UpdateManager, UpdateSettings
from aoscore.cm.updatemanager.phases import Phase
from aoscore.cm.updatemanager.schedule import Kind, Rule, Start
from aoscore.cm.updatemanager.store import UpdateStore
from aoscore.common.aio import Backoff, Broadcast
from aoscore.common.db import Database, Schema
from aoscore.common.errors import AosError, FailedError, NoSpaceError, SignatureError, to_error_info
from aoscore.common.types import (
    ConfigState,
    Duration,
    ErrorInfo,
    InstanceIdent,
    InstanceState,
    InstanceStatus,
    ItemType,
    NodeInfo,
    NodeState,
)
from tests.support.images import desired as wanted_item
from tests.support.running import running, until

SCHEMA = Schema(create=(*UPDATE_MANAGER_TABLES, *UPDATE_GATE_TABLES))
AT_ONCE, ON_TRIGGER = Rule(), Rule(type=Start.TRIGGER)
PHASES = ["downloading", "pending", "installing", "launching", "activating", "finalizing"]


class Unit:
    """The rest of CM and the nodes: what survives a crash of CM, and a record of what was asked of it."""

    def __init__(self) -> None:
        self.items: dict[tuple[str, str], Item] = {}
        self.bad: dict[str, AosError] = {}
        self.crashing: set[tuple[str, str]] = set()
        self.running: dict[str, str] = {}
        self.requests: list[RunRequest] = []
        self.config: UnitConfig | None = None
        self.config_error: AosError | None = None
        self.node_states = {"n1": NodeState.PROVISIONED}
        self.node_error: AosError | None = None
        self.reports = 0
        self.node_errors: dict[str, ErrorInfo] = {}
        self.attempts: list[UnitConfigStatus] = []
        self.alerts: list[str] = []
        self.trace: list[str] = []
        self.before: Callable[[str], Awaitable[None]] | None = None
        self.changed: Broadcast[list[UnitInstanceStatus]] = Broadcast("instances")
        self.activating: set[str] = set()
        self.gate: UpdateGate

    async def _enter(self, step: str) -> None:
        self.trace.append(step)
        if self.before:
            await self.before(step)

    # images

    def statuses(self) -> Sequence[Item]:
        return list(self.items.values())

    async def download(
        self,
        items: Sequence[DesiredItem],
        certificates: Sequence[SigningCertificate],
        chains: Sequence[CertificateChain],
    ) -> None:
        await self._enter("download")
        for item in items:
            known = self.items.get((item.item_id, item.version))
            if known is not None and known.state in (ItemState.INSTALLED, ItemState.PENDING):
                continue
            error = self.bad.get(item.version)
            self.items[item.item_id, item.version] = Item(
                item.item_id,
                item.item_type,
                item.version,
                item.index_digest,
                ItemState.FAILED if error else ItemState.PENDING,
                datetime.now(UTC),
                to_error_info(error) if error else None,
                isinstance(error, SignatureError),
            )

    async def fail(self, item_id: str, version: str, error: AosError) -> None:
        await self._enter("fail")
        self.items[item_id, version] = msgspec.structs.replace(
            self.items[item_id, version], state=ItemState.FAILED, error=to_error_info(error), final=True
        )

    async def install(self, wanted: Collection[tuple[str, str]], keep: Collection[tuple[str, str]] = ()) -> None:
        await self._enter("install")
        done = set()
        for key in wanted:
            if key in self.items and self.items[key].state is not ItemState.FAILED:
                self.items[key] = msgspec.structs.replace(self.items[key], state=ItemState.INSTALLED)
                done.add(key[0])
        for key in list(self.items):
            if (
                key not in wanted
                and key not in keep
                and (key[0] in done or key[0] not in {item_id for item_id, _ in wanted})
            ):
                del self.items[key]

    # launcher

    async def run_instances(self, requests: list[RunRequest]) -> None:
        await self._enter("launch " + " ".join(f"{entry.item_id}:{entry.version}" for entry in requests))
        self.requests = requests
        self.running = {entry.item_id: entry.version for entry in requests}

    def instances(self) -> list[UnitInstanceStatus]:
        found = []
        for item_id, version in self.running.items():
            state, error = InstanceState.ACTIVE, None
            if (item_id, version) in self.crashing:
                state, error = InstanceState.FAILED, ErrorInfo(1, 0, "exit code 1")
            if item_id in self.activating:
                state = InstanceState.ACTIVATING
            ident = InstanceIdent(item_id, "s", 0)
            found.append(UnitInstanceStatus(InstanceStatus(ident, version, state, error=error), "n1"))
        return found

    # the others

    async def pause_node(self, node_id: str) -> None:
        await self._enter(f"pause {node_id}")
        self._set_node(node_id, NodeState.PAUSED)

    async def resume_node(self, node_id: str) -> None:
        await self._enter(f"resume {node_id}")
        self._set_node(node_id, NodeState.PROVISIONED)

    def _set_node(self, node_id: str, state: NodeState) -> None:
        if self.node_error:
            raise self.node_error
        self.node_states[node_id] = state

    def nodes(self) -> Sequence[UnitNodeInfo]:
        return [UnitNodeInfo(NodeInfo(node_id, state=state)) for node_id, state in self.node_states.items()]

    def subjects(self) -> Sequence[str]:
        return []

    async def send_full(self) -> None:
        self.reports += 1

    def set_node_errors(self, errors: dict[str, ErrorInfo]) -> None:
        self.node_errors = errors

    def set_unit_config_attempt(self, attempt: UnitConfigStatus) -> None:
        self.attempts.append(attempt)

    @property
    def view(self) -> dict[str, str]:
        return {f"{item.item_id} {item.version}": item.state.value for item in self.items.values()}


class FakeLauncher:
    def __init__(self, unit: Unit) -> None:
        self._unit = unit
        self.changed = unit.changed

    async def run_instances(self, requests: list[RunRequest]) -> None:
        await self._unit.run_instances(requests)

    def requests(self) -> Sequence[RunRequest]:
        return self._unit.requests

    def statuses(self) -> Sequence[UnitInstanceStatus]:
        return self._unit.instances()


class FakeUnitConfigs:
    def __init__(self, unit: Unit) -> None:
        self._unit = unit

    def current(self) -> UnitConfig | None:
        return self._unit.config

    def status(self) -> UnitConfigStatus:
        return UnitConfigStatus(state=ConfigState.ABSENT)

    async def check(self, config: UnitConfig) -> None:
        if self._unit.config_error:
            raise self._unit.config_error

    async def update(self, config: UnitConfig) -> None:
        self._unit.config = config


@contextlib.asynccontextmanager
async def manager_of(
    unit: Unit, path: Path, retry_s: float = 3600.0, *, fota: Rule = AT_ONCE, sota: Rule = AT_ONCE, **more: Any
) -> AsyncIterator[UpdateManager]:
    settings: dict[str, Any] = {"activating_s": 5.0, "placement_s": 0.0, "retry_pause_s": retry_s} | more
    async with Database(path / "cm.db", SCHEMA) as database:
        unit.gate = UpdateGate(GateStore(database), {Kind.FOTA: fota, Kind.SOTA: sota})
        manager = UpdateManager(
            UpdateStore(database),
            UpdateSettings(**settings),
            images=unit,
            launcher=FakeLauncher(unit),
            unit_configs=FakeUnitConfigs(unit),
            nodes=unit,
            node_control=unit,
            subjects=unit,
            reporter=unit,
            gate=unit.gate,
            alert=unit.alerts.append,
            backoff=lambda: Backoff(0.01, 0.02),
        )
        async with running(manager):
            yield manager


def desired(*versions: tuple[str, str], **more: Any) -> DesiredStatus:
    values: dict[str, Any] = {
        "items": tuple(wanted_item(item_id, version, "d" + version) for item_id, version in versions),
        "instances": tuple(
            DesiredInstance(item=Identity(id=item_id), subject=Identity(id="s")) for item_id, _ in versions
        ),
    }
    return DesiredStatus(**(values | more))


async def give(manager: UpdateManager, status: DesiredStatus, *problems: Problem) -> None:
    await manager.on_desired_status(Received("t", status, problems))


async def finished(manager: UpdateManager) -> None:
    async with asyncio.timeout(10):
        while manager.phase is not Phase.NONE:
            await asyncio.sleep(0.005)


async def apply(manager: UpdateManager, status: DesiredStatus) -> None:
    await give(manager, status)
    await finished(manager)


async def row(path: Path) -> tuple[str, str]:
    async with Database(path / "cm.db", SCHEMA) as database:
        rows = await database.select("SELECT desiredStatus, updateState FROM updatemanager")
        return str(rows[0][0]), str(rows[0][1])


async def test_a_run_from_wish_to_report(tmp_path: Path) -> None:
    unit = Unit()
    async with manager_of(unit, tmp_path) as manager:
        await apply(manager, desired(("a", "1"), ("b", "1")))
        assert unit.view == {"a 1": "installed", "b 1": "installed"}
        assert unit.trace == ["download", "launch a:1 b:1", "install"]
        assert unit.reports == 1
    assert (await row(tmp_path))[1] == "none"


async def test_what_is_known_already_causes_no_status(tmp_path: Path) -> None:
    """A cloud that answers each status with its desired status must not keep the two talking for ever."""
    unit = Unit()
    async with manager_of(unit, tmp_path, max_remove_percent=50) as manager:
        await apply(manager, desired(("a", "1")))
        for _ in range(3):
            await give(manager, desired(("a", "1")))
        assert manager.phase is Phase.NONE
        assert (unit.reports, len(unit.trace)) == (1, 3)
        for _ in range(3):
            await give(manager, desired())  # refused
        assert (unit.reports, len(unit.alerts)) == (2, 1)
        unit.bad = {"2": FailedError("disk is full")}
        for _ in range(3):
            await apply(manager, desired(("a", "2")))
        assert unit.reports == 3 and unit.trace.count("download") == 2


async def test_what_failed_for_a_while_is_tried_again(tmp_path: Path) -> None:
    unit = Unit()
    unit.bad = {"1": FailedError("disk is full")}
    async with manager_of(unit, tmp_path, retry_s=0.05) as manager:
        await apply(manager, desired(("a", "1")))
        assert unit.view == {"a 1": "failed"}
        unit.bad = {}
        async with asyncio.timeout(5):
            while unit.view != {"a 1": "installed"}:
                await asyncio.sleep(0.01)
        await finished(manager)
        downloads = unit.trace.count("download")
        await asyncio.sleep(0.2)
        assert unit.trace.count("download") == downloads


async def test_what_failed_for_good_is_not_tried_again(tmp_path: Path) -> None:
    unit = Unit()
    unit.bad = {"1": SignatureError("wrong")}
    async with manager_of(unit, tmp_path, retry_s=0.05) as manager:
        await apply(manager, desired(("a", "1")))
        await asyncio.sleep(0.2)
        assert unit.trace.count("download") == 1


class Crash:
    """Stops the world at one point of a run."""

    def __init__(self, unit: Unit, phase: str) -> None:
        self._step = {"downloading": "download", "launching": "launch", "finalizing": "install"}.get(phase, phase)
        self.reached = asyncio.Event()
        unit.before = self._wait

    async def _wait(self, step: str) -> None:
        if step.split()[0] == self._step:
            self.reached.set()
            await asyncio.get_running_loop().create_future()


@pytest.mark.parametrize("phase", PHASES)
async def test_after_a_crash_in_any_phase_the_end_is_the_same(tmp_path: Path, phase: str) -> None:
    unit = Unit()
    async with manager_of(unit, tmp_path) as manager:
        await apply(manager, desired(("a", "1")))
    status = desired(
        ("a", "2"),
        ("b", "1"),
        nodes=(DesiredNode(item=Identity.of_codename("n1"), state=DesiredNodeState.PAUSED),),
        unit_config=UnitConfig(version="1.0.0"),
    )
    # What a crash leaves is the row of the phase and whatever the steps before have done.
    async with manager_of(unit, tmp_path) as manager:
        saved: list[Phase] = []
        save = manager._store.save_phase

        async def save_and_die(value: Phase) -> None:
            await save(value)
            saved.append(value)
            if value == phase:
                await asyncio.get_running_loop().create_future()

        manager._store.save_phase = save_and_die  # type: ignore[assignment]
        if phase == "downloading":
            crash = Crash(unit, phase)
            await give(manager, status)
            await crash.reached.wait()
        else:
            await give(manager, status)
            async with asyncio.timeout(5):
                while not saved or saved[-1] != phase:
                    await asyncio.sleep(0.005)
    unit.before = None
    assert (await row(tmp_path))[1] == phase
    async with manager_of(unit, tmp_path) as manager:
        await finished(manager)
    assert unit.view == {"a 2": "installed", "b 1": "installed"}
    assert unit.running == {"a": "2", "b": "1"}
    assert unit.node_states == {"n1": NodeState.PAUSED}
    assert unit.config == UnitConfig(version="1.0.0")
    assert (await row(tmp_path))[1] == "none"
    assert not unit.alerts


@pytest.mark.parametrize("step", ["download", "launch", "install", "pause"])
async def test_a_stop_in_the_middle_of_a_step_keeps_the_update(tmp_path: Path, step: str) -> None:
    """AosCore 9.1 forgets an update that is stopped while downloading (cm-cloud.md §3.6)."""
    unit = Unit()
    status = desired(("a", "1"), nodes=(DesiredNode(item=Identity.of_codename("n1"), state=DesiredNodeState.PAUSED),))
    async with manager_of(unit, tmp_path) as manager:
        crash = Crash(unit, step)
        await give(manager, status)
        await crash.reached.wait()
    unit.before = None
    assert (await row(tmp_path))[1] != "none"
    async with manager_of(unit, tmp_path) as manager:
        await finished(manager)
    assert unit.view == {"a 1": "installed"} and unit.running == {"a": "1"}


async def test_a_version_that_does_not_run_gives_way_to_its_predecessor(tmp_path: Path) -> None:
    unit = Unit()
    async with manager_of(unit, tmp_path) as manager:
        await apply(manager, desired(("a", "1"), ("b", "1")))
        unit.crashing = {("a", "2")}
        unit.trace.clear()
        await apply(manager, desired(("a", "2"), ("b", "2")))
        assert unit.view == {"a 1": "installed", "a 2": "failed", "b 2": "installed"}
        assert unit.running == {"a": "1", "b": "2"}
        assert unit.trace == ["download", "launch a:2 b:2", "fail", "launch a:1 b:2", "install"]
        error = unit.items["a", "2"].error
        assert error is not None and error.message == "exit code 1"
        assert any("going back" in alert for alert in unit.alerts)
        # The same wish again changes nothing; another one is tried.
        unit.trace.clear()
        await apply(manager, desired(("a", "2"), ("b", "2")))
        assert unit.trace == []
        await apply(manager, desired(("a", "3"), ("b", "2")))
        assert unit.running == {"a": "3", "b": "2"}


@pytest.mark.parametrize("after", ["fail", "launch a:1", "install"])
async def test_a_crash_while_going_back(tmp_path: Path, after: str) -> None:
    unit = Unit()
    async with manager_of(unit, tmp_path) as manager:
        await apply(manager, desired(("a", "1")))
    unit.crashing = {("a", "2")}
    reached = asyncio.Event()

    async def stop(step: str) -> None:
        if step == after:
            reached.set()
            await asyncio.get_running_loop().create_future()

    unit.before = stop
    async with manager_of(unit, tmp_path) as manager:
        await give(manager, desired(("a", "2")))
        await reached.wait()
    unit.before = None
    async with manager_of(unit, tmp_path) as manager:
        await finished(manager)
    assert unit.view == {"a 1": "installed", "a 2": "failed"} and unit.running == {"a": "1"}


async def test_a_crash_between_the_verdict_and_the_way_back(tmp_path: Path) -> None:
    unit = Unit()
    async with manager_of(unit, tmp_path) as manager:
        await apply(manager, desired(("a", "1")))
    unit.crashing = {("a", "2")}
    original, judged = unit.fail, asyncio.Event()

    async def fail(item_id: str, version: str, error: AosError) -> None:
        await original(item_id, version, error)
        judged.set()
        await asyncio.Event().wait()  # the process ends here

    unit.fail = fail  # type: ignore[method-assign]
    async with manager_of(unit, tmp_path) as manager:
        await give(manager, desired(("a", "2")))
        await judged.wait()
    unit.fail = original  # type: ignore[method-assign]
    async with manager_of(unit, tmp_path) as manager:
        await finished(manager)
    assert unit.view == {"a 1": "installed", "a 2": "failed"} and unit.running == {"a": "1"}


async def test_a_new_item_that_does_not_run_stays(tmp_path: Path) -> None:
    unit = Unit()
    unit.crashing = {("a", "1")}
    async with manager_of(unit, tmp_path) as manager:
        await apply(manager, desired(("a", "1"), ("b", "1")))
    assert unit.view == {"a 1": "installed", "b 1": "installed"} and unit.running == {"a": "1", "b": "1"}


async def test_a_version_that_stays_activating_is_given_up_after_the_time_limit(tmp_path: Path) -> None:
    unit = Unit()
    async with manager_of(unit, tmp_path, activating_s=0.2) as manager:
        await apply(manager, desired(("a", "1")))

        async def hang(step: str) -> None:
            unit.activating = {"a"} if step == "launch a:2" else set()

        unit.before = hang
        await apply(manager, desired(("a", "2")))
        error = unit.items["a", "2"].error
        assert error is not None and error.aos_code == 7
        assert unit.running == {"a": "1"}


async def test_an_item_that_cannot_be_downloaded_keeps_its_old_version_and_holds_up_nobody(tmp_path: Path) -> None:
    unit = Unit()
    async with manager_of(unit, tmp_path) as manager:
        await apply(manager, desired(("a", "1")))
        unit.bad = {"2": SignatureError("wrong signature")}
        await apply(manager, desired(("a", "2"), ("b", "1")))
        assert unit.view == {"a 1": "installed", "a 2": "failed", "b 1": "installed"}
        assert unit.running == {"a": "1", "b": "1"}


@pytest.mark.parametrize("phase", [phase for phase in PHASES if phase != "pending"])
async def test_another_wish_breaks_off_a_step_in_any_phase(tmp_path: Path, phase: str) -> None:
    """The step would never end by itself. The gate, whose waiting is phase pending, has a test of its own below."""
    unit = Unit()
    steps = {"downloading": "download", "installing": "pause n1", "launching": "launch a:1", "finalizing": "install"}
    node = DesiredNode(item=Identity.of_codename("n1"), state=DesiredNodeState.PAUSED)
    inside = asyncio.Event()

    async def hang(step: str) -> None:
        if step == steps.get(phase) and not inside.is_set():
            inside.set()
            await asyncio.Event().wait()

    unit.before = hang
    async with manager_of(unit, tmp_path, activating_s=3600.0) as manager:
        if phase == "activating":
            unit.activating = {"a"}
        await give(manager, desired(("a", "1"), nodes=(node,)))
        if phase != "activating":
            await inside.wait()
        await until(lambda: manager.phase == phase)
        unit.activating = set()
        reports = unit.reports
        for version in ("2", "3"):
            await give(manager, desired(("a", version), nodes=(node,)))
        await finished(manager)
        assert unit.running == {"a": "3"} and unit.view["a 3"] == "installed"  # the last one wins
        assert "launch a:2" not in unit.trace
        assert unit.reports == reports + 1  # nothing is said about the runs that were replaced


@pytest.mark.parametrize("full_from", range(8))
async def test_a_full_disk_under_the_database_loses_no_wish_and_heals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full_from: int
) -> None:
    """From some write on every one fails; then there is space again."""
    unit = Unit()
    writes, is_full = 0, True

    original = UpdateStore._write

    async def write(self: UpdateStore, statement: str, values: tuple[str, ...]) -> None:
        nonlocal writes
        writes += 1
        if is_full and writes > full_from:
            raise NoSpaceError("database cm.db: no space left")
        await original(self, statement, values)

    monkeypatch.setattr(UpdateStore, "_write", write)
    async with manager_of(unit, tmp_path) as manager:
        await give(manager, desired(("a", "1")))
        if full_from < 7:  # a run writes the wish and six phases
            await until(lambda: writes > full_from + 3)
            assert len(unit.alerts) == 1 and "no space left" in unit.alerts[0]
        is_full = False
        await until(lambda: unit.view == {"a 1": "installed"} and manager.phase is Phase.NONE)
    assert (await row(tmp_path))[1] == "none" and unit.running == {"a": "1"}


async def test_a_wish_that_could_not_be_stored_gives_way_to_a_newer_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unit = Unit()
    original = UpdateStore.save

    async def save(self: UpdateStore, desired: DesiredStatus, phase: Phase) -> None:
        if desired.items and desired.items[0].version == "1":
            raise NoSpaceError("database cm.db: no space left")
        await original(self, desired, phase)

    monkeypatch.setattr(UpdateStore, "save", save)
    async with manager_of(unit, tmp_path) as manager:
        await give(manager, desired(("a", "1")))
        await until(lambda: unit.alerts)
        await apply(manager, desired(("a", "2")))
        assert unit.running == {"a": "2"} and unit.trace == ["download", "launch a:2", "install"]


async def test_the_same_wish_does_not_disturb_the_run(tmp_path: Path) -> None:
    unit = Unit()
    unit.activating = {"a"}
    async with manager_of(unit, tmp_path) as manager:
        await give(manager, desired(("a", "1")))
        while manager.phase is not Phase.ACTIVATING:
            await asyncio.sleep(0.005)
        await give(manager, desired(("a", "1")))
        await asyncio.sleep(0.05)
        assert unit.trace == ["download", "launch a:1"]
        unit.activating = set()
        await finished(manager)


async def test_nodes_and_unit_config_report_their_errors_and_hold_up_nothing(tmp_path: Path) -> None:
    unit = Unit()
    unit.node_error = FailedError("node is away")
    unit.config_error = FailedError("node refuses")
    status = desired(
        ("a", "1"),
        nodes=(DesiredNode(item=Identity.of_codename("n1"), state=DesiredNodeState.PAUSED),),
        unit_config=UnitConfig(version="2.0.0"),
    )
    async with manager_of(unit, tmp_path) as manager:
        await apply(manager, status)
        assert unit.view == {"a 1": "installed"}
        assert unit.node_errors["n1"].message == "node is away"
        assert (unit.attempts[0].version, unit.attempts[0].state) == ("2.0.0", ConfigState.FAILED)
        trace = len(unit.trace)
        await apply(manager, status)  # the cloud repeats it at each connect
        assert len(unit.trace) == trace
        unit.node_error = unit.config_error = None
        await apply(manager, msgspec.structs.replace(status, unit_config=UnitConfig(version="2.0.1")))
        assert unit.node_states == {"n1": NodeState.PAUSED} and unit.config == UnitConfig(version="2.0.1")


async def test_nodes_that_are_as_wished_are_left_alone(tmp_path: Path) -> None:
    unit = Unit()
    node = DesiredNode(item=Identity.of_codename("n1"), state=DesiredNodeState.PROVISIONED)
    async with manager_of(unit, tmp_path) as manager:
        await apply(manager, desired(("a", "1"), nodes=(node,)))
        assert "resume n1" not in unit.trace


async def test_a_step_that_fails_is_repeated_then_given_up(tmp_path: Path) -> None:
    unit = Unit()
    failures = 3

    async def fail(step: str) -> None:
        nonlocal failures
        if step.startswith("launch") and failures:
            failures -= 1
            raise FailedError("database is busy")

    unit.before = fail
    async with manager_of(unit, tmp_path) as manager:
        await apply(manager, desired(("a", "1")))
        assert unit.running == {"a": "1"} and not unit.alerts
        failures = 10**6
        await apply(manager, desired(("a", "2")))
        assert any("given up in phase launching" in alert for alert in unit.alerts)
        assert unit.view["a 1"] == "installed" and unit.running == {"a": "1"}
        failures = 0
        await apply(manager, desired(("a", "3")))
        assert unit.running == {"a": "3"}


@pytest.mark.parametrize(
    ("text", "phase"),
    [
        ("{ not json", "launching"),
        ("{}", "downloading"),
        ('{"items": [{"version": "1"}]}', "activating"),
        ('{"items": []}', "dancing"),
    ],
)
async def test_a_stored_wish_that_cannot_be_read_removes_nothing(tmp_path: Path, text: str, phase: str) -> None:
    """AosCore 9.1 goes on with an empty one, which removes every item (cm-cloud.md §3.6)."""
    unit = Unit()
    async with manager_of(unit, tmp_path) as manager:
        await apply(manager, desired(("a", "1")))
    async with Database(tmp_path / "cm.db", Schema(create=UPDATE_MANAGER_TABLES)) as database:
        await database.execute("UPDATE updatemanager SET desiredStatus = ?, updateState = ?", (text, phase))
    trace = len(unit.trace)
    async with manager_of(unit, tmp_path) as manager:
        await asyncio.sleep(0.05)
        assert manager.phase is Phase.NONE and len(unit.trace) == trace
        assert len(unit.alerts) == 1
        await apply(manager, desired(("a", "2")))
        assert unit.running == {"a": "2"}


async def test_a_wish_with_unreadable_parts(tmp_path: Path) -> None:
    unit = Unit()
    async with manager_of(unit, tmp_path) as manager:
        await apply(manager, desired(("a", "1"), ("b", "1")))
        problems = (
            Problem("items[1].owner", "missing"),
            Problem("instances[1].item", "missing"),
            Problem("unitConfig.version", "text expected, got 7"),
        )
        await give(manager, desired(("a", "2")), *problems)
        await finished(manager)
        assert unit.view == {"a 2": "installed", "b 1": "installed"}
        assert unit.running == {"a": "2", "b": "1"}
        assert len(unit.alerts) == 3
        assert unit.attempts[0].state is ConfigState.FAILED
        assert unit.attempts[0].error_info is not None and "version" in unit.attempts[0].error_info.message


async def test_an_item_that_is_known_under_another_type_stays_what_it_is(tmp_path: Path) -> None:
    """Its key has no type (database.md §6, item 17)."""
    unit = Unit()
    async with manager_of(unit, tmp_path) as manager:
        await apply(manager, desired(("a", "1"), ("b", "1")))
        status = desired(("a", "1"), ("b", "2"))
        assert status.items is not None
        component = msgspec.structs.replace(status.items[0], item=Identity(id="a", type=ItemType.COMPONENT))
        await apply(manager, msgspec.structs.replace(status, items=(component, status.items[1])))
        assert unit.view == {"a 1": "installed", "b 2": "installed"}
        assert unit.running == {"a": "1", "b": "2"} and unit.items["a", "1"].type is ItemType.SERVICE
        assert unit.alerts == [
            "desired status: items[0].item.type: item a 1 is known as service, so it can't be a component"
        ]


async def test_too_many_removals(tmp_path: Path) -> None:
    unit = Unit()
    async with manager_of(unit, tmp_path, max_remove_percent=50) as manager:
        await apply(manager, desired(("a", "1"), ("b", "1")))
        await apply(manager, desired())
        assert len(unit.view) == 2 and "would remove 2 of 2" in unit.alerts[0] and unit.reports == 2
        await apply(manager, desired(("a", "1")))
        assert unit.view == {"a 1": "installed"}


async def test_the_row_is_in_the_form_of_9_1(tmp_path: Path) -> None:
    unit = Unit()
    config = UnitConfig(format_version="1", version="1.0.0")
    status = msgspec.structs.replace(desired(("a", "1"), unit_config=config), correlation_id="c")
    async with manager_of(unit, tmp_path) as manager:
        await apply(manager, status)
    document = msgspec.json.decode((await row(tmp_path))[0])
    assert set(document) == {"unitConfig", "items", "instances"}
    assert document["items"] == [
        {"item": {"id": "a", "type": "service"}, "version": "1", "owner": {"id": "owner"}, "indexDigest": "d1"}
    ]
    assert document["instances"] == [{"item": {"id": "a"}, "subject": {"id": "s"}, "priority": 0, "numInstances": 1}]


async def test_every_part_of_a_wish_survives(tmp_path: Path) -> None:
    part = NodeConfig(
        node=Identity.of_codename("n1"),
        node_group_subject=Identity.of_codename("main"),
        alert_rules=AlertRules(
            cpu=PercentRule(min_threshold=70.5, max_threshold=80.0, min_timeout=Duration(90)),
            partitions=(PartitionRule(name="p", min_threshold=1.0, max_threshold=2.0),),
            download=PointRule(min_threshold=1, max_threshold=2**40),
        ),
        resource_ratios=ResourceRatios(cpu=50.0),
        labels=("l1", "l2"),
        priority=7,
    )
    instance = DesiredInstance(
        item=Identity(id="a"), subject=Identity(id="s"), priority=5, num_instances=0, labels=("l1",)
    )
    status = DesiredStatus(
        nodes=(DesiredNode(item=Identity.of_codename("n1"), state=DesiredNodeState.PAUSED),),
        unit_config=UnitConfig(format_version="1", version="1.0.0", nodes=(part,)),
        items=(wanted_item("a", "1", "d"),),
        instances=(instance,),
        subjects=(DesiredSubject(identity=Identity(id="s"), type=SubjectType.USER, is_reported_from_unit=True),),
        certificates=(SigningCertificate(certificate=bytes(range(256)), fingerprint="f"),),
        certificate_chains=(CertificateChain(name="c", fingerprints=("f", "g")),),
    )
    async with Database(tmp_path / "cm.db", SCHEMA) as database:
        store = UpdateStore(database)
        await store.save(msgspec.structs.replace(status, correlation_id="c"), Phase.ACTIVATING)
        assert await store.load() == (status, Phase.ACTIVATING)


# Firmware and software at different times


def mixed(component: str, service: str, **more: Any) -> DesiredStatus:
    """A desired status with a component "os" and a service "app"."""
    status = desired(("os", component), ("app", service), **more)
    assert status.items is not None
    os_item = msgspec.structs.replace(status.items[0], item=Identity(id="os", type=ItemType.COMPONENT))
    return msgspec.structs.replace(status, items=(os_item, status.items[1]))


async def at_gate(unit: Unit, *kinds: Kind) -> None:
    async with asyncio.timeout(10):
        while unit.gate.ready != frozenset(kinds):
            await asyncio.sleep(0.005)


async def test_software_is_updated_while_firmware_waits_for_its_start(tmp_path: Path) -> None:
    unit = Unit()
    async with manager_of(unit, tmp_path) as manager:
        await apply(manager, mixed("1", "1"))
    unit.trace.clear()
    async with manager_of(unit, tmp_path, fota=ON_TRIGGER) as manager:
        await give(manager, mixed("2", "2"))
        await at_gate(unit, Kind.FOTA)
        assert unit.view == {"os 1": "installed", "os 2": "pending", "app 2": "installed"}
        assert unit.running == {"os": "1", "app": "2"}
        assert manager.phase is Phase.PENDING
        unit.gate.start(Kind.FOTA)
        await finished(manager)
        assert unit.view == {"os 2": "installed", "app 2": "installed"}
        assert unit.running == {"os": "2", "app": "2"}
    assert unit.trace == ["download", "launch app:2 os:1", "install", "launch os:2 app:2", "install"]


async def test_an_update_of_one_kind_goes_on_with_it_after_a_restart(tmp_path: Path) -> None:
    """Killed while the software is updated: the firmware must not come along with it."""
    unit = Unit()
    async with manager_of(unit, tmp_path) as manager:
        await apply(manager, mixed("1", "1"))
    for phase in ("launching", "finalizing"):
        crash = Crash(unit, phase)
        async with manager_of(unit, tmp_path, fota=ON_TRIGGER) as manager:
            await give(manager, mixed("2", "2"))
            await crash.reached.wait()
        unit.before = None
    async with manager_of(unit, tmp_path, fota=ON_TRIGGER) as manager:
        await at_gate(unit, Kind.FOTA)
        assert unit.running == {"os": "1", "app": "2"}
        assert await manager.updating() == frozenset()
        unit.gate.start(Kind.FOTA)
        await finished(manager)
        assert unit.running == {"os": "2", "app": "2"}


async def test_what_was_not_started_in_time_is_given_up(tmp_path: Path) -> None:
    unit = Unit()
    async with manager_of(unit, tmp_path) as manager:
        await apply(manager, mixed("1", "1"))
    rule = Rule(type=Start.TRIGGER, ttl=Duration(0.2))
    async with manager_of(unit, tmp_path, fota=rule) as manager:
        await apply(manager, mixed("2", "2"))
        assert unit.view == {"os 1": "installed", "os 2": "failed", "app 2": "installed"}
        assert unit.running == {"os": "1", "app": "2"}
        error = unit.items["os", "2"].error
        assert error is not None and "update timeout" in error.message
        assert unit.alerts == ["fota update is given up: update timeout: it was not started in time"]
        # The cloud may repeat itself: what was given up stays so.
        await apply(manager, mixed("2", "2"))
        assert len(unit.alerts) == 1


async def test_another_desired_status_replaces_one_that_waits(tmp_path: Path) -> None:
    unit = Unit()
    async with manager_of(unit, tmp_path, fota=ON_TRIGGER, sota=ON_TRIGGER) as manager:
        await give(manager, mixed("1", "1"))
        await at_gate(unit, Kind.FOTA, Kind.SOTA)
        await give(manager, mixed("2", "2"))
        async with asyncio.timeout(10):
            while unit.view.get("os 2") != "pending":
                await asyncio.sleep(0.005)
        await at_gate(unit, Kind.FOTA, Kind.SOTA)
        unit.gate.start(Kind.SOTA)
        await at_gate(unit, Kind.FOTA)
        assert unit.running == {"app": "2"}
        unit.gate.start(Kind.FOTA)
        await finished(manager)
        assert unit.view == {"os 2": "installed", "app 2": "installed"}


async def test_unit_config_and_node_states_are_software(tmp_path: Path) -> None:
    unit = Unit()
    config = UnitConfig(version="7")
    node = DesiredNode(item=Identity(codename="n1"), state=DesiredNodeState.PAUSED)
    async with manager_of(unit, tmp_path, sota=ON_TRIGGER) as manager:
        await give(manager, DesiredStatus(items=(), instances=(), unit_config=config, nodes=(node,)))
        await at_gate(unit, Kind.SOTA)
        assert (unit.config, unit.node_states["n1"]) == (None, NodeState.PROVISIONED)
        unit.gate.start(Kind.SOTA)
        await finished(manager)
        assert (unit.config, unit.node_states["n1"]) == (config, NodeState.PAUSED)
