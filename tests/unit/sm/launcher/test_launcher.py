"""The launcher with a real database and fake partners: order of steps, statuses, restart, failures."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable, Sequence, Set
from datetime import datetime
from pathlib import Path

import msgspec
import pytest

from aoscore.common.aio import Backoff, Broadcast
from aoscore.common.db import Database
from aoscore.common.errors import AosError, FailedError, NoSpaceError, NotFoundError
from aoscore.common.oci import ImageConfig, ItemConfig
from aoscore.common.types import (
    AlertRulePercents,
    AlertRulePoints,
    AlertRules,
    Duration,
    EnvVar,
    ErrorInfo,
    InstanceIdent,
    InstanceInfo,
    InstanceState,
    InstanceStatus,
    ItemType,
    MonitoringParameters,
    PartitionAlertRule,
    RuntimeInfo,
)
from aoscore.sm.database import open_database
from aoscore.sm.imagemanager.model import InstalledImage, ItemKey, item_key
from aoscore.sm.launcher.launcher import Launcher
from aoscore.sm.launcher.model import NodeStatuses
from aoscore.sm.launcher.runtimes.base import RunningInstance, SampleTarget, instance_id
from aoscore.sm.launcher.store import Changes, LauncherStore
from tests.support.running import until

MIGRATION = Path(__file__).resolve().parents[4] / "aoscore" / "sm" / "migration"


def info(item: str, version: str = "1.0.0", *, priority: int = 0, runtime: str = "runtime") -> InstanceInfo:
    return InstanceInfo(
        InstanceIdent(item, "subject", 0), version, f"sha256:{item}-{version}", "owner", runtime, priority=priority
    )


A, A2, B = info("a"), info("a", "2.0.0"), info("b")


class FakeRuntime:
    """Runs nothing; remembers what it was asked for in `calls`. Instances in `survivors` are found at adoption."""

    def __init__(self, runtime_id: str = "runtime", survivors: Iterable[InstanceInfo] = ()) -> None:
        self.info = RuntimeInfo(runtime_id, "fake")
        self.changed: Broadcast[InstanceStatus] = Broadcast("fake")
        self.reboot_due = asyncio.Event()
        self.reboots = 0
        self.instances: dict[InstanceIdent, InstanceInfo] = {info.ident: info for info in survivors}
        self.calls: list[str] = []
        self.stops: list[tuple[str, bool]] = []
        self.start_errors: dict[str, AosError] = {}
        self.stop_errors: dict[str, AosError] = {}
        self.delay_s = 0.0
        self.parallel = 0
        self.most_parallel = 0

    async def run(self, started: Callable[[], None]) -> None:
        started()
        await asyncio.Event().wait()

    async def adopt(self, stored: Sequence[InstanceInfo]) -> list[RunningInstance]:
        known = {info.ident: info for info in stored}
        self.instances = {ident: info for ident, info in self.instances.items() if known.get(ident) == info}
        return self.running()

    def running(self) -> list[RunningInstance]:
        return [
            RunningInstance(ident, instance_id(ident), True, self.status(info, InstanceState.ACTIVE))
            for ident, info in self.instances.items()
        ]

    async def start_instance(self, info: InstanceInfo, image: InstalledImage) -> None:
        self.calls.append(f"start {info.ident.item_id} {info.version}")
        self.parallel += 1
        self.most_parallel = max(self.most_parallel, self.parallel)
        try:
            await asyncio.sleep(self.delay_s)
            if error := self.start_errors.get(info.version):
                raise error
        finally:
            self.parallel -= 1
        self.instances[info.ident] = info
        self.changed.publish(self.status(info, InstanceState.ACTIVE))

    async def stop_instance(self, ident: InstanceIdent, *, restart: bool = False) -> None:
        self.calls.append(f"stop {ident.item_id}")
        self.stops.append((ident.item_id, restart))
        self.parallel += 1
        self.most_parallel = max(self.most_parallel, self.parallel)
        await asyncio.sleep(self.delay_s)
        self.parallel -= 1
        if error := self.stop_errors.get(ident.item_id):
            raise error
        if info := self.instances.pop(ident, None):
            self.changed.publish(self.status(info, InstanceState.INACTIVE))

    def sample_targets(self) -> list[SampleTarget]:
        return []

    async def reboot(self) -> None:
        self.reboots += 1

    def status(self, info: InstanceInfo, state: InstanceState) -> InstanceStatus:
        return InstanceStatus(info.ident, info.version, state, info.runtime_id, info.manifest_digest)


class FakeImages:
    """Installs at once, fails as told in `errors` (by version), or waits for `gate`."""

    def __init__(self, installed: Iterable[ItemKey] = ()) -> None:
        self.broken: Broadcast[ItemKey] = Broadcast("broken")
        self.keys: set[ItemKey] = set(installed)
        self.wanted: frozenset[ItemKey] = frozenset()
        self.errors: dict[str, AosError] = {}
        self.gate: asyncio.Event | None = None
        self.calls: list[str] = []
        self.loads: list[ItemKey] = []
        self.offline_ttl_s = 0.0

    def installed(self) -> Set[ItemKey]:
        return frozenset(self.keys)

    def want(self, keys: Set[ItemKey]) -> None:
        self.wanted = frozenset(keys)

    async def install(self, key: ItemKey) -> None:
        self.calls.append(f"install {key}")
        if self.gate:
            await self.gate.wait()
        if error := self.errors.get(key.version):
            raise error
        self.keys.add(key)

    async def load(self, key: ItemKey) -> InstalledImage:
        self.loads.append(key)
        return InstalledImage(
            key, ImageConfig(), ItemConfig(offline_ttl=Duration(self.offline_ttl_s)), layers=(Path("/layer"),)
        )

    async def remove(self, keys: Iterable[ItemKey]) -> None:
        for key in keys:
            self.calls.append(f"remove {key}")
            self.keys.discard(key)


class FakeNetworks:
    """Remembers what was given back."""

    def __init__(self) -> None:
        self.released: list[str] = []

    async def release_instance(self, ident: InstanceIdent) -> None:
        self.released.append(ident.item_id)


class Bed:
    """One SM working directory; `launcher()` is one life of the process."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.runtime = FakeRuntime()
        self.images = FakeImages()
        self.networks = FakeNetworks()
        self.clock: Callable[[], float] = asyncio.get_running_loop().time
        self.pause_s = 0.02
        self.store_type: type[LauncherStore] = LauncherStore

    @contextlib.asynccontextmanager
    async def launcher(self, *, crash: bool = False) -> AsyncIterator[Launcher]:
        """Runs until the block ends; with `crash` without the clean stop."""
        async with open_database(self.directory / "sm.db", MIGRATION, self.directory / "merged") as database:
            launcher = Launcher(
                self.store_type(database),
                [self.runtime],
                self.images,
                self.networks,
                clock=self.clock,
                backoff=lambda: Backoff(self.pause_s, self.pause_s, jitter=0.0),
            )
            started = asyncio.Event()
            task = asyncio.create_task(launcher.run(started.set))
            waiter = asyncio.create_task(started.wait())
            await asyncio.wait({task, waiter}, return_when=asyncio.FIRST_COMPLETED)
            try:
                yield launcher
            finally:
                survivors = dict(self.runtime.instances)
                task.cancel()
                waiter.cancel()
                await asyncio.wait({task})
                if not task.cancelled():
                    task.result()
                if crash:
                    self.runtime.instances = survivors
                    self.runtime.calls.clear()

    async def stored(self) -> tuple[dict[InstanceIdent, InstanceInfo], dict[InstanceIdent, InstanceInfo | None]]:
        async with open_database(self.directory / "sm.db", MIGRATION, self.directory / "merged") as database:
            stored = await LauncherStore(database).load()
        return stored.instances, stored.changes


