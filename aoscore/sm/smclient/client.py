"""The link to CM: one long stream per connection, calls for blob addresses and networks (sm.md §2).

    connect -> SMInfo -> wait for the launcher's first pass -> complete status list -> whatever the outbox holds
                 \\-> read CM's messages in their order              (both until the stream breaks, then again)

The client never ends by itself: every failure leads to a pause and a new attempt, with a new channel, and with the
certificate that IAM knows by then.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import grpc.aio

from aoscore._pb.servicemanager.v5 import servicemanager_pb2 as pb
from aoscore._pb.servicemanager.v5 import servicemanager_pb2_grpc as stubs
from aoscore.common import convert
from aoscore.common.aio import Broadcast, comes_within, log_and_continue
from aoscore.common.errors import AosError, FailedError, first_cause
from aoscore.common.iamclient import CertificateKeeper
from aoscore.common.log import kv
from aoscore.common.rpc import open_tls_channel, rpc_errors
from aoscore.common.types import (
    InstanceIdent,
    InstanceInfo,
    InstanceNetworkState,
    InstanceStatus,
    LogData,
    LogKind,
    LogRequest,
    NodeConfigStatus,
    NodeMonitoring,
    SMInfo,
)
from aoscore.sm.launcher.model import NodeStatuses
from aoscore.sm.smclient.messages import Answer, AverageMonitoring, StatusChanges, Value, to_frame
from aoscore.sm.smclient.network import FirewallUpdate, NetworkClient
from aoscore.sm.smclient.outbox import Outbox

_log = logging.getLogger(__name__)

T = TypeVar("T")

_CALL_TIMEOUT_S = 10.0
# The launcher's first pass may hang on one instance; CM shall not think that the node is away.
_SETTLE_LIMIT_S = 20.0
# Between frames with statuses. Instances of an update change one after the other; a frame for each costs a tenth of
# what starting it costs.
_GATHER_S = 0.05

_sm_stub: Callable[[grpc.aio.Channel], Any] = stubs.SMServiceStub


class Launches(Protocol):
    """The launcher as the link to CM needs it."""

    changed: Broadcast[InstanceStatus | NodeStatuses]
    settled: asyncio.Event

    def statuses(self) -> NodeStatuses:
        """The complete list."""
        ...

    async def update(self, start: Sequence[InstanceInfo], stop: Sequence[InstanceIdent]) -> None:
        """What CM wants different."""
        ...

    def cm_connected(self, connected: bool) -> None:
        """The stream to CM is up or down."""
        ...

    def cloud_connected(self, connected: bool) -> None:
        """CM has the cloud or not."""
        ...


class NodeConfigs(Protocol):
    """The node configuration as CM asks for it."""

    def status(self) -> NodeConfigStatus:
        """Present state."""
        ...

    def check(self, document: str, version: str) -> NodeConfigStatus:
        """Could it be set?"""
        ...

    async def update(self, document: str, version: str) -> NodeConfigStatus:
        """Set it."""
        ...


class Monitors(Protocol):
    """Samples to send, and averages when CM asks."""

    @property
    def samples(self) -> Broadcast[NodeMonitoring]:
        """One per poll period."""
        ...

    def average(self) -> NodeMonitoring:
        """Averages of the present window."""
        ...


class Networks(Protocol):
    """The network manager as CM's partner."""

    def states(self) -> Iterable[InstanceNetworkState]:
        """Networks in use, told to CM after each connect."""
        ...

    async def update_firewall(self, update: FirewallUpdate) -> None:
        """Rules that became known late."""
        ...


@dataclass(frozen=True)
class Node:
    """Everything of this node that CM talks to."""

    info: SMInfo
    launcher: Launches
    node_config: NodeConfigs
    monitoring: Monitors
    networks: Networks
    request_log: Callable[[LogRequest], Awaitable[None]]
    """Takes a request; its reply comes through `SmClient.send`."""


