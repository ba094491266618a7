"""Disks below files."""

import os
from pathlib import Path

from aoscore.sm.resourcemanager.disks import disks_of


def test_a_partition_stands_for_its_disk(tmp_path: Path) -> None:
    number = tmp_path.stat().st_dev
    devices, disk = tmp_path / "dev" / "block", tmp_path / "devices" / "sda"
    part = disk / "sda1"
    part.mkdir(parents=True)
    devices.mkdir(parents=True)
    (disk / "dev").write_text("8:0\n")
    (part / "dev").write_text(f"{os.major(number)}:{os.minor(number)}\n")
    entry = devices / f"{os.major(number)}:{os.minor(number)}"
    entry.symlink_to(part)
    assert disks_of([tmp_path, tmp_path / "dev"], devices) == [(os.major(number), os.minor(number))]
    (part / "partition").write_text("1\n")
    assert disks_of([tmp_path], devices) == [(8, 0)]
    entry.unlink()
    assert disks_of([tmp_path], devices) == []
