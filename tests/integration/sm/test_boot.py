"""Boot updates: SM and node dying at every step, and partitions on loop devices."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from aoscore.common.types import InstanceInfo
from aoscore.sm.imagemanager.model import InstalledImage
from aoscore.sm.launcher.runtimes.boot import partitions
from tests.support.boot import BootNode, announce_writes
from tests.support.components import FakeSystem, life


@pytest.mark.timeout(300)
@pytest.mark.parametrize("then", ["SM starts again", "power cut"])
@pytest.mark.parametrize("outcome", ["good", "sick", "broken"])
def test_killed_at_any_step_the_update_ends_the_same(tmp_path: Path, then: str, outcome: str) -> None:
    """Each write to files, partitions and variables of all lives, from the request to the end of the update."""
    step = 0
    while True:
        step += 1
        directory = tmp_path / f"{step}"
        directory.mkdir()
        node = BootNode(directory)
        if outcome == "sick":
            node.system = FakeSystem({"a.service": "failed"})
        if outcome == "broken":
            node.broken.add("2.0.0")
        info, payload = node.update()

        async def work(node: BootNode = node, info: InstanceInfo = info, payload: InstalledImage = payload) -> int:
            announce_writes()
            return await life(node.runtime(), info, payload)

        killed = node.survive(step, work, power_cut=then == "power cut")
        assert node.running == node.installed(), step
        assert node.are_equal(), step
        if outcome != "good":
            assert node.running == "1.0.0", step
        elif then == "SM starts again":
            assert node.running == "2.0.0", step
        left = node.files() - {"rejected_instance.json"}
        assert left == {"installed.json"}, (step, left)
        shutil.rmtree(directory)
        if not killed:
            break
    assert step > 10


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[Path]:
    """A loop device with a file system that this kernel can mount, and aos/version on it."""
    if os.geteuid() != 0 or shutil.which("losetup") is None:
        pytest.skip("needs root and losetup")
    tree = tmp_path / "tree"
    (tree / "aos").mkdir(parents=True)
    (tree / "aos/version").write_text('VERSION = "1.2.3"\n')
    disk = tmp_path / "disk"
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-d", tree, disk, "4M"], check=True)
    found = subprocess.run(["losetup", "--find", "--show", disk], check=True, capture_output=True, text=True)
    yield Path(found.stdout.strip())
    subprocess.run(["losetup", "--detach", found.stdout.strip()], check=True)


@pytest.mark.container
def test_partition_on_a_loop_device(loop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Not every kernel that runs tests has vfat.
    monkeypatch.setattr(partitions, "FILE_SYSTEM", "ext4")
    assert partitions.read_partition_version(loop, "aos/version", tmp_path / "mnt") == "1.2.3"
    assert not (tmp_path / "mnt/aos").exists()
    mounted = tmp_path / "mounted"
    mounted.mkdir()
    subprocess.run(["mount", loop, mounted], check=True)
    try:
        assert partitions.read_partition_version(loop, "aos/version", tmp_path / "mnt") == "1.2.3"
        # What is in use is not written to.
        with pytest.raises(OSError, match="busy"):
            partitions.copy_partition(tmp_path / "disk", loop)
    finally:
        subprocess.run(["umount", mounted], check=True)
    other = tmp_path / "other"
    other.write_bytes(os.urandom(4 << 20))
    partitions.copy_partition(other, loop)
    subprocess.run(["blockdev", "--flushbufs", loop], check=True)
    assert loop.read_bytes() == other.read_bytes()
