"""When statuses are sent, with short times."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

from aoscore.cm.communication.messages import ItemState, Message, UnitConfigStatus, UnitStatus
from aoscore.cm.imagemanager.store import Item
from aoscore.cm.launcher.model import UnitInstanceStatus
from aoscore.cm.nodeinfo import UnitNodeInfo
from aoscore.cm.updatemanager.reporter import StatusReporter
from aoscore.common.aio import Broadcast
from aoscore.common.errors import FailedError
from aoscore.common.types import (
    ConfigState,
    ErrorInfo,
    InstanceIdent,
    InstanceState,
    InstanceStatus,
    ItemType,
    NodeInfo,
)
from tests.support.running import running, until


class Cloud:
    def __init__(self) -> None:
        self.connection: Broadcast[bool] = Broadcast("cloud")
        self.connected = False
        self.sent: list[UnitStatus] = []

    async def send(self, message: Message) -> None:
        assert isinstance(message, UnitStatus)
        self.sent.append(message)

    def switch(self, connected: bool) -> None:
        self.connected = connected
        self.connection.publish(connected)


class Source:
    """One part of the status."""

    def __init__(self, name: str, *values: Any) -> None:
        self.values: list[Any] = list(values)
        self.error: Exception | None = None
        self.changed: Broadcast[Any] = Broadcast(name)

    def _read(self) -> list[Any]:
        if self.error:
            raise self.error
        return self.values

    nodes = statuses = subjects = _read


class Config(Source):
    def status(self) -> UnitConfigStatus:
        return UnitConfigStatus(version="1.0.0", state=ConfigState.INSTALLED)


def item(state: ItemState) -> Item:
    return Item("a", ItemType.SERVICE, "1", "d", state, datetime(2026, 3, 1, tzinfo=UTC))


def instance(state: InstanceState) -> UnitInstanceStatus:
    return UnitInstanceStatus(InstanceStatus(InstanceIdent("a", "s", 0), "1", state), "n1")


class Bench:
    def __init__(self) -> None:
        self.cloud = Cloud()
        self.nodes = Source("nodes", UnitNodeInfo(NodeInfo("n1")))
        self.items = Source("items", item(ItemState.INSTALLED))
        self.instances = Source("instances", instance(InstanceState.ACTIVE))
        self.subjects = Source("subjects", "user")

    @contextlib.asynccontextmanager
    async def started(self) -> AsyncIterator[StatusReporter]:
        reporter = StatusReporter(
            self.cloud,
            nodes=self.nodes,
            items=self.items,
            instances=self.instances,
            unit_config=Config("config"),
            subjects=self.subjects,
            quiet_s=0.05,
        )
        async with running(reporter):
            yield reporter


async def test_full_at_connect_then_deltas_and_nothing_offline() -> None:
    bench = Bench()
    async with bench.started() as reporter:
        await reporter.send_full()
        bench.items.changed.publish(item(ItemState.PENDING))
        await asyncio.sleep(0.2)
        assert bench.cloud.sent == []
        bench.cloud.switch(True)
        await until(lambda: len(bench.cloud.sent) == 1)
        full = bench.cloud.sent[0]
        assert not full.is_delta_info
        assert [len(part or ()) for part in (full.nodes, full.items, full.instances, full.subjects)] == [1, 1, 1, 1]
        bench.items.changed.publish(item(ItemState.REMOVED))
        bench.nodes.changed.publish(UnitNodeInfo(NodeInfo("n1", title="New")))
        bench.instances.changed.publish([instance(InstanceState.FAILED)])
        bench.subjects.changed.publish(())
        await until(lambda: len(bench.cloud.sent) == 2)
        delta = bench.cloud.sent[1]
        assert delta.is_delta_info and delta.unit_config is None
        assert delta.items is not None and delta.items[0].state is ItemState.REMOVED
        assert delta.nodes is not None and delta.nodes[0].identity.title == "New"
        assert delta.instances is not None and delta.subjects == ()
        await asyncio.sleep(0.2)
        assert len(bench.cloud.sent) == 2


async def test_a_disconnect_forgets_the_delta() -> None:
    bench = Bench()
    async with bench.started():
        bench.cloud.switch(True)
        await until(lambda: len(bench.cloud.sent) == 1)
        bench.items.changed.publish(item(ItemState.PENDING))
        await asyncio.sleep(0)
        bench.cloud.switch(False)
        await asyncio.sleep(0.2)
        assert len(bench.cloud.sent) == 1


async def test_a_part_that_cannot_be_had_does_not_silence_the_unit() -> None:
    """AosCore 9.1 sends no status at all any more (cm-cloud.md §4.3)."""
    bench = Bench()
    bench.cloud.connected = True
    bench.nodes.error = FailedError("no nodes")
    async with bench.started() as reporter:
        await until(lambda: len(bench.cloud.sent) == 1)
        assert bench.cloud.sent[0].nodes == () and bench.cloud.sent[0].items != ()
        bench.nodes.error = None
        await reporter.send_full()
        assert bench.cloud.sent[1].nodes != ()


async def test_attempts_and_node_errors() -> None:
    bench = Bench()
    bench.cloud.connected = True
    async with bench.started() as reporter:
        await until(lambda: len(bench.cloud.sent) == 1)
        reporter.set_node_errors({"n1": ErrorInfo(1, 0, "stuck")})
        reporter.set_unit_config_attempt(UnitConfigStatus(version="2.0.0", state=ConfigState.FAILED))
        await reporter.send_full()
        full = bench.cloud.sent[-1]
        assert full.unit_config is not None and full.nodes is not None
        assert [entry.version for entry in full.unit_config] == ["1.0.0", "2.0.0"]
        assert full.nodes[0].error_info is not None and full.nodes[0].error_info.message == "stuck"
        await reporter.send_full()
        assert len(bench.cloud.sent[-1].unit_config or ()) == 1
        await asyncio.sleep(0.2)
        assert all(not status.is_delta_info for status in bench.cloud.sent)
