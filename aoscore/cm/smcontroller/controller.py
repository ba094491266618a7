"""Serves the SMs of all nodes and reaches them for the rest of CM (cm-orchestration §2)."""

import asyncio
import logging
from collections.abc import AsyncIterable, Awaitable, Callable, Sequence
from functools import partial
from typing import Any, Protocol

import msgspec

from aoscore._pb.servicemanager.v5 import network_pb2_grpc
from aoscore._pb.servicemanager.v5 import servicemanager_pb2 as pb
from aoscore._pb.servicemanager.v5 import servicemanager_pb2_grpc as stubs
from aoscore.cm.smcontroller.link import SmLink
from aoscore.cm.smcontroller.network import Admit, Networks, NetworkService
from aoscore.common import convert
from aoscore.common.aio import Broadcast, log_and_continue
from aoscore.common.errors import AosError, InvalidArgumentError, NotFoundError
from aoscore.common.log import kv
from aoscore.common.rpc import Server, begin_answers, handler, peer_host
from aoscore.common.tls import ServerTls
from aoscore.common.types import (
    InstanceIdent,
    InstanceInfo,
    InstanceStatus,
    LogData,
    LogRequest,
    NodeAlert,
    NodeConfigStatus,
    NodeMonitoring,
    SMInfo,
)

_log = logging.getLogger(__name__)


class CloudState(Protocol):
    """Whether the cloud is connected: nodes count the time without it (offline TTL)."""

    connection: Broadcast[bool]

    @property
    def connected(self) -> bool: ...


class Receivers(msgspec.Struct, frozen=True, kw_only=True):
    """Who gets what SMs tell. The node id comes first; an error is logged, the stream goes on."""

    sm_info: Callable[[SMInfo], None]
    sm_lost: Callable[[str], None]
    node_statuses: Callable[[str, Sequence[InstanceStatus]], None]
    """All instances of a node: after connecting and after each update."""
    statuses: Callable[[str, Sequence[InstanceStatus]], None]
    """Single instances that changed."""
    monitoring: Callable[[str, NodeMonitoring], None]
    alert: Callable[[str, NodeAlert], None]
    log: Callable[[str, LogData], Awaitable[None]]


