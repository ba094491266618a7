"""Runs in a node that systemd runs: the native runtime does what it promises. Prints one line per promise kept."""

import asyncio
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

from aoscore.common.aio import Broadcast
from aoscore.common.oci import ImageConfig, ItemConfig, ProcessConfig, Quotas, RunParameters
from aoscore.common.types import (
    ArchInfo,
    CPUInfo,
    Duration,
    EnvVar,
    InstanceIdent,
    InstanceInfo,
    InstanceState,
    InstanceStatus,
    NodeInfo,
    OSInfo,
    ResourceAllocateAlert,
)
from aoscore.sm import cgroups
from aoscore.sm.imagemanager.model import InstalledImage, item_key
from aoscore.sm.launcher.runtimes.base import instance_id
from aoscore.sm.launcher.runtimes.container.history import RunHistory
from aoscore.sm.launcher.runtimes.container.output import JournalOutput
from aoscore.sm.launcher.runtimes.container.runtime import ContainerRuntime
from aoscore.sm.launcher.runtimes.native.config import load_native_config
from aoscore.sm.launcher.runtimes.native.engine import SystemdEngine
from aoscore.sm.launcher.runtimes.native.unit import unit_name
from aoscore.sm.networkmanager.model import AttachedNetwork, NetworkConfig, netns_path
from aoscore.sm.resourcemanager.quotas import DiskQuotas
from aoscore.sm.resourcemanager.resources import Resources
from aoscore.sm.systemd import Systemd

ROOT = Path("/var/native")
NODE = NodeInfo(
    "node", max_dmips=10000, os_info=OSInfo("linux"), cpus=(CPUInfo(num_cores=2, arch_info=ArchInfo("amd64")),)
)
MIB = 1024 * 1024
CONTROLLERS = Path("/sys/fs/cgroup/cgroup.controllers").read_text().split()
ODD = "a \"b\" $HOME `c` \\ 'd'"


class Networks:
    """Empty network namespaces."""

    async def attach(self, instance_id: str, network_id: str, config: NetworkConfig) -> AttachedNetwork:
        if not netns_path(instance_id).exists():
            subprocess.run(["ip", "netns", "add", instance_id], check=True)
        return AttachedNetwork("127.0.0.1\tlocalhost\n", "nameserver\t10.0.0.1\n")

    async def detach(self, instance_id: str) -> None:
        if netns_path(instance_id).exists():
            subprocess.run(["ip", "netns", "delete", instance_id], check=True)


class Secrets:
    """One secret for everybody."""

    def __init__(self) -> None:
        self.iam_returned: Broadcast[str] = Broadcast("returns of IAM")

    async def register_instance(self, ident: InstanceIdent, permissions: dict[str, dict[str, str]]) -> str:
        return "very-secret"

    async def unregister_instance(self, ident: InstanceIdent) -> None:
        pass


async def alert(value: ResourceAllocateAlert) -> None:
    raise AssertionError(value)


def runtime() -> ContainerRuntime:
    """The runtime of a new SM process."""
    config = load_native_config({"stopTimeout": "3s"}, path=Path("sm.cfg"), where="config", working_dir=ROOT)
    return ContainerRuntime(
        config.as_container(),
        "native",
        NODE,
        cgroups.probe(),
        networks=Networks(),
        permissions=Secrets(),
        resources=Resources(()),
        disk_quotas=DiskQuotas(),
        output=JournalOutput(),
        history=RunHistory(ROOT / "history"),
        send_alert=alert,
        engine=SystemdEngine(config, Systemd()),
    )


def instance(number: int) -> InstanceInfo:
    ident = InstanceIdent("item", "subject", number)
    return InstanceInfo(
        ident,
        "1.0.0",
        "sha256:00",
        "owner",
        runtime().info.runtime_id,
        uid=5000 + number,
        gid=5000,
        storage_path=f"{number}",
        env_vars=(EnvVar("ODD", ODD),),
    )


def image(info: InstanceInfo, *args: str, **quotas: int) -> InstalledImage:
    item = ItemConfig(
        quotas=Quotas(**quotas),
        permissions={"service": {"function": "rw"}},
        run_parameters=RunParameters(restart_interval=Duration(1)),
    )
    layer = ROOT / "layer"
    (layer / "app").mkdir(parents=True, exist_ok=True)
    return InstalledImage(
        item_key(info), ImageConfig(config=ProcessConfig(entrypoint=args)), item_config=item, layers=(layer,)
    )


async def until(condition: Callable[[], object], what: str) -> None:
    for _ in range(600):
        if condition():
            return
        await asyncio.sleep(0.05)
    raise AssertionError(f"waited 30 s until {what}")


async def failed(queue: "asyncio.Queue[InstanceStatus]") -> str:
    """Words of the next failure."""
    async with asyncio.timeout(30):
        while (status := await queue.get()).state is not InstanceState.FAILED:
            pass
    assert status.error is not None
    return f"{status.error.exit_code}: {status.error.message}"


def run(service: ContainerRuntime) -> "asyncio.Task[None]":
    return asyncio.create_task(service.run(lambda: None))


def kept(promise: str) -> None:
    print(f"kept: {promise}", flush=True)


