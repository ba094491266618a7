"""The public side of IAM as CM, SM and MP use it: identity, certificates, nodes (iam.md, grpc.md iamanager.v6)."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Self

import grpc.aio
from google.protobuf.empty_pb2 import Empty

from aoscore._pb.iamanager.v6 import iamanager_pb2 as pb
from aoscore._pb.iamanager.v6 import iamanager_pb2_grpc as stubs
from aoscore.common import convert
from aoscore.common.aio import Backoff, Broadcast
from aoscore.common.errors import AosError, NotFoundError
from aoscore.common.rpc import LazyChannel, rpc_errors
from aoscore.common.tls import TlsIdentity, TlsRoots
from aoscore.common.types import CertInfo, NodeInfo, SystemInfo

_log = logging.getLogger(__name__)

Present = Awaitable[Sequence[Any]]

CALL_TIMEOUT_S = 10.0


class IamPublicClient:
    """IAM's public port. Use as an async context manager.

    `ca_file` None means plain text: IAM in provisioning mode. The channel is opened at the first call and again when
    IAM shows another certificate. Calls raise AosError; watches never end by themselves: after a break they begin with
    the present value.
    """

    def __init__(self, address: str, ca_file: Path | None) -> None:
        roots = None if ca_file is None else TlsRoots(ca_file)
        self._channel = LazyChannel(address, lambda: roots)
        self.returned: Broadcast[str] = Broadcast("returns of IAM")
        """A watch works again after a break: IAM may have been restarted. The value says which watch."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._channel.drop()

    async def _call(self, what: str, stub: Callable[[grpc.aio.Channel], Any], method: str, request: Any) -> Any:
        return await self._channel.call(f"{what} from IAM", stub, method, request, timeout_s=CALL_TIMEOUT_S)

    async def _watch(
        self,
        what: str,
        stub: Callable[[grpc.aio.Channel], Any],
        method: str,
        request: Any,
        present: Callable[[], Present],
    ) -> AsyncIterator[Any]:
        """Messages of a subscription; after a break first the `present` values, since changes may have been missed."""
        backoff = Backoff(1.0, 10.0)
        missed = False
        while True:
            try:
                channel = await self._channel.open()
                with rpc_errors(f"{what} from IAM at {self._channel.address}"):
                    call = getattr(stub(channel), method)(request)
                    if missed:
                        messages = await present()
                        self.returned.publish(what)
                        for message in messages:
                            yield message
                    async for message in call:
                        backoff.reset()
                        yield message
                reason = "stream ended"
            except AosError as error:
                reason = str(error)
            missed = True
            pause_s = backoff.next()
            _log.warning("IAM subscription broken, trying again: pause=%.1fs, reason=%s", pause_s, reason)
            await self._channel.drop()
            await asyncio.sleep(pause_s)

    async def get_cert(self, cert_type: str, *, issuer: bytes = b"", serial: str = "") -> CertInfo:
        """The newest certificate of a type, or the one with that issuer (DER) and serial (hex)."""
        return convert.cert_info_from_pb(await self._get_cert(cert_type, issuer, serial))

    async def _get_cert(self, cert_type: str, issuer: bytes = b"", serial: str = "") -> pb.CertInfo:
        request = pb.GetCertRequest(type=cert_type, issuer=issuer, serial=serial)
        stub = stubs.IAMPublicCertServiceStub
        answer: pb.CertInfo = await self._call(f"certificate {cert_type}", stub, "GetCert", request)
        if not answer.cert_url:
            raise NotFoundError(f"IAM has no certificate {cert_type}")
        return answer

    async def watch_cert(self, cert_type: str) -> AsyncIterator[CertInfo]:
        """Every new certificate of a type."""
        request = pb.SubscribeCertChangedRequest(type=cert_type)
        stub = stubs.IAMPublicCertServiceStub

        async def present() -> list[pb.CertInfo]:
            return [await self._get_cert(cert_type)]

        async for message in self._watch(f"certificate {cert_type}", stub, "SubscribeCertChanged", request, present):
            yield convert.cert_info_from_pb(message)

    async def get_node_info(self) -> NodeInfo:
        """The node IAM runs on."""
        stub = stubs.IAMPublicCurrentNodeServiceStub
        return convert.node_info_from_pb(await self._call("node info", stub, "GetCurrentNodeInfo", Empty()))

    async def watch_node_info(self) -> AsyncIterator[NodeInfo]:
        """Changes of the node IAM runs on."""
        stub = stubs.IAMPublicCurrentNodeServiceStub

        async def present() -> list[pb.NodeInfo]:
            return [await self._call("node info", stub, "GetCurrentNodeInfo", Empty())]

        async for message in self._watch("node changes", stub, "SubscribeCurrentNodeChanged", Empty(), present):
            yield convert.node_info_from_pb(message)

    async def get_system_info(self) -> SystemInfo:
        """Identity of the Unit."""
        stub = stubs.IAMPublicIdentityServiceStub
        return convert.system_info_from_pb(await self._call("system info", stub, "GetSystemInfo", Empty()))

    async def get_subjects(self) -> tuple[str, ...]:
        """Subjects active on the Unit."""
        answer = await self._call("subjects", stubs.IAMPublicIdentityServiceStub, "GetSubjects", Empty())
        return tuple(answer.subjects)

    async def watch_subjects(self) -> AsyncIterator[tuple[str, ...]]:
        """Changes of the subjects."""
        stub = stubs.IAMPublicIdentityServiceStub

        async def present() -> list[pb.Subjects]:
            return [await self._call("subjects", stub, "GetSubjects", Empty())]

        async for message in self._watch("subjects", stub, "SubscribeSubjectsChanged", Empty(), present):
            yield tuple(message.subjects)

    async def get_node_ids(self) -> tuple[str, ...]:
        """Nodes of the Unit."""
        answer = await self._call("node IDs", stubs.IAMPublicNodesServiceStub, "GetAllNodeIDs", Empty())
        return tuple(answer.ids)

    async def get_node(self, node_id: str) -> NodeInfo:
        """One node of the Unit."""
        request = pb.GetNodeInfoRequest(node_id=node_id)
        stub = stubs.IAMPublicNodesServiceStub
        return convert.node_info_from_pb(await self._call(f"node {node_id}", stub, "GetNodeInfo", request))

    async def watch_nodes(self) -> AsyncIterator[NodeInfo]:
        """Changes of any node of the Unit."""
        stub = stubs.IAMPublicNodesServiceStub

        async def present() -> list[pb.NodeInfo]:
            requests = [pb.GetNodeInfoRequest(node_id=node_id) for node_id in await self.get_node_ids()]
            return [await self._call(f"node {request.node_id}", stub, "GetNodeInfo", request) for request in requests]

        async for message in self._watch("node changes", stub, "SubscribeNodeChanged", Empty(), present):
            yield convert.node_info_from_pb(message)