class SmClient:
    """See the module text. A Service; `bind` comes before `run`."""

    def __init__(
        self, address: str, node_id: str, certificates: CertificateKeeper, *, reconnect_pause_s: float = 10.0
    ) -> None:
        self._address = address
        self._certificates = certificates
        self._pause_s = reconnect_pause_s
        self._node: Node | None = None
        self._channel: grpc.aio.Channel | None = None
        self._outbox = Outbox()
        self._filled = asyncio.Event()
        self._room = asyncio.Condition()
        self.networks = NetworkClient(node_id, self._present_channel)

    def bind(self, node: Node) -> None:
        """Tell who answers CM. Separate from making the client, since those parts need it to be made."""
        self._node = node

    # For the other parts

    async def send(self, value: Value) -> None:
        """Queue a value for CM; returns once queued, also while CM is away. Log data waits for room."""
        if isinstance(value, LogData):
            async with self._room:
                await self._room.wait_for(lambda: self._outbox.has_room_for_logs)
        self._put(value)

    async def blob_urls(self, digests: list[str]) -> list[str]:
        """Where CM offers blobs, in the same order. Raises AosError, without a connection at once."""
        stub = _sm_stub(self._present_channel())
        with rpc_errors("GetBlobsInfos at CM"):
            answer = await stub.GetBlobsInfos(pb.BlobsInfosRequest(digests=digests), timeout=_CALL_TIMEOUT_S)
        return list(answer.urls)

    # The service

    async def run(self, started: Callable[[], None]) -> None:
        """Stay connected until cancelled. CM being there is no part of being started."""
        if self._node is None:
            raise FailedError("the link to CM was not bound to a node")
        node = self._node
        with (
            node.launcher.changed.subscribe() as statuses,
            node.monitoring.samples.subscribe() as samples,
            self._certificates.changed.subscribe() as renewals,
        ):
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._forward(statuses))
                tasks.create_task(self._forward(samples))
                started()
                while True:
                    renewed = await self._connect_once(node, renewals)
                    if not renewed:
                        await asyncio.sleep(self._pause_s)

    async def _forward(self, queue: asyncio.Queue[T]) -> None:
        while True:
            self._put(await queue.get())  # type: ignore[arg-type]

    def _put(self, value: Value | Answer) -> None:
        self._outbox.put(value)
        self._filled.set()

    def _present_channel(self) -> grpc.aio.Channel:
        if self._channel is None:
            raise FailedError(f"CM at {self._address} is not connected")
        return self._channel

    async def _connect_once(self, node: Node, renewals: "asyncio.Queue[Any]") -> bool:
        """One connection from its beginning to its end; whether it ended for a new certificate."""
        while not renewals.empty():
            renewals.get_nowait()
        session = asyncio.create_task(self._session(node))
        renewal = asyncio.create_task(renewals.get())
        try:
            await asyncio.wait({session, renewal}, return_when=asyncio.FIRST_COMPLETED)
            if session.done():
                await session
            else:
                _log.info("Certificate changed, connecting to CM anew")
        except Exception as error:
            cause = first_cause(error)
            known = isinstance(cause, AosError | OSError)
            _log.warning(
                kv("Link to CM is down", address=self._address, reason=cause, next_try_s=self._pause_s),
                exc_info=None if known else cause,
            )
        finally:
            for task in (session, renewal):
                task.cancel()
            await asyncio.gather(session, renewal, return_exceptions=True)
        return renewal.done() and not renewal.cancelled()

    async def _session(self, node: Node) -> None:
        async with self._open() as channel:
            call = _sm_stub(channel).RegisterSM()
            with rpc_errors("RegisterSM at CM"):
                await call.write(to_frame(node.info))
                self._channel = channel
                _log.info(kv("Connected to CM", address=self._address))
                node.launcher.cm_connected(True)
                try:
                    async with asyncio.TaskGroup() as tasks:
                        tasks.create_task(self._write(node, call))
                        tasks.create_task(self._network_updates(node))
                        await self._read(node, call)
                finally:
                    self._channel = None
                    node.launcher.cm_connected(False)

    @contextlib.asynccontextmanager
    async def _open(self) -> AsyncIterator[grpc.aio.Channel]:
        channel = await open_tls_channel(self._address, self._certificates.identity)
        try:
            yield channel
        finally:
            await channel.close()

    async def _write(self, node: Node, call: Any) -> None:
        await comes_within(node.launcher.settled, _SETTLE_LIMIT_S)
        self._outbox.connected(node.launcher.statuses())
        with rpc_errors("RegisterSM at CM"):
            while True:
                self._filled.clear()
                while (value := self._outbox.next()) is not None:
                    await call.write(to_frame(value))
                    self._outbox.written(value)
                    if isinstance(value, LogData):
                        async with self._room:
                            self._room.notify_all()
                    elif isinstance(value, StatusChanges):
                        await asyncio.sleep(_GATHER_S)
                await self._filled.wait()

    async def _network_updates(self, node: Node) -> None:
        with log_and_continue(_log, "Can't tell CM the networks of this node"):
            await self.networks.sync_network_state(node.networks.states())
        while True:
            with log_and_continue(_log, "Can't follow network updates of CM"):
                async for update in self.networks.firewall_updates():
                    with log_and_continue(_log, f"Can't update firewall of {update.ident}"):
                        await node.networks.update_firewall(update)
            await asyncio.sleep(self._pause_s)

    # What CM says

    async def _read(self, node: Node, call: Any) -> None:
        with rpc_errors("RegisterSM at CM"):
            async for message in call:
                kind = message.WhichOneof("SMIncomingMessage")
                if kind is None:
                    _log.warning("Message of CM without content ignored")
                    continue
                # One bad message must not cost the link, nor the messages after it.
                with log_and_continue(_log, f"Can't handle {kind} of CM"):
                    await self._handle(node, kind, getattr(message, kind))
        raise FailedError("CM closed the stream")

    async def _handle(self, node: Node, kind: str, message: Any) -> None:
        match kind:
            case "get_node_config_status":
                self._put(node.node_config.status())
            case "check_node_config":
                self._put(node.node_config.check(message.node_config, message.version))
            case "set_node_config":
                self._put(await node.node_config.update(message.node_config, message.version))
            case "update_instances":
                await node.launcher.update(
                    _each(convert.instance_info_from_pb, message.start_instances),
                    _each(convert.ident_from_pb, message.stop_instances),
                )
            case "system_log_request":
                await node.request_log(convert.log_request_from_pb(LogKind.SYSTEM, message))
            case "instance_log_request":
                await node.request_log(convert.log_request_from_pb(LogKind.INSTANCE, message))
            case "instance_crash_log_request":
                await node.request_log(convert.log_request_from_pb(LogKind.CRASH, message))
            case "get_average_monitoring":
                self._put(AverageMonitoring(node.monitoring.average()))
            case "connection_status":
                node.launcher.cloud_connected(message.cloud_status == pb.CONNECTED)
            case _:
                _log.warning("Message of CM is of an unknown kind: kind=%s", kind)


def _each(convert_one: Callable[[Any], T], messages: Iterable[Any]) -> list[T]:
    """Convert a list; an entry that cannot be read costs only itself."""
    values: list[T] = []
    for message in messages:
        with log_and_continue(_log, "Can't read an instance of an update"):
            values.append(convert_one(message))
    return values
