"""The container runtime on real crun and conmon: start, limits, restart, stop, logs, adoption after kill -9."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec
import pytest

from aoscore.common.config import Duration
from aoscore.common.errors import AosError, NotFoundError
from aoscore.common.oci import Quotas, ResourceRef, RunParameters
from aoscore.common.types import EnvVar, InstanceFilter, InstanceInfo, InstanceState, InstanceStatus
from aoscore.sm import cgroups
from aoscore.sm.launcher.runtimes.base import instance_id
from aoscore.sm.launcher.runtimes.container.config import DiskSpeed
from aoscore.sm.launcher.runtimes.container.output import ConmonOutput
from aoscore.sm.launcher.runtimes.container.runtime import ContainerRuntime
from aoscore.sm.networkmanager.model import netns_path
from aoscore.sm.processes import is_alive
from aoscore.sm.resourcemanager.disks import disks_of
from aoscore.sm.resourcemanager.resources import HostConfig, MountConfig, ResourceConfig
from tests.support import bed, containers
from tests.support.containers import image, instance, output, runtime
from tests.support.running import running, until

pytestmark = pytest.mark.container

FOREVER = "echo started; while true; do sleep 1; done"
GRACEFUL = "trap 'echo bye; exit 0' TERM; echo started; while true; do sleep 0.1; done"


async def state(queue: asyncio.Queue[InstanceStatus], wanted: InstanceState) -> InstanceStatus:
    """The next status with that state."""
    async with asyncio.timeout(15):
        while (status := await queue.get()).state is not wanted:
            pass
    return status


@pytest.fixture
async def host(tmp_path: Path) -> AsyncIterator[ContainerRuntime]:
    made = runtime(tmp_path)
    async with running(made):
        await made.adopt([])
        yield made


async def test_runs_and_leaves_nothing_behind(host: ContainerRuntime, tmp_path: Path) -> None:
    info = instance(env_vars=(EnvVar("WHO", "world"),), state_path="1/state", storage_path="1")
    script = "echo hello $WHO $AOS_INSTANCE_ID; id -u; cat /state.dat; echo new >/state.dat; touch /storage/x; "
    with host.changed.subscribe() as statuses:
        await host.start_instance(info, image(tmp_path, script + FOREVER))
        assert [statuses.get_nowait().state for _ in range(2)] == [InstanceState.ACTIVATING, InstanceState.ACTIVE]
        [target] = host.sample_targets()
        assert is_alive(target.pid) and target.partitions == (
            ("storages", tmp_path / "storages/1"),
            ("states", tmp_path / "states/1/state"),
        )
        await until(lambda: "started" in output(tmp_path, info))
        assert output(tmp_path, info).splitlines()[:2] == [f"hello world {instance_id(info.ident)}", "5000"]
        assert (tmp_path / "states/1/state").read_text() == "new\n"
        assert (tmp_path / "storages/1/x").stat().st_uid == 5000
        await host.stop_instance(info.ident)
        assert statuses.get_nowait().state is InstanceState.INACTIVE
    assert not is_alive(target.pid)
    assert host.running() == [] and list((tmp_path / "runtime").iterdir()) == []
    assert not netns_path(instance_id(info.ident)).exists()
    assert str(tmp_path / "runtime") not in Path("/proc/self/mounts").read_text()
    assert list((tmp_path / "crun").iterdir()) == []
    await host.stop_instance(info.ident)


async def test_same_parameters_do_not_restart_others_do(host: ContainerRuntime, tmp_path: Path) -> None:
    info = instance()
    await host.start_instance(info, image(tmp_path, FOREVER))
    [first] = host.sample_targets()
    await host.start_instance(info, image(tmp_path, FOREVER))
    assert [target.pid for target in host.sample_targets()] == [first.pid]
    await host.start_instance(msgspec.structs.replace(info, version="2.0.0"), image(tmp_path, FOREVER))
    [second] = host.sample_targets()
    assert second.pid != first.pid and not is_alive(first.pid)


async def test_graceful_stop_before_kill(host: ContainerRuntime, tmp_path: Path) -> None:
    info = instance()
    await host.start_instance(info, image(tmp_path, GRACEFUL))
    await until(lambda: "started" in output(tmp_path, info))
    await host.stop_instance(info.ident)
    assert output(tmp_path, info).splitlines()[-1] == "bye"


async def test_signal_that_the_image_names(host: ContainerRuntime, tmp_path: Path) -> None:
    info = instance()
    script = "trap 'echo bye; exit 0' QUIT; trap 'echo wrong' TERM; echo started; while true; do sleep 0.1; done"
    made = image(tmp_path, script)
    process = msgspec.structs.replace(made.image_config.config, stop_signal="SIGQUIT")
    config = msgspec.structs.replace(made.image_config, config=process)
    await host.start_instance(info, msgspec.structs.replace(made, image_config=config))
    await until(lambda: "started" in output(tmp_path, info))
    await host.stop_instance(info.ident)
    assert output(tmp_path, info).splitlines()[-1] == "bye"


async def test_child_behind_a_shell_is_stopped_gracefully(host: ContainerRuntime, tmp_path: Path) -> None:
    info = instance()
    await host.start_instance(info, image(tmp_path, f'/bin/sh -c "{GRACEFUL}"; sleep 100'))
    await until(lambda: "started" in output(tmp_path, info))
    began = time.monotonic()
    await host.stop_instance(info.ident)
    assert output(tmp_path, info).splitlines()[-1] == "bye"
    assert time.monotonic() - began < 2.5, "nobody else listens, so nobody else is waited for"


async def test_deaf_service_is_killed_at_once_and_stubborn_one_after_the_timeout(
    host: ContainerRuntime, tmp_path: Path
) -> None:
    await host.start_instance(instance(0), image(tmp_path, FOREVER))
    await host.start_instance(instance(1), image(tmp_path, "trap '' HUP; trap 'echo no' TERM; " + FOREVER))
    began = time.monotonic()
    await host.stop_instance(instance(0).ident)
    assert time.monotonic() - began < 1
    began = time.monotonic()
    await host.stop_instance(instance(1).ident)
    assert 2.9 < time.monotonic() - began < 5


async def test_item_says_how_long_its_end_may_take(tmp_path: Path) -> None:
    host = runtime(tmp_path, stop_timeout_s=Duration(60))
    async with running(host):
        await host.adopt([])
        parameters = RunParameters(stop_timeout=Duration(0.5))
        stubborn = "trap '' HUP; trap 'echo no' TERM; " + FOREVER
        await host.start_instance(instance(), image(tmp_path, stubborn, run_parameters=parameters))
        began = time.monotonic()
        await host.stop_instance(instance().ident)
        assert 0.4 < time.monotonic() - began < 30


async def test_end_is_reported_with_exit_code_and_restarted(host: ContainerRuntime, tmp_path: Path) -> None:
    info = instance()
    script = "if [ -e /storage/x ]; then while true; do sleep 1; done; fi; touch /storage/x; exit 7"
    with host.changed.subscribe() as statuses:
        await host.start_instance(msgspec.structs.replace(info, storage_path="s"), image(tmp_path, script))
        failed = await state(statuses, InstanceState.FAILED)
        assert failed.error is not None
        assert (failed.error.aos_code, failed.error.exit_code, failed.error.message) == (1, 7, "exited with 7")
        await state(statuses, InstanceState.ACTIVE)
    history = host._tools.history.get(instance_id(info.ident))
    assert history is not None and [run.exit_code for run in history.runs] == [7]


async def test_crash_loop_goes_on_ever_more_slowly(host: ContainerRuntime, tmp_path: Path) -> None:
    with host.changed.subscribe() as statuses:
        await host.start_instance(instance(), image(tmp_path, "exit 1"))
        ends = [await state(statuses, InstanceState.FAILED) for _ in range(5)]
        assert ends[4].error is not None and ends[4].error.message == "exited with 1, 4 restarts"
    await host.stop_instance(instance().ident)


async def test_killed_by_a_signal(host: ContainerRuntime, tmp_path: Path) -> None:
    with host.changed.subscribe() as statuses:
        await host.start_instance(instance(), image(tmp_path, FOREVER))
        os.kill(host.sample_targets()[0].pid, signal.SIGKILL)
        failed = await state(statuses, InstanceState.FAILED)
    assert failed.error is not None and failed.error.message.startswith("killed by SIGKILL (137)")


async def test_memory_limit(host: ContainerRuntime, tmp_path: Path) -> None:
    quotas = Quotas(ram_limit=16 * 1024 * 1024, pids_limit=20, cpu_dmips_limit=5000)
    with host.changed.subscribe() as statuses:
        # The first process itself must be the one that takes the memory.
        await host.start_instance(
            instance(), image(tmp_path, "exec dd if=/dev/zero of=/dev/null bs=64M count=100", quotas=quotas)
        )
        failed = await state(statuses, InstanceState.FAILED)
    assert failed.error is not None
    assert (failed.error.exit_code, failed.error.message) == (137, "killed by SIGKILL (137), out of memory")


async def test_limits_that_the_node_sets(tmp_path: Path) -> None:
    [(major, minor)] = disks_of([tmp_path]) or pytest.skip(f"{tmp_path} is on no disk")
    made = runtime(tmp_path, default_pids_limit=25, disk_speed=DiskSpeed(write_bytes_per_s=1 << 20, reads_per_s=500))
    layout = cgroups.probe()
    group = f"{bed.cgroup_parent()}/{instance_id(instance().ident)}"

    def limits(controller: str, name: str) -> str:
        tree = layout.unified if layout.version == 2 else layout.controllers[controller]
        return Path(f"{tree}{group}/{name}").read_text()

    async with running(made):
        await made.adopt([])
        await made.start_instance(instance(), image(tmp_path, FOREVER))
        assert limits("pids", "pids.max") == "25\n"
        if layout.version == 2:
            assert f"{major}:{minor} rbps=max wbps=1048576 riops=500 wiops=max" in limits("io", "io.max")
        else:
            assert f"{major}:{minor} 1048576" in limits("blkio", "blkio.throttle.write_bps_device")
            assert f"{major}:{minor} 500" in limits("blkio", "blkio.throttle.read_iops_device")
        assert Path(f"/proc/{made.sample_targets()[0].pid}/oom_score_adj").read_text() == "500\n"
        await made.stop_instance(instance().ident)


async def test_root_is_read_only_and_the_host_hidden(tmp_path: Path) -> None:
    made = runtime(tmp_path, host_binds=("bin", "sbin", "lib", "lib64", "usr"))
    script = "ls /; touch /x 2>/dev/null || echo read-only; ls /home /root 2>&1; cat /etc/resolv.conf; hostname"
    async with running(made):
        await made.adopt([])
        info = instance()
        await made.start_instance(
            info,
            image(tmp_path, f"{script}; {FOREVER}", base_layer_is_node_rootfs=True, hostname="demo", quotas=Quotas()),
        )
        await until(lambda: "started" in output(tmp_path, info))
        text = output(tmp_path, info)
        await made.stop_instance(info.ident)
    assert "read-only" in text and "usr" in text.splitlines()
    assert "home" not in text.splitlines() and "No such file" in text
    assert "nameserver\t10.0.0.1" in text and text.splitlines()[-2:] == ["demo", "started"]


async def test_capabilities_seccomp_and_privileges(host: ContainerRuntime, tmp_path: Path) -> None:
    info = instance()
    script = "grep -E 'CapBnd|CapEff|NoNewPrivs|Seccomp:' /proc/self/status; unshare -U id || echo refused; "
    await host.start_instance(info, image(tmp_path, script + FOREVER))
    await until(lambda: "started" in output(tmp_path, info))
    words = " ".join(output(tmp_path, info).split())
    # AUDIT_WRITE (29), KILL (5), NET_BIND_SERVICE (10)
    assert "CapBnd: 0000000020000420" in words
    assert "NoNewPrivs: 1 Seccomp: 2" in words and "refused" in words


async def test_user_namespace(tmp_path: Path) -> None:
    # Its root must get to the mounts by their paths, as it does on a node.
    for folder in (tmp_path, *tmp_path.parents[:3]):
        folder.chmod(folder.stat().st_mode | 0o055)
    made = runtime(tmp_path, user_namespace_base=700_000)
    info = instance(state_path="1/state", storage_path="1")
    script = "cat /proc/self/uid_map; id -u; cat /state.dat; echo new >/state.dat; touch /storage/x; ls -ln /bin/sh; "
    async with running(made):
        await made.adopt([])
        await made.start_instance(info, image(tmp_path, script + FOREVER))
        await until(lambda: "started" in output(tmp_path, info))
        pid = made.sample_targets()[0].pid
        assert Path(f"/proc/{pid}/uid_map").read_text().split() == ["0", "700000", "1", "5000", "5000", "1"]
        await made.stop_instance(info.ident)
    lines = output(tmp_path, info).splitlines()
    assert [line.split() for line in lines[:3]] == [["0", "700000", "1"], ["5000", "5000", "1"], ["5000"]]
    # Files of the node's root are nobody's.
    assert "65534" in lines[3]
    assert (tmp_path / "states/1/state").read_text() == "new\n"
    assert (tmp_path / "storages/1/x").stat().st_uid == 5000


async def test_resources_reach_the_container(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "file").write_text("from the host\n")
    resource = ResourceConfig(
        "thing",
        groups=("video",),
        mounts=(MountConfig("/opt/thing", source=str(tmp_path / "shared"), options=("bind", "ro")),),
        envs=("THING=1",),
        hosts=(HostConfig("10.1.1.1", "thing"),),
        devices=("/dev/zero:/dev/thing",),
    )
    alerts = containers.Alerts()
    made = runtime(tmp_path, resources=(resource,), alerts=alerts)
    script = "cat /opt/thing/file; echo THING=$THING; id -G; ls -l /dev/thing; "
    async with running(made):
        await made.adopt([])
        info = instance()
        wanted = (ResourceRef("thing", "rw"),)
        await made.start_instance(info, image(tmp_path, script + FOREVER, resources=wanted))
        await until(lambda: "started" in output(tmp_path, info))
        text = output(tmp_path, info)
        with pytest.raises(NotFoundError, match="no resource 'other'"):
            await made.start_instance(instance(1), image(tmp_path, FOREVER, resources=(ResourceRef("other"),)))
        assert [running.ident for running in made.running()] == [info.ident]
        assert [(alert.ident, alert.resource) for alert in alerts.sent] == [(instance(1).ident, "other")]
        await made.stop_instance(info.ident)
    assert text.splitlines()[:2] == ["from the host", "THING=1"]
    assert "44" in text.splitlines()[2].split() and "1,   5" in text


class InheritedOutput:
    """As the journal has it: the container writes to what conmon was started with, so conmon can carry no words."""

    @contextlib.contextmanager
    def prepare(self, instance_id: str) -> Iterator[ConmonOutput]:
        with Path(os.devnull).open("wb") as null:
            yield ConmonOutput(("--log-path", "passthrough"), null.fileno(), null.fileno())

    def tend(self, instance_id: str, bundle: Path) -> None:
        pass


@pytest.mark.parametrize("inherited", [False, True])
async def test_failed_start_says_why_and_leaves_nothing(
    host: ContainerRuntime, tmp_path: Path, inherited: bool
) -> None:
    if inherited:
        host._tools = msgspec.structs.replace(host._tools, output=InheritedOutput())
    broken = msgspec.structs.replace(image(tmp_path, ""), image_config=image(tmp_path, "").image_config)
    process = msgspec.structs.replace(broken.image_config.config, entrypoint=("/no/such/program",))
    broken = msgspec.structs.replace(broken, image_config=msgspec.structs.replace(broken.image_config, config=process))
    with host.changed.subscribe() as statuses:
        with pytest.raises(AosError, match="/no/such/program"):
            await host.start_instance(instance(), broken)
        failed = await state(statuses, InstanceState.FAILED)
    assert failed.error is not None and "/no/such/program" in failed.error.message
    assert list((tmp_path / "runtime").iterdir()) == [] and not netns_path(instance_id(instance().ident)).exists()


@pytest.mark.parametrize("inherited", [False, True])
async def test_the_reason_of_crun_is_told_wherever_output_goes(tmp_path: Path, inherited: bool) -> None:
    layout = cgroups.probe()
    if layout.version == 2:
        pytest.skip("a controller can't be taken away from control groups of version 2")
    made = runtime(tmp_path)
    if inherited:
        made._tools = msgspec.structs.replace(made._tools, output=InheritedOutput())
    subprocess.run(["umount", layout.controllers["pids"]], check=True)
    async with running(made):
        await made.adopt([])
        with pytest.raises(AosError, match=r"can't create container .*pids\.max"):
            await made.start_instance(instance(), image(tmp_path, FOREVER, quotas=Quotas(pids_limit=20)))


async def test_secret_is_given_and_taken_back(host: ContainerRuntime, tmp_path: Path) -> None:
    secrets = host._permissions
    assert isinstance(secrets, containers.Secrets)
    info = instance()
    await host.start_instance(info, image(tmp_path, f"echo $AOS_SECRET; {FOREVER}", permissions={"vis": {"*": "rw"}}))
    await until(lambda: "started" in output(tmp_path, info))
    assert output(tmp_path, info).startswith("secret-1") and list(secrets.registered) == [info.ident]
    await host.stop_instance(info.ident)
    assert secrets.registered == {}


@pytest.mark.parametrize("adopted", [False, True])
async def test_a_secret_that_iam_has_forgotten_is_replaced(tmp_path: Path, adopted: bool) -> None:
    """As IAM of AosCore 9.1 does at each restart; one that still knows it disturbs nobody (D23)."""
    info, other = instance(0), instance(1)
    host = runtime(tmp_path)
    async with running(host):
        await host.adopt([])
        script = f"trap 'exit 0' TERM; echo $AOS_SECRET; {GRACEFUL}"
        await host.start_instance(info, image(tmp_path, script, permissions={"vis": {"*": "rw"}}))
        await host.start_instance(other, image(tmp_path, FOREVER))
        if not adopted:
            await check_secret(host, info, tmp_path)
    if adopted:
        host = runtime(tmp_path)
        secrets = host._permissions
        assert isinstance(secrets, containers.Secrets)
        # Its process has lived on: so it still gives the same.
        await secrets.register_instance(info.ident, {})
        async with running(host):
            await host.adopt([info, other])
            await check_secret(host, info, tmp_path)


async def check_secret(host: ContainerRuntime, info: InstanceInfo, directory: Path) -> None:
    secrets = host._permissions
    assert isinstance(secrets, containers.Secrets)
    pids = {target.ident.instance: target.pid for target in host.sample_targets()}
    secrets.iam_returned.publish("test")
    await until(lambda: secrets.asked >= 2)
    with host.changed.subscribe() as statuses:
        secrets.registered.clear()
        secrets.iam_returned.publish("test")
        # Nothing failed: the next status is that of the new start.
        assert (await statuses.get()).state is InstanceState.ACTIVATING
        assert (await statuses.get()).state is InstanceState.ACTIVE
    after = {target.ident.instance: target.pid for target in host.sample_targets()}
    assert after[1] == pids[1] and after[0] != pids[0]
    lines = output(directory, info).splitlines()
    assert [line for line in lines if line.startswith("secret")] == ["secret-1", "secret-2"]
    assert host._tools.history.find(InstanceFilter(instance=0))[instance_id(info.ident)].runs == ()
    for ident in (info.ident, instance(1).ident):
        await host.stop_instance(ident)


async def test_restarts_are_counted_over_the_end_of_the_process(tmp_path: Path) -> None:
    """A service that ends again and again is not started faster because SM is (D34)."""
    parameters = RunParameters(start_interval=Duration(60), restart_interval=Duration(0.1))
    ending = image(tmp_path, "sleep 2; exit 3", run_parameters=parameters)

    def restarts(status: InstanceStatus) -> int:
        assert status.error is not None
        return int(status.error.message.split()[-2]) if "restarts" in status.error.message else 0

    async with running(host := runtime(tmp_path, settle_time_s=Duration(0.1))):
        await host.adopt([])
        with host.changed.subscribe() as statuses:
            await host.start_instance(instance(), ending)
            while (first := restarts(await state(statuses, InstanceState.FAILED))) < 2:
                pass
            await state(statuses, InstanceState.ACTIVE)
    # It runs, and is adopted.
    async with running(host := runtime(tmp_path, settle_time_s=Duration(0.1))):
        with host.changed.subscribe() as statuses:
            assert len(await host.adopt([instance()])) == 1
            assert restarts(await state(statuses, InstanceState.FAILED)) == first + 1
    # It has ended, and is started.
    async with running(host := runtime(tmp_path, settle_time_s=Duration(0.1))):
        with host.changed.subscribe() as statuses:
            assert await host.adopt([instance()]) == []
            await host.start_instance(instance(), ending)
            assert restarts(await state(statuses, InstanceState.FAILED)) == first + 2
        await host.stop_instance(instance().ident)


async def test_log_file_keeps_its_limit_and_its_newest_lines(tmp_path: Path) -> None:
    made = runtime(tmp_path, output_max_size_bytes=20_000)
    async with running(made):
        await made.adopt([])
        info = instance()
        script = "i=0; while true; do i=$((i+1)); echo line $i; sleep 0.001; done"
        await made.start_instance(info, image(tmp_path, script))
        folder = tmp_path / "logs" / instance_id(info.ident)
        bundle = tmp_path / "runtime" / instance_id(info.ident)
        for _ in range(2):
            await until(lambda: (folder / "output.log").stat().st_size > 12_000)
            made._tools.output.tend(instance_id(info.ident), bundle)
            await until(lambda: (folder / "output.log").exists() and (folder / "output.log").stat().st_size > 0)
        await made.stop_instance(info.ident)
    old, new = ((folder / name).read_text().splitlines() for name in ("output.log.1", "output.log"))
    assert int(new[0].split()[-1]) == int(old[-1].split()[-1]) + 1, "no line is lost between the files"


def start_manager(directory: Path, *scripts: str) -> subprocess.Popen[bytes]:
    """A process that manages one instance per script, ready."""
    manager = subprocess.Popen(
        [sys.executable, "-m", "tests.support.containers", directory, *scripts], stdout=subprocess.PIPE
    )
    assert manager.stdout is not None and manager.stdout.readline() == b"ready\n"
    return manager


async def test_killed_manager_leaves_containers_that_the_next_one_adopts(tmp_path: Path) -> None:
    counting = "i=0; while true; do i=$((i+1)); echo $i; sleep 0.05; done"
    manager = await asyncio.to_thread(start_manager, tmp_path, counting, "trap 'exit 9' TERM; " + FOREVER, FOREVER)
    before = {path.name: int((path / "pid").read_text()) for path in (tmp_path / "runtime").iterdir()}
    manager.kill()
    manager.wait()
    lines = len(output(tmp_path, instance(0)).splitlines())
    await until(lambda: len(output(tmp_path, instance(0)).splitlines()) > lines + 5)

    made = runtime(tmp_path)
    async with running(made):
        # Instance 2 is not wanted any more, instance 3 never ran.
        adopted = await made.adopt([instance(0), instance(1), instance(3)])
        assert sorted(run.ident.instance for run in adopted) == [0, 1]
        assert all(run.adopted and run.status.state is InstanceState.ACTIVE for run in adopted)
        after = {target.instance_id: target.pid for target in made.sample_targets()}
        names = [instance_id(instance(number).ident) for number in (0, 1, 2)]
        assert after == {name: before[name] for name in names[:2]}
        assert not is_alive(before[names[2]]) and not (tmp_path / "runtime" / names[2]).exists()
        # Exit codes of adopted containers are known, and they are restarted like all others.
        with made.changed.subscribe() as statuses:
            os.kill(before[names[1]], signal.SIGTERM)
            failed = await state(statuses, InstanceState.FAILED)
            assert failed.error is not None and failed.error.exit_code == 9
            await state(statuses, InstanceState.ACTIVE)
        for number in (0, 1):
            await made.stop_instance(instance(number).ident)
    assert list((tmp_path / "runtime").iterdir()) == []


async def test_end_while_nobody_watched_is_remembered(tmp_path: Path) -> None:
    manager = await asyncio.to_thread(start_manager, tmp_path, "trap 'exit 3' TERM; " + FOREVER)
    name = instance_id(instance(0).ident)
    pid = int((tmp_path / "runtime" / name / "pid").read_text())
    manager.kill()
    manager.wait()
    os.kill(pid, signal.SIGTERM)
    await until(lambda: not is_alive(pid))
    made = runtime(tmp_path)
    async with running(made):
        assert await made.adopt([instance(0)]) == []
        history = made._tools.history.get(name)
        assert history is not None and [run.exit_code for run in history.runs] == [3]
        await made.start_instance(instance(0), image(tmp_path, FOREVER))
        await made.stop_instance(instance(0).ident)


@pytest.mark.parametrize("delay_s", [0.0, 0.02, 0.04, 0.06, 0.09, 0.13])
async def test_killed_in_the_middle_of_a_start(tmp_path: Path, delay_s: float) -> None:
    manager = subprocess.Popen([sys.executable, "-m", "tests.support.containers", tmp_path, FOREVER])
    await until(lambda: any((tmp_path / "runtime").glob("*")))
    await asyncio.sleep(delay_s)
    manager.kill()
    manager.wait()
    made = runtime(tmp_path)
    async with running(made):
        await made.adopt([instance(0)])
        await made.start_instance(instance(0), image(tmp_path, FOREVER))
        [target] = made.sample_targets()
        assert is_alive(target.pid)
        await made.stop_instance(instance(0).ident)
    assert not is_alive(target.pid) and list((tmp_path / "runtime").iterdir()) == []
    assert list((tmp_path / "crun").iterdir()) == []


async def test_instances_survive_an_orderly_end_of_the_runtime(tmp_path: Path) -> None:
    first = runtime(tmp_path)
    async with running(first):
        await first.adopt([])
        await first.start_instance(instance(0), image(tmp_path, FOREVER))
        [target] = first.sample_targets()
    assert is_alive(target.pid)
    second = runtime(tmp_path)
    async with running(second):
        assert [run.ident for run in await second.adopt([instance(0)])] == [instance(0).ident]
        await second.stop_instance(instance(0).ident)
