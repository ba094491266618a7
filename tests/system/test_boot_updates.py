"""Updates of a node's boot partition as the cloud orders them: real partitions and reboots of a guest (bed D).

The firmware is played, see `firmware_in_guest`: the guest has none that could boot from them.
"""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from aoscore.ctl.host import run
from aoscore.ctl.target import Node, tree
from qemu.images import build_images
from qemu.unit import QemuUnit, saved_unit
from tests.support.boot import MEDIA_TYPE
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

# Each reboot takes two minutes.
pytestmark = [pytest.mark.vm, pytest.mark.timeout(3600)]

_PARTITIONS = ("/dev/loop0p1", "/dev/loop0p2")
_SECTORS = 8192
_FIRST_SECTOR = 2048
_FIRMWARE = Path(__file__).with_name("firmware_in_guest.py")
_UNIT = """[Unit]
Description=Plays EFI firmware
RequiresMountsFor=/var/aos
Before=aos-sm.service aos-cm.service
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/opt/aoscore/bin/python /usr/local/lib/aos-firmware.py
[Install]
WantedBy=multi-user.target
"""


@pytest.fixture(scope="module")
def unit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[QemuUnit]:
    saved = saved_unit(build_images())
    directory = tmp_path_factory.mktemp("unit")
    with running(QemuUnit(directory, saved.images, states=saved.states, names=("main",))) as unit:
        unit.provision()
        label_nodes(unit)
        run_services(unit)
        give_partitions(unit)
        unit.wait(lambda: components(unit) == {"1.0.0": "active"}, 120, "the cloud to know the boot partition")
        yield unit


def file_system(directory: Path, version: str, *, is_sick: bool = False) -> Path:
    """An image of a boot partition."""
    content = directory / "content"
    for name, text in {"EFI/BOOT/bootx64.efi": "loader", "aos/version": f'VERSION="{version}"\n'}.items():
        (content / name).parent.mkdir(parents=True, exist_ok=True)
        (content / name).write_text(text)
    if is_sick:
        (content / "aos/sick").touch()
    image = directory / "partition.img"
    run(["mkfs.vfat", "-C", image, f"{_SECTORS // 2}"])
    run(["mcopy", "-s", "-i", image, content / "EFI", content / "aos", "::/"])
    return image


def give_partitions(unit: QemuUnit) -> None:
    """Give the guest a disk with two boot partitions, firmware, and SM the runtime for them."""
    directory = unit.directory / "boot-1.0.0"
    data = file_system(directory, "1.0.0").read_bytes()
    disk = directory / "boot.img"
    disk.write_bytes(b"")
    with disk.open("r+b") as file:
        file.truncate((_FIRST_SECTOR + 2 * _SECTORS + 2048) * 512)
        table = "label: gpt\n" + "".join(
            f"start={_FIRST_SECTOR + number * _SECTORS}, size={_SECTORS}, type=uefi\n" for number in (0, 1)
        )
        (directory / "table").write_text(table)
        run(["sh", "-c", f"sfdisk --quiet {disk} < {directory / 'table'}"])
        for number in (0, 1):
            file.seek((_FIRST_SECTOR + number * _SECTORS) * 512)
            file.write(data)
    main = unit.main
    main.run("sh", "-c", "gunzip > /var/aos/boot.img", stdin=gzip.compress(disk.read_bytes()))
    main.run("sh", "-c", "cat > /usr/local/lib/aos-firmware.py", stdin=_FIRMWARE.read_bytes())
    main.run("sh", "-c", "cat > /etc/systemd/system/aos-firmware.service", stdin=_UNIT.encode())
    node = Node(data_disk=False, runtimes=("boot",), boot_partitions=_PARTITIONS)
    [runtime] = next(json.loads(one.content)["runtimes"] for one in tree(node) if one.path == "/etc/aos/sm.cfg")
    config = json.loads(main.run("cat", "/etc/aos/sm.cfg"))
    config["runtimes"].append(runtime)
    main.run("sh", "-c", "cat > /etc/aos/sm.cfg", stdin=json.dumps(config).encode())
    # After a boot an emulated node needs minutes; CM would give the update up before SM can tell what was wrong.
    config = json.loads(main.run("cat", "/etc/aos/cm.cfg"))
    config["nodeInfoProvider"] = {**config.get("nodeInfoProvider", {}), "smConnectionTimeout": "10m"}
    main.run("sh", "-c", "cat > /etc/aos/cm.cfg", stdin=json.dumps(config).encode())
    main.shell("systemctl daemon-reload; systemctl enable --now aos-firmware; systemctl restart aos-cm aos-sm")


def offer(unit: QemuUnit, version: str, *, is_sick: bool = False) -> None:
    """Give the cloud a version of the boot partition."""
    directory = unit.directory / f"boot-{version}"
    image = file_system(directory, version, is_sick=is_sick)
    packed = directory / "packed"
    packed.write_bytes(gzip.compress(image.read_bytes(), mtime=0))
    upload_component(unit, "boot", version, MEDIA_TYPE, packed)


def boot(unit: QemuUnit) -> str:
    """Another one after each boot. Soon asked again when the question is lost in one."""
    return unit.main.run("cat", "/proc/sys/kernel/random/boot_id", timeout_s=10)


def booted(unit: QemuUnit) -> list[str]:
    """What the firmware has started at each boot, from its first on."""
    said = unit.main.run("journalctl", "-u", "aos-firmware", "-o", "cat").splitlines()
    return [line for line in said if line.startswith("boots load option")]


def check(unit: QemuUnit, version: str) -> None:
    """The Unit runs this version, has it on both partitions, and does what it is for."""
    unit.wait(unit.is_online, 120, "the Unit to be online")
    wait_active(unit)
    check_whole(unit)
    unit.main.run("cmp", *_PARTITIONS)
    assert version in unit.main.run("grep", "-a", "-o", f'VERSION="{version}"', _PARTITIONS[0])
    assert unit.ask("violations") == []


def test_boot_partition_is_tried_and_taken_over(unit: QemuUnit) -> None:
    before = boot(unit)
    offer(unit, "2.0.0")
    unit.call("assign", item="boot", target=unit.system_id)
    unit.wait(lambda: boot(unit) != before, 120, "the node to boot again")
    wait_installed(unit, "2.0.0", 120)
    assert len(booted(unit)) == 1
    check(unit, "2.0.0")


def test_boot_partition_that_is_not_well_is_left(unit: QemuUnit) -> None:
    before = booted(unit)
    offer(unit, "2.1.0", is_sick=True)
    unit.wait(lambda: "unit aos-cm.service has failed" in str(unit.ask("unit")), 360, "the cloud to be told why")
    wait_installed(unit, "2.0.0", 60)
    trial, after = booted(unit)[len(before) :]
    assert trial != after == before[-1]
    check(unit, "2.0.0")


def test_newer_boot_partition_is_wanted_in_the_middle(unit: QemuUnit) -> None:
    before = boot(unit)
    offer(unit, "2.2.0")
    unit.wait(lambda: boot(unit) != before, 120, "the first to be tried")
    offer(unit, "2.2.1")
    wait_installed(unit, "2.2.1", 300)
    check(unit, "2.2.1")