@pytest.fixture
async def bed(tmp_path: Path) -> Bed:
    return Bed(tmp_path)


async def complete(queue: "asyncio.Queue[InstanceStatus | NodeStatuses]") -> dict[str, InstanceStatus]:
    """The next complete list."""
    async with asyncio.timeout(5):
        while not isinstance(value := await queue.get(), NodeStatuses):
            pass
    return {status.ident.item_id: status for status in value.statuses}


async def update(
    launcher: Launcher, *start: InstanceInfo, stop: tuple[InstanceInfo, ...] = ()
) -> dict[str, InstanceStatus]:
    with launcher.changed.subscribe() as queue:
        await launcher.update(start, [one.ident for one in stop])
        return await complete(queue)


async def test_empty_update_is_answered(bed: Bed) -> None:
    async with bed.launcher() as launcher:
        assert await update(launcher) == {}


async def test_install_start_and_statuses(bed: Bed) -> None:
    async with bed.launcher() as launcher:
        with launcher.changed.subscribe() as queue:
            await launcher.update([A], [])
            statuses = await complete(queue)
        assert statuses["a"] == InstanceStatus(A.ident, "1.0.0", InstanceState.ACTIVE, "runtime", A.manifest_digest)
        assert bed.images.calls == ["install a 1.0.0"]
        assert bed.runtime.calls == ["start a 1.0.0"]
        assert bed.images.wanted == {item_key(A)}
    assert await bed.stored() == ({A.ident: A}, {})
    # The clean stop ended it.
    assert bed.runtime.calls[-1] == "stop a"


