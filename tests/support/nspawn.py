"""Bed C: a Unit of one or two nodes in systemd-nspawn with its cloud, in one machine of namespaces (testbed.md §6).

cloud 10.0.0.1 ── bridge ─┬─ host0 main 10.0.0.100
                          └─ host0 secondary 10.0.0.101
"""

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Literal

from aoscore.common.errors import AosError
from aoscore.ctl.host import run, wait
from aoscore.ctl.machine import Machine, remove_cgroups
from aoscore.ctl.sandbox import Program
from qemu.bed import BRIDGE, MAIN_IP, Bed
from qemu.images import DOMAIN, TOOLS, guest_nodes, write_node
from qemu.layers import lower_layers
from tests.support.fakexen import FakeXen

CLOUD_IP = "10.0.0.1"
_BOOT_NODE = Path(__file__).with_name("boot-node.sh")
_BOOT_S = 120.0
_DISK_MIB = 512


def _make_disk(top: Path) -> tuple[str, ...]:
    """Make a file system of the node's own files, in a file on a file system that can be frozen; how to mount that."""
    content = top / "content"
    content.mkdir()
    _make_file_system(content / "disk0.img", _DISK_MIB, top / "own")
    _make_file_system(top / "store.img", 3 * _DISK_MIB, content)
    shutil.rmtree(content)
    (top / "disk").write_text(str(top / "store" / "disk0.img"))
    return ("mount", "-o", "loop", str(top / "store.img"), str(top / "store"))


def _make_file_system(image: Path, size_mib: int, content: Path) -> None:
    run(["mke2fs", "-q", "-t", "ext4", "-d", content, image, f"{size_mib}M"], 120)


DOMAINS = {"main": 1, "secondary": 2}
"""Of the played Xen."""
_XEN_DIR = "/xen"


def _write_domain(root: Path, domain: int) -> None:
    """MP finds the played Xen's libraries and devices."""
    for unit in ("aos-mp", "aos-mp-provisioning"):
        place = root / "etc" / "systemd" / "system" / f"{unit}.service.d"
        place.mkdir(parents=True)
        (place / "xen.conf").write_text(
            f"[Service]\nEnvironment=LD_LIBRARY_PATH={_XEN_DIR}/lib FAKEXEN_DIR={_XEN_DIR} FAKEXEN_DOMAIN={domain}\n"
            f"ReadWritePaths={_XEN_DIR}\n"
        )


class NspawnNode:
    """A node that systemd-nspawn boots. `machine_name` is the host's name for it."""

    def __init__(self, name: str, machine_name: str, machine: Machine) -> None:
        self.name = name
        self.machine_name = machine_name
        self._machine = machine

    @property
    def leader(self) -> str:
        """Process ID of systemd in the node, as the bed's machine sees it."""
        outer = run(self._machine.enter("pgrep", "-f", f"^systemd-nspawn .*--machine={self.machine_name} ")).split()
        return run(self._machine.enter("pgrep", "-P", outer[0])).split()[0]

    def run(self, *args: str | Path, timeout_s: float = 60) -> str:
        """Output of a program in the node. Raises FailedError with all it said when it fails."""
        return run(self._machine.enter("nsenter", "-t", self.leader, "-a", *args), timeout_s)

    def wait_settled(self, timeout_s: float = _BOOT_S) -> None:
        """Until systemd has started all that belongs to the boot."""
        state = ("sh", "-c", "systemctl is-system-running || true")
        wait(lambda: self.run(*state).strip() in ("running", "degraded"), timeout_s, f"systemd in {self.name} to run")


