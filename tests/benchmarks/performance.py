"""The three hot paths against the best programs there are, on the same data in one run (make bench).

Unpacking goes onto a file system that is made for each run, ext4 as on a device: an old one looks long for inodes that
nobody freed lately, and what others do there takes time as well. Processes are new for each run, too (`hotpath`).
"""

import contextlib
import os
import random
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import msgspec
import psutil

from aoscore._speedups import _sampler, _unpack
from aoscore._speedups._plain import sampler as plain_sampler
from tests.benchmarks.footprint import ROOT, written
from tests.benchmarks.hotpath import Figures
from tests.support import debian

PAGE = ROOT / "docs" / "performance.md"
ROUNDS = 7
SMALL_FILES = 50_000
SMALL_BYTES = 4096
FILES_PER_DIRECTORY = 100
LARGE_BYTES = 1 << 30
DISK_BYTES = 4 << 30
OPENSSL = ("openssl", "dgst", "-sha256")
INSTANCES = 256
SAMPLES = 10
MEMORY_MIB = 32
SAMPLE_MS = 10

Run = Callable[[], Figures]


class Comparison(NamedTuple):
    """A row of the table: what is done, what it is compared with, and how many times as fast it is to be."""

    work: str
    against: str
    goal: float | None
    ours: str
    theirs: str


COMPARISONS = (
    Comparison(
        "unpack the layer, with both digests",
        "`tar -xzf`, `sha256sum` of the blob, `sha256sum` of the unpacked tar, one after another",
        2.0,
        "gzip",
        "tar and sums",
    ),
    Comparison("the same", "`tar -xzf` alone, no digest", 1.2, "gzip", "tar"),
    Comparison(f"{SMALL_FILES:,} small files", "`tar -xzf`, no digest", 1.0, "small", "tar small"),
    Comparison("the layer packed by zstd", "`tar --zstd -xf`, no digest", 1.0, "zstd", "tar zstd"),
    Comparison("the layer, gzip", "Python's `tarfile` with the same checks and digests", 5.0, "gzip", "tarfile"),
    Comparison("chunk and digest a file of 1 GiB, cached", "`sha256sum`", 0.9, "chunks", "sum"),
    Comparison("the same", "`openssl dgst -sha256`, the same library as ours", None, "chunks", "openssl"),
    Comparison(
        f"one sample of {INSTANCES} instances and the node, CPU time", "psutil and plain reads", 15.0, "sample", "reads"
    ),
    Comparison("unpack the layer, gzip", "the plain twin", None, "gzip", "twin"),
    Comparison("the sample, CPU time", "the plain twin", None, "sample", "twin sample"),
)
# What a part of the work takes alone, whoever does it.
ALONE = {
    "write alone": "`tar -xf` of the unpacked tar",
    "inflate alone": "`gzip -dc` of the layer to nowhere",
    "hash alone": "`openssl dgst -sha256` of the blob and of the unpacked tar",
}


def main() -> int:
    """Measure, print the page, write docs/performance.md."""
    reason = debian.fetch_root()
    if reason:
        print(reason, file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="aos-performance-", dir=os.environ.get("AOSCORE_BENCH_DIR")) as directory:
        place = Path(directory)
        layers = Layers(place)
        with cgroups() as (root, parent):
            taken = measure({**unpacking(place, layers), **hashing(place), **sampling(root, parent)})
        text = report(taken, layers)
    print(text)
    PAGE.write_text(text)
    return 0


# -- what is measured


