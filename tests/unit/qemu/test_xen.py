"""The files of Xen's Dom0 and its guest: they find each other, and each its own disks."""

import json
import re
from pathlib import Path

from qemu.images import write_node
from qemu.xen.images import CONFIG, GUEST, write_dom0, write_domu, xen_nodes

_MAX_VCHAN_PATH = 49


def test_dom0_starts_the_guest_that_its_gateway_waits_for(tmp_path: Path) -> None:
    main, _ = xen_nodes("")
    kernel = tuple(tmp_path / name for name in ("vmlinuz-1", "initrd.img-1"))
    for file in kernel:
        file.write_text(file.name)
    root = tmp_path / "root"
    write_node(main, root)
    write_dom0(main, (kernel[0], kernel[1]), root)

    link = json.loads((root / "etc/aos/mp.cfg").read_text())
    config = (root / CONFIG.lstrip("/")).read_text()
    values = dict(re.findall(r'^(\w+) = "(.*)"$', config, re.MULTILINE))
    assert link["role"] == "gateway" and link["transport"]["type"] == "vchan"
    assert link["vchan"]["domain"] == f"name:{values['name']}" == f"name:{GUEST}"
    assert (root / values["kernel"].lstrip("/")).read_text() == "vmlinuz-1"
    assert (root / values["ramdisk"].lstrip("/")).read_text() == "initrd.img-1"
    # The first two disks are Dom0's own, and the guest's have the same labels.
    assert re.findall(r"phy:(/dev/\w+),(\w+),w", config) == [("/dev/vdc", "xvda"), ("/dev/vdd", "xvdb")]
    assert "/dev/vdb /var/aos ext4" in (root / "etc/fstab").read_text()


def test_the_guest_finds_the_gateway_and_waits_to_be_provisioned(tmp_path: Path) -> None:
    main, secondary = xen_nodes("")
    write_node(secondary, tmp_path)
    write_domu(secondary, tmp_path)

    link = json.loads((tmp_path / "etc/aos/mp.cfg").read_text())
    assert link["role"] == "node" and link["vchan"]["domain"] == 0
    assert link["vchan"]["xsRxPath"] == f"{main.vchan_path}/rx"
    assert len(f"/local/domain/0/{main.vchan_path}/rx") <= _MAX_VCHAN_PATH
    assert not (tmp_path / "etc/systemd/system/aos-iam-prov.service").is_symlink()
    assert "LABEL=aosdata /var/aos ext4" in (tmp_path / "etc/fstab").read_text()
    assert "xen-gntdev" in (tmp_path / "etc/modules-load.d/xen.conf").read_text().split()
