"""SM at scale, on real crun, nftables and links in namespaces of its own; CM and IAM are played (make bench).

Services are one busybox, in an image of one layer. What SM does when is noted by the process itself (`sm_process`).
"""

import asyncio
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from aoscore.common.types import InstanceInfo, MonitoringParameters
from aoscore.ctl.machine import remove_cgroups
from aoscore.sm import cgroups
from aoscore.sm.launcher.runtimes.container.runtime import PARALLEL
from tests.benchmarks.footprint import PAGE, ROOT, cpu_s, size_mb, written
from tests.support import bed
from tests.support.cm import TestCm
from tests.support.items import tar
from tests.support.pages import put_section
from tests.support.smbed import Child, SmBed
from tests.support.smunit import RUNTIME_ID, SmUnit

COUNTS = (1, 8, 16, 64, 128, 256)
ITEMS = (1, 8, 16)
ITEM_BYTES = 16 << 20
ITEM_STEPS = ("download", "unpack", "install", "network", "prepare", "start")
LARGE_BYTES = 100 << 20
COMPARED = 64
ROUNDS = 5
COMPARED_ROUNDS = 20
IDLE_S = 20
WAIT_S = 120.0

Spans = dict[str, list[tuple[float, float]]]


class Notes:
    """What the process noted since a moment."""

    def __init__(self, path: Path, since: float) -> None:
        self.spans: Spans = {}
        for line in path.read_text().rstrip("\0").splitlines():
            name, begin, end = line.split("\t")
            if float(begin) >= since:
                self.spans.setdefault(name, []).append((float(begin), float(end)))

    def mean_ms(self, name: str) -> float:
        """How long a step took on average, waiting for its turn included; 0 when it was not needed."""
        return 1000 * statistics.fmean(end - begin for begin, end in self.spans.get(name, [(0.0, 0.0)]))

    def busy_s(self, *names: str) -> float:
        """How long at least one of the steps was going on."""
        total, reached = 0.0, 0.0
        for begin, end in sorted(span for name in names for span in self.spans.get(name, [])):
            total += max(0.0, end - max(begin, reached))
            reached = max(reached, end)
        return total

    def last(self, name: str) -> float:
        """When the last step of that name ended."""
        return max(end for _, end in self.spans[name])


class Cost(msgspec.Struct):
    """What a change took: seconds from CM's message to the complete list, CPU seconds of SM and of its programs."""

    total_s: float
    cpu_s: float
    programs_s: float
    began: float
    notes: Notes


class Bench:
    """An SM process under measurement."""

    def __init__(self, unit: SmUnit, sm: Child, notes: Path) -> None:
        self.unit = unit
        self.cm = unit.cm
        self.pid = sm.process.pid
        self._notes = notes

    async def change(self, start: Sequence[InstanceInfo] = (), stop: Sequence[InstanceInfo] = ()) -> Cost:
        """Have CM ask for it, and wait for the complete list in which all that run are active."""
        seen = len(self.cm.connections[-1].frames)
        began, cpu, programs = time.monotonic(), cpu_s(self.pid), programs_s(self.pid)
        self.cm.update(*start, stop=tuple(stop))
        await self.cm.wait(lambda cm: is_complete(cm, seen, start), WAIT_S)
        return Cost(
            time.monotonic() - began,
            cpu_s(self.pid) - cpu,
            programs_s(self.pid) - programs,
            began,
            Notes(self._notes, began),
        )

    async def round_ms(self) -> tuple[float, float]:
        """CPU time of a round of monitoring: SM's own and that of the programs it ran, ms."""
        began = time.monotonic()
        os.kill(self.pid, signal.SIGUSR1)
        async with asyncio.timeout(WAIT_S):
            while not (found := [name for name in Notes(self._notes, began).spans if name.startswith("round ")]):
                await asyncio.sleep(0.05)
        _, own, programs = found[0].split()
        return 1000 * float(own), 1000 * float(programs)

    def pss_mb(self) -> float:
        """SM's share of memory now."""
        return size_mb(Path(f"/proc/{self.pid}/smaps_rollup").read_text(), "Pss")


def is_complete(cm: TestCm, seen: int, wanted: Sequence[InstanceInfo]) -> bool:
    """Whether CM has got a complete list since then, with all that is wanted active."""
    idents = {(info.ident.item_id, info.ident.instance, info.version) for info in wanted}
    for frame in cm.connections[-1].frames[seen:]:
        if frame.WhichOneof("SMOutgoingMessage") == "node_instances_status":
            active = {
                (one.instance.item_id, one.instance.instance, one.version)
                for one in frame.node_instances_status.instances
                if one.state == "active"
            }
            if idents <= active:
                return True
    return False


