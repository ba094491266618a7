"""The initramfs modules of meta-aoscore as the initramfs runs them, on file systems in files (sm-runtime.md §3.3)."""

import hashlib
import os
import shutil
from pathlib import Path

import pytest

from tests.support.initramfs import Machine, installed_machine, run

pytestmark = [
    pytest.mark.container,
    pytest.mark.timeout(300),
    pytest.mark.skipif(os.geteuid() != 0, reason="mounts need root"),
]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return installed_machine(tmp_path)


def with_update(machine: Machine, kind: str = "full", *, image: bytes | None = None, **files: str) -> Machine:
    """A machine with root 1.0 on which an update to 2.0 lies ready."""
    machine.root("root_a", {"etc/version": "1.0", "usr/old": "old", "usr/both": "1"})
    if image is None:
        image = machine.image(update_tree(machine, kind))
    tree = machine.tree(
        "data.update", {"update_rootfs/do_update": kind, **{f"update_rootfs/{n}": t for n, t in files.items()}}
    )
    (tree / "update_rootfs/image.squashfs").write_bytes(image)
    run(["mke2fs", "-q", "-t", "ext4", "-d", str(tree), str(machine.directory / "data"), "16M"])
    machine.parameters["bootparam_aosupdate_disk"] = "/images/data"
    return machine


def update_tree(machine: Machine, kind: str) -> Path:
    if kind == "full":
        tree = machine.tree(
            "new", {"etc/version": "2.0", "usr/both": "2", "var/": "", "run/": "", "dev/": "", "etc/machine-id": ""}
        )
    else:
        tree = machine.tree("new", {"etc/version": "2.0", "usr/both": "2"})
        os.mknod(tree / "usr/old", 0o020000, os.makedev(0, 0))
    return tree


def with_two_roots(machine: Machine) -> Machine:
    machine.root("root_b", {"etc/version": "0.9", "usr/older": "older"})
    machine.parameters["bootparam_aosupdate_roots"] = "/images/root_a,/images/root_b"
    return machine


def files_of(machine: Machine) -> set[str]:
    root = machine.directory / "booted/root"
    return {str(path.relative_to(root)) for path in (root / "usr").iterdir()}


def test_var_run_and_the_machine_id_reach_the_root(machine: Machine) -> None:
    machine.root("root_a", {"etc/version": "1.0"})
    machine.boot()
    first = (machine.directory / "booted/root/etc/machine-id").read_text()
    assert len(first) == 33
    assert set(first.strip()) <= set("0123456789abcdef")
    assert (machine.directory / "booted/root/var/machine-id").read_text() == first
    assert " on /rootfs/run type tmpfs" in (machine.directory / "booted/mounts").read_text()
    machine.boot()
    assert (machine.directory / "booted/root/etc/machine-id").read_text() == first


def test_a_var_that_does_not_come_is_told_and_does_not_stop_the_boot(machine: Machine) -> None:
    machine.root("root_a", {"etc/version": "1.0"})
    machine.parameters["bootparam_vardir_disk"] = "LABEL=nowhere"
    machine.boot()
    assert "<3>aos-initramfs: /dev/disk/by-label/nowhere did not come within 5 s" in machine.log
    assert machine.version == "1.0"


@pytest.mark.parametrize("kind", ["full", "incremental"])
@pytest.mark.parametrize("roots", [1, 2])
def test_an_update_is_tried_then_applied_for_good(machine: Machine, kind: str, roots: int) -> None:
    with_update(machine, kind)
    if roots == 2:
        with_two_roots(machine)
    machine.boot()
    assert machine.version == "2.0"
    assert files_of(machine) == {"usr/both"}
    assert machine.flags() == {"do_update": kind, "updated": "1"}
    machine.edit("data", "touch update_rootfs/do_apply")
    machine.boot()
    assert machine.version == "2.0"
    assert (machine.directory / "booted/where").read_text() == "/rootfs\n"
    assert files_of(machine) == {"usr/both"}
    assert machine.flags() == {}
    machine.boot()
    assert machine.version == "2.0"
    old = machine.edit("root_a", "cat etc/version")
    assert old == ("2.0" if roots == 1 else "1.0")