class SmController:
    """A service: the gRPC server for SMs. Requests to a node that is not connected raise NotFoundError."""

    def __init__(
        self,
        address: str,
        credentials: Callable[[], ServerTls] | None,
        *,
        cloud: CloudState,
        networks: Networks,
        blob_url: Callable[[str], str],
        receivers: Receivers,
        admit: Admit | None,
    ) -> None:
        """`admit` raises AosError when who calls may not speak for a node; None where nobody shows a certificate."""
        self._admit = admit or _admit_all
        self._cloud = cloud
        self._receivers = receivers
        self._streams: set[SmLink] = set()
        self._nodes: dict[str, SmLink] = {}
        self._hosts: dict[str, str] = {}
        servicer = _SmService(self, blob_url)
        self._server = Server(
            _listen_address(address),
            credentials,
            [
                partial(stubs.add_SMServiceServicer_to_server, servicer),
                partial(network_pb2_grpc.add_NetworkServiceServicer_to_server, NetworkService(networks, self._admit)),
            ],
        )

    @property
    def port(self) -> int:
        """Bound port once started."""
        return self._server.port

    async def run(self, started: Callable[[], None]) -> None:
        """Serve until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._tell_cloud_state())
            tasks.create_task(self._server.run(started))

    async def update_instances(
        self, node_id: str, start: Sequence[InstanceInfo], stop: Sequence[InstanceIdent]
    ) -> None:
        """Send the wanted instances of a node; it answers with all its statuses when it is done."""
        update = pb.UpdateInstances(
            start_instances=[convert.instance_info_to_pb(info) for info in start],
            stop_instances=[convert.ident_to_pb(ident) for ident in stop],
        )
        await self._link(node_id).send(pb.SMIncomingMessages(update_instances=update))

    async def get_node_config_status(self, node_id: str) -> NodeConfigStatus:
        """Which node config the node has."""
        frame = pb.SMIncomingMessages(get_node_config_status=pb.GetNodeConfigStatus())
        return convert.node_config_status_from_pb(await self._link(node_id).request(frame, "node_config_status"))

    async def check_node_config(self, node_id: str, config: str, version: str) -> NodeConfigStatus:
        """Ask a node whether it could apply a config; the status holds its objection."""
        frame = pb.SMIncomingMessages(check_node_config=pb.CheckNodeConfig(node_config=config, version=version))
        return await self._config_request(node_id, frame, version)

    async def set_node_config(self, node_id: str, config: str, version: str) -> NodeConfigStatus:
        """Have a node apply a config."""
        frame = pb.SMIncomingMessages(set_node_config=pb.SetNodeConfig(node_config=config, version=version))
        return await self._config_request(node_id, frame, version)

    async def get_average_monitoring(self, node_id: str) -> NodeMonitoring:
        """How busy the node and its instances are."""
        frame = pb.SMIncomingMessages(get_average_monitoring=pb.GetAverageMonitoring())
        return convert.monitoring_from_pb(await self._link(node_id).request(frame, "average_monitoring"))

    async def request_log(self, node_id: str, request: LogRequest) -> None:
        """Ask a node for a log; its parts come to `Receivers.log`."""
        await self._link(node_id).send(convert.log_request_to_pb(request))

    async def _config_request(self, node_id: str, frame: pb.SMIncomingMessages, version: str) -> NodeConfigStatus:
        """The answer must name the version: an SM that cannot parse a config answers nothing, perhaps later."""
        reply = await self._link(node_id).request(
            frame, "node_config_status", accept=lambda status: status.version == version
        )
        return convert.node_config_status_from_pb(reply)

    def is_node(self, ip: str) -> bool:
        """Whether the SM of a node has come from an IP address, the last time that it did."""
        return ip in self._hosts.values()

    def _link(self, node_id: str) -> SmLink:
        try:
            return self._nodes[node_id]
        except KeyError:
            raise NotFoundError(f"node {node_id} is not connected") from None

    async def _tell_cloud_state(self) -> None:
        with self._cloud.connection.subscribe() as changes:
            while True:
                await changes.get()
                for link in list(self._streams):
                    with log_and_continue(_log, f"Can't tell {link.name} the state of the cloud connection"):
                        await link.send(self._cloud_state_frame())

    def _cloud_state_frame(self) -> pb.SMIncomingMessages:
        status = pb.ConnectionStatus(cloud_status=pb.CONNECTED if self._cloud.connected else pb.DISCONNECTED)
        return pb.SMIncomingMessages(connection_status=status)

    async def serve_stream(self, requests: AsyncIterable[pb.SMOutgoingMessages], context: Any) -> None:
        """One SM, from its call to the end of its stream."""
        await begin_answers(context)
        link = SmLink()
        self._streams.add(link)
        await link.send(self._cloud_state_frame())
        tasks = {
            asyncio.create_task(self._read(link, requests, context)),
            asyncio.create_task(_write(link, context)),
            asyncio.create_task(link.closed.wait()),
        }
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._forget(link)
        for task in done:
            await task

    async def _read(self, link: SmLink, requests: AsyncIterable[pb.SMOutgoingMessages], context: Any) -> None:
        async for frame in requests:
            kind = frame.WhichOneof("SMOutgoingMessage")
            if kind == "sm_info" and not link.node_id and frame.sm_info.node_id:
                try:
                    await self._admit(frame.sm_info.node_id, context)
                except AosError as error:
                    _log.error(kv("SM is refused", nodeID=frame.sm_info.node_id, error=error))
                    link.close()
                    return
                self._hosts[frame.sm_info.node_id] = peer_host(context)
            with log_and_continue(_log, f"Can't handle {kind} of {link.name}"):
                await self._receive(link, kind, frame)

    async def _receive(self, link: SmLink, kind: str | None, frame: pb.SMOutgoingMessages) -> None:
        if kind == "sm_info":
            self._register(link, convert.sm_info_from_pb(frame.sm_info))
            return
        if not link.node_id:
            raise InvalidArgumentError("the SM has not told its node yet")
        receivers, node_id = self._receivers, link.node_id
        match kind:
            case "node_instances_status":
                receivers.node_statuses(node_id, _statuses(node_id, frame.node_instances_status.instances))
            case "update_instances_status":
                receivers.statuses(node_id, _statuses(node_id, frame.update_instances_status.instances))
            case "instant_monitoring":
                receivers.monitoring(node_id, convert.monitoring_from_pb(frame.instant_monitoring))
            case "alert":
                receivers.alert(node_id, convert.alert_from_pb(frame.alert))
            case "log":
                await receivers.log(node_id, convert.log_data_from_pb(frame.log))
            case "node_config_status" | "average_monitoring":
                if not link.on_reply(kind, getattr(frame, kind)):
                    _log.error(kv("Reply that nobody waits for", nodeID=node_id, kind=kind))
            case _:
                _log.warning(kv("Unknown message", nodeID=node_id))

    def _register(self, link: SmLink, info: SMInfo) -> None:
        """The newest stream of a node counts: the older one is of an SM that has restarted or lost its connection."""
        if not info.node_id:
            raise InvalidArgumentError("SM info has no node id")
        if not link.node_id:
            link.node_id = info.node_id
            if older := self._nodes.get(link.node_id):
                _log.warning(kv("SM connected again, its older stream is closed", nodeID=link.node_id))
                older.close()
                self._receivers.sm_lost(link.node_id)
            self._nodes[link.node_id] = link
            _log.info(kv("SM connected", nodeID=link.node_id, runtimes=[one.type for one in info.runtimes]))
        self._receivers.sm_info(msgspec.structs.replace(info, node_id=link.node_id))

    def _forget(self, link: SmLink) -> None:
        self._streams.discard(link)
        link.close()
        if self._nodes.get(link.node_id) is link:
            del self._nodes[link.node_id]
            _log.info(kv("SM disconnected", nodeID=link.node_id))
            with log_and_continue(_log, f"Can't handle the loss of {link.name}"):
                self._receivers.sm_lost(link.node_id)


async def _admit_all(node_id: str, context: Any) -> None:
    pass


async def _write(link: SmLink, context: Any) -> None:
    while True:
        await context.write(await link.next_frame())


def _statuses(node_id: str, entries: Sequence[pb.InstanceStatus]) -> list[InstanceStatus]:
    """What can be read of a list; one bad entry does not spoil the others."""
    statuses = []
    for entry in entries:
        with log_and_continue(_log, f"Can't read a status of node {node_id}"):
            statuses.append(convert.instance_status_from_pb(entry))
    return statuses


def _listen_address(address: str) -> str:
    """A port alone means all addresses, of IPv6 too."""
    return f"[::]{address}" if address.startswith(":") else address


class _SmService(stubs.SMServiceServicer):
    def __init__(self, controller: SmController, blob_url: Callable[[str], str]) -> None:
        self._controller = controller
        self._blob_url = blob_url

    @handler
    async def RegisterSM(self, request_iterator: AsyncIterable[pb.SMOutgoingMessages], context: Any) -> None:
        await self._controller.serve_stream(request_iterator, context)

    @handler
    async def GetBlobsInfos(self, request: pb.BlobsInfosRequest, context: Any) -> pb.BlobsInfos:
        return pb.BlobsInfos(urls=[self._blob_url(digest) for digest in request.digests])
