"""To which Node a request goes."""

from typing import Protocol

from aoscore.common.errors import NotFoundError
from aoscore.common.types import CertInfo
from aoscore.iam.certhandler.handler import CertHandler
from aoscore.iam.currentnode.node import CurrentNode
from aoscore.iam.identhandler.identifier import Identifier
from aoscore.iam.provisioning import Provisioning


class NodeRequests(Protocol):
    """What can be asked of a Node, wherever it is. Failures are AosErrors."""

    async def cert_types(self) -> list[str]:
        """Certificate types that the cloud issues for the Node."""

    async def start_provisioning(self, password: str) -> None:
        """Empty and prepare the key storages."""

    async def finish_provisioning(self, password: str) -> None:
        """Put the Node into service."""

    async def deprovision(self, password: str) -> None:
        """Take the Node out of service."""

    async def pause(self) -> None:
        """Let no instances run."""

    async def resume(self) -> None:
        """Let instances run again."""

    async def create_key(self, cert_type: str, subject: str) -> str:
        """A new key; the PEM request for its certificate. An empty subject stands for the system id."""

    async def apply_cert(self, cert_type: str, pem: str) -> CertInfo:
        """Take an issued certificate into use."""


class LocalNode:
    """NodeRequests to this Node."""

    def __init__(self, provisioning: Provisioning, certs: CertHandler, identifier: Identifier | None) -> None:
        self._provisioning = provisioning
        self._certs = certs
        self._identifier = identifier

    async def cert_types(self) -> list[str]:
        """See NodeRequests."""
        return self._certs.cert_types()

    async def start_provisioning(self, password: str) -> None:
        """See NodeRequests."""
        await self._provisioning.start(password)

    async def finish_provisioning(self, password: str) -> None:
        """See NodeRequests; nothing is left to do with the password."""
        await self._provisioning.finish()

    async def deprovision(self, password: str) -> None:
        """See NodeRequests; nothing is left to do with the password."""
        await self._provisioning.deprovision()

    async def pause(self) -> None:
        """See NodeRequests."""
        await self._provisioning.pause()

    async def resume(self) -> None:
        """See NodeRequests."""
        await self._provisioning.resume()

    async def create_key(self, cert_type: str, subject: str) -> str:
        """See NodeRequests."""
        if not subject:
            if self._identifier is None:
                raise NotFoundError("the request names no subject, and no identifier tells the system id")
            subject = (await self._identifier.system_info()).system_id
        return await self._certs.create_key(cert_type, subject)

    async def apply_cert(self, cert_type: str, pem: str) -> CertInfo:
        """See NodeRequests."""
        return await self._certs.apply_cert(cert_type, pem)


class NodeRouter:
    """Finds the Node of a request. An empty id stands for this Node."""

    def __init__(self, node: CurrentNode, local: NodeRequests) -> None:
        self._node = node
        self._local = local

    def of(self, node_id: str) -> NodeRequests:
        """Raises NotFoundError at once for a Node that can't be reached."""
        if node_id in ("", self._node.info.node_id):
            return self._local
        raise NotFoundError(f"node {node_id!r} is not connected")
