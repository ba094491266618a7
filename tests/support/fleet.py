"""Units of many nodes: an IAM that knows them all, and real SMs with a runtime that only pretends."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from google.protobuf.empty_pb2 import Empty

from aoscore._pb.iamanager.v6 import iamanager_pb2 as pb
from aoscore._pb.iamanager.v6 import iamanager_pb2_grpc as stubs
from aoscore.common import convert
from aoscore.common.aio import Broadcast
from aoscore.common.errors import FailedError, NotSupportedError
from aoscore.common.tls import TlsIdentity
from aoscore.common.types import (
    ArchInfo,
    CertInfo,
    CPUInfo,
    InstanceIdent,
    InstanceInfo,
    InstanceState,
    InstanceStatus,
    LogRequest,
    NodeInfo,
    NodeState,
    OSInfo,
    RuntimeInfo,
)
from aoscore.sm import app
from aoscore.sm.config import load
from aoscore.sm.imagemanager.model import InstalledImage
from aoscore.sm.launcher.runtimes.base import RunningInstance, SampleTarget, instance_id, runtime_id
from tests.support.fakeiam import TestIam
from tests.support.processes import NoMonitoring, NoNetworks, empty_log
from tests.support.running import running

NODE_DMIPS = 10_000


def fleet_nodes(count: int) -> list[NodeInfo]:
    """Equal nodes in service; the first is the Main Node."""
    return [
        NodeInfo(
            f"node-{number:02}",
            "main" if number == 1 else "secondary",
            max_dmips=NODE_DMIPS,
            total_ram=1 << 32,
            os_info=OSInfo("linux"),
            cpus=(CPUInfo(arch_info=ArchInfo("amd64")),),
            attrs={"AosComponents": "sm,iam"} | ({"MainNode": ""} if number == 1 else {}),
            state=NodeState.PROVISIONED,
        )
        for number in range(1, count + 1)
    ]


class FleetIam(TestIam, stubs.IAMPublicNodesServiceServicer):
    """The Main Node's IAM as CM sees it: the Unit, its nodes and its certificates."""

    def __init__(
        self, identity: TlsIdentity, nodes: Sequence[NodeInfo], certs: dict[str, CertInfo], system_id: str
    ) -> None:
        super().__init__(identity, nodes[0], certs)
        self.nodes = {node.node_id: node for node in nodes}
        self.system_id = system_id

    def public_services(self) -> list[partial[None]]:
        return [
            *super().public_services(),
            partial(stubs.add_IAMPublicIdentityServiceServicer_to_server, self),
            partial(stubs.add_IAMPublicNodesServiceServicer_to_server, self),
        ]

    async def GetSystemInfo(self, request: Empty, context: Any) -> pb.SystemInfo:
        return pb.SystemInfo(system_id=self.system_id, unit_model="model")

    async def GetSubjects(self, request: Empty, context: Any) -> pb.Subjects:
        return pb.Subjects()

    async def SubscribeSubjectsChanged(self, request: Empty, context: Any) -> AsyncIterator[pb.Subjects]:
        yield pb.Subjects()
        await asyncio.Event().wait()

    async def GetAllNodeIDs(self, request: Empty, context: Any) -> pb.NodesID:
        return pb.NodesID(ids=self.nodes)

    async def GetNodeInfo(self, request: pb.GetNodeInfoRequest, context: Any) -> pb.NodeInfo:
        return convert.node_info_to_pb(self.nodes[request.node_id])

    async def SubscribeNodeChanged(self, request: Empty, context: Any) -> AsyncIterator[pb.NodeInfo]:
        for node in self.nodes.values():
            yield convert.node_info_to_pb(node)
        await asyncio.Event().wait()


class SimulatedRuntime:
    """Instances that are notes in memory. An image whose `bin/app` holds the word "bad" cannot be started."""

    def __init__(self, node: NodeInfo) -> None:
        name = runtime_id("crun", node.node_id)
        self.info = RuntimeInfo(name, "crun", max_instances=256, os_info=node.os_info, arch_info=ArchInfo("amd64"))
        self.changed: Broadcast[InstanceStatus] = Broadcast("simulated runtime")
        self.reboot_due = asyncio.Event()
        self.instances: dict[InstanceIdent, InstanceInfo] = {}
        self.starts: list[tuple[InstanceIdent, str]] = []

    async def run(self, started: Callable[[], None]) -> None:
        started()
        await asyncio.Event().wait()

    async def adopt(self, stored: Sequence[InstanceInfo]) -> list[RunningInstance]:
        self.instances = {info.ident: info for info in stored if self.instances.get(info.ident) == info}
        return self.running()

    def running(self) -> list[RunningInstance]:
        return [
            RunningInstance(ident, instance_id(ident), True, self._status(info, InstanceState.ACTIVE))
            for ident, info in self.instances.items()
        ]

    async def start_instance(self, info: InstanceInfo, image: InstalledImage) -> None:
        if self.instances.get(info.ident) != info:
            if b"bad" in (image.layers[-1] / "bin" / "app").read_bytes():
                raise FailedError("the app is bad")
            self.starts.append((info.ident, info.version))
            self.instances[info.ident] = info
        self.changed.publish(self._status(info, InstanceState.ACTIVE))

    async def stop_instance(self, ident: InstanceIdent, *, restart: bool = False) -> None:
        if info := self.instances.pop(ident, None):
            self.changed.publish(self._status(info, InstanceState.INACTIVE))

    def sample_targets(self) -> list[SampleTarget]:
        return []

    async def reboot(self) -> None:
        raise NotSupportedError("nothing to reboot")

    def _status(self, info: InstanceInfo, state: InstanceState) -> InstanceStatus:
        return InstanceStatus(info.ident, info.version, state, self.info.runtime_id, info.manifest_digest)


@contextlib.asynccontextmanager
async def simulated_node(
    directory: Path, node: NodeInfo, *, iam: TlsIdentity, sm: CertInfo, ca_file: Path, cm_port: int
) -> AsyncIterator[SimulatedRuntime]:
    """A real SM in this process, its IAM beside it, its runtime simulated; runs for the length of the block."""
    directory.mkdir()
    runtime = SimulatedRuntime(node)
    node_iam = TestIam(iam, node, {"sm": sm})
    async with node_iam.running(), contextlib.AsyncExitStack() as stack:
        config = {
            "workingDir": str(directory / "work"),
            "caCert": str(ca_file),
            "cmServerURL": f"127.0.0.1:{cm_port}",
            "iamPublicServerURL": f"127.0.0.1:{node_iam.public_port}",
            "iamProtectedServerURL": f"127.0.0.1:{node_iam.protected_port}",
            "cmReconnectTimeout": "200ms",
            "resourcesConfigFile": str(directory / "resources.cfg"),
        }
        (directory / "sm.cfg").write_text(json.dumps(config))
        core = await app.build_core(load(directory / "sm.cfg"), stack)

        async def request_log(request: LogRequest) -> None:
            await core.client.send(empty_log(request))

        services = app.assemble(
            core, runtimes=[runtime], networks=NoNetworks(), monitoring=NoMonitoring(), request_log=request_log
        )
        async with running(*services):
            yield runtime


def with_ports(document: dict[str, Any], iam: FleetIam) -> dict[str, Any]:
    """A CM configuration that finds its IAM."""
    return document | {
        "iamPublicServerUrl": f"127.0.0.1:{iam.public_port}",
        "iamProtectedServerUrl": f"127.0.0.1:{iam.protected_port}",
    }
