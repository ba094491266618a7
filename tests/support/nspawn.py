"""Bed C: a Unit of one or two nodes in systemd-nspawn with its cloud, in one machine of namespaces (testbed.md §6).

cloud 10.0.0.1 ── bridge ─┬─ host0 main 10.0.0.100
                          └─ host0 secondary 10.0.0.101
"""

import dataclasses
import itertools
import os
import shutil
import subprocess
from pathlib import Path
from typing import Literal

from aoscore.common.errors import AosError
from aoscore.ctl.host import run, wait
from aoscore.ctl.machine import Machine, remove_cgroups
from aoscore.ctl.sandbox import Program
from aoscore.ctl.target import Node
from qemu.bed import BRIDGE, MAIN_IP, Bed
from qemu.images import DOMAIN, TOOLS, guest_nodes, write_node
from qemu.layers import lower_layers
from tests.support.fakexen import FakeXen
from tests.support.initramfs import copy_modules

CLOUD_IP = "10.0.0.1"
THIRD = "third"
"""A Secondary Node of a type of its own."""
_THIRD_IP = "10.0.0.102"
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


_NUMBERS = itertools.count(1)
"""Of the Units of this process: some may be there at the same time."""
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
        with_updates: bool = False,
        later: tuple[str, ...] = (),
    ) -> None:
        """`with_mp`: the Secondary Node reaches the Main Node through MP; with `xen` by vchan of that machine.

        `with_disks`: what a node writes is on a disk of its own, and its power can be cut. `with_updates`: a node has
        a read-only root that can be updated, by the initramfs of the layer. `later`: nodes for `add_node`.
        """
        super().__init__(directory, domain=DOMAIN, tools=TOOLS, main_address=MAIN_IP)
        self._with_mp = with_mp
        self._keys = keys
        self._xen = xen
        self._with_disks = with_disks
        self._with_updates = with_updates
        self._cuts = 0
        self._suffix = f"{os.getpid()}-{next(_NUMBERS)}"
        # Control groups are the host's.
        self.cgroups = {name: f"aos-test-{name}{self._suffix}" for name in (*names, *later)}
        self.nodes = {name: self._node(name) for name in names}
        self._added: list[subprocess.Popen[bytes]] = []

    def _node(self, name: str) -> NspawnNode:
        return NspawnNode(name, f"{name}{self._suffix}", self.machine)

    def start(self) -> None:
        """Boot; returns when the cloud answers and systemd runs in all nodes."""
        programs, setup = [], []
        for name in self.nodes:
            top, boot = self._prepare(name)
            if self._with_disks:
                setup.append(_make_disk(top))
            programs.append(Program(name, boot, notifies=False))
        self._start_machine(CLOUD_IP, programs=programs, setup=setup, cgroups=tuple(self.cgroups.values()))
        for node in self.nodes.values():
            node.wait_settled()

    def add_node(self, name: str) -> NspawnNode:
        """Switch on one more node, for the first time; returns when systemd runs in it. It does not reboot."""
        self.nodes[name] = self._node(name)
        _, boot = self._prepare(name)
        with (self.directory / "log" / f"{name}.log").open("ab") as log:
            command = self.machine.enter(*boot)
            self._added.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log))
        self.nodes[name].wait_settled()
        return self.nodes[name]

    def _prepare(self, name: str) -> tuple[Path, tuple[str, ...]]:
        """Make the files of a node: where they are, and the program that boots it."""
        top = self.directory / "nodes" / name
        own = top / "own"
        for directory in (own / "upper", own / "work", top / "root", top / "store"):
            directory.mkdir(parents=True)
        node = self._description(name)
        of_xen: tuple[str, ...] = ()
        if self._xen is not None:
            other = DOMAINS["secondary" if name == "main" else "main"]
            node = dataclasses.replace(node, transport="vchan", vchan_domain=other)
            _write_domain(own / "upper", DOMAINS[name])
            of_xen = (f"--bind={self._xen.lend()}:{_XEN_DIR}",)
        write_node(node, own / "upper", CLOUD_IP)
        if self._with_updates:
            copy_modules(top / "modules")
            (own / "upper" / "etc" / "machine-id").touch()
        layers = ":".join(map(str, lower_layers(with_vchan=self._xen is not None)))
        machine_name = self.nodes[name].machine_name
        return top, (str(_BOOT_NODE), machine_name, str(top), BRIDGE, layers, self.cgroups[name], *of_xen)

    def _description(self, name: str) -> Node:
        nodes = guest_nodes(
            self.cloud.root_file().read_text(),
            interface="host0",
            cloud_ip=CLOUD_IP,
            with_mp=self._with_mp,
            keys=self._keys,
            runtimes=("container", "rootfs") if self._with_updates else ("container",),
        )
        if name == THIRD:
            node_type = nodes["secondary"].node_type.replace("secondary", THIRD)
            return dataclasses.replace(nodes["secondary"], hostname=THIRD, ip=f"{_THIRD_IP}/24", node_type=node_type)
        return nodes[name]

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
            # They are the host's, and would outlive what they were made for.
            remove_cgroups(self.cgroups[name])
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
        for process in self._added:
            process.wait()
        for name in self.cgroups.values():
            remove_cgroups(name)
        shutil.rmtree(self.directory / "nodes", ignore_errors=True)