def test_an_update_that_nobody_confirms_is_reverted(machine: Machine) -> None:
    with_update(machine)
    machine.boot()
    assert machine.version == "2.0"
    machine.boot()
    assert machine.version == "1.0"
    assert files_of(machine) == {"usr/both", "usr/old"}
    assert machine.flags() == {"failed": "update not confirmed after 1 boot(s)"}
    assert "<3>aos-initramfs: root file system update failed: update not confirmed" in machine.log


def test_a_trial_may_take_several_boots(machine: Machine) -> None:
    with_update(machine)
    machine.parameters["bootparam_aosupdate_tries"] = "3"
    for boot in range(1, 4):
        machine.boot()
        assert (machine.version, machine.flags()["updated"]) == ("2.0", str(boot))
    machine.boot()
    assert machine.version == "1.0"


def test_what_sm_found_wrong_is_kept(machine: Machine) -> None:
    with_update(machine)
    machine.boot()
    machine.edit("data", "printf 'aos-sm.service failed' > update_rootfs/failed")
    machine.boot()
    assert machine.version == "1.0"
    assert machine.flags() == {"failed": "aos-sm.service failed"}


def test_a_broken_image_is_refused_once(machine: Machine) -> None:
    with_update(machine, image=b"no image" * 1000)
    machine.boot()
    assert machine.version == "1.0"
    assert machine.flags() == {"do_update": "full", "failed": "can't mount the image image.squashfs"}
    before = machine.log
    machine.boot()
    assert machine.log.removeprefix(before).count("<3>") == 0


def test_a_checksum_is_kept_to(machine: Machine) -> None:
    with_update(machine, **{"image.sha256": f"{'0' * 64}  image.squashfs\n"})
    machine.boot()
    assert machine.version == "1.0"
    assert machine.flags()["failed"] == "the image does not have the checksum it should have"
    image = (machine.directory / "data.update/update_rootfs/image.squashfs").read_bytes()
    good = hashlib.sha256(image).hexdigest()
    machine.edit(
        "data", f"cd update_rootfs; rm failed; echo '{good}  image.squashfs' > image.sha256; echo no > a.squashfs"
    )
    machine.boot()
    assert machine.version == "2.0"


def test_a_checksum_names_no_file_elsewhere(machine: Machine) -> None:
    with_update(machine, **{"image.sha256": f"{'0' * 64}  ../../etc/passwd\n"})
    machine.boot()
    assert machine.version == "1.0"
    assert "failed" in machine.flags()


def test_a_node_without_data_disk_boots(machine: Machine) -> None:
    machine.root("root_a", {"etc/version": "1.0"})
    machine.parameters["bootparam_aosupdate_disk"] = "/images/none"
    machine.boot()
    assert machine.version == "1.0"
    assert "<3>" not in machine.log


@pytest.mark.parametrize("roots", [1, 2])
def test_a_power_cut_at_any_step_ends_in_a_whole_system(machine: Machine, roots: int) -> None:
    """Cut at every program that writes something durable, while it is tried and while it is applied."""
    with_update(machine)
    if roots == 2:
        with_two_roots(machine)
    disks = ["data", "root_a", "var", *(["root_b"] if roots == 2 else [])]
    for name in disks:
        shutil.copy(machine.directory / name, machine.directory / f"{name}.saved")
    cuts = 0
    for flag in ("do_update", "do_apply"):
        done = False
        while not done:
            cuts += 1
            for name in disks:
                shutil.copy(machine.directory / f"{name}.saved", machine.directory / name)
            machine.edit("data", f"touch update_rootfs/{flag}")
            done = machine.boot(cut=cuts)
            if not done:
                machine.boot()
            assert machine.version in ("1.0", "2.0")
            assert files_of(machine) == ({"usr/both", "usr/old"} if machine.version == "1.0" else {"usr/both"})
            if flag == "do_apply":
                assert (machine.version, machine.flags()) == ("2.0", {})
        cuts = 0
