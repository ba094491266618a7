"""CM on a disk that runs full: the cloud is told, what runs goes on, and all heals when there is space again."""

import asyncio
import contextlib
import errno
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.iam import Iam
from tests.support.images import Image
from tests.support.unitbed import UnitBed, shown_items, unit_bed

pytestmark = [pytest.mark.net, pytest.mark.timeout(120)]

MIB = 1024 * 1024
A1, B1 = Image([b"a1" * 50_000]), Image([b"b1" * 50_000])
LARGE = Image([b"a2" * (16 * MIB)])


def mount(directory: Path, size_mib: int, *options: str) -> None:
    command = ["mount", "-t", "tmpfs", "-o", ",".join([f"size={size_mib}m", *options]), "tmpfs", str(directory)]
    subprocess.run(command, check=True)


def fill(directory: Path) -> Path:
    """Take all space that is left."""
    path = directory / "filler"
    with path.open("wb", buffering=0) as file:
        for piece in (MIB, 4096, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(b"x" * piece)
    return path


@contextlib.asynccontextmanager
async def running_bed(tmp_path: Path, iam: Iam, small: str, **config: Any) -> AsyncIterator[UnitBed]:
    """A Unit with item a 1.0.0 running, the named directory on a disk of 32 MiB."""
    options = {"updateManager": {"retryPause": "300ms"}, "alerts": {"sendPeriod": "100ms"}}
    async with unit_bed(tmp_path, iam, **options, **config) as bed:
        (tmp_path / small).mkdir(parents=True)
        mount(tmp_path / small, 32)
        for image in (A1, B1, LARGE):
            bed.blobs.publish(image)
        await bed.start()
        await bed.cloud.connected()
        await bed.cloud.send_frame(bed.wish(("a", "1.0.0", A1)))
        await bed.full_status(lambda status: shown_items(status) == {"a 1.0.0": "installed"})
        yield bed


def errors(bed: UnitBed, version: str) -> list[dict[str, Any]]:
    """Errors of a version in all statuses so far."""
    return [
        one["errorInfo"]
        for status in (*bed.statuses(), *bed.statuses(full=False))
        for one in status.get("items") or ()
        if one["version"] == version and "errorInfo" in one
    ]


def alerts(bed: UnitBed) -> list[str]:
    frames = [frame["data"] for frame in bed.cloud.frames if frame["data"]["messageType"] == "alerts"]
    return [item.get("message", "") for data in frames for item in data["items"]]


@pytest.mark.parametrize("where", ["announced", "unannounced", "unpacking"])
async def test_no_space_for_a_blob(tmp_path: Path, iam: Iam, where: str) -> None:
    """For its download, told before or not, or for what it holds."""
    small, config = "work", {}
    if where == "unpacking":
        small = "images"
        config = {"imageManager": {"installPath": str(tmp_path / "images"), "downloadPath": str(tmp_path / "partial")}}
    async with running_bed(tmp_path, iam, small, **config) as bed:
        if where == "unannounced":
            bed.blobs.change(LARGE.layers[0], size=0)
        await bed.cloud.send_frame(bed.wish(("a", "2.0.0", LARGE), ("b", "1.0.0", B1)))
        told = {"a 1.0.0": "installed", "a 2.0.0": "failed", "b 1.0.0": "installed"}
        await bed.full_status(lambda status: shown_items(status) == told)
        error = errors(bed, "2.0.0")[-1]
        expected = "no space left for" if where == "unannounced" else "bytes needed in"
        assert error["aosCode"] == 3 and expected in error["message"], error
        assert bed.running == {"a": "1.0.0", "b": "1.0.0"}
        mount(tmp_path / small, 200, "remount")
        await bed.full_status(lambda status: shown_items(status) == {"a 2.0.0": "installed", "b 1.0.0": "installed"})
        assert bed.running == {"a": "2.0.0", "b": "1.0.0"} and bed.is_alive


async def test_no_space_for_the_database(tmp_path: Path, iam: Iam) -> None:
    async with running_bed(tmp_path, iam, "work") as bed:
        filler = fill(tmp_path / "work")
        await bed.cloud.send_frame(bed.wish(("a", "1.0.0", A1), ("b", "1.0.0", B1)))
        await bed.until(lambda: any("no space left" in text for text in alerts(bed)))
        assert bed.is_alive and bed.running == {"a": "1.0.0"}
        filler.unlink()
        await bed.full_status(lambda status: shown_items(status) == {"a 1.0.0": "installed", "b 1.0.0": "installed"})
        assert bed.running == {"a": "1.0.0", "b": "1.0.0"}


@pytest.mark.parametrize("phase", ["downloading", "installing", "activating"])
async def test_the_database_runs_full_in_the_middle_of_an_update(tmp_path: Path, iam: Iam, phase: str) -> None:
    async with running_bed(tmp_path, iam, "work") as bed:
        before = bed.sm.starts.copy()
        bed.sm.silent = phase == "activating"
        await bed.cloud.send_frame(bed.wish(("a", "1.0.0", A1), ("b", "1.0.0", B1)))
        await bed.until(lambda: f"Update: phase={phase}" in bed.new_log().rpartition("Update starts")[2])
        filler = await asyncio.to_thread(fill, tmp_path / "work")
        await asyncio.sleep(1.0)  # whatever it tries meanwhile
        assert bed.is_alive and bed.running["a"] == "1.0.0"
        filler.unlink()
        if bed.sm.silent:
            bed.sm.silent = False
            bed.sm.send(node_instances_status=bed.sm._full_list())
        await bed.full_status(lambda status: shown_items(status) == {"a 1.0.0": "installed", "b 1.0.0": "installed"})
        await bed.until(lambda: bed.running == {"a": "1.0.0", "b": "1.0.0"})
        assert [key for key in bed.sm.starts if key[0] == "a"] == before


async def test_a_start_with_a_full_disk_keeps_the_database(tmp_path: Path, iam: Iam) -> None:
    async with running_bed(tmp_path, iam, "work") as bed:
        await bed.kill()
        filler = fill(tmp_path / "work")
        await bed.start()
        await bed.kill()
        filler.unlink()
        assert not list((tmp_path / "work").glob("cm.db.broken*"))
        await bed.start()
        await bed.cloud.connected()
        await bed.full_status(lambda status: shown_items(status) == {"a 1.0.0": "installed"})
        assert bed.running == {"a": "1.0.0"} and bed.sm.starts == [("a", *bed.sm.starts[0][1:])]


def test_the_filler_leaves_nothing(tmp_path: Path) -> None:
    mount(tmp_path, 1)
    fill(tmp_path)
    with pytest.raises(OSError) as caught:
        (tmp_path / "more").write_bytes(b"x" * 4096)
    assert caught.value.errno == errno.ENOSPC
