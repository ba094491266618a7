"""A Unit of guests that has nothing to do, and what it writes all the same."""

import time

from qemu.guest import Guest
from qemu.unit import QemuUnit
from tests.support.wholeunit import wait_active

_FLUSH_S = 20.0
_GRACE = "cat /proc/fs/nfsd/v4_end_grace 2>/dev/null || echo Y"


def go_idle(unit: QemuUnit) -> None:
    """All daemons start with the log level of devices; returns when what that has left in memory is on the disks."""
    for guest in unit.nodes.values():
        guest.shell("sed -i s/AOS_LOG_LEVEL=.*/AOS_LOG_LEVEL=info/ /etc/default/aoscore.env")
        guest.run("systemctl", "restart", "aos.target")
        # Of the distribution, once a day and a quarter of an hour after the boot; what it has to say goes to the disk.
        guest.run("systemctl", "stop", "systemd-tmpfiles-clean.timer")
    unit.wait(unit.is_online, 120, "the Unit to be online again")
    wait_active(unit)
    # The NFS server notes on its disk when the time of its former clients is over.
    unit.wait(lambda: unit.main.shell(_GRACE).strip() == "Y", 180, "the NFS server to wait no more for former clients")
    for guest in unit.nodes.values():
        # journald would bring what it has been told to the disk after five minutes. `journalctl --sync` and `systemctl
        # kill` make it sooner, but are noted in the journal themselves, which is on the disk five minutes later.
        guest.shell("/bin/kill -s RTMIN+1 $(pidof systemd-journald)")
    time.sleep(_FLUSH_S)
    for guest in unit.nodes.values():
        guest.run("sync")


def written_sectors(guest: Guest) -> dict[str, int]:
    """Sectors of 512 bytes written since the boot, by disk: root and data; what waits in memory is written before."""
    guest.run("sync")
    lines = guest.shell("for disk in vda vdb; do echo $disk $(cat /sys/block/$disk/stat); done").splitlines()
    return {line.split()[0]: int(line.split()[7]) for line in lines}


def what_was_written(guest: Guest, seconds: float) -> str:
    """Files that have changed, and what the journal has to say, since `seconds` ago: why sectors were written."""
    files = guest.shell(f"find / /var/aos -xdev -newermt '-{seconds:.0f} seconds' -type f 2>/dev/null || true")
    return files + guest.run("journalctl", "--quiet", "--since", f"-{seconds:.0f} seconds")
