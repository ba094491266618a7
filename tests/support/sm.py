"""A test SM that talks to CM as the C++ SM was seen to (recorded/cm-against-test-sm.txt)."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

from aoscore._pb.common.v2 import common_pb2 as common
from aoscore._pb.servicemanager.v5 import network_pb2 as net
from aoscore._pb.servicemanager.v5 import network_pb2_grpc as net_stubs
from aoscore._pb.servicemanager.v5 import servicemanager_pb2 as pb
from aoscore._pb.servicemanager.v5 import servicemanager_pb2_grpc as stubs
from aoscore.common.rpc import open_channel
from aoscore.common.tls import TlsIdentity

Key = tuple[str, str, int, int]


def key_of(ident: common.InstanceIdent) -> Key:
    """What a C++ SM knows an instance by."""
    return ident.item_id, ident.subject_id, ident.instance, ident.type


class TestSm:
    """One node's SM. `instances` outlive connections, as they do on a node while CM restarts.

    Order after connecting: `sm_info` and `node_instances_status` on the stream, then SyncNetworkState and the
    subscription as other calls. `update_instances` is answered by the full list once all is done; an instance whose
    item is in `broken` fails. Node config answers hold the state before the request; text that is no JSON gets none.
    """

    __test__ = False

    def __init__(self, node_id: str, runtimes: tuple[pb.RuntimeInfo, ...] | None = None) -> None:
        self.info = pb.SMInfo(node_id=node_id)
        self.info.runtimes.extend(runtimes or (pb.RuntimeInfo(runtime_id=f"crun-{node_id}", type="crun"),))
        self.instances: dict[Key, pb.InstanceStatus] = {}
        self.infos: dict[Key, pb.InstanceInfo] = {}
        self.broken: set[str] = set()
        self.broken_versions: set[tuple[str, str]] = set()
        self.silent = False
        self.silent_about_config = False
        self.starts: list[Key] = []
        self.updates: list[pb.UpdateInstances] = []
        self.received: list[pb.SMIncomingMessages] = []
        self.config = ("", "")
        self.average: pb.AverageMonitoring | None = pb.AverageMonitoring(
            node_monitoring=pb.MonitoringData(timestamp={})
        )
        self.network_updates: list[net.InstanceNetworkUpdateNotification] = []
        self.networks: Any = None
        self.blobs: Any = None
        self.ended = asyncio.Event()
        self._outbox: asyncio.Queue[pb.SMOutgoingMessages | None] = asyncio.Queue()
        self._news = asyncio.Condition()

    @property
    def node_id(self) -> str:
        return self.info.node_id

    @contextlib.asynccontextmanager
    async def connected(self, port: int, identity: TlsIdentity | None) -> AsyncIterator["TestSm"]:
        """Stay connected to the CM at a port of this machine for the length of the block."""
        credentials = identity.grpc_client_credentials() if identity else None
        self._outbox = asyncio.Queue()
        self.ended.clear()
        async with open_channel(f"127.0.0.1:{port}", credentials, name="localhost" if identity else None) as channel:
            self.blobs = stubs.SMServiceStub(channel)
            self.networks = net_stubs.NetworkServiceStub(channel)
            call = self.blobs.RegisterSM(self._frames())
            tasks = [asyncio.create_task(self._read(call)), asyncio.create_task(self._follow_networks())]
            try:
                yield self
            finally:
                # gRPC waits for the next frame of a call that CM has ended, too, and for ever.
                self._outbox.put_nowait(None)
                call.cancel()
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    def send(self, **member: Any) -> None:
        """Send a frame to CM, e.g. `send(alert=pb.Alert(…))`."""
        self._outbox.put_nowait(pb.SMOutgoingMessages(**member))

    def set_state(self, key: Key, state: str, error: str = "") -> None:
        """An instance changed by itself."""
        status = self.instances[key]
        status.state = state
        status.error.CopyFrom(common.ErrorInfo(aos_code=1, message=error) if error else common.ErrorInfo())
        self.send(update_instances_status=pb.UpdateInstancesStatus(instances=[status]))

    async def wait(self, what: Callable[["TestSm"], Any], timeout_s: float = 10) -> Any:
        """Wait until `what` is true of this SM; its value. Looked at after every frame of CM."""
        async with asyncio.timeout(timeout_s), self._news:
            while not (value := what(self)):
                await self._news.wait()
            return value

    async def _frames(self) -> AsyncIterator[pb.SMOutgoingMessages]:
        yield pb.SMOutgoingMessages(sm_info=self.info)
        yield pb.SMOutgoingMessages(node_instances_status=self._full_list())
        outbox = self._outbox
        while (frame := await outbox.get()) is not None:
            yield frame

    def _full_list(self) -> pb.NodeInstancesStatus:
        return pb.NodeInstancesStatus(instances=self.instances.values())

    async def _follow_networks(self) -> None:
        await self.networks.SyncNetworkState(net.SyncNetworkStateRequest(node_id=self.node_id))
        request = net.SubscribeInstanceNetworkUpdatesRequest(node_id=self.node_id)
        async for update in self.networks.SubscribeInstanceNetworkUpdates(request):
            async with self._news:
                self.network_updates.append(update)
                self._news.notify_all()

    async def _read(self, call: Any) -> None:
        try:
            async for frame in call:
                self._answer(frame)
                async with self._news:
                    self.received.append(frame)
                    self._news.notify_all()
        finally:
            self.ended.set()

    def _answer(self, frame: pb.SMIncomingMessages) -> None:
        match frame.WhichOneof("SMIncomingMessage"):
            case "update_instances":
                self.updates.append(frame.update_instances)
                if not self.silent:
                    self._update(frame.update_instances)
                    self.send(node_instances_status=self._full_list())
            case "get_node_config_status" | "check_node_config" | "set_node_config" if self.silent_about_config:
                pass
            case "get_node_config_status":
                self._config_status(self.config[0])
            case "check_node_config":
                if frame.check_node_config.node_config.startswith("{") and "bad" not in frame.check_node_config.version:
                    self._config_status(frame.check_node_config.version)
            case "set_node_config":
                request = frame.set_node_config
                state = "installed" if self.config[0] else "absent"
                self.config = (request.version, request.node_config)
                self._config_status(request.version, state)
            case "get_average_monitoring" if self.average is not None:
                self.send(average_monitoring=self.average)

    def _config_status(self, version: str, state: str | None = None) -> None:
        state = state or ("installed" if self.config[0] else "absent")
        self.send(node_config_status=pb.NodeConfigStatus(state=state, version=version, error=common.ErrorInfo()))

    def _update(self, update: pb.UpdateInstances) -> None:
        """As sm.md §4.3: stop what is named or differs, start what does not run."""
        changed = [
            key_of(info.instance)
            for info in update.start_instances
            if key_of(info.instance) in self.infos and self.infos[key_of(info.instance)] != info
        ]
        for key in [*changed, *map(key_of, update.stop_instances)]:
            self.instances.pop(key, None)
            self.infos.pop(key, None)
        for info in update.start_instances:
            key = key_of(info.instance)
            if key in self.instances and self.instances[key].state == "active":
                continue
            self.starts.append(key)
            self.infos[key] = info
            item_id = info.instance.item_id
            failed = item_id in self.broken or (item_id, info.version) in self.broken_versions
            self.instances[key] = pb.InstanceStatus(
                instance=info.instance,
                version=info.version,
                runtime_id=info.runtime_id,
                manifest_digest=info.manifest_digest,
                state="failed" if failed else "active",
                error=common.ErrorInfo(aos_code=5, message="not found") if failed else common.ErrorInfo(),
                env_vars=[pb.EnvVarStatus(name=one.name, error=common.ErrorInfo()) for one in info.env_vars],
            )


async def stay_connected(sm: TestSm, port: int, identity: TlsIdentity) -> None:
    """An SM connects again whenever CM was gone."""
    while True:
        async with sm.connected(port, identity):
            await sm.ended.wait()
        await asyncio.sleep(0.1)
