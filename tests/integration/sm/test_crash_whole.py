"""kill -9 of the whole SM at every persistent step of an update, with real containers and networks.

What runs goes on and is adopted, the update comes to its end, and afterwards database, kernel and containers say the
same.
"""

import asyncio
import contextlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import apsw
import pytest

from aoscore.common.types import InstanceInfo
from aoscore.sm.launcher.runtimes.base import instance_id
from tests.support import bed as namespaces
from tests.support.running import until
from tests.support.smbed import SmBed, child
from tests.support.smunit import SmUnit

pytestmark = [pytest.mark.container, pytest.mark.net, pytest.mark.timeout(240)]

# The update takes fewer: how many depends on which networks come together.
STEPS = 54
STEPS_PER_TEST = 6
END = {"updated": ("2.0.0", "active"), "added": ("1.0.0", "active"), "kept": ("1.0.0", "active")}


class Crash:
    """An update of three services, in a process that may be killed on the way."""

    def __init__(self, bed: SmBed) -> None:
        self.unit = SmUnit(bed)
        self.bed, self.cm = bed, bed.cm
        container = {
            **{f"{name}Dir": str(bed.root / name) for name in ("runtime", "storage", "state")},
            "crunStateRoot": str(bed.root / "crun"),
            "cgroupParent": namespaces.cgroup_parent(),
            "output": "files",
        }
        self.config = bed.write_config(runtimes=[{"plugin": "container", "type": "crun", "config": container}])
        self.old = [self.unit.service(name) for name in ("updated", "stopped", "kept")]
        self.new = [self.unit.service("updated", "2.0.0"), self.unit.service("added"), self.old[2]]

    def sm(self, name: str, *arguments: str) -> Any:
        """The process; it writes to the file of that name."""
        words = (sys.executable, "-m", "tests.support.sm_process", str(self.config), *arguments, "whole")
        return child(*words, log=self.bed.root / name)

    def steps(self) -> list[str]:
        """What the killed process was about to do, the last one not done."""
        return (self.bed.root / "steps").read_text().splitlines()

    async def run(self, kill_at: str) -> None:
        """Kill, start again, and see that all is well."""
        async with self.sm("first.log", kill_at) as first:
            await self.cm.connected(1)
            self.cm.update(*self.old)
            await self.cm.wait(lambda cm: [state for _, state in cm.states().values()] == ["active"] * 3, 60)
            # Its last step of the first update.
            await until((self.bed.root / "sm/servicemanager.db.copy1").exists)
            kept = self.containers()[instance_id(self.old[2].ident)]
            self.cm.update(*self.new, stop=(self.old[1],))
            done = asyncio.create_task(self.cm.wait(lambda cm: cm.states() == END, 60))
            killed = asyncio.create_task(first.wait(60))
            await asyncio.wait({done, killed}, return_when=asyncio.FIRST_COMPLETED)
            if not killed.done():
                # What is left are steps after the last status.
                await asyncio.wait({killed}, timeout=0.3)
                with contextlib.suppress(ProcessLookupError):
                    first.kill()
            done.cancel()
            assert await killed == -9, first.text()[-5000:]
        before = self.containers()
        assert before[instance_id(self.old[2].ident)] == kept, "it runs although SM is dead"
        async with self.sm("second.log") as second:
            await self.cm.connected(2)
            if len(self.steps()) == 1:
                # Killed before the update was stored: as CM would, ask again.
                self.cm.update(*self.new, stop=(self.old[1],))
            try:
                await self.cm.wait(lambda cm: cm.states(1) == END, 60)
                # Leftovers go after the last status.
                await until(lambda: self.of_database() == self.of_kernel(), 30)
            except TimeoutError:
                where = self.steps()[-1:]
                found = f"{self.cm.states(1)}\n{self.of_database()}\n{self.of_kernel()}"
                pytest.fail(f"killed before {where}, then {found}:\n{second.text()[-8000:]}")
            self.check_database()
            assert self.containers()[instance_id(self.old[2].ident)] == kept, "a running service was restarted"
        assert self.containers() == {} and list((self.bed.root / "runtime").iterdir()) == []

    # What is where

    def containers(self) -> dict[str, int]:
        """First processes of running containers."""
        words = ["crun", "--root", self.bed.root / "crun", "list", "--format", "json"]
        # As SM starts it: crun refuses a machine with both kinds of control groups.
        script = 'umount /sys/fs/cgroup/unified 2>/dev/null; exec "$@"'
        done = subprocess.run(["unshare", "--mount", "sh", "-c", script, "sh", *words], check=True, capture_output=True)
        return {one["id"]: one["pid"] for one in json.loads(done.stdout) or [] if one["status"] == "running"}

    def query(self, statement: str) -> list[tuple[Any, ...]]:
        """Rows of SM's database."""
        with contextlib.closing(apsw.Connection(str(self.bed.root / "sm/servicemanager.db"))) as connection:
            return list(connection.execute(statement))

    def of_database(self) -> dict[str, set[str]]:
        """What there must be of containers, namespaces, links and firewall chains, by the database."""
        rows = self.query("SELECT instanceID, hostIfName FROM instancenetwork")
        names = {name for name, _ in rows}
        return {
            "containers": {instance_id(info.ident) for info in self.new} if len(names) == len(self.new) else set(),
            "bundles": names,
            "namespaces": names,
            "links": {link for _, link in rows},
            "chains": {f"instance_{name.replace('-', '_')}" for name in names},
        }

    def of_kernel(self) -> dict[str, set[str]]:
        """What there is."""
        links = subprocess.run(["ip", "-j", "link"], check=True, capture_output=True).stdout
        table = subprocess.run(["nft", "-j", "list", "table", "inet", "aos"], check=True, capture_output=True).stdout
        chains = [one["chain"]["name"] for one in json.loads(table)["nftables"] if "chain" in one]
        return {
            "containers": set(self.containers()),
            "bundles": {path.name for path in (self.bed.root / "runtime").iterdir()},
            "namespaces": {path.name for path in Path("/run/netns").iterdir()},
            "links": {one["ifname"] for one in json.loads(links) if one["ifname"].startswith("veth")},
            "chains": {name for name in chains if name.startswith("instance_")},
        }

    def check_database(self) -> None:
        """What was asked for is what is stored, and nothing waits."""

        def named(infos: list[InstanceInfo]) -> set[tuple[str, str, str]]:
            return {(info.ident.item_id, info.version, info.manifest_digest) for info in infos}

        assert set(self.query("SELECT itemID, version, manifestDigest FROM instances")) == named(self.new)
        assert self.query("SELECT * FROM aoscore_changes") == []
        items = self.query("SELECT itemID, version, manifestDigest, state FROM items")
        assert {tuple(row[:3]) for row in items if row[3] == "installed"} == named(self.new)
        assert {row[:2] for row in items if row[3] == "removed"} == {("updated", "1.0.0"), ("stopped", "1.0.0")}


@pytest.mark.parametrize("first_step", range(1, STEPS + 1, STEPS_PER_TEST))
async def test_kill_before_each_step(tmp_path: Path, first_step: int) -> None:
    for step in range(first_step, first_step + STEPS_PER_TEST):
        root = tmp_path / str(step)
        root.mkdir()
        async with SmBed(root).running() as bed:
            await Crash(bed).run(str(step))


async def test_all_steps_are_covered(tmp_path: Path) -> None:
    async with SmBed(tmp_path).running() as bed:
        crash = Crash(bed)
        await crash.run("0")
        steps = crash.steps()
    print("\n".join(steps))
    assert STEPS - 20 < len(steps) <= STEPS
