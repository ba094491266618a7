"""kill -9 of CM at every persistent step of an update, and of the way back from one: after its restart the same end."""

import copy
import hashlib
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.iam import Iam
from tests.support.images import Image
from tests.support.unitbed import SUBJECT, UnitBed, shown_items, unit_bed

pytestmark = pytest.mark.timeout(300)

QUOTAS = {"quotas": {"stateLimit": 1000, "storageLimit": 1000}}
A1 = Image([b"a1" * 50_000, b"shared layer"], **QUOTAS)
A2 = Image([b"a2" * 50_000, b"shared layer"], **QUOTAS)
B1 = Image([b"b1" * 50_000, b"shared layer"])
GONE = Image([b"gone" * 50_000])

# Each takes a few steps less: what comes after the last one is a kill when all is done.
STEPS = {"update": 90, "back": 30}
STEPS_PER_TEST = 10
CASES = [(kind, first) for kind, count in STEPS.items() for first in range(1, count, STEPS_PER_TEST)]


class Snapshot:
    """What CM and its node had at a time."""

    def __init__(self, bed: UnitBed) -> None:
        shutil.copytree(bed.directory / "work", bed.directory / "saved", symlinks=True)
        self._instances = copy.deepcopy(bed.sm.instances)
        self._infos = copy.deepcopy(bed.sm.infos)

    def restore(self, bed: UnitBed) -> None:
        shutil.rmtree(bed.directory / "work")
        shutil.copytree(bed.directory / "saved", bed.directory / "work", symlinks=True)
        bed.sm.instances = copy.deepcopy(self._instances)
        bed.sm.infos = copy.deepcopy(self._infos)
        bed.sm.config = ("", "")
        bed.cloud.frames.clear()


@pytest.fixture
async def bed(tmp_path: Path, iam: Iam) -> AsyncIterator[UnitBed]:
    async with unit_bed(tmp_path, iam) as opened:
        for image in (A1, A2, B1, GONE):
            opened.blobs.publish(image)
        await opened.start()
        await opened.cloud.connected()
        await opened.cloud.send_frame(opened.wish(("a", "1.0.0", A1), ("gone", "1.0.0", GONE)))
        await opened.until(lambda: opened.phase == "none" and opened.running == {"a": "1.0.0", "gone": "1.0.0"})
        await opened.stop()
        yield opened


def files(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def check_files(bed: UnitBed, *images: Image) -> None:
    """Exactly the blobs of these images, whole; nothing half done anywhere."""
    work = bed.directory / "work"
    blobs = files(work / "install")
    assert blobs.keys() == {f"blobs/sha256/{digest[7:]}" for image in images for digest in image.blobs}
    assert all(hashlib.sha256(content).hexdigest() == name.rpartition("/")[2] for name, content in blobs.items())
    assert files(work / "download") == {}
    assert files(work / "states") == {f"a/{SUBJECT}/0/state.dat": b""}
    assert not list(work.glob(".*.tmp"))


def wish(bed: UnitBed) -> dict[str, Any]:
    """Update a, add b, remove gone, and a unit config."""
    node = {"nodeGroupSubject": {"codename": "main"}, "priority": 3}
    config = {"formatVersion": "1", "version": "1.0.1", "nodes": [node]}
    return bed.wish(("a", "2.0.0", A2), ("b", "1.0.0", B1), unitConfig=config)


async def one_case(bed: UnitBed, saved: Snapshot, kind: str, step: int) -> bool:
    """Kill at a step, start again, compare; whether there was such a step."""
    saved.restore(bed)
    a_runs, a_shown = ("2.0.0", {"a 2.0.0": "installed"})
    if kind == "back":
        a_runs, a_shown = "1.0.0", {"a 1.0.0": "installed", "a 2.0.0": "failed"}
        bed.sm.broken_versions = {("a", "2.0.0")}
    end = a_shown | {"b 1.0.0": "installed"}
    running = {"a": a_runs, "b": "1.0.0"}

    def is_done() -> bool:
        return bed.phase == "none" and bed.running == running and any(shown_items(one) == end for one in bed.statuses())

    await bed.start(f"{kind} {step}")
    await bed.cloud.connected()
    await bed.cloud.send_frame(wish(bed))
    await bed.until(lambda: not bed.is_alive or is_done())
    was_killed = not bed.is_alive
    await bed.kill()
    steps = (bed.directory / "steps").read_text().splitlines()
    bed.cloud.frames.clear()
    await bed.start()
    if (kind, step) == ("update", 1):
        # Nothing has begun: the cloud says it again when it sees the status.
        await bed.cloud.connected()
        await bed.cloud.send_frame(wish(bed))
    try:
        await bed.until(is_done)
        assert bed.items == end | {"gone 1.0.0": "removed"}
        images = (A2, B1, GONE) if kind == "update" else (A1, A2, B1, GONE)
        await bed.until(
            lambda: len(files(bed.directory / "work" / "install")) == len({d for i in images for d in i.blobs})
        )
        check_files(bed, *images)
        await bed.until(lambda: bed.sm.config[0] == "1.0.1")
    except AssertionError as error:
        error.add_note(f"killed at {kind} {steps[-1:]}")
        raise
    await bed.kill()
    return was_killed


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (
            "update",
            {
                "downloading": ("ItemStore.write", "open", "os.rename"),
                "pending": ("GateStore.save",),
                "installing": ("os.rename .aos_unit.cfg",),
                "launching": ("save_requests", "save_records"),
                "activating": ("UpdateStore",),
                "finalizing": ("ItemStore.write", "os.remove"),
            },
        ),
        (
            "back",
            {
                "activating": ("ItemStore.write",),
                "launching": ("save_requests", "save_records"),
                "finalizing": ("ItemStore.write",),
            },
        ),
    ],
)
async def test_the_steps_are_of_every_phase(bed: UnitBed, kind: str, expected: dict[str, tuple[str, ...]]) -> None:
    """What the kills below go through: download, install, launch, activate, finalize, and the way back."""
    assert not await one_case(bed, Snapshot(bed), kind, 10_000)
    found: dict[str, list[str]] = {}
    for line in (bed.directory / "steps").read_text().splitlines():
        _, phase, name = line.split(" ", 2)
        found.setdefault(phase, []).append(name)
    for phase, names in expected.items():
        for wanted in names:
            assert any(wanted in name for name in found.get(phase, [])), (phase, wanted, found)


@pytest.mark.parametrize(("kind", "first"), CASES)
async def test_killed_at_every_step_the_end_is_the_same(bed: UnitBed, kind: str, first: int) -> None:
    saved = Snapshot(bed)
    for step in range(first, first + STEPS_PER_TEST):
        if not await one_case(bed, saved, kind, step):
            assert step > STEPS[kind] - 2 * STEPS_PER_TEST, f"only {step - 1} steps"
            return
    assert first + STEPS_PER_TEST <= STEPS[kind], f"more than {STEPS[kind]} steps"
