"""One run of a hot path in a process of its own, which prints what it took (`performance`)."""

import hashlib
import os
import re
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import msgspec

CHUNK_BYTES = 1 << 20


class Figures(msgspec.Struct, array_like=True):
    """Wall time, CPU time of all threads, and the peak of memory above what the process had before."""

    wall_s: float
    cpu_s: float
    peak_kib: int = 0


def main() -> None:
    """Run what the command line names; nothing is loaded but what it needs."""
    name, *arguments = sys.argv[1:]
    run = {"unpack": unpack, "twin": unpack, "tarfile": by_tarfile, "chunks": chunks}[name](name, *arguments)
    bare_kib = peak_kib()
    begin, cpu = time.perf_counter(), time.process_time()
    run()
    figures = Figures(time.perf_counter() - begin, time.process_time() - cpu, peak_kib() - bare_kib)
    sys.stdout.buffer.write(msgspec.json.encode(figures))


def peak_kib() -> int:
    """Peak of the memory of this process so far."""
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1])


def unpack(name: str, blob: str, packing: str, target: str) -> Callable[[], Any]:
    """By the native module or its twin."""
    from aoscore._speedups import _unpack
    from aoscore._speedups._plain import unpack as twin
    from aoscore._speedups.unpack_types import Compression

    module: Any = _unpack if name == "unpack" else twin
    return lambda: module.unpack_layer(blob, target, compression=Compression(packing))


class _Hashed:
    """A file whose bytes are hashed as they are read."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.digest = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self.digest.update(data)
        return data


def by_tarfile(_name: str, blob: str, _packing: str, target: str) -> Callable[[], Any]:
    """By the library of Python: both digests in the same pass, names checked by its filter, numeric owners."""
    import gzip

    def run() -> None:
        with open(blob, "rb") as file:  # noqa: PTH123
            packed = _Hashed(file)
            with gzip.GzipFile(fileobj=packed) as unzipped:  # type: ignore[call-overload]
                unpacked = _Hashed(unzipped)
                with tarfile.open(fileobj=unpacked, mode="r|") as archive:  # type: ignore[call-overload]
                    archive.extractall(target, filter="tar", numeric_owner=True)
                while unpacked.read(CHUNK_BYTES):
                    pass
        packed.digest.hexdigest()
        unpacked.digest.hexdigest()

    return run


def chunks(_name: str, path: str) -> Callable[[], Any]:
    """A file chunk by chunk, hashed in the same pass."""
    from aoscore._speedups import _chunker

    def run() -> None:
        fd = os.open(path, os.O_RDONLY)
        digest = _chunker.Digest()
        for _chunk in _chunker.read_chunks(fd, CHUNK_BYTES, digest):
            pass
        digest.text()
        os.close(fd)

    return run


if __name__ == "__main__":
    main()
