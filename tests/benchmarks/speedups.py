"""What the native hot paths buy: against GNU tar, Python's tarfile and their plain twins (make bench)."""

import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from aoscore._speedups import _chunker, _sampler, _unpack
from aoscore._speedups._plain import chunker as plain_chunker
from aoscore._speedups._plain import sampler as plain_sampler
from aoscore._speedups._plain import unpack as plain_unpack
from aoscore._speedups.unpack_types import Compression
from tests.benchmarks.footprint import ROOT, machine

LAYER_BYTES = 100 << 20
LARGE_FILE_BYTES = 10 << 20
ROUNDS = 7
INSTANCES = 256


def main() -> int:
    """Measure, print the page, write docs/speedups.md."""
    with tempfile.TemporaryDirectory(prefix="aos-speedups-", dir=os.environ.get("AOSCORE_BENCH_DIR")) as directory:
        text = report(Path(directory))
    print(text)
    (ROOT / "docs" / "speedups.md").write_text(text)
    return 0


def report(place: Path) -> str:
    """The page; everything is made below `place`."""
    large, small = make_layers(place)
    sections = "\n\n".join(
        table(title, medians(candidates))
        for title, candidates in (
            (f"A layer of {count_files(large)} large files, gzip", unpackers(place, large, "gzip")),
            (f"A layer of {count_files(small)} system files, gzip", unpackers(place, small, "gzip")),
            ("The same files, zstd", unpackers(place, repacked(small, "zstd"), "zstd")),
            ("SHA-256 and SHA3-256 of a file in one pass", hashers(unpacked(large))),
            (f"One sample of the node and {INSTANCES} instances", samplers(place)),
        )
    )
    return f"""# Native hot paths

Written by `make bench` on {datetime.now(UTC):%Y-%m-%d}: {machine()}.

Medians of {ROUNDS} rounds; in each round every candidate runs once, side by side, with warm caches and clean disks.
Layers are {LAYER_BYTES >> 20} MiB unpacked, from this machine's own files. `unpack_layer` also computes the digests of
the blob and of the unpacked tar; the programs it is compared with do not.

{sections}
"""


Candidates = dict[str, Callable[[], object]]


def medians(candidates: Candidates) -> dict[str, float]:
    """Median seconds of each candidate."""
    taken: dict[str, list[float]] = {name: [] for name in candidates}
    for _round in range(ROUNDS):
        for name, run in candidates.items():
            os.sync()
            start = time.perf_counter()
            run()
            taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in taken.items()}


def table(title: str, found: dict[str, float]) -> str:
    """Markdown table; the first candidate is ours."""
    ours = next(iter(found.values()))
    rows = "\n".join(f"| {name} | {taken * 1000:.2f} | {taken / ours:.2f} |" for name, taken in found.items())
    return f"## {title}\n\n| | ms | times ours |\n| --- | --- | --- |\n{rows}"


def make_layers(place: Path) -> tuple[Path, Path]:
    """Two gzip layers: large files, and files as they come in a root file system."""
    large, small = place / "large", place / "small"
    files = sorted(path for path in Path("/usr").rglob("*") if path.is_file() and not path.is_symlink())
    whole = bytearray()
    left = LAYER_BYTES
    for path in files:
        size = path.stat().st_size
        if left < size or size > LARGE_FILE_BYTES:
            continue
        left -= size
        target = small / path.relative_to("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target)
        whole += path.read_bytes()
    large.mkdir()
    for start in range(0, len(whole), LARGE_FILE_BYTES):
        (large / str(start)).write_bytes(whole[start : start + LARGE_FILE_BYTES])
    return repacked(large, "gzip"), repacked(small, "gzip")


def unpacked(layer: Path) -> Path:
    """The first file of what a layer was packed from."""
    return next(layer.with_suffix("").iterdir())


def count_files(layer: Path) -> int:
    """Files in a layer."""
    return sum(len(files) for _folder, _directories, files in os.walk(layer.with_suffix("")))


def repacked(layer: Path, compression: str) -> Path:
    """The files of a layer, or of a directory, as a layer of this compression."""
    source = layer.with_suffix("")
    packed = source.with_suffix(f".{compression}")
    subprocess.run(["tar", f"--{compression}", "-cf", packed, "-C", source, "."], check=True)
    return packed


def unpackers(place: Path, layer: Path, compression: str) -> Candidates:
    """Ways to unpack a layer into a fresh directory each time."""

    def fresh() -> Path:
        return Path(tempfile.mkdtemp(dir=place))

    def by_tar() -> None:
        subprocess.run(["tar", f"--{compression}", "-xf", layer, "-C", fresh()], check=True)

    def by_tarfile() -> None:
        with tarfile.open(layer, "r:gz") as archive:
            archive.extractall(fresh(), filter="fully_trusted")

    candidates: Candidates = {
        "unpack_layer": lambda: _unpack.unpack_layer(layer, fresh(), compression=Compression(compression)),
        f"tar --{compression}": by_tar,
        "plain twin": lambda: plain_unpack.unpack_layer(layer, fresh(), compression=Compression(compression)),
    }
    if compression == "gzip":
        candidates["tarfile"] = by_tarfile
    return candidates


def hashers(file: Path) -> Candidates:
    """Two digests of a file."""
    algorithms = ("sha256", "sha3-256")
    return {
        "hash_file_all": lambda: _chunker.hash_file_all(file, algorithms),
        "plain twin": lambda: plain_chunker.hash_file_all(file, algorithms),
    }


def samplers(place: Path) -> Candidates:
    """Sampling of as many cgroups as a node may have, made up from plain files."""
    root = place / "cgroup"
    content = {
        "cpu.stat": "usage_usec 1\n",
        "memory.current": "1\n",
        "pids.current": "1\n",
        "io.stat": "8:0 rbytes=1\n",
    }
    for index in range(INSTANCES):
        group = root / str(index)
        group.mkdir(parents=True)
        for name, text in content.items():
            (group / name).write_text(text)
    (root / "cgroup.controllers").touch()
    candidates: Candidates = {}
    for name, kind in (("Sampler", _sampler.Sampler), ("plain twin", plain_sampler.Sampler)):
        sampler = kind(cgroup_root=str(root), max_kept_files=4 * INSTANCES)
        for index in range(INSTANCES):
            sampler.add(str(index), str(index))
        sampler.sample()
        candidates[name] = sampler.sample
    return candidates


if __name__ == "__main__":
    sys.exit(main())