class NspawnUnit(Bed):
    """The Unit in `directory`."""

    nodes: dict[str, NspawnNode]

    def __init__(
        self,
        directory: Path,
        names: tuple[str, ...] = ("main",),
        *,
        with_mp: bool = False,
        keys: Literal["softhsm", "file"] = "file",
        xen: FakeXen | None = None,
        with_disks: bool = False,
    ) -> None:
        """`with_mp`: the Secondary Node reaches the Main Node through MP; with `xen` by vchan of that machine.

        `with_disks`: what a node writes is on a disk of its own, and its power can be cut.
        """
        super().__init__(directory, domain=DOMAIN, tools=TOOLS, main_address=MAIN_IP)
        self._with_mp = with_mp
        self._keys = keys
        self._xen = xen
        self._with_disks = with_disks
        self._cuts = 0
        # Control groups are the host's.
        self.cgroups = {name: f"aos-test-{name}{os.getpid()}" for name in names}
        self.nodes = {name: NspawnNode(name, f"{name}{os.getpid()}", self.machine) for name in names}

    def start(self) -> None:
        """Boot; returns when the cloud answers and systemd runs in all nodes."""
        lower = lower_layers(with_vchan=self._xen is not None)
        root_ca = self.cloud.root_file().read_text()
        nodes = guest_nodes(root_ca, interface="host0", cloud_ip=CLOUD_IP, with_mp=self._with_mp, keys=self._keys)
        programs, setup = [], []
        for name, node in self.nodes.items():
            top = self.directory / "nodes" / name
            own = top / "own"
            for directory in (own / "upper", own / "work", top / "root", top / "store"):
                directory.mkdir(parents=True)
            of_xen: tuple[str, ...] = ()
            if self._xen is None:
                write_node(nodes[name], own / "upper", CLOUD_IP)
            else:
                other = DOMAINS["secondary" if name == "main" else "main"]
                in_xen = dataclasses.replace(nodes[name], transport="vchan", vchan_domain=other)
                write_node(in_xen, own / "upper", CLOUD_IP)
                _write_domain(own / "upper", DOMAINS[name])
                of_xen = (f"--bind={self._xen.lend()}:{_XEN_DIR}",)
            if self._with_disks:
                setup.append(_make_disk(top))
            layers = ":".join(map(str, lower))
            boot = (str(_BOOT_NODE), node.machine_name, str(top), BRIDGE, layers, self.cgroups[name], *of_xen)
            programs.append(Program(name, boot, notifies=False))
        self._start_machine(CLOUD_IP, programs=programs, setup=setup, cgroups=tuple(self.cgroups.values()))
        for node in self.nodes.values():
            node.wait_settled()

    def cut_power(self, *names: str) -> None:
        """The power of nodes goes, and comes back: all that they had not flushed to their disks is lost.

        Returns when systemd runs again.
        """
        self._cuts += 1
        tops = {name: self.directory / "nodes" / name for name in names}
        disks = {name: Path((top / "disk").read_text()) for name, top in tops.items()}
        leaders = {name: self.nodes[name].leader for name in names}
        for top in tops.values():
            # From here on nothing that a node writes reaches its disk.
            self.inside("fsfreeze", "--freeze", top / "store")
        for name, top in tops.items():
            self.inside("cp", "--sparse=always", disks[name], top / "left.img")
            (top / "disk").write_text(str(top / "store" / f"disk{self._cuts}.img"))
            self.inside("kill", "-KILL", leaders[name])
            self.inside("fsfreeze", "--unfreeze", top / "store")
        for name, top in tops.items():
            loops = ("losetup", "--noheadings", "--output", "NAME", "--associated", disks[name])
            self.wait(lambda loops=loops: self.inside(*loops).strip() == "", 60, f"all processes of {name} to end")
            self.inside("rm", disks[name])
            self.inside("cp", "--sparse=always", top / "left.img", top / "store" / "copy")
            self.inside("mv", top / "store" / "copy", (top / "disk").read_text())
        for name in names:
            self.wait(lambda name=name: self._runs_again(name, leaders[name]), 60, f"{name} to boot")
        for name in names:
            self.nodes[name].wait_settled()

    def _runs_again(self, name: str, old_leader: str) -> bool:
        try:
            return self.nodes[name].leader != old_leader
        except (AosError, IndexError):
            return False

    def stop(self) -> None:
        """Power off hard: everything of the bed ends with the machine."""
        self.machine.stop()
        for name in self.cgroups.values():
            remove_cgroups(name)
        shutil.rmtree(self.directory / "nodes", ignore_errors=True)