def programs_s(pid: int) -> float:
    """CPU time of programs that a process has run to their end."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[13]) + int(fields[14])) / os.sysconf("SC_CLK_TCK")


def numbered(info: InstanceInfo, count: int) -> list[InstanceInfo]:
    """So many instances of an item, each with a user of its own."""
    return [
        msgspec.structs.replace(
            info,
            ident=msgspec.structs.replace(info.ident, instance=number),
            uid=bed.first_uid() + number,
            gid=bed.first_uid() + number,
        )
        for number in range(count)
    ]


def large_item(unit: SmUnit, name: str, content: bytes) -> InstanceInfo:
    """A service with a layer of so many bytes, not to be compressed."""
    layers = [tar({"bin/busybox": Path("/bin/busybox").read_bytes()}, mode=0o755), tar({"data": content})]
    process = {"entrypoint": ["/bin/busybox", "sleep", "1000000"]}
    digest = unit.bed.blobs.item(layers, process=process, item_config={"baseLayerIsNodeRootfs": False, "author": name})
    return unit.bed.instance(name, manifest_digest=digest, runtime_id=RUNTIME_ID)


async def instances_table(bench: Bench) -> str:
    """Starts and stops of so many instances of one item that is installed."""
    info = bench.unit.service("svc", monitoring_parameters=MonitoringParameters())
    first = numbered(info, 1)
    await bench.change(first)
    await bench.change(stop=first)
    rows = []
    for count in COUNTS:
        wanted = numbered(info, count)
        up = await bench.change(wanted)
        pss = bench.pss_mb()
        round_ = [await bench.round_ms() for _ in range(ROUNDS)] if count == COUNTS[-1] else []
        down = await bench.change(stop=wanted)
        run_s = up.notes.last("start") - up.began
        rows.append(
            f"| {count} | {up.total_s:.2f} | {run_s:.2f} | {up.notes.busy_s('network'):.2f} "
            f"| {up.notes.mean_ms('prepare'):.1f} | {up.notes.mean_ms('start'):.0f} | {up.cpu_s:.2f} "
            f"| {up.programs_s:.2f} | {pss:.0f} | {down.total_s:.2f} | {down.cpu_s:.2f} | {down.programs_s:.2f} |"
        )
    own, programs = (statistics.median(values) for values in zip(*round_, strict=True))
    titles = ("instances", "all active, s", "all run, s", "network, s", "prepare, ms", "start, ms", "CPU of SM, s")
    titles += ("CPU of nft, s", "PSS, MB", "stop, s", "CPU of SM, s", "CPU of crun and nft, s")
    return f"""{table(titles, rows)}

"All run" ends with the last process; "all active" comes at least 0.1 s later, since an instance counts as active only
when it has lived so long. "Network" is the time in which at least one network was being made; "prepare" (bundle, beside
the network) and "start" (conmon and crun, {PARALLEL} at a time) are means per instance. conmon and crun of a start are
not SM's children in the end, so their CPU time is not in the table.

A round of monitoring over {COUNTS[-1]} instances, with their traffic, takes {own:.1f} ms of CPU time in SM (goal 15)
and {programs:.1f} ms in programs that it runs; medians of {ROUNDS}."""


def table(titles: Sequence[str], rows: Iterable[str]) -> str:
    """Markdown."""
    return "\n".join((f"| {' | '.join(titles)} |", "| --- " * len(titles) + "|", *rows))


async def plain_crun(ids: Iterable[str]) -> float:
    """Seconds of `crun run` for the bundles of running instances: same root and network, other control groups."""
    plain, command = Path("/run/plain"), ["crun", "--root=/run/plain-state", "--cgroup-manager=cgroupfs"]
    for name in ids:
        spec = json.loads(Path("/run/aos/runtime", name, "config.json").read_text())
        spec["linux"]["cgroupsPath"] += "-plain"
        (plain / name).mkdir(parents=True)
        (plain / name / "config.json").write_text(json.dumps(spec))
    limit = asyncio.Semaphore(PARALLEL)
    quiet: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)

    async def crun(*args: str | Path) -> None:
        async with limit:
            process = await asyncio.create_subprocess_exec(*command, *args, **quiet)
            assert await process.wait() == 0, args

    began = time.monotonic()
    await asyncio.gather(
        *(crun("run", "--detach", "--pid-file", plain / name / "pid", "--bundle", plain / name, name) for name in ids)
    )
    taken_s = time.monotonic() - began
    await asyncio.gather(*(crun("delete", "--force", name) for name in ids))
    for name in ids:
        # They are children of ours, the first process here; unawaited, they count against their user's limit.
        os.waitpid(int((plain / name / "pid").read_text()), 0)
    shutil.rmtree(plain)
    return taken_s


async def comparison(bench: Bench) -> str:
    """Start of as many instances by SM and by plain crun, in turns."""
    wanted = numbered(bench.unit.service("svc"), COMPARED)
    rows = []
    for _ in range(COMPARED_ROUNDS):
        up = await bench.change(wanted)
        plain_s = await plain_crun(sorted(path.name for path in Path("/run/aos/runtime").iterdir()))
        await bench.change(stop=wanted)
        rows.append((plain_s, up.notes.busy_s("start"), up.notes.last("start") - up.began))
    plain_s, start_s, all_s = (statistics.median(values) for values in zip(*rows, strict=True))
    start, everything = (statistics.median(row[index] / row[0] for row in rows) for index in (1, 2))
    return f"""Start of {COMPARED} instances and `crun run --detach` of their bundles, in turns, {PARALLEL} at a time:

