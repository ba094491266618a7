"""The protected side of IAM on the Main Node (grpc.md, iamanager.v6; cm-cloud.md §11)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Self

import grpc.aio

from aoscore._pb.iamanager.v6 import iamanager_pb2 as pb
from aoscore._pb.iamanager.v6 import iamanager_pb2_grpc as stubs
from aoscore.common import convert
from aoscore.common.errors import from_error_info
from aoscore.common.rpc import LazyChannel
from aoscore.common.tls import TlsIdentity
from aoscore.common.types import CertInfo

CALL_TIMEOUT_S: Final = 10.0
PROVISIONING_TIMEOUT_S: Final = 600.0
# Keys in a token take a while, and a Secondary Node is asked through the Main Node.
KEY_TIMEOUT_S: Final = 60.0


class IamClient:
    """Nodes, keys, certificates and provisioning. Use as an async context manager.

    `identity` gives the certificate to use for a channel that is opened now; None means plain text. Every call raises
    AosError: of the link, or the one IAM answers.
    """

    def __init__(self, address: str, identity: Callable[[], TlsIdentity | None]) -> None:
        self._channel = LazyChannel(address, identity)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._channel.drop()

    async def _call(
        self,
        what: str,
        stub: Callable[[grpc.aio.Channel], Any],
        method: str,
        request: Any,
        timeout_s: float = CALL_TIMEOUT_S,
    ) -> Any:
        answer = await self._channel.call(f"{what} by IAM", stub, method, request, timeout_s=timeout_s)
        info = convert.error_from_pb(answer.error) if hasattr(answer, "error") else None
        if error := from_error_info(info):
            raise error
        return answer

    async def pause_node(self, node_id: str) -> None:
        """Takes a node out of service."""
        request = pb.PauseNodeRequest(node_id=node_id)
        await self._call(f"pausing node {node_id}", stubs.IAMNodesServiceStub, "PauseNode", request)

    async def resume_node(self, node_id: str) -> None:
        """Takes a paused node into service again."""
        request = pb.ResumeNodeRequest(node_id=node_id)
        await self._call(f"resuming node {node_id}", stubs.IAMNodesServiceStub, "ResumeNode", request)

    async def create_key(self, node_id: str, cert_type: str, password: str) -> str:
        """Makes a new key on a node; its certificate request, PEM."""
        request = pb.CreateKeyRequest(node_id=node_id, subject="", type=cert_type, password=password)
        what = f"creating key {cert_type} of node {node_id}"
        answer = await self._call(what, stubs.IAMCertificateServiceStub, "CreateKey", request, KEY_TIMEOUT_S)
        return str(answer.csr)

    async def apply_cert(self, node_id: str, cert_type: str, chain_pem: str) -> CertInfo:
        """Installs a certificate on a node."""
        request = pb.ApplyCertRequest(node_id=node_id, type=cert_type, cert=chain_pem)
        what = f"applying certificate {cert_type} of node {node_id}"
        answer = await self._call(what, stubs.IAMCertificateServiceStub, "ApplyCert", request, KEY_TIMEOUT_S)
        return convert.cert_info_from_pb(answer.cert_info)

    async def cert_types(self, node_id: str) -> tuple[str, ...]:
        """The certificate types a node needs."""
        request = pb.GetCertTypesRequest(node_id=node_id)
        what = f"certificate types of node {node_id}"
        answer = await self._call(what, stubs.IAMProvisioningServiceStub, "GetCertTypes", request)
        return tuple(answer.types)

    async def start_provisioning(self, node_id: str, password: str) -> None:
        """Prepares a node's key storage."""
        request = pb.StartProvisioningRequest(node_id=node_id, password=password)
        await self._provision(f"provisioning of node {node_id}", "StartProvisioning", request)

    async def finish_provisioning(self, node_id: str, password: str) -> None:
        """Ends the provisioning of a node."""
        request = pb.FinishProvisioningRequest(node_id=node_id, password=password)
        await self._provision(f"end of provisioning of node {node_id}", "FinishProvisioning", request)

    async def deprovision(self, node_id: str, password: str) -> None:
        """Takes a node out of the Unit."""
        request = pb.DeprovisionRequest(node_id=node_id, password=password)
        await self._provision(f"deprovisioning of node {node_id}", "Deprovision", request)

    async def _provision(self, what: str, method: str, request: Any) -> None:
        await self._call(what, stubs.IAMProvisioningServiceStub, method, request, PROVISIONING_TIMEOUT_S)
