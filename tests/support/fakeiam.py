"""A test IAM as SM and MP see it: node info and certificates on the public port, secrets on the protected one."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from google.protobuf.empty_pb2 import Empty

from aoscore._pb.iamanager.v6 import iamanager_pb2 as pb
from aoscore._pb.iamanager.v6 import iamanager_pb2_grpc as stubs
from aoscore.common import convert
from aoscore.common.rpc import Server
from aoscore.common.tls import TlsIdentity, grpc_server_credentials
from aoscore.common.types import CertInfo, NodeInfo
from tests.support.running import running


class TestIam:
    """`certs` are handed out by type; `renew` tells subscribers about a new one."""

    __test__ = False

    def __init__(self, identity: TlsIdentity, node: NodeInfo, certs: dict[str, CertInfo]) -> None:
        self.identity = identity
        self.node = node
        self.certs = certs
        self.public_port = 0
        self.protected_port = 0
        self.registered: dict[str, dict[str, dict[str, str]]] = {}
        self._subscribers: list[asyncio.Queue[CertInfo]] = []

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator["TestIam"]:
        """Serve for the length of the block."""
        public = Server(
            f"127.0.0.1:{self.public_port}",
            partial(grpc_server_credentials, lambda: self.identity, require_client=False),
            self.public_services(),
        )
        protected = Server(
            f"127.0.0.1:{self.protected_port}",
            partial(grpc_server_credentials, lambda: self.identity),
            [partial(stubs.add_IAMPermissionsServiceServicer_to_server, self)],
        )
        async with running(public, protected):
            self.public_port, self.protected_port = public.port, protected.port
            yield self

    def public_services(self) -> list[partial[None]]:
        """What is served on the public port."""
        return [
            partial(stubs.add_IAMPublicCurrentNodeServiceServicer_to_server, self),
            partial(stubs.add_IAMPublicCertServiceServicer_to_server, self),
        ]

    def renew(self, cert: CertInfo) -> None:
        """Replace a certificate."""
        self.certs[cert.type] = cert
        for queue in self._subscribers:
            queue.put_nowait(cert)

    async def GetCurrentNodeInfo(self, request: Empty, context: Any) -> pb.NodeInfo:
        return convert.node_info_to_pb(self.node)

    async def SubscribeCurrentNodeChanged(self, request: Empty, context: Any) -> AsyncIterator[pb.NodeInfo]:
        yield convert.node_info_to_pb(self.node)
        await asyncio.Event().wait()

    async def GetCert(self, request: pb.GetCertRequest, context: Any) -> pb.CertInfo:
        return convert.cert_info_to_pb(self.certs[request.type])

    async def SubscribeCertChanged(
        self, request: pb.SubscribeCertChangedRequest, context: Any
    ) -> AsyncIterator[pb.CertInfo]:
        queue: asyncio.Queue[CertInfo] = asyncio.Queue()
        self._subscribers.append(queue)
        try:
            yield convert.cert_info_to_pb(self.certs[request.type])
            while True:
                yield convert.cert_info_to_pb(await queue.get())
        finally:
            self._subscribers.remove(queue)

    async def RegisterInstance(self, request: pb.RegisterInstanceRequest, context: Any) -> pb.RegisterInstanceResponse:
        rights = {server: dict(value.permissions) for server, value in request.permissions.items()}
        self.registered[request.instance.item_id] = rights
        return pb.RegisterInstanceResponse(secret=f"secret-{request.instance.item_id}")

    async def UnregisterInstance(self, request: pb.UnregisterInstanceRequest, context: Any) -> Empty:
        self.registered.pop(request.instance.item_id, None)
        return Empty()
