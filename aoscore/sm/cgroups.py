"""What control groups this machine offers, and what follows from it.

Target images have cgroup v2 only. Developer machines may still have v1, or v1 with an empty v2 tree beside it
("hybrid"): crun refuses the latter and works once it does not see the v2 tree, so there it is started in a mount
namespace of its own without it. Decided by the mount table alone.
"""

import contextlib
import errno
import os
import shutil
import time
from pathlib import Path

import msgspec

from aoscore.common.errors import FailedError, NotSupportedError

_REMOVE_TIMEOUT_S = 10.0
_REMOVE_PAUSE_S = 0.05
_CONTROLLER_FOR_PIDS = ("pids", "memory", "devices")
_V1_CONTROLLERS = frozenset(
    ("blkio", "cpu", "cpuacct", "cpuset", "devices", "freezer", "hugetlb", "memory", "net_cls", "net_prio", "pids")
)


class CgroupLayout(msgspec.Struct, frozen=True):
    """Where the trees are mounted.

    `unified`: the v2 tree, None without one. `controllers`: v1 trees by controller; empty on a v2 machine.
    """

    unified: Path | None
    controllers: dict[str, Path]

    @property
    def version(self) -> int:
        """1 or 2: which tree holds the limits."""
        return 1 if self.controllers else 2

    def has(self, controller: str) -> bool:
        """Whether limits of this controller can be set, for example "pids"."""
        if self.version == 1:
            return controller in self.controllers
        return controller in _read(self.unified, "", "cgroup.controllers").split()

    def runtime_prefix(self) -> tuple[str, ...]:
        """Words to put before an OCI runtime's command line so that it accepts this machine."""
        if self.version == 2 or self.unified is None:
            return ()
        # conmon wants a full path.
        unshare = shutil.which("unshare") or "/usr/bin/unshare"
        return (unshare, "--mount", "sh", "-c", 'umount "$0" && exec "$@"', str(self.unified))

    def processes(self, cgroup: str) -> list[int]:
        """Pids in a cgroup given by its path below the mount; empty when it does not exist."""
        tree = self.unified if self.version == 2 else self._any_tree()
        return [int(pid) for pid in _read(tree, cgroup, "cgroup.procs").split()]

    def oom_kills(self, cgroup: str) -> int:
        """How many of its processes the kernel has killed for want of memory; 0 when it does not exist."""
        text = (
            _read(self.unified, cgroup, "memory.events")
            if self.version == 2
            else _read(self.controllers.get("memory"), cgroup, "memory.oom_control")
        )
        return next((int(line.split()[1]) for line in text.splitlines() if line.startswith("oom_kill ")), 0)

    def remove(self, cgroup: str) -> None:
        """End what lives in a v2 cgroup and delete it with all below it; an absent one is success. Blocking.

        Raises FailedError when something in it does not end.
        """
        if self.version == 1:
            return
        top = Path(f"{self.unified}/{cgroup.lstrip('/')}")
        deadline_s = time.monotonic() + _REMOVE_TIMEOUT_S
        while top.exists():
            try:
                for folder, _, _ in os.walk(top, topdown=False):
                    Path(folder).rmdir()
            except FileNotFoundError:
                continue
            except OSError as error:
                if error.errno != errno.EBUSY or time.monotonic() > deadline_s:
                    raise FailedError(f"control group {cgroup} can't be removed: {error.strerror}") from error
                with contextlib.suppress(OSError):
                    (top / "cgroup.kill").write_text("1")
                time.sleep(_REMOVE_PAUSE_S)

    def _any_tree(self) -> Path | None:
        return next((self.controllers[name] for name in _CONTROLLER_FOR_PIDS if name in self.controllers), None)


def _read(tree: Path | None, cgroup: str, name: str) -> str:
    """A file of a cgroup; empty when it does not exist."""
    if tree is None:
        return ""
    try:
        return Path(f"{tree}/{cgroup.lstrip('/')}", name).read_text()
    except OSError:
        return ""


def parse_layout(mounts: str) -> CgroupLayout:
    """Read the text of /proc/self/mounts. Raises NotSupportedError for a machine without control groups."""
    unified: Path | None = None
    controllers: dict[str, Path] = {}
    for line in mounts.splitlines():
        _, target, kind, options, *_ = line.split(" ")
        if kind == "cgroup2":
            unified = Path(target)
        elif kind == "cgroup":
            # A named hierarchy ("name=systemd") has no controller and limits nothing.
            names = [name for name in options.split(",") if name in _V1_CONTROLLERS]
            controllers |= {name: Path(target) for name in names}
    if unified is None and not controllers:
        raise NotSupportedError("no control groups are mounted; containers need them (mount cgroup2 on /sys/fs/cgroup)")
    return CgroupLayout(unified, controllers)


def probe() -> CgroupLayout:
    """The layout that this process sees. Raises NotSupportedError for a machine without control groups."""
    return parse_layout(Path("/proc/self/mounts").read_text())
