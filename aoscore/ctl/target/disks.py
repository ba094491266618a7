"""Volumes, mounts and the network file system of a Node (yocto.md §6). Pure."""

import ipaddress
from collections.abc import Iterator
from dataclasses import dataclass

from aoscore.ctl.target.entry import Entry
from aoscore.ctl.target.node import Node
from aoscore.ctl.target.units import UNIT_DIR

GROUP = "aosvg"
MAPPING = "aos"
CONFIG_NAME = "aosdisk.cfg"


@dataclass(frozen=True)
class Volume:
    """A logical volume: its name, its share of the group in percent, whether quotas are counted."""

    name: str
    percent: int
    quota: bool


def volumes(node: Node) -> tuple[Volume, ...]:
    """What the encrypted disk of a node is divided into."""
    if not node.is_main:
        return (Volume("workdirs", 100, False),)
    return (
        Volume("downloads", 40, False),
        Volume("workdirs", 30, False),
        Volume("storages", 20, True),
        Volume("states", 10, True),
    )


def read_volumes(text: str) -> tuple[Volume, ...]:
    """The volumes of a configuration file: lines `name size quota`, `#` begins a comment.

    Raises ValueError naming the line. Sizes are percents of the group, written 40 or 40%VG.
    """
    found: list[Volume] = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        if len(words) != 3 or words[2] not in ("0", "1"):
            raise ValueError(f"line {number}: {line.strip()!r} is not `name size quota(0/1)`")
        name, size, quota = words
        percent = size.removesuffix("%VG").removesuffix("%")
        if not name.isalnum() or not percent.isdigit() or not 1 <= int(percent) <= 100:
            raise ValueError(f"line {number}: {name} {size} is no name with a share of 1 to 100 percent")
        if name in [volume.name for volume in found]:
            raise ValueError(f"line {number}: volume {name} is there twice")
        found.append(Volume(name, int(percent), quota == "1"))
    if not found:
        raise ValueError("no volume is named")
    if (total := sum(volume.percent for volume in found)) > 100:
        raise ValueError(f"the shares add up to {total} percent")
    return tuple(found)


def entries(node: Node) -> Iterator[Entry]:
    """Part disks."""
    if node.data_disk:
        lines = [f"{volume.name} {volume.percent}%VG {int(volume.quota)}\n" for volume in volumes(node)]
        yield Entry(f"{node.opt}/{CONFIG_NAME}", "# name size quota(0/1)\n" + "".join(lines), "disks")
        yield Entry(f"{node.opt}/setupdisk.sh", _disk_script(node), "disks", 0o755)
    if lines := list(fstab_lines(node)):
        yield Entry("/etc/fstab", "".join(f"{line}\n" for line in lines), "image", kind="lines")
    if node.is_main and node.nfs:
        yield Entry("/etc/exports.d/aos.exports", "".join(f"{line}\n" for line in exports(node)), "disks")
        name = "rpc-rquotad.service"
        yield Entry(f"{UNIT_DIR}/{name}", _RQUOTAD, "disks")
        yield Entry(f"{UNIT_DIR}/multi-user.target.wants/{name}", f"../{name}", "disks", kind="link")


def fstab_lines(node: Node, context: str = "") -> Iterator[str]:
    """Lines for /etc/fstab, fstab(5); `context` is an SELinux context for all of them."""
    more = f",context={context}" if context else ""
    if node.data_disk:
        for volume in volumes(node):
            quota = ",usrquota,grpquota" if volume.quota else ""
            options = f"nofail,noatime{quota},x-systemd.device-timeout=30s{more}"
            yield f"/dev/{GROUP}/{volume.name} {node.var}/{volume.name} ext4 {options} 0 2"
    elif node.is_main and node.nfs:
        # Volumes of their own are exported for themselves; directories of one are so where they are mounted.
        for name in ("storages", "states"):
            yield f"{node.var}/{name} {node.var}/{name} none bind,nofail 0 0"
    if node.shared_from_main:
        # A dead Main Node gives errors after half a minute, not processes that nobody can end.
        options = f"nofail,noatime,_netdev,softerr,timeo=100,retrans=2,x-systemd.device-timeout=90s{more}"
        for name in ("storages", "states"):
            yield f"{node.main_host}:/{name} {node.var}/{name} nfs4 {options} 0 0"


def exports(node: Node) -> Iterator[str]:
    """Lines of exports(5): to the Unit's other nodes only.

    SM sets owners, so root stays root for them where they write. On the way there they are nobody: what else is there,
    keys and PINs among it, is not for them.
    """
    for path, options in (
        (node.var, "ro,fsid=0,all_squash"),
        (f"{node.var}/storages", "rw,fsid=1,no_root_squash"),
        (f"{node.var}/states", "rw,fsid=2,no_root_squash"),
    ):
        clients = [f"{ipaddress.ip_network(peer, strict=False)}" for peer in node.trusted_peers]
        yield f"{path} " + " ".join(f"{client}({options},no_subtree_check,sync)" for client in clients)


def _disk_script(node: Node) -> str:
    """IAM waits for the unit and gets its exit code; mounts made in it are the system's, not only IAM's."""
    return f"""#!/bin/sh
exec systemd-run --quiet --collect --wait --pipe {node.bin}/aosctl disk "$@"
"""


_RQUOTAD = """[Unit]
Description=Quotas over the network file system
After=rpcbind.service network-online.target
Wants=rpcbind.service network-online.target
ConditionFileIsExecutable=/usr/sbin/rpc.rquotad

[Service]
Type=forking
ExecStart=/usr/sbin/rpc.rquotad

[Install]
WantedBy=multi-user.target
"""
