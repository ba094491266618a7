"""The part of iamanager.v5 that older clients still use: Nodes, certificates, identity, permissions (grpc.md)."""

from collections.abc import AsyncIterator
from typing import Any

from google.protobuf.empty_pb2 import Empty

from aoscore._pb.common.v1 import common_pb2 as common
from aoscore._pb.iamanager.v5 import iamanager_pb2 as pb
from aoscore._pb.iamanager.v5 import iamanager_pb2_grpc as stubs
from aoscore.common import convert
from aoscore.common.rpc import handler
from aoscore.common.types import CertInfo, InstanceIdent, NodeInfo
from aoscore.iam.certhandler.handler import CertHandler
from aoscore.iam.currentnode.node import CurrentNode
from aoscore.iam.iamserver.public import no_identifier
from aoscore.iam.identhandler.identifier import Identifier
from aoscore.iam.nodemanager import NodeManager
from aoscore.iam.permissions import Permissions


def node_info_to_pb(node: NodeInfo) -> pb.NodeInfo:
    """A Node in the numbering of v5."""
    return pb.NodeInfo(
        node_id=node.node_id,
        node_type=node.node_type,
        name=node.title,
        status=node.state,
        os_type=node.os_info.os,
        cpus=[
            pb.CPUInfo(
                model_name=cpu.model_name,
                num_cores=cpu.num_cores,
                num_threads=cpu.num_threads,
                arch=cpu.arch_info.architecture,
                arch_family=cpu.arch_info.variant,
                max_dmips=cpu.max_dmips,
            )
            for cpu in node.cpus
        ],
        max_dmips=node.max_dmips,
        total_ram=node.total_ram,
        partitions=[
            pb.PartitionInfo(name=part.name, types=part.types, total_size=part.total_size, path=part.path)
            for part in node.partitions
        ],
        attrs=[pb.NodeAttribute(name=name, value=value) for name, value in node.attrs.items()],
        error=None if node.error is None else convert.error_to_pb_v1(node.error),
    )


def cert_info_to_pb(info: CertInfo) -> pb.CertInfo:
    """A certificate as v5 knew it, without serial and issuer."""
    return pb.CertInfo(type=info.type, cert_url=info.cert_url, key_url=info.key_url)


class PublicService(stubs.IAMPublicServiceServicer):
    """This Node and its certificates."""

    def __init__(self, node: CurrentNode, certs: CertHandler) -> None:
        self._node = node
        self._certs = certs

    @handler
    async def GetNodeInfo(self, request: Empty, context: Any) -> pb.NodeInfo:
        """See proto."""
        return node_info_to_pb(self._node.info)

    @handler
    async def GetCert(self, request: pb.GetCertRequest, context: Any) -> pb.CertInfo:
        """See proto."""
        return cert_info_to_pb(self._certs.get_cert(request.type, request.issuer, request.serial))

    @handler
    async def SubscribeCertChanged(
        self, request: pb.SubscribeCertChangedRequest, context: Any
    ) -> AsyncIterator[pb.CertInfo]:
        """See proto."""
        async for info in self._certs.changes_of(request.type):
            yield cert_info_to_pb(info)


class IdentityService(stubs.IAMPublicIdentityServiceServicer):
    """The Unit; model and version are one text."""

    def __init__(self, identifier: Identifier | None) -> None:
        self._identifier = identifier

    @handler
    async def GetSystemInfo(self, request: Empty, context: Any) -> pb.SystemInfo:
        """See proto."""
        identifier = self._identifier or await no_identifier(context)
        info = await identifier.system_info()
        return pb.SystemInfo(system_id=info.system_id, unit_model=f"{info.unit_model};{info.version}")

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


class NodesService(stubs.IAMPublicNodesServiceServicer):
    """All Nodes, to read. Nodes themselves register by v6 alone: RegisterNode answers UNIMPLEMENTED."""

    def __init__(self, nodes: NodeManager) -> None:
        self._nodes = nodes

    @handler
    async def GetAllNodeIDs(self, request: Empty, context: Any) -> pb.NodesID:
        """See proto."""
        return pb.NodesID(ids=self._nodes.ids())

    @handler
    async def GetNodeInfo(self, request: pb.GetNodeInfoRequest, context: Any) -> pb.NodeInfo:
        """See proto."""
        return node_info_to_pb(self._nodes.get(request.node_id))

    @handler
    async def SubscribeNodeChanged(self, request: Empty, context: Any) -> AsyncIterator[pb.NodeInfo]:
        """See proto."""
        async for info in self._nodes.changes.values():
            yield node_info_to_pb(info)


class PublicPermissionsService(stubs.IAMPublicPermissionsServiceServicer):
    """Look-up by secret, as the vehicle information service does it."""

    def __init__(self, permissions: Permissions) -> None:
        self._permissions = permissions

    @handler
    async def GetPermissions(self, request: pb.PermissionsRequest, context: Any) -> pb.PermissionsResponse:
        """See proto."""
        ident, rights = self._permissions.find(request.secret, request.functional_server_id)
        instance = common.InstanceIdent(service_id=ident.item_id, subject_id=ident.subject_id, instance=ident.instance)
        return pb.PermissionsResponse(instance=instance, permissions=pb.Permissions(permissions=rights))


def ident_from_pb(message: common.InstanceIdent) -> InstanceIdent:
    """An instance as v5 names it; all of them are of services."""
    return InstanceIdent(message.service_id, message.subject_id, message.instance)


class PermissionsService(stubs.IAMPermissionsServiceServicer):
    """Registration of instances."""

    def __init__(self, permissions: Permissions) -> None:
        self._permissions = permissions

    @handler
    async def RegisterInstance(self, request: pb.RegisterInstanceRequest, context: Any) -> pb.RegisterInstanceResponse:
        """See proto."""
        permissions = {server: dict(rights.permissions) for server, rights in request.permissions.items()}
        secret = await self._permissions.register(ident_from_pb(request.instance), permissions)
        return pb.RegisterInstanceResponse(secret=secret)

    @handler
    async def UnregisterInstance(self, request: pb.UnregisterInstanceRequest, context: Any) -> Empty:
        """See proto."""
        await self._permissions.unregister(ident_from_pb(request.instance))
        return Empty()