class Layers:
    """The layer that others made, and what is made of it."""

    def __init__(self, place: Path) -> None:
        self.gzip = debian.root()
        self.tar = place / "layer.tar"
        self.zstd = place / "layer.zst"
        self.wide = place / "wide.zst"
        self.small = place / "small.gz"
        with self.tar.open("wb") as tar:
            subprocess.run(["gzip", "-dc", self.gzip], check=True, stdout=tar)
        subprocess.run(["zstd", "-q", self.tar, "-o", self.zstd], check=True)
        subprocess.run(["zstd", "-q", "--long=24", self.tar, "-o", self.wide], check=True)
        small = place / "small.tar"
        self._make_small(small)
        subprocess.run(["gzip", small], check=True)
        small.with_name("small.tar.gz").rename(self.small)
        with tarfile.open(self.tar) as archive:
            self.files = sum(member.isreg() for member in archive)

    def _make_small(self, target: Path) -> None:
        """Files of up to SMALL_BYTES, cut from the content of the layer."""
        chance = random.Random(1)
        content = self.tar.read_bytes()
        with tarfile.open(target, "w", format=tarfile.GNU_FORMAT) as archive:
            for number in range(SMALL_FILES):
                folder = f"{number // FILES_PER_DIRECTORY}"
                if number % FILES_PER_DIRECTORY == 0:
                    entry = tarfile.TarInfo(folder)
                    entry.type, entry.mode = tarfile.DIRTYPE, 0o755
                    archive.addfile(entry)
                entry = tarfile.TarInfo(f"{folder}/{number}")
                entry.size = chance.randrange(SMALL_BYTES)
                start = chance.randrange(len(content) - SMALL_BYTES)
                archive.addfile(entry, BytesIO(content[start : start + entry.size]))


def unpacking(place: Path, layers: Layers) -> dict[str, Run]:
    """Ways to unpack, each into an empty directory."""

    def into(make: Callable[[Path], Figures]) -> Run:
        def run() -> Figures:
            with new_file_system(place) as target:
                return make(target)

        return run

    def ours(layer: Path, packing: str, how: str = "unpack") -> Run:
        return into(lambda target: hot_path(how, layer, packing, target))

    def tar(layer: Path, packing: str) -> Run:
        return into(lambda target: programs(["tar", *packing.split(), "-xf", layer, "-C", target]))

    sums = [["sha256sum", layers.gzip], ["sha256sum", layers.tar]]
    unzip = ["tar", "--gzip", "-xf", layers.gzip, "-C"]
    return {
        "gzip": ours(layers.gzip, "gzip"),
        "tar and sums": into(lambda target: programs([*unzip, target], *sums)),
        "tar": tar(layers.gzip, "--gzip"),
        "small": ours(layers.small, "gzip"),
        "tar small": tar(layers.small, "--gzip"),
        "zstd": ours(layers.zstd, "zstd"),
        "tar zstd": tar(layers.zstd, "--zstd"),
        "tarfile": ours(layers.gzip, "gzip", "tarfile"),
        "twin": ours(layers.gzip, "gzip", "twin"),
        "wide window": ours(layers.wide, "zstd"),
        "write alone": tar(layers.tar, ""),
        "inflate alone": lambda: programs(["gzip", "-dc", layers.gzip]),
        "hash alone": lambda: programs([*OPENSSL, layers.gzip, layers.tar]),
    }