async def main() -> None:
    first = runtime()
    task = run(first)
    await asyncio.sleep(0)
    await first.adopt([])
    info = instance(0)
    script = "trap 'echo bye >>/storage/out; exit 0' TERM; env >/storage/env; id >/storage/out; "
    script += "ls / >/storage/root; cat /etc/hosts >>/storage/out; echo started $0; while :; do sleep 0.1; done"
    quotas = {"ram_limit": 64 * MIB, "pids_limit": 20, "cpu_dmips_limit": 2500, "no_file_limit": 99}
    await first.start_instance(info, image(info, "sh", "-c", script, "$HOME", **quotas))
    storage = ROOT / "storages/0"
    await until(lambda: (storage / "out").exists() and "localhost" in (storage / "out").read_text(), "it wrote")
    variables = dict(line.partition("=")[::2] for line in (storage / "env").read_text().splitlines())
    assert variables["ODD"] == ODD, variables
    assert (variables["AOS_INSTANCE_ID"], variables["AOS_SECRET"]) == (instance_id(info.ident), "very-secret")
    assert "uid=5000" in (storage / "out").read_text()
    entries = set((storage / "root").read_text().split())
    assert "app" in entries and not entries & {"opt", "root", "home", "boot", "var"}, entries
    kept("environment, user and root are those of the item")

    name = unit_name(instance_id(info.ident))
    listed = subprocess.run(["systemctl", "show", name], capture_output=True, text=True, check=True).stdout
    assert "very-secret" not in listed
    kept("the secret is in no property")

    [target] = first.sample_targets()
    group = Path("/sys/fs/cgroup") / target.cgroup.lstrip("/")
    limits = {"MemoryMax": f"{64 * MIB}", "TasksMax": "20", "CPUQuotaPerSecUSec": "500ms"}
    assert set(listed.splitlines()) >= {f"{key}={value}" for key, value in limits.items()}, listed
    for controller, value in {"memory": f"{64 * MIB}", "pids": "20", "cpu": "50000 100000"}.items():
        if controller in CONTROLLERS:
            assert (group / f"{controller}.max").read_text().strip() == value, controller
        else:
            print(f"not shown here: the kernel's limit, this bed has no {controller} controller")
    assert f"{target.pid}" in (group / "cgroup.procs").read_text().split()
    files = Path(f"/proc/{target.pid}/limits").read_text()
    assert any(line.split()[3:5] == ["99", "99"] for line in files.splitlines() if line.startswith("Max open")), files
    kept("limits of memory, processes, CPU and files")

    # SM dies, and the next one finds it.
    task.cancel()
    await asyncio.wait({task})
    second = runtime()
    task = run(second)
    await asyncio.sleep(0)
    [adopted] = await second.adopt([info])
    assert adopted.adopted and [one.pid for one in second.sample_targets()] == [target.pid]
    kept("a running service is adopted")

    await second.stop_instance(info.ident)
    assert (storage / "out").read_text().splitlines()[-1] == "bye"
    assert not group.exists() and not netns_path(instance_id(info.ident)).exists()
    kept("it is asked before it is killed, and nothing is left")

    log = subprocess.run(
        ["journalctl", "-o", "cat", f"SYSLOG_IDENTIFIER={instance_id(info.ident)}"], capture_output=True, text=True
    )
    assert "started $HOME" in log.stdout, log.stdout
    kept("its output is in the journal under its instance id, arguments are not expanded")

    with second.changed.subscribe() as statuses:
        for number, (script, wanted) in enumerate(
            (
                ("exit 7", "7: exited with 7"),
                ("exit 0", "0: exited with 0"),
                ("kill -9 $$", "137: killed by SIGKILL (137)"),
            ),
            start=1,
        ):
            info = instance(number)
            await second.start_instance(info, image(info, "/bin/sh", "-c", script))
            assert (words := await failed(statuses)) == wanted, words
            assert (words := await failed(statuses)).startswith(wanted), words
            await second.stop_instance(info.ident)
        kept("exit codes and signals are reported, and it is started again")
        info = instance(4)
        script = "if [ -e /storage/x ]; then sleep 1000; fi; touch /storage/x; exit 1"
        await second.start_instance(info, image(info, "/bin/sh", "-c", script, ram_limit=64 * MIB))
        await failed(statuses)
        await until(lambda: second.sample_targets(), "it runs again")
        unit = unit_name(instance_id(info.ident))
        shown = subprocess.run(["systemctl", "show", unit], capture_output=True, text=True, check=True).stdout
        assert {f"MemoryMax={64 * MIB}", "SubState=running"} <= set(shown.splitlines()), shown
        await second.stop_instance(info.ident)
        kept("after a restart the limits are the same")
        if "memory" in CONTROLLERS:
            info = instance(5)
            eater = "x=a; while :; do x=$x$x; done"
            await second.start_instance(info, image(info, "/bin/sh", "-c", eater, ram_limit=32 * MIB))
            assert "out of memory" in (words := await failed(statuses)), words
            await second.stop_instance(info.ident)
            kept("want of memory is reported")
    task.cancel()
    await asyncio.wait({task})
    left = subprocess.run(
        ["systemctl", "list-units", "--all", "--output=json", "aos-service@*"], capture_output=True, text=True
    )
    assert json.loads(left.stdout or "[]") == [], left.stdout
    assert list(Path("/run/aos/native").iterdir()) == []
    kept("nothing is left at the end")


asyncio.run(main())
