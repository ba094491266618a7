"""Updates of a node's root file system as the cloud orders them, with initramfs and reboots (bed C)."""

from collections.abc import Iterator

import pytest

from aoscore.ctl.host import run
from tests.support.nspawn import NspawnUnit
from tests.support.rootfs import INCREMENTAL
from tests.support.wholeunit import (
    check_whole,
    components,
    label_nodes,
    run_services,
    upload_component,
    wait_active,
    wait_installed,
)
from tests.system.conftest import running

pytestmark = [pytest.mark.nspawn, pytest.mark.timeout(600)]

_UPDATES = "/var/aos/workdirs/sm/runtimes/rootfs"
_SICK = "[Service]\nExecStart=\nExecStart=/bin/false\nRestart=no\n"


@pytest.fixture(scope="module")
def provisioned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NspawnUnit]:
    with running(NspawnUnit(tmp_path_factory.mktemp("unit"), keys="softhsm", with_updates=True)) as unit:
        unit.provision()
        label_nodes(unit)
        run_services(unit)
        assert components(unit) == {"1.0.0": "active"}
        yield unit


@pytest.fixture
def unit(provisioned: NspawnUnit) -> Iterator[NspawnUnit]:
    yield provisioned
    # Whatever became of the update, the node is whole, and what it is for goes on.
    provisioned.wait(provisioned.is_online, 90, "the Unit to be online")
    wait_active(provisioned)
    check_whole(provisioned)
    assert provisioned.ask("violations") == []


def offer_root(unit: NspawnUnit, version: str, **files: str) -> None:
    """Give the cloud a version of the root file system: a difference to any other, with these files besides."""
    folder = unit.directory / "roots" / version
    tree = folder / "tree"
    for name, content in {"etc/aos/version": f'VERSION="{version}"\n', f"usr/{version}": "new", **files}.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(content)
    run(["mksquashfs", tree, folder / "image", "-quiet", "-no-progress", "-all-root"])
    upload_component(unit, "rootfs", version, INCREMENTAL, folder / "image")


def running_version(unit: NspawnUnit) -> str:
    """What the booted root says that it is."""
    return unit.nodes["main"].run("cat", "/etc/aos/version").strip().removeprefix('VERSION="').rstrip('"')


def boot(unit: NspawnUnit) -> str:
    """Another one after each boot."""
    return unit.nodes["main"].run("cat", "/proc/sys/kernel/random/boot_id").strip()


def kernel_log(unit: NspawnUnit) -> str:
    """What the initramfs has said at all boots."""
    return (unit.directory / "nodes" / "main" / "kmsg").read_text()


def test_root_is_tried_confirmed_and_applied(unit: NspawnUnit) -> None:
    first = boot(unit)
    offer_root(unit, "2.0.0")
    unit.call("assign", item="rootfs", target=unit.system_id)
    unit.wait(lambda: running_version(unit) == "2.0.0" and boot(unit) != first, 90, "the new root to be tried")
    trial = boot(unit)
    assert "trying the root file system image.squashfs, boot 1" in kernel_log(unit)
    wait_installed(unit, "2.0.0", 120)
    assert boot(unit) not in (first, trial), "applied at a boot of its own"
    assert "root file system image.squashfs is applied" in kernel_log(unit)
    assert running_version(unit) == "2.0.0"
    assert unit.nodes["main"].run("cat", "/usr/2.0.0") == "new"
    assert unit.nodes["main"].run("ls", _UPDATES).split() == ["installed_instance.json"]


def test_root_that_is_not_well_is_reverted(unit: NspawnUnit) -> None:
    before = running_version(unit)
    offer_root(unit, "2.1.0", **{"usr/lib/systemd/system/aos-cm.service.d/sick.conf": _SICK})
    unit.wait(lambda: running_version(unit) == "2.1.0", 90, "the new root to be tried")
    unit.wait(lambda: running_version(unit) == before, 120, "the old root to be back")
    unit.wait(lambda: "unit aos-cm.service has failed" in str(unit.ask("unit")), 120, "the cloud to be told why")
    unit.wait(lambda: components(unit).get(before) == "active", 60, "the cloud to know which one is installed")
    assert not unit.nodes["main"].run("sh", "-c", "ls /usr/2.1.0 2>/dev/null || true")


@pytest.mark.parametrize("moment", ["before the reboot", "on trial"])
def test_newer_root_is_wanted_in_the_middle(unit: NspawnUnit, moment: str) -> None:
    """The one that was wanted first is left, and the newest is what is installed in the end."""
    first, last = ("2.3.0", "2.3.1") if moment == "on trial" else ("2.2.0", "2.2.1")
    offer_root(unit, first)
    if moment == "on trial":
        unit.wait(lambda: running_version(unit) == first, 90, "the first to be tried")
        unit.wait(unit.is_online, 60, "the Unit to be online")
    offer_root(unit, last)
    wait_installed(unit, last, 240)
    assert running_version(unit) == last
    assert unit.nodes["main"].run("ls", _UPDATES).split() == ["installed_instance.json"]
