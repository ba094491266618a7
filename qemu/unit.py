"""A Unit of guests with its cloud: two nodes on a network of their own, the Main Node with an uplink to the cloud.

Everything lives in one machine of namespaces (`aoscore.ctl.machine`): the host's network is not touched, and nothing
outlives the process that started it.

    cloud 172.31.9.1 ── bridge ── tap ── eth1 main eth0 10.0.0.100 ── dgram sockets ── eth0 secondary 10.0.0.101
"""

import os
import shutil
import time
from functools import partial
from pathlib import Path

import msgspec

from aoscore.ctl.host import run
from qemu.bed import BRIDGE, Bed
from qemu.cache import kept
from qemu.guest import Boot, Guest
from qemu.images import CLOUD_IP, DOMAIN, MAIN_UPLINK_IP, TOOLS, Images

_TAP = "aostap"
NODES = ("main", "secondary")
# An emulated processor on a machine that does other things too.
_PATIENCE = 5.0
_PROVISIONABLE = ("systemctl", "is-active", "aos-iam-prov.service")


class GuestBed(Bed):
    """What Units have whose nodes live in guests of QEMU: overlays of the disks, logs, sockets, and `cloud/`."""

    nodes: dict[str, Guest]
    # QEMU's network that leads the Main Node to the cloud.
    uplink = f"tap,ifname={_TAP},script=no,downscript=no"

    def __init__(self, directory: Path, cloud: Path, *, patience: float) -> None:
        """`cloud`: whose root certificate is in the images; the Unit works on a copy."""
        super().__init__(directory, domain=DOMAIN, tools=TOOLS, main_address=MAIN_UPLINK_IP, patience=patience)
        self._cloud_source = cloud

    @property
    def main(self) -> Guest:
        return self.nodes["main"]

    def prepare(self) -> None:
        """Start the machine with the cloud, and make the guests' disks; no guest runs yet."""
        self.directory.mkdir(parents=True, exist_ok=True)
        if not self.cloud.directory.exists():
            shutil.copytree(self._cloud_source, self.cloud.directory)
        tap = (
            ("ip", "tuntap", "add", "dev", _TAP, "mode", "tap"),
            ("ip", "link", "set", _TAP, "master", BRIDGE, "up"),
        )
        self._start_machine(CLOUD_IP, setup=tap)
        for guest in self.nodes.values():
            guest.make_disks()

    def start(self) -> None:
        """Power on the machine and all guests, and wait until they have settled."""
        self.prepare()
        for guest in self.nodes.values():
            guest.start()
        for guest in self.nodes.values():
            guest.wait_settled()

    def stop(self) -> None:
        """Power off hard; everything ends with the machine."""
        try:
            for guest in self.nodes.values():
                guest.kill()
        finally:
            self.machine.stop()

    def cut_uplink(self, *, cut: bool = True) -> None:
        """Pull the cable between Main Node and cloud, or put it in again."""
        self.inside("ip", "link", "set", _TAP, "down" if cut else "up")


class QemuUnit(GuestBed):
    """The Unit in `directory`."""

    def __init__(
        self, directory: Path, images: Images, *, states: Path | None = None, names: tuple[str, ...] = NODES
    ) -> None:
        """`states`: the guests go on from there instead of booting, and `images` are those of the states."""
        super().__init__(directory, images.cloud, patience=_PATIENCE)
        self.images = images
        self._states = states
        self.nodes = {name: self._guest(name, images.boots[name]) for name in names}

    def _guest(self, name: str, boot: Boot) -> Guest:
        other = next(node for node in NODES if node != name)
        sockets = f"local.type=unix,local.path=lan.{name}.sock,remote.type=unix,remote.path=lan.{other}.sock"
        networks = [f"dgram,{sockets}"]
        if name == "main":
            networks.append(self.uplink)
        number = NODES.index(name) + 1
        return Guest(name, self.directory, boot, networks=networks, mac=number, enter=self.machine.enter)

    @property
    def secondary(self) -> Guest:
        return self.nodes["secondary"]

    def prepare(self) -> None:
        for path in self.directory.glob("lan.*.sock"):
            path.unlink()
        super().prepare()

    def start(self) -> None:
        """Power on the machine and all guests, and wait until they have settled."""
        self.prepare()
        for name, guest in self.nodes.items():
            guest.start(resume=self._states / f"{name}.state.zst" if self._states else None)
        for guest in self.nodes.values():
            guest.wait_settled()
            if self._states:
                # It believes that it is as late as when it was saved, and would repeat its random numbers.
                guest.run("date", "-u", "-s", f"@{time.time():.3f}")
                guest.run("dd", "of=/dev/urandom", "status=none", stdin=os.urandom(64))


class Saved(msgspec.Struct, frozen=True):
    """A Unit that has booted and waits to be provisioned: its states, and images with the disks of the states."""

    states: Path
    images: Images


def saved_unit(images: Images) -> Saved:
    """Boot once, save, keep; the next time it is there."""
    version = run(["qemu-system-x86_64", "--version"]).splitlines()[0]
    # The guests that go on must have the same devices as those that were saved.
    commands = [word for guest in QemuUnit(Path("/"), images).nodes.values() for word in guest.command()]
    states = kept("qemu", [version, *images.key, *commands], lambda target: _save(target, images))
    boots = {
        name: msgspec.structs.replace(boot, disks=tuple(states / f"{name}.{n}.qcow2" for n, _ in enumerate(boot.disks)))
        for name, boot in images.boots.items()
    }
    return Saved(states, Images(boots, images.cloud))


def _save(target: Path, images: Images) -> None:
    unit = QemuUnit(target, images)
    try:
        unit.start()
        unit.wait(partial(unit.main.run, *_PROVISIONABLE), 120, "the Main Node to be ready for provisioning")
        for guest in unit.nodes.values():
            # As small as it gets: what lies in caches is saved too.
            guest.shell("journalctl -q --flush; sync; echo 3 > /proc/sys/vm/drop_caches")
            guest.save(target / f"{guest.name}.state.zst")
    finally:
        unit.stop()
    shutil.rmtree(target / "cloud")
