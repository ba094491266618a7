"""Alerts about limits, on files that stand for control groups."""

import asyncio
from pathlib import Path

from aoscore.common.aio import Broadcast
from aoscore.common.types import InstanceAlert, InstanceIdent, InstanceInfo, InstanceState, InstanceStatus
from aoscore.sm.alerts.limitalerts import LimitAlerts
from aoscore.sm.cgroups import CgroupLayout
from aoscore.sm.launcher.runtimes.base import SampleTarget
from tests.support.running import running, until

IDENT = InstanceIdent("item", "subject", 0)


class Host:
    """A runtime with one instance, and what its control group has counted."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.layout = CgroupLayout(root, {})
        self.changed: Broadcast[InstanceStatus] = Broadcast("statuses")
        self.pid = 0
        self.alerts: list[str] = []

    def begin(self, pid: int) -> None:
        """A new run, with a control group of its own."""
        self.pid = pid
        (self.root / f"group{pid}").mkdir()
        self.count(0, 0)
        self.changed.publish(InstanceStatus(IDENT, "1.0.0", InstanceState.ACTIVE, "runtime", "sha256:00"))

    def count(self, refused: int, killed: int) -> None:
        """What the kernel does."""
        for name, text in (
            ("pids.events", f"max {refused}\n"),
            ("memory.events", f"low 0\nmax 5\noom 7\noom_kill {killed}\noom_group_kill 0\n"),
        ):
            path = self.root / f"group{self.pid}" / name
            if not path.exists() or path.read_text() != text:
                path.write_text(text)

    def sample_targets(self) -> list[SampleTarget]:
        info = InstanceInfo(IDENT, "1.0.0", "sha256:00", "owner", "runtime")
        return [SampleTarget("id", IDENT, info, f"/group{self.pid}", self.pid, None)] if self.pid else []

    async def send(self, alert: InstanceAlert) -> None:
        assert (alert.ident, alert.version) == (IDENT, "1.0.0")
        self.alerts.append(alert.message)

    def service(self, period_s: float = 0.01) -> LimitAlerts:
        return LimitAlerts([self], self.layout, self.send, period_s=period_s, settle_s=0.0)


async def test_each_event_is_told_once_also_over_restarts(tmp_path: Path) -> None:
    host = Host(tmp_path)
    async with running(host.service()):
        host.begin(1)
        await asyncio.sleep(0)
        host.count(3, 0)
        await until(lambda: host.alerts)
        assert host.alerts == ["the limit of processes was reached: 3 could not be started"]
        host.count(5, 1)
        await until(lambda: len(host.alerts) == 3)
        assert sorted(host.alerts[1:]) == [
            "the limit of memory was reached: 1 processes were killed",
            "the limit of processes was reached: 2 could not be started",
        ]
        host.begin(2)
        host.count(4, 0)
        await until(lambda: len(host.alerts) == 4)
        assert host.alerts[3] == "the limit of processes was reached: 4 could not be started"
    # What was told is no news to the next SM.
    async with running(host.service()):
        host.count(5, 0)
        await until(lambda: len(host.alerts) == 5)
        assert host.alerts[4] == "the limit of processes was reached: 1 could not be started"


async def test_a_flood_of_events_is_one_alert_per_period(tmp_path: Path) -> None:
    host = Host(tmp_path)
    async with running(host.service(period_s=1000)):
        host.begin(1)
        host.count(1, 0)
        await until(lambda: host.alerts)
        for number in range(2, 100):
            host.count(number, 0)
            await asyncio.sleep(0)
        host.count(99, 1)
        await until(lambda: len(host.alerts) > 1)
        assert len(host.alerts) == 2 and "memory" in host.alerts[1]


async def test_instances_without_such_files_are_left_out(tmp_path: Path) -> None:
    host = Host(tmp_path)
    host.layout = CgroupLayout(None, {"memory": tmp_path})
    async with running(host.service()):
        host.begin(1)
        host.count(1, 1)
        await until(lambda: host.alerts)
        assert host.alerts == ["the limit of memory was reached: 1 processes were killed"]