async def test_same_update_again_touches_nothing(bed: Bed) -> None:
    async with bed.launcher() as launcher:
        await update(launcher, A)
        bed.runtime.calls.clear()
        assert (await update(launcher, A))["a"].state is InstanceState.ACTIVE
        assert bed.runtime.calls == []


async def test_new_version_replaces_the_old_one_when_it_is_installed(bed: Bed) -> None:
    async with bed.launcher() as launcher:
        await update(launcher, A)
        bed.images.gate = asyncio.Event()
        with launcher.changed.subscribe() as queue:
            await launcher.update([A2], [])
            await until(lambda: "install a 2.0.0" in bed.images.calls)
            assert bed.runtime.instances == {A.ident: A}
            bed.images.gate.set()
            statuses = await complete(queue)
        assert statuses["a"].version == "2.0.0"
        assert statuses["a"].state is InstanceState.ACTIVE
        assert bed.runtime.calls == ["start a 1.0.0", "stop a", "start a 2.0.0"]
        await until(lambda: bed.images.calls[-1] == "remove a 1.0.0")
        assert bed.networks.released == []


async def test_failed_install_is_reported_and_the_old_version_goes_on(bed: Bed) -> None:
    bed.pause_s = 0.01
    async with bed.launcher() as launcher:
        await update(launcher, A)
        bed.images.errors["2.0.0"] = NotFoundError("blob is gone")
        statuses = await update(launcher, A2)
        assert statuses["a"].version == "2.0.0"
        assert statuses["a"].state is InstanceState.FAILED
        assert statuses["a"].error is not None
        assert (statuses["a"].error.aos_code, statuses["a"].error.message) == (5, "blob is gone")
        assert bed.runtime.instances == {A.ident: A}
        # What the old version does meanwhile is not reported as the new one's state.
        bed.runtime.changed.publish(bed.runtime.status(A, InstanceState.ACTIVE))
        await asyncio.sleep(0.01)
        assert launcher.statuses().statuses[0].version == "2.0.0"
        # It is tried again until it works.
        bed.images.errors.clear()
        await until(lambda: bed.runtime.instances == {A.ident: A2})


async def test_roll_back_after_a_failed_install(bed: Bed) -> None:
    async with bed.launcher() as launcher:
        await update(launcher, A)
        bed.images.errors["2.0.0"] = NotFoundError("blob is gone")
        await update(launcher, A2)
        statuses = await update(launcher, A)
        assert (statuses["a"].version, statuses["a"].state) == ("1.0.0", InstanceState.ACTIVE)
        assert bed.runtime.calls == ["start a 1.0.0"]
    assert await bed.stored() == ({A.ident: A}, {})


