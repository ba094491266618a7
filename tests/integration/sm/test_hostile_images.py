"""Hostile images on the whole SM with a small disk: each is refused with a reason, and the node works on."""

import os
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from aoscore.common.types import InstanceInfo
from tests.support.items import tar
from tests.support.smbed import SmBed
from tests.support.smunit import RUNTIME_ID, SmUnit
from tests.support.tar import END, directory, gnu_sparse, member, symlink

pytestmark = [pytest.mark.container, pytest.mark.net, pytest.mark.timeout(180)]

MIB = 1 << 20
DISK = 128 * MIB
INODES = 120_000
BUSYBOX = Path("/bin/busybox")

HOSTILE = {
    "bomb": (lambda: member(b"zeros", bytes(512 * MIB)) + END, "bytes of disk"),
    "liar": (lambda: gnu_sparse(b"huge", [(0, b"x")], 4 << 30) + END, "unpacks to more than is allowed"),
    "many": (lambda: b"".join(directory(b"d%d" % one) for one in range(INODES)) + END, "files, half of what fit"),
    # A third of the disk by the archive's own word, but every file takes a block.
    "small": (lambda: b"".join(member(b"f%d" % one, b"x") for one in range(45_000)) + END, "takes more disk than"),
    "escape": (lambda: member(b"../../../escaped", b"bad") + END, "'../../../escaped': leaves the layer"),
    "link": (lambda: symlink(b"etc", b"/etc") + member(b"etc/escaped", b"bad") + END, "'etc/escaped': lies below"),
    "device": (lambda: member(b"sda", kind=b"4", device=(8, 0)) + END, "'sda': is a device node"),
    "name": (lambda: member(b"line\nbreak", b"1") + END, "line break in its name"),
    "cut": (lambda: member(b"file", b"x" * 2000)[:1500], "the archive ends too early"),
}


def service(unit: SmUnit, item: str, layers: list[bytes]) -> InstanceInfo:
    digest = unit.bed.blobs.item(
        [tar({"bin/busybox": BUSYBOX.read_bytes()}, mode=0o755), *layers],
        process={"entrypoint": ["/bin/busybox"], "cmd": ["sleep", "100000"]},
        item_config={"baseLayerIsNodeRootfs": False},
    )
    return unit.bed.instance(item, manifest_digest=digest, runtime_id=RUNTIME_ID, uid=5000, gid=5000)


@pytest.fixture
async def unit(tmp_path: Path) -> AsyncIterator[SmUnit]:
    work = tmp_path / "sm"
    work.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK},nr_inodes={INODES}", "work", work], check=True)
    async with SmBed(tmp_path).running() as bed:
        yield SmUnit(bed)
    subprocess.run(["umount", "-l", work], check=True)


async def test_each_is_refused_with_a_reason_and_the_node_works_on(unit: SmUnit) -> None:
    cm, work = unit.cm, unit.bed.root / "sm"

    def failed(item: str) -> Any:
        found = (one for one in cm.statuses() if one.instance.item_id == item and one.state == "failed")
        return next((one.error.message for one in found), None)

    async with unit.sm() as sm:
        await cm.connected(1)
        cm.update(service(unit, "good", []))
        await cm.wait(lambda cm: cm.states().get("good") == ("1.0.0", "active"), 60)
        for item, (layer, reason) in HOSTILE.items():
            info = service(unit, item, [layer()])
            cm.update(info)
            message = await cm.wait(lambda cm, item=item: failed(item), 60)
            free = os.statvfs(work).f_bavail * os.statvfs(work).f_frsize
            print(f"{item:8}{message}\n{'':8}{free >> 20} MiB of {DISK >> 20} are free")
            assert reason in message
            assert free >= DISK // 20, "some is left to others"
            assert not any(unit.bed.root.rglob("escaped"))
            cm.update(stop=(info,))
            await cm.wait(lambda cm, item=item: item not in cm.states(), 60)
        # What the broken installs have left gives way.
        cm.update(service(unit, "large", [tar({"random": os.urandom(45 * MIB)})]))
        await cm.wait(lambda cm: cm.states().get("large") == ("1.0.0", "active"), 60)
        assert cm.states() == dict.fromkeys(("good", "large"), ("1.0.0", "active"))
        assert "Can't store" not in sm.text()
