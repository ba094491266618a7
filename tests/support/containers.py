"""A container runtime for tests: real crun, conmon, overlay; a network namespace without anything in it.

Also a program, so that a test can kill the process that manages containers:
``python -m tests.support.containers DIR ARG...`` starts one instance that runs ``/bin/sh -c ARG`` per argument, prints
"ready" and waits.
"""

import asyncio
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec

from aoscore.common.aio import Broadcast
from aoscore.common.oci import ImageConfig, ItemConfig, ProcessConfig, RunParameters
from aoscore.common.types import (
    ArchInfo,
    CPUInfo,
    Duration,
    InstanceIdent,
    InstanceInfo,
    ItemType,
    NodeInfo,
    OSInfo,
    ResourceAllocateAlert,
)
from aoscore.sm import cgroups
from aoscore.sm.imagemanager.model import InstalledImage, ItemKey
from aoscore.sm.launcher.runtimes.base import instance_id
from aoscore.sm.launcher.runtimes.container.config import ContainerConfig, OutputKind
from aoscore.sm.launcher.runtimes.container.history import RunHistory
from aoscore.sm.launcher.runtimes.container.output import choose_output
from aoscore.sm.launcher.runtimes.container.runtime import ContainerRuntime
from aoscore.sm.networkmanager.model import AttachedNetwork, NetworkConfig, netns_path
from aoscore.sm.resourcemanager.quotas import DiskQuotas
from aoscore.sm.resourcemanager.resources import ResourceConfig, Resources
from tests.support import bed
from tests.support.running import running

NODE = NodeInfo(
    "node",
    max_dmips=10000,
    os_info=OSInfo("linux"),
    cpus=(CPUInfo(num_cores=2, arch_info=ArchInfo("amd64")),),
)


class PlainNetworks:
    """Empty network namespaces."""

    async def attach(self, instance_id: str, network_id: str, config: NetworkConfig) -> AttachedNetwork:
        if not netns_path(instance_id).exists():
            subprocess.run(["ip", "netns", "add", instance_id], check=True)
        return AttachedNetwork("127.0.0.1\tlocalhost\n", "nameserver\t10.0.0.1\n")

    async def detach(self, instance_id: str) -> None:
        if netns_path(instance_id).exists():
            subprocess.run(["ip", "netns", "delete", instance_id], check=True)


class Alerts:
    """Remembers alerts."""

    def __init__(self) -> None:
        self.sent: list[ResourceAllocateAlert] = []

    async def send(self, alert: ResourceAllocateAlert) -> None:
        self.sent.append(alert)


class Secrets:
    """Gives numbered secrets and remembers who has one."""

    def __init__(self) -> None:
        self.iam_returned: Broadcast[str] = Broadcast("returns of IAM")
        self.registered: dict[InstanceIdent, str] = {}
        self.asked = 0
        self._given = 0

    async def register_instance(self, ident: InstanceIdent, permissions: dict[str, dict[str, str]]) -> str:
        self.asked += 1
        if ident not in self.registered:
            self._given += 1
            self.registered[ident] = f"secret-{self._given}"
        return self.registered[ident]

    async def unregister_instance(self, ident: InstanceIdent) -> None:
        del self.registered[ident]


def config(directory: Path, **changes: Any) -> ContainerConfig:
    """Everything below one directory, containers in the test's control group."""
    return msgspec.structs.replace(
        ContainerConfig(
            runtime_dir=directory / "runtime",
            storage_dir=directory / "storages",
            state_dir=directory / "states",
            crun_state_root=directory / "crun",
            cgroup_parent=bed.cgroup_parent(),
            output=OutputKind.FILES,
            output_dir=directory / "logs",
            stop_timeout_s=Duration(3),
            settle_time_s=Duration(0.2),
        ),
        **changes,
    )


def runtime(
    directory: Path,
    *,
    resources: tuple[ResourceConfig, ...] = (),
    alerts: Alerts | None = None,
    **changes: Any,
) -> ContainerRuntime:
    """A runtime over `directory`."""
    settings = config(directory, **changes)
    assert settings.output_dir is not None
    return ContainerRuntime(
        settings,
        "crun",
        NODE,
        cgroups.probe(),
        networks=PlainNetworks(),
        permissions=Secrets(),
        resources=Resources(resources),
        disk_quotas=DiskQuotas(),
        output=choose_output(settings.output, settings.output_dir, settings.output_max_size_bytes),
        history=RunHistory(settings.output_dir),
        send_alert=(alerts or Alerts()).send,
    )


def instance(number: int = 0, **changes: Any) -> InstanceInfo:
    """Instance `number` of the test's item."""
    info = InstanceInfo(
        InstanceIdent("item", "subject", number), "1.0.0", "sha256:00", "owner", "runtime", uid=5000, gid=5000
    )
    return msgspec.structs.replace(info, **changes)


def image(directory: Path, script: str, **item: Any) -> InstalledImage:
    """An image of busybox alone that runs a shell script; `item` are members of the item config."""
    layer = directory / "layer"
    if not layer.exists():
        (layer / "bin").mkdir(parents=True)
        shutil.copy("/bin/busybox", layer / "bin" / "busybox")
        for name in ("sh", "sleep", "cat", "id", "ls", "hostname", "grep", "dd", "mount", "touch", "unshare", "date"):
            (layer / "bin" / name).symlink_to("busybox")
    return InstalledImage(
        ItemKey("item", ItemType.SERVICE, "1.0.0", "sha256:00"),
        ImageConfig(config=ProcessConfig(entrypoint=("/bin/sh", "-c"), cmd=(script,))),
        ItemConfig(
            **{
                "base_layer_is_node_rootfs": False,
                "run_parameters": RunParameters(restart_interval=Duration(0.1)),
                **item,
            }
        ),
        layers=(layer,),
    )


def output(directory: Path, info: InstanceInfo) -> str:
    """What an instance has written so far, without time stamps."""
    path = directory / "logs" / instance_id(info.ident) / "output.log"
    lines = path.read_text().splitlines() if path.exists() else []
    return "\n".join(line.split(" ", 3)[3] for line in lines)


async def _main(directory: Path, scripts: list[str]) -> None:
    host = runtime(directory)
    async with running(host):
        await host.adopt([])
        for number, script in enumerate(scripts):
            await host.start_instance(instance(number), image(directory, script))
        os.write(1, b"ready\n")
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_main(Path(sys.argv[1]), sys.argv[2:]))
