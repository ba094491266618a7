"""A Unit in one guest of QEMU: Xen with the Main Node in Dom0, and the Secondary Node in a guest of Dom0.

    cloud 172.31.9.1 ── bridge ── tap ── eth1 Dom0, main ══ two vchans ══ guest, secondary

The guest has no network at all: what it hears of the Unit comes through the link of the two MPs.
"""

import contextlib
from pathlib import Path

from aoscore.common.errors import AosError, FailedError
from qemu.guest import Guest
from qemu.unit import GuestBed
from qemu.xen.images import CONFIG, CONSOLE_LOG, GUEST, XenImages

# Emulated, and one processor for two domains.
_PATIENCE = 10.0
_MEMORY_MIB = 2048
_START_S = 1200.0


class XenUnit(GuestBed):
    """The Unit in `directory`: overlays of the disks, logs, sockets, and `cloud/`. Only Dom0 is among the nodes."""

    # To ask the cloud takes a processor from the emulator, which has too little.
    pause_s = 5.0

    def __init__(self, directory: Path, images: XenImages) -> None:
        super().__init__(directory, images.cloud, patience=_PATIENCE)
        # The Unit's network ends here, but the Main Node has its address in it.
        networks = ["user,restrict=on", self.uplink]
        self.nodes = {
            "main": Guest(
                "main",
                self.directory,
                images.boot,
                networks=networks,
                mac=1,
                enter=self.machine.enter,
                memory_mib=_MEMORY_MIB,
            )
        }

    def start_secondary(self) -> None:
        """Start the guest; returns when somebody could log in there."""
        self.main.run("xl", "create", CONFIG, timeout_s=_START_S)
        self._wait_for_line(f"tail -n +1 -F {CONSOLE_LOG}", "login: ")

    def wait_linked(self) -> None:
        """Until MP of the Main Node, not provisioned yet, has a link to the guest's."""
        follow = "journalctl -b -u aos-mp-provisioning -o cat -n all -f"
        self._wait_for_line(follow, f"Link is up: peer=domain name:{GUEST}")

    def _wait_for_line(self, follow: str, text: str) -> None:
        """Until a program in Dom0 prints a line with this. Asking again and again would cost the only processor much.

        Raises DeadlineError.
        """
        self.main.shell(f"{follow} 2>/dev/null | grep -qF '{text}'", timeout_s=_START_S)

    def keep_console(self) -> None:
        """Bring what the guest wrote to its console into the Unit's directory, where Dom0 still runs."""
        with contextlib.suppress(AosError):
            (self.directory / f"{GUEST}.console.log").write_text(self.main.run("cat", CONSOLE_LOG))

    def check_link(self) -> None:
        """Raises FailedError unless the vchans are there, and no other way between the nodes."""
        if len(self.main.run("xl", "network-list", GUEST).splitlines()) > 1:
            raise FailedError("the guest has a network")
        if self.main.run("ss", "-Htln", "sport", "=", ":30001").strip():
            raise FailedError("MP listens for TCP")
        for name in ("rx", "tx"):
            self.main.run("xenstore-read", f"/local/domain/0/data/vchan/aos/{name}/ring-ref")
