"""Handles the cloud's certificate and provisioning messages (cm-cloud.md §11, cloud-protocol §6.13)."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from aoscore.cm.communication.messages import (
    CertificateRequest,
    CertType,
    DeprovisioningRequest,
    DeprovisioningResponse,
    ErrorInfo,
    FinishProvisioningRequest,
    FinishProvisioningResponse,
    InstalledCertificate,
    InstallUnitCertificatesConfirmation,
    IssuedCertificate,
    IssuedUnitCertificates,
    IssueUnitCertificates,
    Message,
    NodeCSR,
    RenewCertificatesNotification,
    StartProvisioningRequest,
    StartProvisioningResponse,
    message_type,
)
from aoscore.common.errors import AosError, FailedError, NotFoundError, UnreachableError, to_error_info
from aoscore.common.log import kv
from aoscore.common.types import CertInfo

_log = logging.getLogger(__name__)

# IAM warns of an ending certificate while it starts, and the cloud may ask at once; what is missed here waits for the
# cloud to ask again.
_IAM_WAIT_S: Final = 30.0
_IAM_RETRY_S: Final = 1.0

_INTERRUPTED: Final = FailedError("CM was restarted in the middle of it, and keeps no passwords: ask again")


class CertificateAuthorityFront(Protocol):
    """IAM's part in it."""

    async def create_key(self, node_id: str, cert_type: str, password: str) -> str: ...

    async def apply_cert(self, node_id: str, cert_type: str, chain_pem: str) -> CertInfo: ...

    async def cert_types(self, node_id: str) -> tuple[str, ...]: ...

    async def start_provisioning(self, node_id: str, password: str) -> None: ...

    async def finish_provisioning(self, node_id: str, password: str) -> None: ...

    async def deprovision(self, node_id: str, password: str) -> None: ...


class Sender(Protocol):
    """The way to the cloud."""

    async def send(self, message: Message) -> object: ...


def installation_order(certificates: Sequence[IssuedCertificate], main_node_id: str) -> list[IssuedCertificate]:
    """Other nodes before the Main Node, nodes by id, `iam` last within a node: IAM restarts when that one changes."""
    return sorted(
        certificates,
        key=lambda entry: (
            entry.node.codename == main_node_id,
            entry.node.codename,
            entry.type is CertType.IAM,
        ),
    )


