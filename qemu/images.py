"""Disk images of guests: the layers of `layers.py` and the files of a Node from the one generator of them."""

import dataclasses
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import msgspec

from aoscore.common.files import remove_tree
from aoscore.ctl.localcloud import LocalCloud
from aoscore.ctl.target import Node, tree, write
from qemu.bed import MAIN_IP
from qemu.cache import kept, run_builder, tree_digest
from qemu.guest import Boot
from qemu.layers import kernel, lower_layers

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ROOT / ".venv-tools"
DOMAIN = "aoscloud.test"
# The cloud's network: the host's end and the Main Node's. The Unit's own network is the generator's default.
CLOUD_IP = "172.31.9.1"
MAIN_UPLINK_IP = "172.31.9.2"
# Nobody is there; the VLANs of instances go over the link of the default route, which is not the one to the cloud.
_ROUTER_IP = "10.0.0.1"
SECONDARY_IP = "10.0.0.101"

# The emulated processor has no faults to be protected from.
KERNEL_OPTIONS = "net.ifnames=0 mitigations=off quiet"
_ROOT_MIB = 1536
_DATA_MIB = 1024
_BUILD_TIMEOUT_S = 900.0
_AGENT = Path(__file__).with_name("agent.py")
# What Debian starts and a node has no use for; the others only where the node has no such disks.
_MASKED = (
    *("apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "e2scrub_all.timer", "fstrim.timer"),
    *("e2scrub_reap.service", "systemd-networkd-wait-online.service", "getty@tty1.service"),
    # The kernel has turned quotas on with the mount already.
    "quotaon@var-aos.service",
    *("systemd-pstore.service", "modprobe@efi_pstore.service", "modprobe@drm.service", "nfs-blkmap.service"),
)
_OF_NFS = ("run-rpc_pipefs.mount", "nfs-server.service", "nfs-client.target", "rpcbind.service", "rpcbind.socket")
_OF_VOLUMES = ("lvm2-monitor.service", "lvm2-lvmpolld.socket", "dm-event.socket", "blk-availability.service")


def guest_nodes(
    root_ca: str,
    *,
    interface: str = "eth0",
    cloud_ip: str = CLOUD_IP,
    with_mp: bool = False,
    keys: Literal["softhsm", "file"] = "softhsm",
    runtimes: tuple[str, ...] = ("container",),
) -> dict[str, Node]:
    """The two Nodes of a Unit by host name. `interface` leads to the Unit's network, `root_ca` is PEM text.

    `with_mp`: the Secondary Node reaches the Main Node through the link of two MPs. `keys`: where private keys are.
    """
    mp = ("mp",) if with_mp else ()

    def node(kind: Literal["main", "secondary"], components: tuple[str, ...], ip: str, gateway: str) -> Node:
        return Node(
            kind=kind,
            components=components,
            interface=interface,
            ip=f"{ip}/24",
            gateway=gateway,
            dhcp=False,
            provisioning_peers=(cloud_ip,),
            keys=keys,
            data_disk=False,
            nfs=False,
            runtimes=runtimes,
            discovery_url=f"https://{DOMAIN}:9000/sd/v7/",
            root_ca=root_ca,
            bin="/opt/aoscore/bin",
            log_level="debug",
            status_period="1s",
            monitoring_period="5s",
        )

    return {
        "main": node("main", ("cm", "sm", "iam", *mp), MAIN_IP, ""),
        "secondary": node("secondary", ("sm", "iam", *mp), SECONDARY_IP, MAIN_IP),
    }


class Images(msgspec.Struct, frozen=True):
    """What a Unit of guests boots, by host name, and the cloud whose root certificate is in the images."""

    boots: dict[str, Boot]
    cloud: Path

    @property
    def key(self) -> list[str]:
        """What tells these from other images."""
        return [str(disk) for boot in self.boots.values() for disk in boot.disks] + [str(self.cloud)]


def build_images() -> Images:
    """Disk images of all guests; builds what is not there yet."""
    layers = lower_layers()
    vmlinuz, initrd = kernel(layers)
    cloud = cloud_of_images()
    root_ca = cloud.root_file().read_text()
    boots = {}
    for name, described in guest_nodes(root_ca).items():
        node = dataclasses.replace(described, nfs=True, gateway=described.gateway or _ROUTER_IP)

        def add(root: Path, node: Node = node) -> None:
            write_guest(node, root)
            write_agent(root)

        append = f"root=/dev/vda rw console=ttyS0 {KERNEL_OPTIONS}"
        boots[name] = Boot(node_disks(name, node, layers, add), vmlinuz, initrd, append)
    return Images(boots, cloud.directory)


def node_disks(name: str, node: Node, layers: list[Path], add: Callable[[Path], None]) -> tuple[Path, Path]:
    """Disks of a node, root and data; builds what is not there yet. `add` writes further files below a root."""
    with tempfile.TemporaryDirectory() as directory:
        files = Path(directory)
        write_node(node, files)
        add(files)
        key = [*map(str, layers), tree_digest(files), str(_ROOT_MIB), str(_DATA_MIB)]
        disk = kept(f"disk-{name}", key, partial(_make_disks, layers=[files, *layers]))
    return disk / "root.img", disk / "data.img"


def cloud_of_images() -> LocalCloud:
    """The cloud whose root certificate is in the images."""
    return LocalCloud(kept("cloud", [DOMAIN], _make_cloud), DOMAIN, TOOLS)


def _make_cloud(target: Path) -> None:
    cloud = LocalCloud(target, DOMAIN, TOOLS)
    for role in ("oem", "sp"):
        cloud.user(role)


def write_node(node: Node, root: Path, cloud_ip: str = CLOUD_IP) -> None:
    """The files of a Node below `root`: the generator's, and what is different on Debian."""
    write(tree(node), root)
    units = root / "etc" / "systemd" / "system"
    units.mkdir(parents=True, exist_ok=True)
    unused = [*_MASKED, *(() if node.nfs else _OF_NFS), *(() if node.data_disk else _OF_VOLUMES)]
    if not node.is_main:
        # aos-prov takes all Nodes that have registered, however many it was told to wait for: a test that wants both
        # unmasks this.
        unused.append("aos-iam-prov.service")
    for name in unused:
        (units / name).symlink_to("/dev/null")
    # Yocto's presets do this.
    wants = units / "multi-user.target.wants"
    wants.mkdir(exist_ok=True)
    (wants / "systemd-networkd.service").symlink_to("/usr/lib/systemd/system/systemd-networkd.service")
    with (root / "etc" / "hosts").open("a") as hosts:
        hosts.write(f"{cloud_ip} {DOMAIN}\n")


def write_agent(root: Path) -> None:
    """The agent in a guest of QEMU."""
    units = root / "etc" / "systemd" / "system"
    agent = root / "usr" / "local" / "lib" / "aos-agent.py"
    agent.parent.mkdir(parents=True)
    agent.write_bytes(_AGENT.read_bytes())
    (units / "aos-agent.service").write_text(
        "[Unit]\nDescription=Runs what the host asks for\nDefaultDependencies=no\n"
        "[Service]\nExecStart=/usr/bin/python3 -I /usr/local/lib/aos-agent.py\nRestart=always\nRestartSec=1\n"
    )
    wants = units / "sysinit.target.wants"
    wants.mkdir(exist_ok=True)
    (wants / "aos-agent.service").symlink_to("../aos-agent.service")


def write_guest(node: Node, root: Path, *, console: str = "ttyS0", data: str = "LABEL=aosdata") -> None:
    """What makes a node a guest: a root shell on its console, the disk `data` of its own, the way to the cloud."""
    units = root / "etc" / "systemd" / "system"
    # Nothing is given up because the emulated processor is slow.
    settings = root / "etc" / "systemd" / "system.conf.d" / "slow.conf"
    settings.parent.mkdir()
    settings.write_text("[Manager]\nDefaultTimeoutStartSec=600s\nDefaultDeviceTimeoutSec=600s\n")
    login = units / f"serial-getty@{console}.service.d"
    login.mkdir()
    (login / "autologin.conf").write_text(
        "[Service]\nExecStart=\nExecStart=-/sbin/agetty --autologin root --noclear --keep-baud 115200 %I $TERM\n"
    )
    # The initial RAM disk has no modules for quotas, so the root file system cannot have them.
    with (root / "etc" / "fstab").open("a") as mounts:
        mounts.write(f"{data} /var/aos ext4 usrquota,grpquota,noatime,nofail 0 2\n")
    if node.is_main:
        uplink = root / "etc" / "systemd" / "network" / "05-uplink.network"
        uplink.parent.mkdir(parents=True, exist_ok=True)
        uplink.write_text(f"[Match]\nName=eth1\n\n[Network]\nAddress={MAIN_UPLINK_IP}/24\nLinkLocalAddressing=no\n")


def _make_disks(target: Path, layers: list[Path]) -> None:
    """Root and data as ext4 file systems, made without mounting them or a loop device; the second has quotas."""
    for name in ("upper", "work", "mount"):
        (target / name).mkdir(parents=True)
    mount = target / "mount"
    options = f"lowerdir={':'.join(map(str, layers))},upperdir={target}/upper,workdir={target}/work"
    make = "mke2fs -q -t ext4 -E lazy_itable_init=0,lazy_journal_init=0"
    script = f"""set -e
        mount -t overlay overlay -o {options} {mount}
        {make} -L aosdata -O quota -d {mount}/var/aos {target}/data.img {_DATA_MIB}M
        rm -rf {mount}/var/aos/*
        {make} -L root -d {mount} {target}/root.img {_ROOT_MIB}M
    """
    run_builder(["sh", "-c", script], _BUILD_TIMEOUT_S)
    for name in ("mount", "upper", "work"):
        remove_tree(target / name)
