"""Sends unit statuses: full at connect and after each run, delta in between (cm-cloud.md §4)."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from aoscore.cm.communication.messages import Message, UnitConfigStatus
from aoscore.cm.imagemanager.store import Item
from aoscore.cm.launcher.model import UnitInstanceStatus
from aoscore.cm.nodeinfo import UnitNodeInfo
from aoscore.cm.updatemanager.unitstatus import Delta, full_status, unit_item, unit_node
from aoscore.common.aio import Broadcast, comes_within, log_and_continue
from aoscore.common.types import ConfigState, ErrorInfo

_log = logging.getLogger(__name__)

T = TypeVar("T")


class Cloud(Protocol):
    """The cloud as far as statuses need it."""

    connection: Broadcast[bool]

    @property
    def connected(self) -> bool: ...

    async def send(self, message: Message) -> object: ...


class Nodes(Protocol):
    """The nodes of the Unit."""

    changed: Broadcast[UnitNodeInfo]

    def nodes(self) -> Sequence[UnitNodeInfo]: ...


class Items(Protocol):
    """The known item versions."""

    changed: Broadcast[Item]

    def statuses(self) -> Sequence[Item]: ...


class Instances(Protocol):
    """The instances of the Unit."""

    changed: Broadcast[list[UnitInstanceStatus]]

    def statuses(self) -> Sequence[UnitInstanceStatus]: ...


class UnitConfigSource(Protocol):
    """The present unit config."""

    def status(self) -> UnitConfigStatus: ...


class Subjects(Protocol):
    """The subjects active on the Unit."""

    changed: Broadcast[tuple[str, ...]]

    def subjects(self) -> Sequence[str]: ...


class StatusReporter:
    """Follows everything that is in a unit status, as a service."""

    def __init__(
        self,
        cloud: Cloud,
        *,
        nodes: Nodes,
        items: Items,
        instances: Instances,
        unit_config: UnitConfigSource,
        subjects: Subjects,
        quiet_s: float,
    ) -> None:
        self._cloud = cloud
        self._nodes = nodes
        self._items = items
        self._instances = instances
        self._unit_config = unit_config
        self._subjects = subjects
        self._delta = Delta(quiet_s)
        self._attempt: UnitConfigStatus | None = None
        self._node_errors: dict[str, ErrorInfo] = {}
        self._wake = asyncio.Event()

    def set_node_errors(self, errors: dict[str, ErrorInfo]) -> None:
        """Errors of the last attempts to pause or resume nodes, by node id."""
        self._node_errors = errors

    def set_unit_config_attempt(self, attempt: UnitConfigStatus) -> None:
        """What became of the last attempt to change the unit config; told until the next full status."""
        self._attempt = attempt
        self._delta.set_unit_config([attempt], self._now())
        self._wake.set()

    async def send_full(self) -> None:
        """Sends a full status if there is a connection. What cannot be had is left empty and logged."""
        if not self._cloud.connected:
            return
        current = self._part("unit config", lambda: [self._unit_config.status()])
        attempt = self._attempt
        if attempt is not None and (
            attempt.state is ConfigState.FAILED or attempt.version not in [entry.version for entry in current]
        ):
            current = [*current, attempt]
        status = full_status(
            unit_config=current,
            nodes=self._part("nodes", self._nodes.nodes),
            node_errors=self._node_errors,
            items=self._part("items", self._items.statuses),
            instances=self._part("instances", self._instances.statuses),
            subjects=self._part("subjects", self._subjects.subjects),
        )
        # All parts were read without a pause in between: no change can get lost between the status and the delta.
        self._delta.clear()
        self._attempt = None
        await self._cloud.send(status)

    @staticmethod
    def _part(name: str, read: Callable[[], Sequence[T]]) -> Sequence[T]:
        with log_and_continue(_log, f"Unit status goes without its {name}"):
            return read()
        return []

    async def run(self, started: Callable[[], None]) -> None:
        """Reports until cancelled."""
        async with asyncio.TaskGroup() as group:
            with (
                self._cloud.connection.subscribe() as connection,
                self._nodes.changed.subscribe() as nodes,
                self._items.changed.subscribe() as items,
                self._instances.changed.subscribe() as instances,
                self._subjects.changed.subscribe() as subjects,
            ):
                for task in (
                    self._follow(nodes, self._on_node),
                    self._follow(items, lambda item: self._delta.add_item(unit_item(item), self._now())),
                    self._follow(instances, lambda changed: self._delta.add_instances(changed, self._now())),
                    self._follow(subjects, lambda changed: self._delta.set_subjects(changed, self._now())),
                    self._follow_connection(connection),
                    self._send_deltas(),
                ):
                    group.create_task(task)
                started()
                await asyncio.get_running_loop().create_future()

    def _on_node(self, node: UnitNodeInfo) -> None:
        self._delta.add_node(unit_node(node, self._node_errors.get(node.node_id)), self._now())

    async def _follow(self, queue: asyncio.Queue[T], note: Callable[[T], None]) -> None:
        while True:
            value = await queue.get()
            if self._cloud.connected:
                note(value)
                self._wake.set()

    async def _follow_connection(self, queue: asyncio.Queue[bool]) -> None:
        if self._cloud.connected:
            await self.send_full()
        while True:
            if await queue.get():
                with log_and_continue(_log, "Can't send unit status"):
                    await self.send_full()
            else:
                self._delta.clear()

    async def _send_deltas(self) -> None:
        while True:
            self._wake.clear()
            due = self._delta.due
            if due is not None and due <= self._now():
                with log_and_continue(_log, "Can't send unit status"):
                    await self._cloud.send(self._delta.take())
                continue
            await comes_within(self._wake, None if due is None else due - self._now())

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()
