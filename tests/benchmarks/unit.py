"""From desired status to active on a whole Unit: real cloud link, CM, SM, crun (make bench)."""

import os
import shutil
import statistics
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from aoscore.common.errors import DeadlineError
from aoscore.common.files import remove_tree
from aoscore.ctl.demo import Demo
from aoscore.ctl.webservice import ITEM, make_project
from aoscore.devcloud.client import AdminClient
from tests.benchmarks.footprint import PAGE, demo_unit, written
from tests.support.pages import put_section

UNIT = "demo-unit"
LAYER_BYTES = 100 << 20
LARGEST_FILE_BYTES = 8 << 20
ROUNDS = 3
INSTANCES = 8
WAIT_S = 120.0
REST_S = 2.0


def main() -> int:
    """Measure, print the section, write it into docs/footprint.md."""
    # Projects are in memory, not on the disk of the Unit: for a minute ext4 is slow where many files were deleted.
    with demo_unit() as (demo, _), tempfile.TemporaryDirectory(prefix="aos-bench-", dir="/dev/shm") as place:
        text = report(Measured(demo, Path(place)))
    print(text)
    put_section(PAGE, "whole unit", "A whole Unit, from desired status to active", text)
    return 0


def report(unit: "Measured") -> str:
    """The section."""
    large = [unit.deploy_large(f"demo-large-{number}") for number in range(ROUNDS)]
    more, fewer = [], []
    for _ in range(ROUNDS):
        more.append(unit.change_to(INSTANCES))
        fewer.append(unit.change_to(1))
    layer = f"{LAYER_BYTES >> 20} MiB in {unit.files} files"
    return f"""{written()}
Load average of the machine at the end: {os.getloadavg()[0]:.0f}, of {os.cpu_count()} cores.

| | goal, s | s | AosCore 9.1, s |
| --- | --- | --- | --- |
| a new item with one gzip layer, {layer} | 1.5 | {statistics.median(large):.2f} | 3.6 |
| from 1 to {INSTANCES} instances of an item | 0.5 | {statistics.median(more):.2f} | 0.56 |
| from {INSTANCES} to 1 | | {statistics.median(fewer):.2f} | |

Medians of {ROUNDS}, on the demo's Unit (`make demo`): from the moment when the cloud sends the desired status to the
unit status that tells that all instances are active. The cloud has packed and encrypted the item before. Cloud, CM,
SM and IAM run on the same cores. The figures of AosCore 9.1 (C++, release build) are from another machine of the same
size, and another layer.
"""


class Measured:
    """The Unit of a demo that is up."""

    def __init__(self, demo: Demo, place: Path) -> None:
        self._demo = demo
        self._cloud = demo._cloud
        # Not by commands: each would take a third of a second of CPU time from what is measured.
        self._admin = AdminClient(self._cloud.directory)
        self._place = place
        self.files = 0

    def deploy_large(self, name: str) -> float:
        """Seconds to deploy a new item. It is taken away again, so that each finds the same."""
        project = make_project(self._place / "project", user=self._cloud.user("sp"), domain=self._cloud.domain)
        config = project / "config.yaml"
        config.write_text(config.read_text().replace(ITEM, name))
        (project / ITEM).rename(project / name)
        self.files = fill(project / name / "rootfs" / "data", salt=name)
        self._cloud.sign_and_upload(self._demo._machine, project)
        remove_tree(project)
        taken = self._time("assign", running=2, item=name)
        self._time("unassign", running=1, item=name)
        return taken

    def change_to(self, count: int) -> float:
        """Seconds to change the number of instances."""
        return self._time("assign", running=count, item=ITEM, instances=count)

    def _time(self, change: str, *, running: int, **arguments: Any) -> float:
        """Seconds from the desired status that a change causes until so many instances are active."""
        # CM tells that an instance is gone while SM still ends it.
        time.sleep(REST_S)
        before = max(one["number"] for one in self._messages(None, 0))
        events = self._admin.watch(timeout_s=WAIT_S)
        deadline_s = time.monotonic() + WAIT_S
        self._admin.call(change, target=UNIT, **arguments)
        while (reached := self._reached(before, running)) is None:
            if time.monotonic() > deadline_s:
                raise DeadlineError(f"waited {WAIT_S:g} s for {running} active instances")
            while (event := next(events))["event"] != "from" or event["type"] != "unitStatus":
                pass
        events.close()
        wished = next(one for one in self._messages("desiredStatus", before) if one["direction"] == "to")
        return (at(reached) - at(wished)).total_seconds()

    def _messages(self, message_type: str | None, after: int) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self._admin.call(
            "messages", unit=UNIT, message_type=message_type, after=after, limit=100_000
        )
        return found

    def _reached(self, after: int, running: int) -> dict[str, Any] | None:
        """The first unit status since then with which the cloud knows of so many active instances and no others."""
        states: dict[Any, str] = {}
        for message in self._messages("unitStatus", 0):
            data = message["data"]
            if not data.get("isDeltaInfo"):
                states.clear()
            for group in data.get("instances", []):
                key = str(group["item"]), str(group["subject"])
                for one in group["instances"]:
                    states[*key, one["instance"]] = one["state"]
            alive = [state for state in states.values() if state != "inactive"]
            if message["number"] > after and len(alive) == running and set(alive) == {"active"}:
                return message
        return None


def at(message: dict[str, Any]) -> datetime:
    """When the cloud sent or got it."""
    return datetime.fromisoformat(message["at"])


def fill(place: Path, salt: str) -> int:
    """System files of LAYER_BYTES in all, in a new directory; their number. `salt` makes the layer one of its own."""
    place.mkdir()
    (place / "salt").write_text(salt)
    left, count = LAYER_BYTES, 1
    for path in sorted(path for path in Path("/usr/lib").rglob("*") if path.is_file() and not path.is_symlink()):
        size = path.stat().st_size
        if size > min(left, LARGEST_FILE_BYTES):
            continue
        target = place / path.relative_to("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
        left -= size
        count += 1
    return count


if __name__ == "__main__":
    sys.exit(main())