def hashing(place: Path) -> dict[str, Run]:
    """Ways to get the digest of a large file."""
    large = place / "large"
    with large.open("wb") as file:
        block = random.Random(2).randbytes(1 << 20)
        for _ in range(LARGE_BYTES // len(block)):
            file.write(block)
    return {
        "chunks": lambda: hot_path("chunks", large),
        "sum": lambda: programs(["sha256sum", large]),
        "openssl": lambda: programs([*OPENSSL, large]),
    }


def sampling(root: Path, parent: str) -> dict[str, Run]:
    """Ways to read the counters of the node and of all instances once, as CPU time."""
    names = [f"{parent}/{number}" for number in range(INSTANCES)]

    def sampler(kind: type[_sampler.Sampler] | type[plain_sampler.Sampler]) -> Run:
        one = kind(cgroup_root=str(root), filesystems={"root": "/"}, max_kept_files=5 * INSTANCES)
        for name in names:
            one.add(name, name)
        one.sample()
        return mean(one.sample)

    return {
        "sample": sampler(_sampler.Sampler),
        "reads": mean(lambda: plain_reads(root, names)),
        "twin sample": sampler(plain_sampler.Sampler),
    }


def plain_reads(root: Path, names: Sequence[str]) -> list[tuple[int, ...]]:
    """The values of a sample as one would write it down."""
    psutil.cpu_times()
    psutil.virtual_memory()
    psutil.net_io_counters(pernic=True)
    psutil.disk_usage("/")
    is_unified = (root / "cgroup.controllers").exists()
    found = []
    for name in names:
        if is_unified:
            cpu = dict(line.split() for line in (root / name / "cpu.stat").read_text().splitlines())["usage_usec"]
            memory = (root / name / "memory.current").read_text()
            pids = (root / name / "pids.current").read_text()
            lines = (root / name / "io.stat").read_text().splitlines()
            parts = [part.split("=") for line in lines for part in line.split()[1:]]
        else:
            cpu = (root / "cpuacct" / name / "cpuacct.usage").read_text()
            memory = (root / "memory" / name / "memory.usage_in_bytes").read_text()
            pids = (root / "pids" / name / "pids.current").read_text()
            lines = (root / "blkio" / name / "blkio.throttle.io_service_bytes").read_text().splitlines()
            parts = [line.split()[1:] for line in lines if not line.startswith("Total")]
        read = sum(int(value) for key, value in parts if key in ("rbytes", "Read"))
        write = sum(int(value) for key, value in parts if key in ("wbytes", "Write"))
        found.append((int(cpu), int(memory), int(pids), read, write))
    return found


# -- how


def measure(runs: dict[str, Run]) -> dict[str, list[Figures]]:
    """Everything once a round, so that what else the machine does falls on all of them."""
    taken: dict[str, list[Figures]] = {name: [] for name in runs}
    for number in range(ROUNDS):
        for name, run in runs.items():
            os.sync()
            taken[name].append(run())
        print(f"round {number + 1} of {ROUNDS}", file=sys.stderr)
    return taken


def hot_path(*arguments: str | Path) -> Figures:
    """One of ours, in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.hotpath", *arguments]
    return msgspec.json.decode(
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout, type=Figures
    )


def programs(*commands: Sequence[str | Path]) -> Figures:
    """Programs one after another, with those they start."""
    begin = time.perf_counter()
    cpu_s = 0.0
    nowhere = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
    for command in commands:
        pid = os.posix_spawnp(command[0], command, os.environ, file_actions=nowhere)
        _, status, used = os.wait4(pid, 0)
        if status:
            raise RuntimeError(f"{command} ended with {os.waitstatus_to_exitcode(status)}")
        cpu_s += used.ru_utime + used.ru_stime
    return Figures(time.perf_counter() - begin, cpu_s)


def mean(run: Callable[[], object]) -> Run:
    """The CPU time of one of several calls, as both times; one call before warms the caches."""

    def measured() -> Figures:
        run()
        begin = time.process_time()
        for _ in range(SAMPLES):
            run()
        taken = (time.process_time() - begin) / SAMPLES
        return Figures(taken, taken)

    return measured


@contextlib.contextmanager
def new_file_system(place: Path) -> Iterator[Path]:
    """An empty directory on an ext4 of its own."""
    image, mount = place / "disk", place / "mount"
    with image.open("wb") as file:
        file.truncate(DISK_BYTES)
    subprocess.run(["mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0", image], check=True)
    mount.mkdir(exist_ok=True)
    subprocess.run(["mount", "-o", "loop", image, mount], check=True)
    try:
        target = mount / "layer"
        target.mkdir()
        os.sync()
        yield target
    finally:
        subprocess.run(["umount", mount], check=True)
        image.unlink()


@contextlib.contextmanager
def cgroups() -> Iterator[tuple[Path, str]]:
    """Real control groups, as many as there are instances: where they are mounted, and the name of what they are in."""
    root, parent = Path("/sys/fs/cgroup"), f"aoscore-bench-{os.getpid()}"
    is_unified = (root / "cgroup.controllers").exists()
    controllers = ("",) if is_unified else ("cpuacct", "memory", "pids", "blkio")
    trees = [root / controller / parent for controller in controllers]
    try:
        for tree in trees:
            tree.mkdir()
            if is_unified:
                (tree / "cgroup.subtree_control").write_text("+cpu +memory +io +pids")
            for number in range(INSTANCES):
                (tree / str(number)).mkdir()
        yield root, parent
    finally:
        for tree in trees:
            for group in (*tree.glob("*/"), *tree.parent.glob(parent)):
                group.rmdir()


# -- the page


def report(taken: dict[str, list[Figures]], layers: Layers) -> str:
    """The page of what was measured."""
    rows = "\n".join(row(one, taken) for one in COMPARISONS)
    alone = "\n".join(f"| {name} | {what} | {seconds(taken[name])} |" for name, what in ALONE.items())
    peaks = [one.peak_kib / 1024 for name in ("gzip", "small", "zstd", "wide window") for one in taken[name]]
    sample_ms = statistics.median(one.cpu_s for one in taken["sample"]) * 1000
    tools = ", ".join(
        subprocess.run([*tool], capture_output=True, text=True, check=True).stdout.splitlines()[0].strip("* ")
        for tool in (*((name, "--version") for name in ("tar", "gzip", "zstd", "sha256sum")), ("openssl", "version"))
    )
    return f"""# Performance of the hot paths

{written()}
Layers are inflated by {_unpack.INFLATED_BY}. Compared with: {tools}. Load average of the machine at the end:
{os.getloadavg()[1]:.1f} (more than its cores means that others took part of the time).

| work | against | goal, times as fast | measured | ours: wall, CPU in s | theirs: wall, CPU in s |
| --- | --- | --- | --- | --- | --- |
{rows}

| | goal | measured |
| --- | --- | --- |
| peak memory of an unpacking above the bare process, largest of all runs | {MEMORY_MIB} MiB | {max(peaks):.1f} MiB |
| one sample of {INSTANCES} instances and the node, CPU time | {SAMPLE_MS} ms | {sample_ms:.1f} ms |

What the parts of unpacking the layer take alone, with programs that do nothing else:

| | | wall, CPU in s |
| --- | --- | --- |
{alone}

The layer is a root file system of Debian as mmdebstrap packs it: {size(layers.gzip)} packed, {size(layers.tar)}
unpacked, {layers.files:,} files. The small files are cut from it, {SMALL_BYTES} bytes at most. Each run of ours
computes the digests of the blob and of the unpacked tar; `sha256sum` gets the unpacked tar for nothing. Unpacking goes
onto an ext4 that is new for each run, without waiting for the disk on either side, with the packed file in the page
cache. Memory is that of layers as above and of one packed with the largest window that is taken, 16 MiB; a unit test
bounds it for the greediest layer.

Times are medians of {ROUNDS} rounds. In each round everything runs once, one after another; "measured" is the median of
the rounds' ratios of wall time (of CPU time for samples).
"""


def row(one: Comparison, taken: dict[str, list[Figures]]) -> str:
    """A comparison as a row of the table."""
    ours, theirs = taken[one.ours], taken[one.theirs]
    ratio = statistics.median(other.wall_s / mine.wall_s for mine, other in zip(ours, theirs, strict=True))
    goal = "" if one.goal is None else f"{one.goal:g}"
    return f"| {one.work} | {one.against} | {goal} | {ratio:.2f} | {seconds(ours)} | {seconds(theirs)} |"


def seconds(runs: Sequence[Figures]) -> str:
    """Medians of wall time and CPU time."""
    wall, cpu = (statistics.median(times) for times in zip(*((one.wall_s, one.cpu_s) for one in runs), strict=True))
    return f"{wall:.2f}, {cpu:.2f}" if wall > 0.1 else f"{wall:.5f}, {cpu:.5f}"


def size(path: Path) -> str:
    """Of a file, for people."""
    return f"{path.stat().st_size / (1 << 20):.0f} MiB"


if __name__ == "__main__":
    sys.exit(main())
