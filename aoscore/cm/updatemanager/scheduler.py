"""UpdateSchedulerService: a scheduler outside of AosCore sees updates and says when they start (cm-cloud.md §16)."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Any, Protocol

from google.protobuf.empty_pb2 import Empty

from aoscore._pb.communicationmanager.v3 import updatescheduler_pb2 as pb
from aoscore._pb.communicationmanager.v3 import updatescheduler_pb2_grpc as stubs
from aoscore.cm.communication.messages import DesiredStatus, ItemState, UnitConfig
from aoscore.cm.imagemanager.store import Item
from aoscore.cm.updatemanager.gate import UpdateGate
from aoscore.cm.updatemanager.phases import Phase
from aoscore.cm.updatemanager.plan import wanted_versions
from aoscore.cm.updatemanager.schedule import Kind, kind_of
from aoscore.common import convert
from aoscore.common.aio import Broadcast
from aoscore.common.rpc import handler
from aoscore.common.types import ErrorInfo


class Updates(Protocol):
    """The update manager."""

    progress: Broadcast[Phase]

    @property
    def phase(self) -> Phase: ...

    @property
    def desired(self) -> DesiredStatus | None: ...

    async def updating(self) -> frozenset[Kind]: ...


class Images(Protocol):
    """The image manager."""

    def statuses(self) -> Sequence[Item]: ...


class UnitConfigs(Protocol):
    """The unit config."""

    def current(self) -> UnitConfig | None: ...


def state_of(kind: Kind, phase: Phase, ready: frozenset[Kind], updating: frozenset[Kind]) -> pb.UpdateState:
    """What the interface calls the state of one kind."""
    if kind in ready:
        return pb.UpdateState.READY_TO_UPDATE
    if kind in updating:
        return pb.UpdateState.UPDATING
    return pb.UpdateState.DOWNLOADING if phase is Phase.DOWNLOADING else pb.UpdateState.NO_UPDATE


def fota_status(state: pb.UpdateState, desired: DesiredStatus | None, items: Sequence[Item]) -> pb.UpdateFOTAStatus:
    """Components that are to come."""
    coming = _coming(Kind.FOTA, desired, items)
    return pb.UpdateFOTAStatus(
        state=state,
        components=[pb.ComponentInfo(component_id=item.item_id, version=item.version) for item in coming],
        error=convert.error_to_pb_v1(error) if (error := _error(Kind.FOTA, desired, items)) else None,
    )


def sota_status(
    state: pb.UpdateState, desired: DesiredStatus | None, items: Sequence[Item], config: UnitConfig | None
) -> pb.UpdateSOTAStatus:
    """Services that come and go, and a new unit config. Layers are no items of their own in protocol v7."""
    wanted_ids = {item.item_id for item in (desired.items if desired and desired.items else ())}
    going = [
        item
        for item in items
        if kind_of(item.type) is Kind.SOTA and item.state is ItemState.INSTALLED and item.item_id not in wanted_ids
    ]
    new = desired.unit_config if desired and desired.unit_config != config else None
    coming = _coming(Kind.SOTA, desired, items)
    return pb.UpdateSOTAStatus(
        state=state,
        unit_config=pb.UnitConfigInfo(version=new.version) if new else None,
        install_services=[pb.ServiceInfo(service_id=item.item_id, version=item.version) for item in coming],
        remove_services=[pb.ServiceInfo(service_id=item.item_id, version=item.version) for item in going],
        error=convert.error_to_pb_v1(error) if (error := _error(Kind.SOTA, desired, items)) else None,
    )


def _coming(kind: Kind, desired: DesiredStatus | None, items: Sequence[Item]) -> list[Item]:
    wanted = wanted_versions(desired) if desired else set()
    states = (ItemState.DOWNLOADING, ItemState.PENDING)
    return [item for item in items if kind_of(item.type) is kind and item.key in wanted and item.state in states]


def _error(kind: Kind, desired: DesiredStatus | None, items: Sequence[Item]) -> ErrorInfo | None:
    wanted = wanted_versions(desired) if desired else set()
    failed = (item.error for item in items if kind_of(item.type) is kind and item.key in wanted and item.error)
    return next(failed, None)


class UpdateScheduler(stubs.UpdateSchedulerServiceServicer):
    """The service. Starting what is not ready fails with status INTERNAL and a text."""

    def __init__(self, gate: UpdateGate, updates: Updates, images: Images, unit_configs: UnitConfigs) -> None:
        self._gate = gate
        self._updates = updates
        self._images = images
        self._unit_configs = unit_configs

    @property
    def register(self) -> Any:
        """Adds the service to a server."""
        return partial(stubs.add_UpdateSchedulerServiceServicer_to_server, self)

    @handler
    async def StartFOTAUpdate(self, request: Empty, context: Any) -> Empty:
        """See proto."""
        self._gate.start(Kind.FOTA)
        return Empty()

    @handler
    async def StartSOTAUpdate(self, request: Empty, context: Any) -> Empty:
        """See proto."""
        self._gate.start(Kind.SOTA)
        return Empty()

    @handler
    async def SubscribeNotifications(self, request: Empty, context: Any) -> AsyncIterator[pb.SchedulerNotifications]:
        """See proto: both states as they are, then each that changes."""
        told: dict[Kind, pb.SchedulerNotifications] = {}
        with contextlib.ExitStack() as stack:
            phases = stack.enter_context(self._updates.progress.subscribe())
            gate = stack.enter_context(self._gate.changed.subscribe())
            while True:
                for kind, notification in (await self._notifications()).items():
                    if told.get(kind) != notification:
                        told[kind] = notification
                        yield notification
                await _any(phases, gate)

    async def _notifications(self) -> dict[Kind, pb.SchedulerNotifications]:
        desired, items = self._updates.desired, self._images.statuses()
        updating = await self._updates.updating()
        states = {kind: state_of(kind, self._updates.phase, self._gate.ready, updating) for kind in Kind}
        return {
            Kind.FOTA: pb.SchedulerNotifications(fota_status=fota_status(states[Kind.FOTA], desired, items)),
            Kind.SOTA: pb.SchedulerNotifications(
                sota_status=sota_status(states[Kind.SOTA], desired, items, self._unit_configs.current())
            ),
        }


async def _any(*queues: asyncio.Queue[Any]) -> None:
    """Wait until one of the queues has something; what they have is dropped, since the newest state is what counts."""
    tasks = [asyncio.ensure_future(queue.get()) for queue in queues]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
    for queue in queues:
        while not queue.empty():
            queue.get_nowait()
