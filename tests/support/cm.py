"""A test CM for SMs: the services of `cmServerURL` over mutual TLS, every call recorded, and a server for blobs."""

import asyncio
import contextlib
import ipaddress
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from typing import Any

from aoscore._pb.common.v2 import common_pb2 as common
from aoscore._pb.servicemanager.v5 import network_pb2 as net
from aoscore._pb.servicemanager.v5 import network_pb2_grpc as net_stubs
from aoscore._pb.servicemanager.v5 import servicemanager_pb2 as pb
from aoscore._pb.servicemanager.v5 import servicemanager_pb2_grpc as stubs
from aoscore.common import convert
from aoscore.common.fileserver import FileServer
from aoscore.common.rpc import Server
from aoscore.common.tls import TlsIdentity, grpc_server_credentials
from aoscore.common.types import InstanceInfo
from tests.support.items import Blobs
from tests.support.running import running


class Connection:
    """One RegisterSM stream: frames of the SM in `frames`, and what CM sends."""

    def __init__(self) -> None:
        self.frames: list[pb.SMOutgoingMessages] = []
        self.outbox: asyncio.Queue[pb.SMIncomingMessages | None] = asyncio.Queue()
        self.ended = asyncio.Event()

    def kinds(self) -> list[str]:
        """Kinds of all frames so far."""
        return [str(frame.WhichOneof("SMOutgoingMessage")) for frame in self.frames]


