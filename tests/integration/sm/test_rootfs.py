"""Root file system updates: SM and node dying at every step, and SM with the initramfs modules of the layer."""

import os
from pathlib import Path

import pytest

from aoscore.common.types import InstanceInfo
from aoscore.sm.imagemanager.model import InstalledImage
from aoscore.sm.launcher.runtimes.component import read_version
from aoscore.sm.launcher.runtimes.rootfs.config import RootfsConfig
from aoscore.sm.launcher.runtimes.rootfs.runtime import RootfsRuntime
from tests.support.components import (
    NODE,
    SETTLED,
    TO_REBOOT,
    FakeSystem,
    image,
    instance,
    life,
    no_pause,
    told,
)
from tests.support.initramfs import installed_machine
from tests.support.rootfs import FULL, INCREMENTAL, Node


@pytest.mark.timeout(300)
@pytest.mark.parametrize("then", ["SM starts again", "power cut"])
@pytest.mark.parametrize("outcome", ["good", "sick"])
def test_killed_at_any_step_the_update_ends_the_same(tmp_path: Path, then: str, outcome: str) -> None:
    """Each file step of all lives, from the request to the end of the update."""
    step = 0
    while True:
        step += 1
        (tmp_path / f"{step}").mkdir()
        node = Node(tmp_path / f"{step}")
        if outcome == "sick":
            node.system = FakeSystem({"a.service": "failed"})
        info, payload = node.update()

        async def work(node: Node = node, info: InstanceInfo = info, payload: InstalledImage = payload) -> int:
            return await life(node.runtime(), info, payload)

        killed = node.survive(step, work, power_cut=then == "power cut")
        assert node.root == node.installed(), step
        if outcome == "sick":
            assert node.root == "1.0.0"
        elif then == "SM starts again":
            assert node.root == "2.0.0", step
        left = node.files() - {"rejected_instance.json"}
        assert left == {"installed_instance.json"}, (step, left)
        if not killed:
            break
    assert step > 10


class RealNode:
    """SM's directory is on a disk of the machine: SM finds there what the initramfs left, and vice versa."""

    def __init__(self, directory: Path) -> None:
        self.machine = installed_machine(directory)
        self.machine.root("root_a", {"etc/aos/version": 'VERSION="1.0.0"\n', "etc/version": "1.0", "usr/old": "old"})
        self.machine.disk("data", {"update_rootfs/": ""})
        self.machine.parameters["bootparam_aosupdate_disk"] = "/images/data"
        self.updates = directory / "updates"
        self.updates.mkdir()
        self.system = FakeSystem()
        self.boots = 0
        self.boot()

    def boot(self) -> None:
        """Reboot: the files go to the disk before and come back after."""
        self.machine.edit("data", f"rm -rf update_rootfs && cp -a {self.updates} update_rootfs")
        self.machine.boot()
        self.boots += 1
        self.machine.edit("data", f"rm -rf {self.updates} && cp -a update_rootfs {self.updates}")

    @property
    def version(self) -> str:
        """Version of the running system."""
        return read_version(self.machine.directory / "booted/root/etc/aos/version")

    def files(self) -> set[str]:
        """What is on the disk."""
        return {path.name for path in self.updates.iterdir()}

    async def life(self, info: InstanceInfo, payload: InstalledImage) -> tuple[int, list[tuple[str, str, str]]]:
        """One life of SM: how it ends, what it told."""
        config = RootfsConfig(
            working_dir=self.updates,
            version_file_path=self.machine.directory / "booted/root/etc/aos/version",
            health_check_services=("a.service",),
        )
        runtime = RootfsRuntime(config, "rootfs", NODE, self.system, boot_id=f"boot {self.boots}", sleep=no_pause)
        with runtime.changed.subscribe() as statuses:
            return await life(runtime, info, payload), told(statuses)

    def update(self, kind: str) -> tuple[InstanceInfo, InstalledImage]:
        """Version 2.0.0 as CM asks for it."""
        files = {"etc/aos/version": 'VERSION="2.0.0"\n', "etc/version": "2.0", "usr/new": "new"}
        if kind == "full":
            files |= {**dict.fromkeys(("var/", "run/", "dev/"), ""), "etc/machine-id": ""}
        content = self.machine.image(self.machine.tree("new", files))
        info = instance("runtime", "2.0.0", "sha256:manifest-2.0.0")
        media_type = FULL if kind == "full" else INCREMENTAL
        return info, image(self.machine.directory / "blob", info, content, media_type)


@pytest.mark.container
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts need root")
@pytest.mark.parametrize("kind", ["full", "incremental"])
async def test_sm_and_initramfs_try_confirm_and_apply(tmp_path: Path, kind: str) -> None:
    node = RealNode(tmp_path)
    info, payload = node.update(kind)
    assert node.version == "1.0.0"
    assert await node.life(info, payload) == (TO_REBOOT, [("1.0.0", "active", ""), ("2.0.0", "activating", "")])
    node.boot()
    assert (node.version, "updated" in node.files()) == ("2.0.0", True)
    assert (await node.life(info, payload))[0] == TO_REBOOT
    node.boot()
    assert (node.version, "do_apply" in node.files()) == ("2.0.0", False)
    settled = [("1.0.0", "inactive", ""), ("2.0.0", "active", "")]
    assert await node.life(info, payload) == (SETTLED, settled)
    assert node.files() == {"installed_instance.json"}
    node.boot()
    assert node.version == "2.0.0"
    assert (tmp_path / "booted/root/usr/old").exists() == (kind == "incremental")


@pytest.mark.container
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts need root")
async def test_sm_and_initramfs_revert(tmp_path: Path) -> None:
    node = RealNode(tmp_path)
    info, payload = node.update("full")
    assert (await node.life(info, payload))[0] == TO_REBOOT
    node.boot()
    node.system.units = {"a.service": "failed"}
    end, statuses = await node.life(info, payload)
    assert (end, statuses[-1]) == (TO_REBOOT, ("2.0.0", "failed", "unit a.service has failed"))
    node.boot()
    assert node.version == "1.0.0"
    end, statuses = await node.life(info, payload)
    assert end == SETTLED
    assert statuses == [("2.0.0", "failed", "unit a.service has failed"), ("1.0.0", "active", "")]
    assert node.files() == {"installed_instance.json", "rejected_instance.json"}


@pytest.mark.container
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts need root")
async def test_image_that_was_damaged_on_the_disk_is_refused_by_the_initramfs_and_reported(tmp_path: Path) -> None:
    node = RealNode(tmp_path)
    info, payload = node.update("full")
    assert (await node.life(info, payload))[0] == TO_REBOOT
    with (node.updates / "image.squashfs").open("r+b") as file:
        file.seek(2000)
        file.write(b"damage")
    node.boot()
    assert node.version == "1.0.0"
    _, statuses = await node.life(info, payload)
    assert statuses[0] == ("2.0.0", "failed", "the image does not have the checksum it should have")
