"""What an idle Unit of two QEMU guests takes, and what it writes to its disks (make guest-figures)."""

import os
import tempfile
import time
from pathlib import Path

from aoscore.ctl.host import describe
from qemu.guest import Guest
from tests.benchmarks.footprint import PAGE, size_mb
from tests.support.idle import go_idle, what_was_written, written_sectors
from tests.support.pages import put_section
from tests.support.wholeunit import label_nodes, main_pid, provision_both, run_services
from tests.system.conftest import running, saved_qemu_unit

IDLE_S = float(os.environ.get("AOSCORE_IDLE_S", "600"))
DAEMONS = {"main": ("iam", "cm", "sm"), "secondary": ("iam", "sm")}


def main() -> int:
    """Measure, print the section, write it into docs/footprint.md."""
    with tempfile.TemporaryDirectory(prefix="aos-bench-") as directory:
        unit = saved_qemu_unit(Path(directory) / "unit")
        with running(unit):
            provision_both(unit)
            label_nodes(unit)
            run_services(unit)
            go_idle(unit)
            busy_before = {name: cpu_s(guest, name) for name, guest in unit.nodes.items()}
            # Last: the programs that were run to measure have times of access to be written, too.
            before = {name: written_sectors(guest) for name, guest in unit.nodes.items()}
            time.sleep(IDLE_S)
            after = {name: written_sectors(guest) for name, guest in unit.nodes.items()}
            rows, written = [], []
            for name, guest in unit.nodes.items():
                busy = cpu_s(guest, name)
                for daemon in DAEMONS[name]:
                    sizes = guest.run("cat", f"/proc/{main_pid(guest, f'aos-{daemon}')}/smaps_rollup")
                    percent = (busy[daemon] - busy_before[name][daemon]) / IDLE_S * 100
                    rows.append(
                        f"| {name} | {daemon.upper()} | {size_mb(sizes, 'Pss'):.0f} | {size_mb(sizes, 'Rss'):.0f} "
                        f"| {percent:.2f} |"
                    )
                if after[name] != before[name]:
                    print(f"{name} wrote:\n{what_was_written(guest, IDLE_S)}")
                for disk, count in after[name].items():
                    written.append(f"| {name} | {disk} | {count - before[name][disk]} |")
    text = report(rows, written)
    print(text)
    put_section(PAGE, "guests", "A Unit of two guests that has nothing to do", text)
    return 0


def cpu_s(guest: Guest, node: str) -> dict[str, float]:
    """CPU time that each daemon of a node has used, seconds of the guest."""
    ticks = {}
    for daemon in DAEMONS[node]:
        stat = guest.run("cat", f"/proc/{main_pid(guest, f'aos-{daemon}')}/stat").rpartition(")")[2].split()
        ticks[daemon] = int(stat[11]) + int(stat[12])
    per_s = int(guest.run("getconf", "CLK_TCK"))
    return {daemon: count / per_s for daemon, count in ticks.items()}


def report(rows: list[str], written: list[str]) -> str:
    """The section."""
    return f"""Written by `make guest-figures` on {time.strftime("%Y-%m-%d")}: {describe()}; guests with Debian trixie,
Python 3.13, all private keys in tokens, processor emulated.

| node | daemon | PSS, MB | RSS, MB | CPU, % of the emulated processor |
| --- | --- | --- | --- | --- |
{chr(10).join(rows)}

| node | disk | sectors written in {IDLE_S:.0f} s |
| --- | --- | --- |
{chr(10).join(written)}

Both nodes provisioned, a service on each, log level info, monitoring every 5 s instead of 35 s; `vda` is the root file
system, `vdb` the data. Where something is written, the command says which files have changed: so far those of
Debian's journald, which brings to the disk after five minutes what it was told before the count began. `make test`
checks for ten minutes that nothing is written on a Main Node.
"""


if __name__ == "__main__":
    raise SystemExit(main())