class TestCm:
    """Serves one SM at a time. Port and blobs survive `running` blocks, so CM can go away and come back."""

    __test__ = False

    def __init__(self, identity: TlsIdentity, blobs: Blobs) -> None:
        self.identity = identity
        self.blobs = blobs
        self.port = 0
        self.connections: list[Connection] = []
        self.calls: list[str] = []
        """Names of other calls than the stream, in order."""
        self.network_updates: asyncio.Queue[net.InstanceNetworkUpdateNotification] = asyncio.Queue()
        self.unknown: set[str] = set()
        """Digests that CM says it does not know."""
        self.addresses: dict[tuple[str, int], str] = {}
        """Addresses of instances, by item and number."""
        self._networks: dict[str, int] = {}
        self._files: FileServer | None = None
        self._news = asyncio.Condition()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator["TestCm"]:
        """Serve for the length of the block."""
        self._files = FileServer("127.0.0.1:0", lambda path: self.blobs.directory / path.rpartition("/")[2])
        server = Server(
            f"127.0.0.1:{self.port}",
            partial(grpc_server_credentials, lambda: self.identity),
            [
                partial(stubs.add_SMServiceServicer_to_server, self),
                partial(net_stubs.add_NetworkServiceServicer_to_server, self),
            ],
        )
        async with running(self._files, server):
            self.port = server.port
            try:
                yield self
            finally:
                for connection in self.connections:
                    connection.outbox.put_nowait(None)

    # What tests do

    def send(self, **member: Any) -> None:
        """Send a frame to the SM, e.g. `send(get_average_monitoring=pb.GetAverageMonitoring())`."""
        self.connections[-1].outbox.put_nowait(pb.SMIncomingMessages(**member))

    def update(self, *start: InstanceInfo, stop: tuple[InstanceInfo, ...] = ()) -> None:
        """Send UpdateInstances."""
        self.send(
            update_instances=pb.UpdateInstances(
                start_instances=[convert.instance_info_to_pb(info) for info in start],
                stop_instances=[convert.ident_to_pb(info.ident) for info in stop],
            )
        )

    def drop(self) -> None:
        """End the stream."""
        self.connections[-1].outbox.put_nowait(None)

    async def wait(self, what: Callable[["TestCm"], Any], timeout_s: float = 20) -> Any:
        """Wait until `what` is true of this CM; its value. Looked at after every frame and call."""
        async with asyncio.timeout(timeout_s), self._news:
            while not (value := what(self)):
                await self._news.wait()
            return value

    async def frame(self, kind: str, *, after: int = 0, connection: int = -1, timeout_s: float = 20) -> Any:
        """The content of the first frame of a kind after so many frames of the connection."""

        def find(cm: "TestCm") -> Any:
            if not cm.connections or len(cm.connections) < abs(connection):
                return None
            for frame in cm.connections[connection].frames[after:]:
                if frame.WhichOneof("SMOutgoingMessage") == kind:
                    return frame
            return None

        return getattr(await self.wait(find, timeout_s), kind)

    async def connected(self, count: int, timeout_s: float = 20) -> Connection:
        """Wait for the connection with that number (from 1) and its first two frames."""
        await self.wait(
            lambda cm: cm.connections[count - 1 :] and len(cm.connections[count - 1].frames) >= 2, timeout_s
        )
        return self.connections[count - 1]

    def states(self, connection: int = -1) -> dict[str, tuple[str, str]]:
        """Version and state of each item's instance as told on a connection."""
        return {item: state for (item, _), state in self.instance_states(connection).items()}

    def instance_states(self, connection: int = -1) -> dict[tuple[str, int], tuple[str, str]]:
        """The same by item and number of the instance."""
        told: dict[tuple[str, int], tuple[str, str]] = {}
        for frame in self.connections[connection].frames:
            kind = frame.WhichOneof("SMOutgoingMessage")
            if kind == "node_instances_status":
                told = {}
            if kind in ("node_instances_status", "update_instances_status"):
                told |= {
                    (one.instance.item_id, one.instance.instance): (one.version, one.state)
                    for one in getattr(frame, kind).instances
                }
        return told

    def statuses(self, connection: int = -1) -> Iterator[pb.InstanceStatus]:
        """Each status of an instance that was told on a connection, alone or in a complete list."""
        for frame in self.connections[connection].frames:
            yield from (*frame.node_instances_status.instances, *frame.update_instances_status.instances)

    # What the SM calls

    async def RegisterSM(self, requests: Any, context: Any) -> AsyncIterator[pb.SMIncomingMessages]:
        connection = Connection()
        self.connections.append(connection)
        reader = asyncio.create_task(self._read(connection, requests))
        try:
            while (message := await connection.outbox.get()) is not None:
                yield message
        finally:
            reader.cancel()
            connection.ended.set()

    async def _read(self, connection: Connection, requests: Any) -> None:
        async for frame in requests:
            connection.frames.append(frame)
            await self._tell()

    async def _note(self, name: str) -> None:
        self.calls.append(name)
        await self._tell()

    async def _tell(self) -> None:
        async with self._news:
            self._news.notify_all()

    async def GetBlobsInfos(self, request: pb.BlobsInfosRequest, context: Any) -> pb.BlobsInfos:
        await self._note(f"GetBlobsInfos {' '.join(request.digests)}")
        if self.unknown & set(request.digests):
            raise RuntimeError("not found")
        assert self._files
        urls = [f"http://127.0.0.1:{self._files.port}/{digest.removeprefix('sha256:')}" for digest in request.digests]
        return pb.BlobsInfos(urls=urls)

    async def GetNodeNetworkParams(self, request: Any, context: Any) -> net.GetNodeNetworkParamsResponse:
        await self._note(f"GetNodeNetworkParams {request.network_id}")
        prefix = self._prefix(request.network_id)
        return net.GetNodeNetworkParamsResponse(subnet=f"{prefix}.0.0/16", ip=f"{prefix}.0.1", vlan_id=5)

    async def AllocateInstanceNetwork(self, request: Any, context: Any) -> net.AllocateInstanceNetworkResponse:
        await self._note(f"AllocateInstanceNetwork {request.instance.item_id}")
        if request.instance.item_id == "refused":
            error = common.ErrorInfo(aos_code=4, message="no address left")
            return net.AllocateInstanceNetworkResponse(error=error)
        prefix = self._prefix(request.network_id)
        count = sum(call.startswith("AllocateInstanceNetwork") for call in self.calls)
        new = str(ipaddress.IPv4Address(f"{prefix}.0.1") + count)
        ip = self.addresses.setdefault((request.instance.item_id, request.instance.instance), new)
        return net.AllocateInstanceNetworkResponse(subnet=f"{prefix}.0.0/16", ip=ip, dns_servers=["172.31.0.100"])

    def _prefix(self, network_id: str) -> str:
        """First half of the addresses of a network: 172.31 for the first, then 172.30 and so on."""
        return f"172.{31 - self._networks.setdefault(network_id, len(self._networks))}"

    async def ReleaseInstanceNetwork(self, request: Any, context: Any) -> net.ReleaseInstanceNetworkResponse:
        await self._note(f"ReleaseInstanceNetwork {request.instance.item_id}")
        # As some servers do: an error of zeros, which means success.
        return net.ReleaseInstanceNetworkResponse(error=common.ErrorInfo())

    async def ReleaseNodeNetwork(self, request: Any, context: Any) -> net.ReleaseNodeNetworkResponse:
        await self._note(f"ReleaseNodeNetwork {request.network_id}")
        return net.ReleaseNodeNetworkResponse()

    async def SyncNetworkState(self, request: Any, context: Any) -> net.SyncNetworkStateResponse:
        await self._note(f"SyncNetworkState {' '.join(one.instance.item_id for one in request.instances)}".rstrip())
        return net.SyncNetworkStateResponse()

    async def SubscribeInstanceNetworkUpdates(
        self, request: Any, context: Any
    ) -> AsyncIterator[net.InstanceNetworkUpdateNotification]:
        await self._note(f"SubscribeInstanceNetworkUpdates {request.node_id}")
        while True:
            yield await self.network_updates.get()
