"""Disk images of a Dom0 that is the Main Node, and of its guest that is the Secondary Node."""

import dataclasses
import gzip
import shutil
from functools import partial
from pathlib import Path

import msgspec

from aoscore.ctl.target import Node
from qemu.cache import kept
from qemu.guest import Boot
from qemu.images import KERNEL_OPTIONS, cloud_of_images, guest_nodes, node_disks, write_agent, write_guest
from qemu.layers import dom0_layers, kernel, lower_layers

GUEST = "secondary"
CONFIG = f"/etc/xen/{GUEST}.cfg"
CONSOLE_LOG = f"/var/log/xen/console/guest-{GUEST}.log"
_CONFIG_FILE = Path(__file__).with_name(f"{GUEST}.cfg")
_DOM0_MIB = 1024
# What has not said for 30 s that it lives may only have waited for its turn; the guest's configuration has the same.
_SLOW = "systemd.show_status=no systemd.service_watchdogs=no"
# What MP needs in a guest; Dom0 starts guests and serves their disks besides.
_MODULES = ("xen-evtchn", "xen-gntdev", "xen-gntalloc", "xenfs")
_DOM0_MODULES = (*_MODULES, "xen-privcmd", "xen-blkback")


class XenImages(msgspec.Struct, frozen=True):
    """What Dom0 boots, with the disks of its guest after its own, and the cloud that both nodes know."""

    boot: Boot
    cloud: Path


def build_xen_images() -> XenImages:
    """Disk images of both nodes; builds what is not there yet."""
    guest_layers = lower_layers(with_vchan=True)
    layers = dom0_layers()
    cloud = cloud_of_images()
    main, secondary = xen_nodes(cloud.root_file().read_text())
    dom0_disks = node_disks("dom0", main, layers, partial(write_dom0, main, kernel(guest_layers)))
    guest_disks = node_disks("domu", secondary, guest_layers, partial(write_domu, secondary))
    vmlinuz, initrd = kernel(layers)
    boot = Boot(
        (*dom0_disks, *guest_disks),
        vmlinuz,
        initrd,
        f"root=/dev/vda rw console=hvc0 {KERNEL_OPTIONS} {_SLOW}",
        xen=kept("hypervisor", [layers[-1].name], partial(_unpack_xen, layers[-1])) / "xen",
        xen_append=f"console=com1 com1=115200,8n1 dom0_mem={_DOM0_MIB}M,max:{_DOM0_MIB}M",
    )
    return XenImages(boot, cloud.directory)


def xen_nodes(root_ca: str) -> tuple[Node, Node]:
    """Main and Secondary Node, whose link is vchan; `root_ca` is PEM text."""
    # Each use of a software token is a process of its own: too slow for two domains on one emulated processor.
    nodes = guest_nodes(root_ca, with_mp=True, keys="file")
    main = dataclasses.replace(nodes["main"], transport="vchan", vchan_domain=f"name:{GUEST}")
    return main, dataclasses.replace(nodes["secondary"], transport="vchan", vchan_domain=0)


def _unpack_xen(tree: Path, target: Path) -> None:
    """QEMU's multiboot loader does not unpack it."""
    target.mkdir()
    packed = next((tree / "boot").glob("xen-*.gz"))
    with gzip.open(packed) as source, (target / "xen").open("wb") as unpacked:
        shutil.copyfileobj(source, unpacked)


def write_dom0(node: Node, guest_kernel: tuple[Path, Path], root: Path) -> None:
    """What makes a node Xen's Dom0, below `root`; it starts its guest with `guest_kernel` and the RAM disk to that."""
    # Dom0 sees the disks of the guest, too: their labels are the same.
    write_guest(node, root, console="hvc0", data="/dev/vdb")
    write_agent(root)
    _load(root, _DOM0_MODULES)
    config = root / CONFIG.lstrip("/")
    config.parent.mkdir(parents=True)
    shutil.copy(_CONFIG_FILE, config)
    boot = root / "boot" / "aos"
    boot.mkdir(parents=True)
    for source, name in zip(guest_kernel, ("vmlinuz", "initrd.img"), strict=True):
        shutil.copy(source, boot / f"{GUEST}-{name}")
    defaults = root / "etc" / "default"
    defaults.mkdir(exist_ok=True)
    (defaults / "xen").write_text("XENCONSOLED_ARGS=--log=guest\n")
    (root / CONSOLE_LOG.lstrip("/")).parent.mkdir(parents=True)


def write_domu(node: Node, root: Path) -> None:
    """What makes a node the guest of that Dom0, below `root`."""
    write_guest(node, root, console="hvc0")
    _load(root, _MODULES)
    # It is to be provisioned with the Main Node.
    (root / "etc" / "systemd" / "system" / "aos-iam-prov.service").unlink()


def _load(root: Path, modules: tuple[str, ...]) -> None:
    place = root / "etc" / "modules-load.d"
    place.mkdir(parents=True)
    (place / "xen.conf").write_text("".join(f"{name}\n" for name in modules))