| | s | times plain crun |
| --- | --- | --- |
| plain `crun run` | {plain_s:.2f} | 1.0 |
| SM, runtime: with conmon, from the first start to the last process | {start_s:.2f} | {start:.2f} (goal 1.3) |
| SM, all: from CM's message on, with addresses, links, firewall, mounts | {all_s:.2f} | {everything:.2f} |

Medians of {COMPARED_ROUNDS} rounds, of ratios within a round. What SM does beside crun needs the same cores."""


async def items_table(bench: Bench) -> str:
    """Installs of items, and updates."""
    rows = []
    for count in ITEMS:
        wanted = [large_item(bench.unit, f"item{count}-{number}", os.urandom(ITEM_BYTES)) for number in range(count)]
        up = await bench.change(wanted)
        rows.append(item_row(f"{count} of {ITEM_BYTES >> 20} MiB", up))
        await bench.change(stop=wanted)
    # System files, as a layer has them: gzip makes them a third.
    content = b"".join(path.read_bytes() for path in sorted(Path("/usr/bin").iterdir()) if path.is_file())
    large = large_item(bench.unit, "large", content[:LARGE_BYTES])
    up = await bench.change([large])
    rows.append(item_row(f"1 of {LARGE_BYTES >> 20} MiB", up))
    await bench.change(stop=[large])
    old, new = (numbered(bench.unit.service("updated", version), 8) for version in ("1.0.0", "2.0.0"))
    updates = []
    for wanted in (old, new, old, new):
        updates.append(await bench.change(wanted))
    median_s = statistics.median(update.total_s for update in updates[1:])
    titles = ("items", "all active, s", *(f"{step}, ms" for step in ITEM_STEPS), "CPU of SM, s")
    return f"""{table(titles, rows)}

From CM's message until all instances are active, one per item; steps are means, waiting for their turn included (4
items and 2 threads at a time), "install" holds download and unpacking. Random data, but 100 MiB of programs. From
the desired status until active, with CM's own download, AosCore 9.1 took 3.6 s for 100 MiB; our goal is 1.5 s.

Update of 8 instances to a new version: {median_s:.2f} s (goal 0.5; AosCore 9.1: 0.56)."""


def item_row(name: str, cost: Cost) -> str:
    """A row of the table of items."""
    steps = " | ".join(f"{cost.notes.mean_ms(step):.0f}" for step in ITEM_STEPS)
    return f"| {name} | {cost.total_s:.2f} | {steps} | {cost.cpu_s:.2f} |"


async def idle(bench: Bench) -> str:
    """Memory of a process that has started a few instances and rests."""
    wanted = numbered(bench.unit.service("svc"), 8)
    await bench.change(wanted)
    await asyncio.sleep(IDLE_S)
    pss = bench.pss_mb()
    await bench.change(stop=wanted)
    return f"PSS of SM idle with 8 instances: {pss:.0f} MB (goal 32; AosCore 9.1: 83)."


async def measure(root: Path) -> str:
    """The section; namespaces are entered."""
    # A hybrid of control group versions makes crun slower; a node has one version.
    if (layout := cgroups.probe()).version == 1 and layout.unified is not None:
        subprocess.run(["umount", layout.unified], check=True)
    notes = root / "notes"
    async with SmBed(root).running() as surroundings:
        unit = SmUnit(surroundings)
        program = ("-m", "tests.benchmarks.sm_process", str(notes))
        texts = []
        for part in (instances_table, comparison, items_table, idle):
            async with unit.sm(program, "info", monitoring={"pollPeriod": "1h"}) as sm:
                await unit.cm.connected(len(unit.cm.connections) + 1)
                texts.append(await part(Bench(unit, sm, notes)))
                print(texts[-1], flush=True)
    load = f"Load average of the machine at the end: {os.getloadavg()[1]:.0f}, of {os.cpu_count()} cores."
    return "\n\n".join((f"{written()}\n{load}", *texts))


def main() -> int:
    """Measure in namespaces of its own, print the tables, write them into docs/footprint.md."""
    name = str(os.getpid())
    with tempfile.TemporaryDirectory(prefix="aoscore-bench-", dir=os.environ.get("AOSCORE_BENCH_DIR")) as directory:
        try:
            subprocess.run(
                [*bed.UNSHARE, sys.executable, "-m", "tests.benchmarks.sm", directory],
                cwd=ROOT,
                env={**os.environ, bed.INSIDE: name},
                check=True,
            )
            text = Path(directory, "text").read_text()
        finally:
            remove_cgroups(f"aoscore-test-{name}")
    put_section(PAGE, "sm at scale", "SM at scale", text)
    return 0


if __name__ == "__main__":
    if bed.is_inside():
        bed.enter()
        place = Path(sys.argv[1])
        place.joinpath("text").write_text(asyncio.run(measure(place)))
    else:
        sys.exit(main())
