"""One node's driver: one update at a time, no update twice without a pause."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest

from aoscore.cm.launcher.nodedriver import DriverSettings, NodeDriver
from aoscore.cm.launcher.nodeplan import list_digest
from aoscore.common.errors import FailedError
from aoscore.common.types import ErrorInfo, InstanceIdent, InstanceInfo, InstanceState, InstanceStatus

A = InstanceInfo(InstanceIdent("a", "s", 0), "1", "sha256:m", "owner", "rt")
B = InstanceInfo(InstanceIdent("b", "s", 0), "1", "sha256:m", "owner", "rt")
SETTINGS = DriverSettings(reply_timeout_s=0.3, retry_first_s=0.1, retry_limit_s=0.4)


def status(info: InstanceInfo, state: InstanceState = InstanceState.ACTIVE) -> InstanceStatus:
    error = ErrorInfo(1, 0, "broken") if state is InstanceState.FAILED else None
    return InstanceStatus(info.ident, info.version, state, info.runtime_id, error=error)


class Bed:
    def __init__(self, confirmed: str | None = None) -> None:
        self.sent: list[tuple[float, list[str], list[str]]] = []
        self.alerts: list[str] = []
        self.confirmed: list[str] = []
        self.usable = True
        self.failing = False
        self.driver = NodeDriver(
            "n",
            self._send,
            is_usable=lambda: self.usable,
            changed=lambda: None,
            confirmed=confirmed,
            save_confirmed=self._save,
            alert=self.alerts.append,
            settings=SETTINGS,
        )

    async def _send(self, node_id: str, start: Sequence[InstanceInfo], stop: Sequence[InstanceIdent]) -> None:
        if self.failing:
            raise FailedError("stream is stuck")
        now_s = asyncio.get_running_loop().time()
        self.sent.append((now_s, [one.ident.item_id for one in start], [one.item_id for one in stop]))

    async def _save(self, node_id: str, digest: str) -> None:
        self.confirmed.append(digest)

    def pauses(self) -> list[float]:
        return [later[0] - earlier[0] for earlier, later in zip(self.sent, self.sent[1:], strict=False)]


@asynccontextmanager
async def running_bed(confirmed: str | None = None) -> AsyncIterator[Bed]:
    bed = Bed(confirmed)
    task = asyncio.create_task(bed.driver.run())
    try:
        yield bed
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_nothing_before_all_is_known() -> None:
    async with running_bed() as bed:
        bed.driver.set_wanted([A])
        await asyncio.sleep(0.05)
        assert bed.sent == []
        bed.usable = False
        bed.driver.on_full_list([])
        await asyncio.sleep(0.05)
        assert bed.sent == []
        bed.usable = True
        bed.driver.wake()
        await asyncio.sleep(0.05)
        assert [start for _, start, _ in bed.sent] == [["a"]]


async def test_one_update_in_flight() -> None:
    async with running_bed() as bed:
        bed.driver.on_full_list([])
        bed.driver.set_wanted([A])
        await asyncio.sleep(0.02)
        bed.driver.set_wanted([A, B])
        bed.driver.on_statuses([status(A, InstanceState.ACTIVATING)])
        await asyncio.sleep(0.05)
        assert [start for _, start, _ in bed.sent] == [["a"]]
        bed.driver.on_full_list([status(A)])
        await asyncio.sleep(0.02)
        assert [start for _, start, _ in bed.sent] == [["a"], ["a", "b"]]
        assert bed.confirmed == [list_digest([A])]


async def test_confirmed_list_is_not_sent_again() -> None:
    async with running_bed(list_digest([A])) as bed:
        bed.driver.set_wanted([A])
        bed.driver.on_full_list([status(A)])
        await asyncio.sleep(0.05)
        assert bed.sent == []
    async with running_bed(list_digest([B])) as bed:
        bed.driver.set_wanted([A])
        bed.driver.on_full_list([status(A)])
        await asyncio.sleep(0.05)
        assert len(bed.sent) == 1


async def test_node_that_does_not_obey_is_told_with_growing_pauses() -> None:
    async with running_bed() as bed:
        bed.driver.set_wanted([])
        for _ in range(100):
            bed.driver.on_full_list([status(A)])
            await asyncio.sleep(0.01)
        pauses = bed.pauses()
        assert 2 <= len(pauses) <= 6
        assert pauses[:3] == sorted(pauses[:3])  # from the third on they are as long as they get, give or take a tenth
        assert pauses[0] >= 0.08


async def test_failing_instance_is_tried_with_growing_pauses_and_one_alert() -> None:
    async with running_bed() as bed:
        bed.driver.set_wanted([A])
        bed.driver.on_full_list([])
        for _ in range(150):
            await asyncio.sleep(0.01)
            bed.driver.on_full_list([status(A, InstanceState.FAILED)])
        assert [stop for _, _, stop in bed.sent][:3] == [[], ["a"], ["a"]]
        assert 3 <= len(bed.sent) <= 8
        assert bed.alerts == ["instance a:s:0 fails again and again on node n: broken"]


async def test_recovered_instance_is_not_stopped() -> None:
    async with running_bed() as bed:
        bed.driver.set_wanted([A])
        bed.driver.on_full_list([status(A, InstanceState.FAILED)])
        bed.driver.on_statuses([status(A)])
        await asyncio.sleep(0.3)
        assert bed.sent == []


async def test_unanswered_update_fails_what_it_should_have_started() -> None:
    async with running_bed() as bed:
        bed.driver.set_wanted([A])
        bed.driver.on_full_list([])
        await asyncio.sleep(0.4)
        found = bed.driver.status(A)
        assert found.state is InstanceState.FAILED
        assert found.error is not None
        assert found.error.aos_code == 7


async def test_stuck_stream_is_tried_again() -> None:
    async with running_bed() as bed:
        bed.failing = True
        bed.driver.set_wanted([A])
        bed.driver.on_full_list([])
        await asyncio.sleep(0.05)
        bed.failing = False
        await asyncio.sleep(0.3)
        assert len(bed.sent) == 1


async def test_new_wish_tries_failed_ones_at_once() -> None:
    async with running_bed() as bed:
        bed.driver.set_wanted([A])
        bed.driver.on_full_list([status(A, InstanceState.FAILED)])
        bed.driver.set_wanted([A], retry=True)
        assert bed.driver.status(A).state is InstanceState.ACTIVATING
        await asyncio.sleep(0.05)
        assert [(start, stop) for _, start, stop in bed.sent] == [(["a"], ["a"])]


async def test_unknown_statuses_are_activating_or_preinstalled() -> None:
    async with running_bed() as bed:
        rootfs = InstanceStatus(InstanceIdent("rootfs", "s", 0, preinstalled=True), "1", InstanceState.ACTIVE)
        bed.driver.set_wanted([A])
        bed.driver.on_full_list([rootfs, InstanceStatus(A.ident, "0", InstanceState.ACTIVE, "rt")])
        assert bed.driver.preinstalled() == [rootfs]
        assert bed.driver.status(A).state is InstanceState.ACTIVATING


@pytest.mark.parametrize("state", [InstanceState.FAILED, InstanceState.ACTIVE])
async def test_unwanted_status_plans_nothing(state: InstanceState) -> None:
    async with running_bed() as bed:
        bed.driver.set_wanted([])
        bed.driver.on_full_list([])
        bed.driver.on_statuses([InstanceStatus(A.ident, "1", state, "rt")])
        await asyncio.sleep(0.05)
        assert [stop for _, _, stop in bed.sent] == [["a"]]
