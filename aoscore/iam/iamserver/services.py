"""Which services are on which port (iam.md §10.1)."""

from collections.abc import Callable
from functools import partial
from typing import Any

import grpc.aio
import msgspec

from aoscore._pb.iamanager import version_pb2_grpc
from aoscore._pb.iamanager.v5 import iamanager_pb2_grpc as v5
from aoscore._pb.iamanager.v6 import iamanager_pb2_grpc as v6
from aoscore.iam.certhandler.handler import CertHandler
from aoscore.iam.currentnode.node import CurrentNode
from aoscore.iam.iamserver import legacy, protected, public
from aoscore.iam.iamserver.access import AccessList
from aoscore.iam.iamserver.admission import Port
from aoscore.iam.iamserver.nodecontroller import NodeController
from aoscore.iam.iamserver.nodes import NodeRouter
from aoscore.iam.identhandler.identifier import Identifier
from aoscore.iam.nodemanager import NodeManager
from aoscore.iam.permissions import Permissions

# What anybody may send to the public port: a node_info or a certificate request has a few kilobytes.
PUBLIC_LIMITS: list[tuple[str, Any]] = [
    ("grpc.max_receive_message_length", 64 * 1024),
    ("grpc.max_concurrent_streams", 64),
]

Register = Callable[[grpc.aio.Server], None]


class Parts(msgspec.Struct, frozen=True):
    """What the services speak for. `permissions` is None when the handler is not enabled."""

    node: CurrentNode
    nodes: NodeManager
    certs: CertHandler
    identifier: Identifier | None
    permissions: Permissions | None
    router: NodeRouter
    controller: NodeController
    access: AccessList


def public_services(parts: Parts, port: Port = Port.PUBLIC) -> list[Register]:
    """Services of both ports, as `port` has them."""
    services = [
        _add(version_pb2_grpc.add_IAMVersionServiceServicer_to_server, public.VersionService()),
        _add(v6.add_IAMPublicCurrentNodeServiceServicer_to_server, public.CurrentNodeService(parts.node)),
        _add(v6.add_IAMPublicCertServiceServicer_to_server, public.CertService(parts.certs)),
        _add(v5.add_IAMPublicServiceServicer_to_server, legacy.PublicService(parts.node, parts.certs)),
    ]
    if parts.permissions is not None:
        of_v6 = public.PublicPermissionsService(parts.permissions)
        of_v5 = legacy.PublicPermissionsService(parts.permissions)
        services += [
            _add(v6.add_IAMPublicPermissionsServiceServicer_to_server, of_v6),
            _add(v5.add_IAMPublicPermissionsServiceServicer_to_server, of_v5),
        ]
    if parts.node.info.is_main:
        services += [
            _add(v6.add_IAMPublicIdentityServiceServicer_to_server, public.IdentityService(parts.identifier)),
            _add(v5.add_IAMPublicIdentityServiceServicer_to_server, legacy.IdentityService(parts.identifier)),
            _add(
                v6.add_IAMPublicNodesServiceServicer_to_server,
                public.NodesService(parts.nodes, parts.controller, port),
            ),
            _add(v5.add_IAMPublicNodesServiceServicer_to_server, legacy.NodesService(parts.nodes)),
        ]
    return services


def protected_services(parts: Parts) -> list[Register]:
    """Services of the protected port: those of both ports and what only Aos components may do."""
    services = public_services(parts, Port.PROTECTED)
    guard = parts.access.guard
    if parts.permissions is not None:
        name = "IAMPermissionsService"
        of_v6 = guard(name, protected.PermissionsService(parts.permissions))
        of_v5 = guard(name, legacy.PermissionsService(parts.permissions))
        services += [
            _add(v6.add_IAMPermissionsServiceServicer_to_server, of_v6),
            _add(v5.add_IAMPermissionsServiceServicer_to_server, of_v5),
        ]
    if parts.node.info.is_main:
        certificates = guard("IAMCertificateService", protected.CertificateService(parts.router))
        provisioning = guard("IAMProvisioningService", protected.ProvisioningService(parts.router))
        states = guard("IAMNodesService", protected.NodesService(parts.router))
        services += [
            _add(v6.add_IAMCertificateServiceServicer_to_server, certificates),
            _add(v6.add_IAMProvisioningServiceServicer_to_server, provisioning),
            _add(v6.add_IAMNodesServiceServicer_to_server, states),
        ]
    return services


def _add(add: Callable[[Any, grpc.aio.Server], None], servicer: object) -> Register:
    return partial(add, servicer)
