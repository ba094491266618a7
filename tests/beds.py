"""What this machine offers to tests: the test beds (testbed.md §1) and features of its kernel.

`python -m tests.beds` prints it as a table. Tests say by a marker which bed they need; what is missing makes them fail
where CI is set, and skips them with this reason at a desk.
"""

import functools
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_PROBE_S = 60.0


@dataclass(frozen=True)
class Bed:
    """A test bed. `attempt` is a shell script that succeeds in fresh namespaces where the bed works."""

    marker: str
    title: str
    programs: tuple[str, ...]
    attempt: str = "true"
    architectures: tuple[str, ...] = ()


# Mounts are the namespace's own and end with it.
_OVERLAY = """
    mount -t tmpfs none /run
    mkdir /run/lower /run/upper /run/work /run/merged /run/cgroup
    mount -t overlay overlay -o lowerdir=/run/lower,upperdir=/run/upper,workdir=/run/work /run/merged
"""
_TREE = ("mmdebstrap", "unshare", "setpriv", "nsenter", "git")
BEDS = (
    Bed(
        "net",
        "B network namespaces",
        ("unshare", "ip", "nft"),
        "ip link add probe type bridge; nft add table inet probe",
    ),
    Bed("container", "B containers", ("unshare", "crun", "conmon", "busybox"), _OVERLAY),
    Bed(
        "nspawn",
        "C Unit in systemd-nspawn",
        (*_TREE, "systemd-nspawn", "script", "ip"),
        f"{_OVERLAY}\nmount -t cgroup2 none /run/cgroup",
    ),
    Bed(
        "vm",
        "D Unit of QEMU guests",
        (*_TREE, "qemu-system-x86_64", "qemu-img", "mke2fs", "zstd", "ip"),
        f"{_OVERLAY}\nip tuntap add dev probe mode tap",
        ("x86_64",),
    ),
)
FEATURES = {
    "cgroup v2 with cpu, memory, pids": """
        umount -R /sys/fs/cgroup; mount -t cgroup2 none /sys/fs/cgroup
        for name in cpu memory pids; do grep -qw $name /sys/fs/cgroup/cgroup.controllers; done
    """,
    "tc matchall": """
        ip link set lo up
        tc qdisc add dev lo ingress
        tc filter add dev lo parent ffff: matchall action drop
    """,
    "ext4 quotas": """
        mount -t tmpfs none /run
        mke2fs -q -t ext4 -O quota /run/disk 8M
        mkdir /run/mounted
        mount -o loop,usrquota /run/disk /run/mounted
    """,
    "device mapper": "grep -q device-mapper /proc/misc",
}


@functools.cache
def missing(marker: str) -> str | None:
    """What this machine lacks for the bed with this marker; None when nothing."""
    bed = next(bed for bed in BEDS if bed.marker == marker)
    if os.geteuid() != 0:
        return "needs root"
    if bed.architectures and platform.machine() not in bed.architectures:
        return f"needs a machine of {' or '.join(bed.architectures)}"
    for program in bed.programs:
        if shutil.which(program) is None:
            return f"{program} is not installed"
    return _attempt(bed.attempt)


def lacking(markers: Iterable[str]) -> str | None:
    """What this machine lacks for a test with these markers; None when nothing."""
    known = {bed.marker for bed in BEDS}
    reasons = [f"{marker}: {reason}" for marker in markers if marker in known and (reason := missing(marker))]
    return "; ".join(reasons) or None


@functools.cache
def lacks(feature: str) -> str | None:
    """Why the machine's kernel does not have a feature of `FEATURES`; None when it has it."""
    return _attempt(FEATURES[feature]) if os.geteuid() == 0 else "needs root"


def _attempt(script: str) -> str | None:
    namespaces = ("unshare", "--mount", "--net", "--ipc", "--uts")
    done = subprocess.run(
        [*namespaces, "sh", "-ec", script], capture_output=True, text=True, timeout=_PROBE_S, check=False
    )
    return None if done.returncode == 0 else (done.stderr.strip().splitlines() or ["no"])[-1]


def main() -> int:
    """Print the table."""

    def row(title: str, reason: str | None) -> None:
        print(f"{title:36} {'yes' if reason is None else f'no: {reason}'}")

    cpus = len(os.sched_getaffinity(0))
    memory = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
    print(
        f"{platform.machine()}, Linux {platform.release()}, {cpus} CPUs, {int(memory.split()[1]) >> 20} GiB available\n"
    )
    row("A processes", None)
    for bed in BEDS:
        row(bed.title, missing(bed.marker))
    print()
    for feature in FEATURES:
        row(feature, lacks(feature))
    return 0


if __name__ == "__main__":
    sys.exit(main())
