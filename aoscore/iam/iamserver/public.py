"""Services of both ports: version, identity, certificates, Nodes, look-up of permissions (iam.md §10, §12)."""

from collections.abc import AsyncIterable, AsyncIterator
from typing import Any, NoReturn

import grpc
from google.protobuf.empty_pb2 import Empty

from aoscore._pb.common.v2 import common_pb2 as common
from aoscore._pb.iamanager import version_pb2, version_pb2_grpc
from aoscore._pb.iamanager.v6 import iamanager_pb2 as pb
from aoscore._pb.iamanager.v6 import iamanager_pb2_grpc as stubs
from aoscore.common import convert
from aoscore.common.rpc import handler
from aoscore.iam.certhandler.handler import CertHandler
from aoscore.iam.currentnode.node import CurrentNode
from aoscore.iam.iamserver.admission import Port
from aoscore.iam.iamserver.nodecontroller import NodeController
from aoscore.iam.identhandler.identifier import Identifier
from aoscore.iam.nodemanager import NodeManager
from aoscore.iam.permissions import Permissions

API_VERSION = 6


async def no_identifier(context: Any) -> NoReturn:
    """Refuse a question about the Unit's identity on a Node that was not told where it is."""
    await context.abort(grpc.StatusCode.UNAVAILABLE, "no identifier is configured")
    raise AssertionError("abort raises")


class VersionService(version_pb2_grpc.IAMVersionServiceServicer):
    """Which interface is served."""

    @handler
    async def GetAPIVersion(self, request: Empty, context: Any) -> version_pb2.APIVersion:
        """See proto."""
        return version_pb2.APIVersion(version=API_VERSION)


class IdentityService(stubs.IAMPublicIdentityServiceServicer):
    """The Unit. Without an identifier all answers are UNAVAILABLE."""

    def __init__(self, identifier: Identifier | None) -> None:
        self._identifier = identifier

    @handler
    async def GetSystemInfo(self, request: Empty, context: Any) -> pb.SystemInfo:
        """See proto."""
        identifier = self._identifier or await no_identifier(context)
        return convert.system_info_to_pb(await identifier.system_info())

    @handler
    async def GetSubjects(self, request: Empty, context: Any) -> pb.Subjects:
        """See proto."""
        identifier = self._identifier or await no_identifier(context)
        return pb.Subjects(subjects=await identifier.subjects())

    @handler
    async def SubscribeSubjectsChanged(self, request: Empty, context: Any) -> AsyncIterator[pb.Subjects]:
        """See proto."""
        identifier = self._identifier or await no_identifier(context)
        async for subjects in identifier.subjects_changes.values():
            yield pb.Subjects(subjects=subjects)


class CurrentNodeService(stubs.IAMPublicCurrentNodeServiceServicer):
    """This Node, live."""

    def __init__(self, node: CurrentNode) -> None:
        self._node = node

    @handler
    async def GetCurrentNodeInfo(self, request: Empty, context: Any) -> pb.NodeInfo:
        """See proto."""
        return convert.node_info_to_pb(self._node.info)

    @handler
    async def SubscribeCurrentNodeChanged(self, request: Empty, context: Any) -> AsyncIterator[pb.NodeInfo]:
        """See proto."""
        async for info in self._node.changes.values():
            yield convert.node_info_to_pb(info)


class CertService(stubs.IAMPublicCertServiceServicer):
    """Certificates of this Node."""

    def __init__(self, certs: CertHandler) -> None:
        self._certs = certs

    @handler
    async def GetCert(self, request: pb.GetCertRequest, context: Any) -> pb.CertInfo:
        """See proto."""
        return convert.cert_info_to_pb(self._certs.get_cert(request.type, request.issuer, request.serial))

    @handler
    async def SubscribeCertChanged(
        self, request: pb.SubscribeCertChangedRequest, context: Any
    ) -> AsyncIterator[pb.CertInfo]:
        """See proto."""
        async for info in self._certs.changes_of(request.type):
            yield convert.cert_info_to_pb(info)


class NodesService(stubs.IAMPublicNodesServiceServicer):
    """All Nodes, and the streams of those that register on this port."""

    def __init__(self, nodes: NodeManager, controller: NodeController, port: Port) -> None:
        self._nodes = nodes
        self._controller = controller
        self._port = port

    @handler
    async def GetAllNodeIDs(self, request: Empty, context: Any) -> pb.NodesID:
        """See proto."""
        return pb.NodesID(ids=self._nodes.ids())

    @handler
    async def GetNodeInfo(self, request: pb.GetNodeInfoRequest, context: Any) -> pb.NodeInfo:
        """See proto."""
        return convert.node_info_to_pb(self._nodes.get(request.node_id))

    @handler
    async def SubscribeNodeChanged(self, request: Empty, context: Any) -> AsyncIterator[pb.NodeInfo]:
        """See proto."""
        async for info in self._nodes.changes.values():
            yield convert.node_info_to_pb(info)

    @handler
    async def RegisterNode(self, request_iterator: AsyncIterable[pb.IAMOutgoingMessages], context: Any) -> None:
        """See proto."""
        await self._controller.serve(request_iterator, context, self._port)


class PublicPermissionsService(stubs.IAMPublicPermissionsServiceServicer):
    """Look-up by secret."""

    def __init__(self, permissions: Permissions) -> None:
        self._permissions = permissions

    @handler
    async def GetPermissions(self, request: pb.PermissionsRequest, context: Any) -> pb.PermissionsResponse:
        """See proto."""
        ident, rights = self._permissions.find(request.secret, request.functional_server_id)
        # The contract names item, subject and index only (grpc.md, PermissionsResponse).
        instance = common.InstanceIdent(item_id=ident.item_id, subject_id=ident.subject_id, instance=ident.instance)
        return pb.PermissionsResponse(instance=instance, permissions=pb.Permissions(permissions=rights))
