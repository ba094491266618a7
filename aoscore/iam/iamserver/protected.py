"""Services of the protected port: provisioning, certificates, Node states, registration of instances (iam.md §12).

A failed operation is told in the `error` of the answer, with status OK; a Node that can't be asked, or does not answer,
as status INTERNAL.
"""

import logging
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from google.protobuf.empty_pb2 import Empty

from aoscore._pb.common.v2 import common_pb2 as common
from aoscore._pb.iamanager.v6 import iamanager_pb2 as pb
from aoscore._pb.iamanager.v6 import iamanager_pb2_grpc as stubs
from aoscore.common import convert
from aoscore.common.aio import unbroken
from aoscore.common.errors import to_error_info
from aoscore.common.log import kv
from aoscore.common.rpc import handler
from aoscore.iam.iamserver.nodelink import UnreachableError
from aoscore.iam.iamserver.nodes import NodeRouter
from aoscore.iam.iamserver.peer import Peer
from aoscore.iam.permissions import Permissions

_log = logging.getLogger(__name__)

T = TypeVar("T")


def peer_of(context: Any) -> str:
    """Who asks: address, and the name in the client certificate when there is one."""
    peer = Peer.of(context)
    return " ".join([peer.address, *peer.names])


async def attempt(
    what: str, node_id: str, context: Any, operation: Callable[[], Coroutine[Any, Any, T]]
) -> tuple[T | None, common.ErrorInfo | None]:
    """The result of an operation, or its error for the answer.

    Any exception is answered: a caller without an answer would wait or repeat for nothing. An operation that was begun
    is done to its end when the caller goes away meanwhile: half of it would help nobody. Raises UnreachableError.
    """
    _log.info(kv(what, nodeID=node_id, peer=peer_of(context)))
    try:
        return await unbroken(operation()), None
    except UnreachableError:
        raise
    except Exception as error:
        info = to_error_info(error)
        _log.error(kv(f"{what} failed", nodeID=node_id, error=info.message))
        _log.debug("Where it failed", exc_info=error)
        return None, convert.error_to_pb(info)


class ProvisioningService(stubs.IAMProvisioningServiceServicer):
    """Provisioning of all Nodes."""

    def __init__(self, nodes: NodeRouter) -> None:
        self._nodes = nodes

    @handler
    async def GetCertTypes(self, request: pb.GetCertTypesRequest, context: Any) -> pb.CertTypes:
        """See proto."""
        return pb.CertTypes(types=await self._nodes.of(request.node_id, context).cert_types())

    @handler
    async def StartProvisioning(
        self, request: pb.StartProvisioningRequest, context: Any
    ) -> pb.StartProvisioningResponse:
        """See proto."""
        node = self._nodes.of(request.node_id, context)
        _, error = await attempt(
            "Start provisioning", request.node_id, context, lambda: node.start_provisioning(request.password)
        )
        return pb.StartProvisioningResponse(error=error)

    @handler
    async def FinishProvisioning(
        self, request: pb.FinishProvisioningRequest, context: Any
    ) -> pb.FinishProvisioningResponse:
        """See proto."""
        node = self._nodes.of(request.node_id, context)
        _, error = await attempt(
            "Finish provisioning", request.node_id, context, lambda: node.finish_provisioning(request.password)
        )
        return pb.FinishProvisioningResponse(error=error)

    @handler
    async def Deprovision(self, request: pb.DeprovisionRequest, context: Any) -> pb.DeprovisionResponse:
        """See proto."""
        node = self._nodes.of(request.node_id, context)
        _, error = await attempt("Deprovision", request.node_id, context, lambda: node.deprovision(request.password))
        return pb.DeprovisionResponse(error=error)


class CertificateService(stubs.IAMCertificateServiceServicer):
    """Issue and renewal of certificates."""

    def __init__(self, nodes: NodeRouter) -> None:
        self._nodes = nodes

    @handler
    async def CreateKey(self, request: pb.CreateKeyRequest, context: Any) -> pb.CreateKeyResponse:
        """See proto."""
        node = self._nodes.of(request.node_id, context)
        csr, error = await attempt(
            f"Create key {request.type}",
            request.node_id,
            context,
            lambda: node.create_key(request.type, request.subject),
        )
        if error is not None:
            return pb.CreateKeyResponse(error=error)
        return pb.CreateKeyResponse(node_id=request.node_id, type=request.type, csr=csr)

    @handler
    async def ApplyCert(self, request: pb.ApplyCertRequest, context: Any) -> pb.ApplyCertResponse:
        """See proto."""
        node = self._nodes.of(request.node_id, context)
        info, error = await attempt(
            f"Apply certificate {request.type}",
            request.node_id,
            context,
            lambda: node.apply_cert(request.type, request.cert),
        )
        cert_info = pb.CertInfo(type=request.type) if info is None else convert.cert_info_to_pb(info)
        return pb.ApplyCertResponse(node_id=request.node_id, cert_info=cert_info, error=error)


class NodesService(stubs.IAMNodesServiceServicer):
    """Pausing and resuming."""

    def __init__(self, nodes: NodeRouter) -> None:
        self._nodes = nodes

    @handler
    async def PauseNode(self, request: pb.PauseNodeRequest, context: Any) -> pb.PauseNodeResponse:
        """See proto."""
        _, error = await attempt("Pause node", request.node_id, context, self._nodes.of(request.node_id, context).pause)
        return pb.PauseNodeResponse(error=error)

    @handler
    async def ResumeNode(self, request: pb.ResumeNodeRequest, context: Any) -> pb.ResumeNodeResponse:
        """See proto."""
        _, error = await attempt(
            "Resume node", request.node_id, context, self._nodes.of(request.node_id, context).resume
        )
        return pb.ResumeNodeResponse(error=error)


class PermissionsService(stubs.IAMPermissionsServiceServicer):
    """Registration of instances by the SM of this Node."""

    def __init__(self, permissions: Permissions) -> None:
        self._permissions = permissions

    @handler
    async def RegisterInstance(self, request: pb.RegisterInstanceRequest, context: Any) -> pb.RegisterInstanceResponse:
        """See proto."""
        permissions = {server: dict(rights.permissions) for server, rights in request.permissions.items()}
        secret = await self._permissions.register(convert.ident_from_pb(request.instance), permissions)
        return pb.RegisterInstanceResponse(secret=secret)

    @handler
    async def UnregisterInstance(self, request: pb.UnregisterInstanceRequest, context: Any) -> Empty:
        """See proto."""
        await self._permissions.unregister(convert.ident_from_pb(request.instance))
        return Empty()