class CertificateKeeper:
    """Knows our present certificate of one type, as a service.

    Started once the first certificate is there. `changed` tells about every later one.
    """

    def __init__(self, iam: IamPublicClient, cert_type: str, ca_file: Path) -> None:
        self._iam = iam
        self._type = cert_type
        self._ca_file = ca_file
        self._identity: TlsIdentity | None = None
        self.changed: Broadcast[TlsIdentity] = Broadcast(f"certificate {cert_type}")

    @property
    def iam_returned(self) -> Broadcast[str]:
        """IAM answers again after a break; it may have been restarted."""
        return self._iam.returned

    @property
    def identity(self) -> TlsIdentity:
        """Certificate, key and roots to use for a link that is opened now."""
        if self._identity is None:
            raise NotFoundError(f"certificate {self._type} is not known yet")
        return self._identity

    async def run(self, started: Callable[[], None]) -> None:
        """Follow the certificate until cancelled."""
        self._take(await self._iam.get_cert(self._type))
        started()
        async for cert in self._iam.watch_cert(self._type):
            self._take(cert)

    def _take(self, cert: CertInfo) -> None:
        identity = TlsIdentity.of(self._ca_file, cert)
        if identity == self._identity:
            return
        first = self._identity is None
        self._identity = identity
        if not first:
            _log.info("Certificate changed: type=%s, url=%s", self._type, cert.cert_url)
            self.changed.publish(identity)
