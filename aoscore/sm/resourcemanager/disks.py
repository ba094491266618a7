"""Which disk files are on, by the numbers that control groups name it with."""

import os
from collections.abc import Iterable
from pathlib import Path

_BLOCK_DEVICES = Path("/sys/dev/block")


def disks_of(paths: Iterable[Path], block_devices: Path = _BLOCK_DEVICES) -> list[tuple[int, int]]:
    """Major and minor number of each disk below these files, sorted; a partition stands for its disk, which the kernel
    limits as a whole. What has no disk (tmpfs, NFS) is left out."""
    found = set()
    for path in paths:
        number = os.stat(path).st_dev  # noqa: PTH116 - works the same for any path-like
        entry = block_devices / f"{os.major(number)}:{os.minor(number)}"
        if (entry / "partition").exists():
            entry = entry.resolve().parent
        try:
            major, _, minor = (entry / "dev").read_text().partition(":")
        except FileNotFoundError:
            continue
        found.add((int(major), int(minor)))
    return sorted(found)
