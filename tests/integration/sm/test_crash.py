"""kill -9 of SM at every persistent step of an update: after its restart the same end, and what ran was not touched."""

import asyncio
import contextlib
import sys
from pathlib import Path

import pytest

from aoscore.sm.launcher.runtimes.base import instance_id
from tests.support.processes import Record, is_alive, records
from tests.support.running import until
from tests.support.smbed import SmBed, child

pytestmark = pytest.mark.net

# The update below takes a few steps less; what comes after its last one is a kill when all is done.
STEPS = 55
STEPS_PER_TEST = 5


def alive(bed: SmBed) -> dict[str, Record]:
    """Running instances by item."""
    return {one.info.ident.item_id: one for one in records(bed.root / "notes").values() if is_alive(one)}


def programs(config: Path, *kill_at: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "tests.support.sm_process", str(config), *kill_at)


async def run_update(bed: SmBed, kill_at: str) -> None:
    """Install three services; then update one, stop one, add one, in a process that may be killed on the way."""
    old = bed.instance("updated"), bed.instance("stopped"), bed.instance("kept")
    new = bed.instance("updated", "2.0.0"), bed.instance("added"), old[2]
    config = bed.write_config()
    async with child(*programs(config, kill_at), log=bed.root / "first.log") as first:
        await bed.cm.connected(1)
        bed.cm.update(*old)
        await bed.cm.wait(lambda cm: [state for _, state in cm.states().values()] == ["active"] * 3)
        # Its last step of the first update.
        await until((bed.root / "sm" / "servicemanager.db.copy1").exists)
        kept = alive(bed)["kept"].pid
        bed.cm.update(*new, stop=(old[1],))
        end = {"updated": ("2.0.0", "active"), "added": ("1.0.0", "active"), "kept": ("1.0.0", "active")}
        done = asyncio.create_task(bed.cm.wait(lambda cm: cm.states() == end))
        killed = asyncio.create_task(first.wait())
        await asyncio.wait({done, killed}, return_when=asyncio.FIRST_COMPLETED)
        if not killed.done():
            # What is left are steps after the last status.
            await asyncio.wait({killed}, timeout=0.2)
            with contextlib.suppress(ProcessLookupError):
                first.kill()
        done.cancel()
        assert await killed == -9, first.text()
    steps = (bed.root / "steps").read_text().splitlines()
    async with child(*programs(config), log=bed.root / "second.log") as second:
        await bed.cm.connected(2)
        if len(steps) == 1:
            # Killed before the update was stored: as CM would, ask again.
            bed.cm.update(*new, stop=(old[1],))
        try:
            await bed.cm.wait(lambda cm: cm.states(1) == end, timeout_s=15)
        except TimeoutError:
            pytest.fail(f"killed before {steps[-1:]}, then {bed.cm.states(1)}:\n{second.text()}")
        running = alive(bed)
        assert {item: one.content for item, one in running.items()} == {
            "updated": "updated 2.0.0",
            "added": "added 1.0.0",
            "kept": "kept 1.0.0",
        }
        assert running["kept"].pid == kept, "a running service was restarted"
        assert set(records(bed.root / "notes")) == {instance_id(one.ident) for one in new}
        assert "Instance adopted: instance=kept" in second.text()
    # The clean stop ends the services, and the next start needs no CM for them.
    assert alive(bed) == {}


@pytest.mark.parametrize("first_step", range(1, STEPS + 1, STEPS_PER_TEST))
@pytest.mark.timeout(120)
async def test_kill_before_each_step(tmp_path: Path, first_step: int) -> None:
    for step in range(first_step, first_step + STEPS_PER_TEST):
        root = tmp_path / str(step)
        root.mkdir()
        async with SmBed(root).running() as bed:
            await run_update(bed, str(step))


async def test_all_steps_are_covered(tmp_path: Path) -> None:
    async with SmBed(tmp_path).running() as bed:
        await run_update(bed, "0")
        steps = (tmp_path / "steps").read_text().splitlines()
    print("\n".join(steps))
    assert STEPS - 10 < len(steps) < STEPS
