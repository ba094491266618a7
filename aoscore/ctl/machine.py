"""A machine in a few namespaces, from the outside: start it, enter it, end it without a trace.

The inside is `sandbox`. The host's network, mounts and processes stay as they are.
"""

import contextlib
import errno
import fnmatch
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from aoscore.common.errors import DeadlineError, FailedError, NotFoundError, RuntimeFailure
from aoscore.ctl.sandbox import Layout

_START_TIMEOUT_S = 20.0
_STOP_TIMEOUT_S = 40.0
_EMPTY_TIMEOUT_S = 60.0
_CGROUPS = Path("/sys/fs/cgroup")


class Machine:
    """One machine, living in `directory`: `log/` has an output file per program, `run/` what lives while it runs."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory.absolute()
        self._pid_file = self.directory / "sandbox.pid"
        self._keeper: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """Process ID (of the host) of the machine's first process, None when it does not run."""
        try:
            pid, begun = map(int, self._pid_file.read_text().split())
        except (FileNotFoundError, ValueError):
            return None
        return pid if _begun(pid) == begun else None

    def start(self, layout: Layout, *, bound: bool = False, cgroups: Sequence[str] = ()) -> None:
        """Start it and wait until it can be entered. Raises FailedError with its last words.

        A `bound` machine ends with the thread that calls this, even when that is killed; the host's control groups
        that its programs make, by name, are removed then.
        """
        if os.geteuid() != 0:
            raise RuntimeFailure("namespaces need root: run as root", 1)
        if shutil.which("unshare") is None:
            raise NotFoundError("program unshare is not installed (package util-linux)")
        for name in ("log", "run"):
            (self.directory / name).mkdir(parents=True, exist_ok=True)
        (self.directory / "run" / "prepared").unlink(missing_ok=True)
        (self.directory / "layout.json").write_bytes(msgspec.json.encode(layout, enc_hook=str))
        namespaces = ("--pid", "--fork", "--kill-child", "--net", "--mount", "--uts", "--ipc")
        leash = ("setpriv", "--pdeathsig", "KILL") if bound else ()
        with (self.directory / "log" / "sandbox.log").open("ab") as output:
            if bound:
                # Its input ends when we do.
                self._keeper = subprocess.Popen(
                    [sys.executable, "-m", "aoscore.ctl.keeper", *cgroups],
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                    cwd="/",
                )
            outer = subprocess.Popen(
                [*leash, "unshare", *namespaces, sys.executable, "-m", "aoscore.ctl.sandbox", str(self.directory)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                cwd="/",
            )
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not (self.directory / "run" / "prepared").exists():
            if outer.poll() is not None:
                last = (self.directory / "log" / "sandbox.log").read_text().splitlines()[-1:]
                raise FailedError(f"the machine did not start: {' '.join(last) or 'no output'}")
            if time.monotonic() > deadline:
                outer.kill()
                raise DeadlineError(f"the machine did not start within {_START_TIMEOUT_S:g} s")
            time.sleep(0.05)
        children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text().split()
        pid = int(children[0])
        self._pid_file.write_text(f"{pid} {_begun(pid)}")

    def enter(self, *args: str | Path) -> list[str]:
        """The command line that runs `args` inside."""
        pid = self.pid
        if pid is None:
            raise NotFoundError(f"no machine runs in {self.directory}")
        return ["nsenter", "-t", str(pid), "-n", "-m", "-p", "-u", "-i", *map(str, args)]

    def stop(self) -> bool:
        """End it with all that runs inside; False when it did not run."""
        ran = self._end()
        if self._keeper is not None:
            self._keeper.communicate()
            self._keeper = None
        return ran

    def _end(self) -> bool:
        pid = self.pid
        if pid is None:
            return False
        inside = {entry.name for entry in Path("/proc").iterdir() if entry.name.isdigit() and _is_inside(entry, pid)}
        os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + _STOP_TIMEOUT_S
        while self.pid is not None:
            if time.monotonic() > deadline:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                deadline += _STOP_TIMEOUT_S
            time.sleep(0.05)
        # The kernel ends what is left inside with the first process; wait until that is done.
        while any(Path("/proc", name).exists() and _is_inside(Path("/proc", name), pid) for name in inside):
            time.sleep(0.05)
        self._pid_file.unlink(missing_ok=True)
        return True


def find_cgroups(pattern: str) -> set[Path]:
    """Control groups, of any hierarchy of the host, whose own name matches the shell-style `pattern`.

    Others may make and remove groups meanwhile: what is gone by the time it is looked at is not found.
    """
    # Not Path.glob: it raises when a folder goes while it is on its way there.
    return {
        Path(top, folder)
        for top, folders, _ in os.walk(_CGROUPS)
        for folder in folders
        if fnmatch.fnmatchcase(folder, pattern)
    }


def remove_cgroups(name: str) -> None:
    """Remove the control groups called `name`, of any hierarchy of the host, with all below them.

    They outlive the processes that were in them: control groups belong to no namespace that ends. Raises
    DeadlineError when something still lives in one.
    """
    deadline = time.monotonic() + _EMPTY_TIMEOUT_S
    for top in find_cgroups(name):
        for folder, _, _ in os.walk(top, topdown=False):
            while True:
                try:
                    Path(folder).rmdir()
                    break
                except FileNotFoundError:
                    break
                except OSError as error:
                    # A process that was just killed is in its group until it has been collected.
                    if error.errno != errno.EBUSY:
                        raise
                    if time.monotonic() > deadline:
                        held = ", ".join(_processes_in(Path(folder))) or "by what lies below it"
                        raise DeadlineError(f"control group {folder} does not get empty, it is held: {held}") from error
                    time.sleep(0.05)


def _processes_in(group: Path) -> list[str]:
    """Who lives in a control group: number, name and state of each process (proc(5))."""
    found = []
    for pid in (group / "cgroup.procs").read_text().split():
        with contextlib.suppress(OSError):
            name, _, rest = Path(f"/proc/{pid}/stat").read_text().partition(" (")[2].rpartition(") ")
            found.append(f"{pid} {name} {rest[:1]}")
    return found


def _begun(pid: int) -> int | None:
    """Start time of a process in clock ticks: tells it from a later one with the same number (proc(5))."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (FileNotFoundError, ProcessLookupError):
        return None


def _is_inside(entry: Path, pid: int) -> bool:
    try:
        return (entry / "ns" / "pid").readlink() == Path(f"/proc/{pid}/ns/pid").readlink()
    except OSError:
        return False


def last_lines(path: Path, count: int) -> Sequence[str]:
    """The end of a log file, nothing when it is not there."""
    with contextlib.suppress(FileNotFoundError):
        return path.read_text(errors="replace").splitlines()[-count:]
    return []
