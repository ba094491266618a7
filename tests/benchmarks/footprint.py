"""Memory, start time and idle CPU of the daemons, measured on a running Unit with one service (make bench)."""

import contextlib
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from aoscore.ctl.demo import Demo
from aoscore.ctl.host import describe
from tests.support.pages import put_section

ROOT = Path(__file__).resolve().parent.parent.parent
PAGE = ROOT / "docs" / "footprint.md"
DAEMONS = ("iam", "cm", "sm")
# AosCore 9.1 (C++) on a machine of the same size (observed.md, "Figures"): PSS in MB, start to ready in s.
REFERENCE = {"iam": (41, "0.10 to 0.15"), "cm": (74, "0.15 to 0.22"), "sm": (70, "0.17 to 0.28")}
IDLE_S = 20
STARTS = 7


def main() -> int:
    """Measure, print the table, write it into docs/footprint.md."""
    with demo_unit() as (_, directory):
        text = report(directory / "demo")
    print(text)
    put_section(PAGE, "daemons", "Daemons of a Main Node with one running service", text)
    return 0


@contextlib.contextmanager
def demo_unit() -> Iterator[tuple[Demo, Path]]:
    """A demo that is up, with the directory above its own; both are gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="aos-bench-") as directory:
        demo = Demo(Path(directory) / "demo", ROOT / ".venv-tools")
        try:
            demo.up()
            yield demo, Path(directory)
        finally:
            demo.down()


def report(demo: Path) -> str:
    """The section, from a demo that runs in `demo`."""
    pids = {name: daemon_pid(demo, name) for name in DAEMONS}
    time.sleep(IDLE_S)
    before = {name: cpu_s(pid) for name, pid in pids.items()}
    time.sleep(IDLE_S)
    busy = {name: (cpu_s(pid) - before[name]) / IDLE_S * 100 for name, pid in pids.items()}
    sizes = {name: Path(f"/proc/{pid}/smaps_rollup").read_text() for name, pid in pids.items()}
    modules = idle_modules()
    rows = "\n".join(
        f"| {name.upper()} | {size_mb(sizes[name], 'Pss'):.0f} | {size_mb(sizes[name], 'Rss'):.0f} "
        f"| {REFERENCE[name][0]} | {statistics.median(restart(demo, name) for _ in range(STARTS)):.2f} "
        f"| {REFERENCE[name][1]} | {busy[name]:.2f} | {modules[name]} |"
        for name in DAEMONS
    )
    return f"""{written()}

| daemon | PSS, MB | RSS, MB | PSS of 9.1, MB | start to ready, s | the same of 9.1, s | idle CPU, % | modules |
| --- | --- | --- | --- | --- | --- | --- | --- |
{rows}

PSS counts a page that n processes share as 1/n. The figures of AosCore 9.1 (C++, release build) are from another
machine of the same size: we take less memory, and longer to start. Code that only start or past work needed is given
back when it is over (`aoscore/common/memory.py`): it stays in the page cache as long as nobody wants the room.

Method: `aosctl demo up` brings up a cloud and a provisioned Unit and deploys one service. After {IDLE_S} s without
work, PSS and RSS come from `/proc/PID/smaps_rollup`, CPU from `/proc/PID/stat` over another {IDLE_S} s, log level
debug, monitoring every 5 s instead of 35 s. Start to ready is the median of {STARTS} starts after `kill -9`, from the
start of the process to `READY=1`. Modules: loaded at import.
"""


def written() -> str:
    """When and where figures were taken."""
    return f"Written by `make bench` on {datetime.now(UTC):%Y-%m-%d}: {machine()}."


def daemon_pid(demo: Path, name: str) -> int:
    """Process ID on the host of a daemon of this demo."""
    config = str(demo / "unit" / "etc" / f"{name}.cfg")
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                args = (entry / "cmdline").read_bytes().decode().split("\0")
            except OSError:
                continue
            if config in args:
                return int(entry.name)
    raise RuntimeError(f"{name} does not run")


def cpu_s(pid: int) -> float:
    """CPU time a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def size_mb(smaps_rollup: str, kind: str) -> float:
    """A figure of smaps_rollup, MB."""
    match = re.search(rf"^{kind}:\s+(\d+) kB", smaps_rollup, re.MULTILINE)
    if match is None:
        raise RuntimeError(f"no {kind} in smaps_rollup")
    return int(match[1]) / 1024


def restart(demo: Path, name: str) -> float:
    """Kill a daemon; seconds from the start of the next process to its readiness, by the machine's log."""
    log = demo / "log" / "sandbox.log"
    seen = len(log.read_text())
    os.kill(daemon_pid(demo, name), 9)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        fresh = log.read_text()[seen:]
        begun = re.search(rf"^(\S+ \S+) .*Started: name={name},", fresh, re.MULTILINE)
        ready = re.search(rf"^(\S+ \S+) .*Ready: name={name}$", fresh, re.MULTILINE)
        if ready and begun:
            times = [datetime.strptime(match[1], "%d.%m.%y %H:%M:%S.%f") for match in (begun, ready)]
            return (times[1] - times[0]).total_seconds()
        time.sleep(0.1)
    raise RuntimeError(f"{name} was not ready within 60 s")


def idle_modules() -> dict[str, int]:
    """How many modules the import of each daemon loads."""
    counts = {}
    for name in DAEMONS:
        code = f"import sys, aoscore.{name}.app; print(len(sys.modules))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        counts[name] = int(done.stdout)
    return counts


def machine() -> str:
    """The machine and the versions in one line."""
    libraries = ", ".join(f"{name} {version(name)}" for name in ("grpcio", "protobuf", "cryptography", "msgspec"))
    return f"{describe()}, Python {platform.python_version()}, {libraries}"


if __name__ == "__main__":
    sys.exit(main())