async def test_stop_removes_the_instance_and_its_network(bed: Bed) -> None:
    async with bed.launcher() as launcher:
        await update(launcher, A, B)
        with launcher.changed.subscribe() as queue:
            await launcher.update([], [A.ident])
            first = await queue.get()
            assert isinstance(first, InstanceStatus)
            assert first.state is InstanceState.INACTIVE
            assert set(await complete(queue)) == {"b"}
        assert bed.networks.released == ["a"]
    assert await bed.stored() == ({B.ident: B}, {})


async def test_stop_of_something_unknown_is_success(bed: Bed) -> None:
    async with bed.launcher() as launcher:
        assert await update(launcher, stop=(A,)) == {}
    assert await bed.stored() == ({}, {})


async def test_failed_start_is_reported_and_tried_again(bed: Bed) -> None:
    bed.runtime.start_errors["1.0.0"] = FailedError("no such device")
    async with bed.launcher() as launcher:
        statuses = await update(launcher, A, B)
        assert statuses["a"].state is InstanceState.FAILED
        assert statuses["a"].error is not None
        assert statuses["a"].error.message == "no such device"
        bed.runtime.start_errors.clear()
        await until(lambda: launcher.statuses().statuses[0].state is InstanceState.ACTIVE)


async def test_a_pause_that_ends_while_the_database_is_copied_is_not_missed(bed: Bed) -> None:
    class SlowStore(LauncherStore):
        async def keep_copy(self) -> None:
            await asyncio.sleep(3 * bed.pause_s)

    bed.store_type = SlowStore
    bed.runtime.start_errors["1.0.0"] = FailedError("no such device")
    async with bed.launcher() as launcher:
        await update(launcher, A)
        bed.runtime.start_errors.clear()
        await until(lambda: launcher.statuses().statuses[0].state is InstanceState.ACTIVE)


async def test_the_end_of_an_update_does_not_wait_for_what_is_tried_again(bed: Bed) -> None:
    bed.pause_s = 0.0
    bed.runtime.start_errors["1.0.0"] = FailedError("no such device")
    async with bed.launcher() as launcher:
        for _ in range(3):
            statuses = await update(launcher, A)
            assert statuses["a"].state is InstanceState.FAILED


async def test_failed_stop_is_tried_again_before_the_new_version_starts(bed: Bed) -> None:
    async with bed.launcher() as launcher:
        await update(launcher, A)
        bed.runtime.stop_errors["a"] = FailedError("can't kill")
        statuses = await update(launcher, A2)
        assert statuses["a"].state is InstanceState.FAILED
        assert "start a 2.0.0" not in bed.runtime.calls
        bed.runtime.stop_errors.clear()
        await until(lambda: bed.runtime.instances == {A.ident: A2})


async def test_unknown_runtime_is_a_clear_error(bed: Bed) -> None:
    async with bed.launcher() as launcher:
        statuses = await update(launcher, info("a", runtime="other"))
        assert statuses["a"].error is not None
        assert "no runtime other" in statuses["a"].error.message


async def test_update_during_an_update_is_not_lost(bed: Bed) -> None:
    bed.images.gate = asyncio.Event()
    async with bed.launcher() as launcher:
        with launcher.changed.subscribe() as queue:
            await launcher.update([A], [])
            await until(lambda: bool(bed.images.calls))
            await launcher.update([A2, B], [])
            await until(lambda: len(bed.images.calls) == 3)
            bed.images.gate.set()
            statuses = await complete(queue)
        assert {name: status.version for name, status in statuses.items()} == {"a": "2.0.0", "b": "1.0.0"}
        assert "start a 1.0.0" not in bed.runtime.calls