class Certificates:
    """Renewal of certificates and provisioning of nodes, on behalf of the cloud."""

    def __init__(
        self,
        iam: CertificateAuthorityFront,
        cloud: Sender,
        *,
        main_node_id: Callable[[], str],
        is_provisioned: Callable[[str], bool],
    ) -> None:
        self._iam = iam
        self._cloud = cloud
        self._main_node_id = main_node_id
        self._is_provisioned = is_provisioned

    async def on_renew(self, message: RenewCertificatesNotification) -> None:
        """Makes new keys and asks for certificates; what does not work is reported, the others go on."""
        secrets = {entry.node.codename: entry.secret for entry in message.unit_secrets.nodes}
        requests, failed = [], []
        until_s = asyncio.get_running_loop().time() + _IAM_WAIT_S
        for entry in message.certificates:
            node_id = entry.node.codename
            try:
                if node_id not in secrets:
                    raise NotFoundError(f"the cloud sent no secret for node {node_id}")
                csr = await self._create_key(node_id, entry.type, secrets[node_id], until_s)
                requests.append(CertificateRequest(type=entry.type, node=entry.node, csr=csr))
            except AosError as error:
                _log.error(kv("Can't renew certificate", nodeID=node_id, type=entry.type, error=error))
                info = ErrorInfo.of(to_error_info(error))
                failed.append(InstalledCertificate(type=entry.type, node=entry.node, serial="", error_info=info))
        if requests:
            await self._cloud.send(IssueUnitCertificates(requests=tuple(requests)))
        if failed:
            await self._cloud.send(InstallUnitCertificatesConfirmation(certificates=tuple(failed)))

    async def _create_key(self, node_id: str, cert_type: str, password: str, until_s: float) -> str:
        """A new key's certificate request; waits for IAM until `until_s` of the loop's time. Raises AosError."""
        while True:
            try:
                return await self._iam.create_key(node_id, cert_type, password)
            except UnreachableError as error:
                if asyncio.get_running_loop().time() >= until_s:
                    raise
                _log.warning(kv("Waiting for IAM", nodeID=node_id, type=cert_type, error=error))
            await asyncio.sleep(_IAM_RETRY_S)

    async def on_interrupted_renewal(self, message: RenewCertificatesNotification) -> None:
        """Tells that a renewal was not finished when CM ended: its passwords are gone, the cloud has to ask again."""
        info = ErrorInfo.of(to_error_info(_INTERRUPTED))
        await self._cloud.send(
            InstallUnitCertificatesConfirmation(
                certificates=tuple(
                    InstalledCertificate(type=entry.type, node=entry.node, serial="", error_info=info)
                    for entry in message.certificates
                )
            )
        )

    async def on_issued(self, message: IssuedUnitCertificates) -> None:
        """Applies new certificates, each for itself, and reports every result."""
        results = []
        for entry in installation_order(message.certificates, self._main_node_id()):
            node_id, serial, info = entry.node.codename, "", None
            try:
                serial = (await self._iam.apply_cert(node_id, entry.type, entry.certificate_chain)).serial
            except AosError as error:
                _log.error(kv("Can't apply certificate", nodeID=node_id, type=entry.type, error=error))
                info = ErrorInfo.of(to_error_info(error))
            results.append(InstalledCertificate(type=entry.type, node=entry.node, serial=serial, error_info=info))
        if results:
            await self._cloud.send(InstallUnitCertificatesConfirmation(certificates=tuple(results)))

    async def on_start_provisioning(self, message: StartProvisioningRequest) -> None:
        """Prepares a node and collects its certificate requests."""
        node_id, csrs, info = message.node.codename, [], None
        try:
            await self._iam.start_provisioning(node_id, message.password)
            for cert_type in await self._iam.cert_types(node_id):
                csr = await self._iam.create_key(node_id, cert_type, message.password)
                csrs.append(NodeCSR(type=cert_type, csr=csr))
        except AosError as error:
            info = self._failed("start provisioning", node_id, error)
        await self._cloud.send(
            StartProvisioningResponse(
                correlation_id=message.correlation_id, node=message.node, error_info=info, csrs=tuple(csrs)
            )
        )

    async def on_finish_provisioning(self, message: FinishProvisioningRequest) -> None:
        """Applies the certificates of a node and ends its provisioning."""
        node_id, info = message.node.codename, None
        try:
            for entry in message.certificates:
                await self._iam.apply_cert(node_id, entry.type, entry.chain)
            await self._iam.finish_provisioning(node_id, message.password)
        except AosError as error:
            info = self._failed("finish provisioning", node_id, error)
        await self._cloud.send(
            FinishProvisioningResponse(correlation_id=message.correlation_id, node=message.node, error_info=info)
        )

    async def on_deprovisioning(self, message: DeprovisioningRequest) -> None:
        """Takes a node out of the Unit."""
        node_id, info = message.node.codename, None
        try:
            await self._iam.deprovision(node_id, message.password)
        except AosError as error:
            info = self._failed("deprovision", node_id, error)
        await self._cloud.send(
            DeprovisioningResponse(correlation_id=message.correlation_id, node=message.node, error_info=info)
        )

    async def on_interrupted(
        self, message: StartProvisioningRequest | FinishProvisioningRequest | DeprovisioningRequest
    ) -> None:
        """Answers a request with which CM had not finished when it ended: done after all, or to be asked again."""
        node_id, node, correlation_id = message.node.codename, message.node, message.correlation_id
        info = self._failed(f"finish {message_type(message)}", node_id, _INTERRUPTED)
        is_provisioned = self._is_provisioned(node_id)
        answer: Message
        match message:
            case StartProvisioningRequest():
                answer = StartProvisioningResponse(correlation_id=correlation_id, node=node, error_info=info, csrs=())
            case FinishProvisioningRequest():
                info = None if is_provisioned else info
                answer = FinishProvisioningResponse(correlation_id=correlation_id, node=node, error_info=info)
            case DeprovisioningRequest():
                info = info if is_provisioned else None
                answer = DeprovisioningResponse(correlation_id=correlation_id, node=node, error_info=info)
        await self._cloud.send(answer)

    @staticmethod
    def _failed(what: str, node_id: str, error: AosError) -> ErrorInfo | None:
        _log.error(kv(f"Can't {what}", nodeID=node_id, error=error))
        return ErrorInfo.of(to_error_info(error))