async def test_order_of_starts_and_stops(bed: Bed) -> None:
    """Starts begin in descending priority, stops end in ascending priority."""
    bed.runtime.delay_s = 0.01
    async with bed.launcher() as launcher:
        many = [info(f"item{number}", priority=number // 2) for number in range(10)]
        await update(launcher, *many)
        starts = [f"start item{number} 1.0.0" for pair in reversed(range(5)) for number in (2 * pair, 2 * pair + 1)]
        assert bed.runtime.calls == starts
        assert bed.runtime.most_parallel == 10
        bed.runtime.calls.clear()
        bed.runtime.most_parallel = 0
    assert bed.runtime.calls == [f"stop item{number}" for number in range(10)]
    assert bed.runtime.most_parallel == 2, "those of a higher priority wait for those of a lower"


async def test_an_item_is_read_once_for_all_its_instances(bed: Bed) -> None:
    many = [msgspec.structs.replace(A, ident=msgspec.structs.replace(A.ident, instance=n)) for n in range(5)]
    async with bed.launcher() as launcher:
        await update(launcher, *many)
        assert len(bed.runtime.instances) == 5
    assert bed.images.loads == [item_key(A)]


async def test_restart_after_a_crash_adopts(bed: Bed) -> None:
    async with bed.launcher(crash=True) as launcher:
        await update(launcher, A, B)
    async with bed.launcher() as launcher:
        await asyncio.wait_for(launcher.settled.wait(), 5)
        assert bed.runtime.calls == []
        assert [status.state for status in launcher.statuses().statuses] == [InstanceState.ACTIVE] * 2


async def test_restart_after_a_clean_stop_starts_everything_without_cm(bed: Bed) -> None:
    async with bed.launcher() as launcher:
        await update(launcher, A, B)
    bed.runtime.calls.clear()
    async with bed.launcher() as launcher:
        await asyncio.wait_for(launcher.settled.wait(), 5)
        assert sorted(bed.runtime.instances) == [A.ident, B.ident]


async def test_interrupted_update_goes_on_after_a_restart(bed: Bed) -> None:
    async with bed.launcher(crash=True) as launcher:
        await update(launcher, A)
        bed.images.gate = asyncio.Event()
        await launcher.update([A2, B], [])
        await until(lambda: len(bed.images.calls) == 3)
    assert await bed.stored() == ({A.ident: A}, {A.ident: A2, B.ident: B})
    async with bed.launcher() as launcher:
        with launcher.changed.subscribe() as queue:
            await asyncio.wait_for(launcher.settled.wait(), 5)
            assert bed.runtime.instances == {A.ident: A}
            bed.images.gate.set()
            statuses = await complete(queue)
        assert statuses["a"].version == "2.0.0"
        assert bed.runtime.instances == {A.ident: A2, B.ident: B}


async def test_crash_report_of_a_runtime_is_the_status(bed: Bed) -> None:
    async with bed.launcher() as launcher:
        await update(launcher, A)
        bed.runtime.changed.publish(bed.runtime.status(A, InstanceState.FAILED))
        await until(lambda: launcher.statuses().statuses[0].state is InstanceState.FAILED)


async def test_damaged_image_is_repaired_and_its_instance_restarted(bed: Bed) -> None:
    async with bed.launcher() as launcher:
        await update(launcher, A)
        bed.images.errors["1.0.0"] = FailedError("CM is away")
        bed.images.keys.clear()
        bed.images.broken.publish(item_key(A))
        await until(lambda: bed.images.calls.count("install a 1.0.0") > 1)
        assert launcher.statuses().statuses[0].state is InstanceState.ACTIVE
        assert bed.runtime.calls == ["start a 1.0.0"]
        bed.images.errors.clear()
        await until(lambda: bed.runtime.calls == ["start a 1.0.0", "stop a", "start a 1.0.0"])


async def test_cm_coming_back_hurries_retries(bed: Bed) -> None:
    bed.pause_s = 1000.0
    bed.images.errors["1.0.0"] = FailedError("CM is away")
    async with bed.launcher() as launcher:
        statuses = await update(launcher, A)
        assert statuses["a"].state is InstanceState.FAILED
        bed.images.errors.clear()
        launcher.cm_connected(True)
        # What CM is told first: it would roll back a version that has failed.
        assert launcher.statuses().statuses[0].state is InstanceState.ACTIVATING
        await until(lambda: bool(bed.runtime.instances))


async def test_a_device_that_is_back_hurries_retries(bed: Bed) -> None:
    bed.pause_s = 1000.0
    bed.runtime.start_errors["1.0.0"] = FailedError("no such device")
    async with bed.launcher() as launcher:
        assert (await update(launcher, A))["a"].state is InstanceState.FAILED
        bed.runtime.start_errors.clear()
        launcher.resources_changed()
        await until(lambda: bool(bed.runtime.instances))


async def test_offline_time_stops_and_a_restart_does_not_forget(bed: Bed) -> None:
    bed.images.offline_ttl_s = 30.0
    now_s = 1000.0
    bed.clock = lambda: now_s
    async with bed.launcher(crash=True) as launcher:
        launcher.cloud_connected(True)
        await update(launcher, A)
        launcher.cloud_connected(False)
        await asyncio.sleep(0.01)
        now_s += 31.0
        launcher.cm_connected(True)
        await until(lambda: not bed.runtime.instances)
        assert launcher.statuses().statuses[0].state is InstanceState.INACTIVE
    async with bed.launcher() as launcher:
        await asyncio.wait_for(launcher.settled.wait(), 5)
        assert bed.runtime.calls == []
        # CM has to send it again (sm.md §4.5).
        launcher.cloud_connected(True)
        await asyncio.sleep(0.02)
        assert bed.runtime.calls == []
        assert (await update(launcher, A))["a"].state is InstanceState.ACTIVE


class FullDisk(LauncherStore):
    """A store whose disk is full at times."""

    full = False

    async def add_changes(self, changes: Changes) -> None:
        self._check()
        await super().add_changes(changes)

    async def apply(self, changes: Changes) -> None:
        self._check()
        await super().apply(changes)

    async def set_offline_since(self, time: datetime | None) -> None:
        self._check()
        await super().set_offline_since(time)

    def _check(self) -> None:
        if self.full:
            raise NoSpaceError("disk is full")


async def fail_to_store(launcher: Launcher, bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    """The image of a new version is there, but the change cannot be stored."""
    bed.images.gate = asyncio.Event()
    await launcher.update([A2], [])
    await until(lambda: "install a 2.0.0" in bed.images.calls)
    monkeypatch.setattr(FullDisk, "full", True)
    bed.images.gate.set()
    await until(lambda: launcher.statuses().statuses[0].state is InstanceState.FAILED)


async def test_full_disk_is_a_clear_status_and_heals(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    bed.store_type = FullDisk
    async with bed.launcher() as launcher:
        await update(launcher, A)
        await fail_to_store(launcher, bed, monkeypatch)
        assert launcher.statuses().statuses[0].error == ErrorInfo(3, 3, "disk is full")
        launcher.cloud_connected(True)
        with launcher.changed.subscribe() as queue:
            with pytest.raises(NoSpaceError):
                await launcher.update([B], [])
            status = await queue.get()
            while not (isinstance(status, InstanceStatus) and status.ident == B.ident):
                status = await queue.get()
            assert status.state is InstanceState.FAILED
        monkeypatch.setattr(FullDisk, "full", False)
        await until(lambda: bed.runtime.instances == {A.ident: A2})
    assert await bed.stored() == ({A.ident: A2}, {})


async def test_runtime_is_told_who_is_started_again(bed: Bed) -> None:
    """So that it can leave alone what would be made anew."""
    other_owner = msgspec.structs.replace(info("a", "3.0.0"), owner_id="other")
    async with bed.launcher() as launcher:
        await update(launcher, A, B)
        await update(launcher, A2, stop=(B,))
        assert sorted(bed.runtime.stops) == [("a", True), ("b", False)]
        await update(launcher, other_owner)
        assert bed.runtime.stops[2:] == [("a", False)]
    assert bed.runtime.stops[3:] == [("a", False)]


async def test_what_was_stopped_for_a_restart_that_did_not_come_is_stopped_at_the_end(
    bed: Bed, monkeypatch: pytest.MonkeyPatch
) -> None:
    bed.store_type = FullDisk
    bed.pause_s = 60.0
    async with bed.launcher() as launcher:
        await update(launcher, A)
        await fail_to_store(launcher, bed, monkeypatch)
        assert bed.runtime.stops == [("a", True)]
    assert bed.runtime.stops == [("a", True), ("a", False)]


async def test_reboot_waits_for_the_end_of_an_update(bed: Bed) -> None:
    async with bed.launcher() as launcher:
        bed.images.gate = asyncio.Event()
        with launcher.changed.subscribe() as queue:
            await launcher.update([A], [])
            await until(lambda: bed.images.calls == ["install a 1.0.0"])
            bed.runtime.reboot_due.set()
            for _ in range(20):
                await asyncio.sleep(0)
            assert bed.runtime.reboots == 0
            bed.images.gate.set()
            await complete(queue)
        await until(lambda: bed.runtime.reboots == 1)
        assert bed.runtime.instances == {A.ident: A}


async def test_preinstalled_component_is_listed_until_it_makes_room(bed: Bed) -> None:
    factory = InstanceInfo(InstanceIdent("root", "main", 0, ItemType.COMPONENT, True), "1.0.0", "", "", "runtime")
    async with bed.launcher() as launcher:
        bed.runtime.changed.publish(bed.runtime.status(factory, InstanceState.ACTIVE))
        await until(lambda: len(launcher.statuses().statuses) == 1)
        with launcher.changed.subscribe() as queue:
            bed.runtime.changed.publish(bed.runtime.status(factory, InstanceState.INACTIVE))
            async with asyncio.timeout(5):
                told = await queue.get()
        assert isinstance(told, InstanceStatus) and told.state is InstanceState.INACTIVE
        assert launcher.statuses().statuses == ()


async def test_newer_change_survives_the_applying_of_an_older_one(tmp_path: Path) -> None:
    async with open_database(tmp_path / "sm.db", MIGRATION, tmp_path / "merged") as database:
        store = LauncherStore(database)
        await store.add_changes({A.ident: A})
        await store.add_changes({A.ident: A2})
        await store.apply({A.ident: A})
        stored = await store.load()
    assert (stored.instances, stored.changes) == ({A.ident: A}, {A.ident: A2})


async def test_store_keeps_every_member(tmp_path: Path) -> None:
    rules = AlertRules(
        ram=AlertRulePercents(10.5, 20, Duration(1.5)),
        cpu=AlertRulePercents(1, 2),
        partitions=(PartitionAlertRule("storages", 5, 6, Duration(2)),),
        download=AlertRulePoints(100, 2**40),
    )
    full = InstanceInfo(
        InstanceIdent("item", "subject", 3, ItemType.COMPONENT, True),
        *("1.0.0", "sha256:x", "owner", "runtime", 5000, 5001, 7, "storage/1", "state/1"),
        (EnvVar("A", "1"),),
        MonitoringParameters(rules),
    )
    others = [
        msgspec.structs.replace(A, monitoring_parameters=None),
        msgspec.structs.replace(B, monitoring_parameters=MonitoringParameters()),
    ]
    database: Database
    async with open_database(tmp_path / "sm.db", MIGRATION, tmp_path / "merged") as database:
        store = LauncherStore(database)
        changes = {one.ident: one for one in (full, *others)}
        await store.add_changes(changes)
        assert (await store.load()).changes == changes
        await store.apply(changes)
        await database.execute(
            "INSERT INTO instances (itemID, subjectID, instance, type) VALUES ('x', 'y', 0, 'nonsense')"
        )
        await database.execute(
            "INSERT INTO instances (itemID, subjectID, instance, envVars) VALUES ('z', 'y', 0, '[broken')"
        )
        stored = await store.load()
        assert stored.instances == changes
        assert stored.changes == {}
        (row,) = await database.select("SELECT monitoringParams, subjectType FROM instances WHERE itemID = 'item'")
        assert '"minTimeout":1500000000' in row[0]
        assert '"cpu":{"minThreshold":1,"maxThreshold":2,"minTimeout":0}' in row[0]
        assert row[1] == "group"
