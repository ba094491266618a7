"""To which Node a request goes."""

import time
from collections.abc import Callable
from typing import Any, Protocol

from aoscore._pb.iamanager.v6 import iamanager_pb2 as pb
from aoscore.common import convert
from aoscore.common.errors import FailedError, NotFoundError, from_error_info
from aoscore.common.types import CertInfo, NodeState
from aoscore.iam.certhandler.handler import CertHandler
from aoscore.iam.currentnode.node import CurrentNode
from aoscore.iam.iamserver.nodecontroller import NodeController
from aoscore.iam.iamserver.nodelink import NodeLink
from aoscore.iam.identhandler.identifier import Identifier
from aoscore.iam.nodekeys import NodeKeys, request_digest
from aoscore.iam.nodemanager import NodeManager
from aoscore.iam.provisioning import Provisioning

# How long a Node may take. Steps of provisioning run hooks, which have ten minutes each.
REPLY_LIMIT_S = 60.0
PROVISIONING_LIMIT_S = 1500.0


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
        """See NodeRequests; the password is for the hook."""
        await self._provisioning.finish(password)

    async def deprovision(self, password: str) -> None:
        """See NodeRequests; the password is for the hook."""
        await self._provisioning.deprovision(password)

    async def pause(self) -> None:
        """See NodeRequests."""
        await self._provisioning.pause()

    async def resume(self) -> None:
        """See NodeRequests."""
        await self._provisioning.resume()

    async def create_key(self, cert_type: str, subject: str) -> str:
        """See NodeRequests."""
        return await self._certs.create_key(cert_type, subject or await system_id(self._identifier))

    async def apply_cert(self, cert_type: str, pem: str) -> CertInfo:
        """See NodeRequests."""
        return await self._certs.apply_cert(cert_type, pem)


class RemoteNode:
    """NodeRequests to another Node, by its stream. What it answers is recorded here.

    A Node that can't be asked raises UnreachableError, what it refuses the error it names.
    """

    def __init__(
        self,
        node_id: str,
        remaining_s: float | None,
        *,
        nodes: NodeManager,
        keys: NodeKeys,
        controller: NodeController,
        identifier: Identifier | None,
    ) -> None:
        """`remaining_s` is how long the caller will wait, None for as long as it takes."""
        self._id = node_id
        self._remaining_s = remaining_s
        self._nodes = nodes
        self._keys = keys
        self._controller = controller
        self._identifier = identifier

    async def cert_types(self) -> list[str]:
        """See NodeRequests."""
        request = pb.IAMIncomingMessages(get_cert_types_request=pb.GetCertTypesRequest(node_id=self._id))
        return list((await self._ask(request, "cert_types_response")).types)

    async def start_provisioning(self, password: str) -> None:
        """See NodeRequests. The keys that the Node had are no proof any more."""
        await self._controller.readmit(self._id)
        link = self._controller.link(self._id)
        if self._state is NodeState.UNPROVISIONED:
            await self._keys.forget(self._id)
        start = pb.StartProvisioningRequest(node_id=self._id, password=password)
        request = pb.IAMIncomingMessages(start_provisioning_request=start)
        await self._ask(request, "start_provisioning_response", limit_s=PROVISIONING_LIMIT_S, link=link)

    async def finish_provisioning(self, password: str) -> None:
        """See NodeRequests."""
        if self._state is NodeState.PROVISIONED:
            return
        finish = pb.FinishProvisioningRequest(node_id=self._id, password=password)
        request = pb.IAMIncomingMessages(finish_provisioning_request=finish)
        await self._ask(request, "finish_provisioning_response", limit_s=PROVISIONING_LIMIT_S)
        await self._nodes.set_state(self._id, NodeState.PROVISIONED)

    async def deprovision(self, password: str) -> None:
        """See NodeRequests."""
        if await self._controller.readmit(self._id):
            return
        request = pb.IAMIncomingMessages(deprovision_request=pb.DeprovisionRequest(node_id=self._id, password=password))
        await self._ask(request, "deprovision_response", limit_s=PROVISIONING_LIMIT_S)
        await self._nodes.set_state(self._id, NodeState.UNPROVISIONED)

    async def pause(self) -> None:
        """See NodeRequests."""
        if self._state is NodeState.PAUSED:
            return
        request = pb.IAMIncomingMessages(pause_node_request=pb.PauseNodeRequest(node_id=self._id))
        await self._ask(request, "pause_node_response")
        await self._nodes.set_state(self._id, NodeState.PAUSED)

    async def resume(self) -> None:
        """See NodeRequests."""
        if self._state is NodeState.PROVISIONED:
            return
        request = pb.IAMIncomingMessages(resume_node_request=pb.ResumeNodeRequest(node_id=self._id))
        await self._ask(request, "resume_node_response")
        await self._nodes.set_state(self._id, NodeState.PROVISIONED)

    async def create_key(self, cert_type: str, subject: str) -> str:
        """See NodeRequests. The Node that answered has the key from now on."""
        create = pb.CreateKeyRequest(
            node_id=self._id, subject=subject or await system_id(self._identifier), type=cert_type
        )
        request = pb.IAMIncomingMessages(create_key_request=create)
        answer = await self._ask(request, "create_key_response", cert_type=cert_type)
        await self._keys.bind(self._id, request_digest(answer.csr))
        return str(answer.csr)

    async def apply_cert(self, cert_type: str, pem: str) -> CertInfo:
        """See NodeRequests."""
        apply = pb.ApplyCertRequest(node_id=self._id, type=cert_type, cert=pem)
        request = pb.IAMIncomingMessages(apply_cert_request=apply)
        answer = await self._ask(request, "apply_cert_response", cert_type=cert_type)
        return convert.cert_info_from_pb(answer.cert_info)

    @property
    def _state(self) -> NodeState | None:
        node = self._nodes.find(self._id)
        return node.state if node else None

    async def _ask(
        self,
        request: pb.IAMIncomingMessages,
        reply: str,
        *,
        cert_type: str = "",
        limit_s: float = REPLY_LIMIT_S,
        link: NodeLink | None = None,
    ) -> Any:
        link = link or self._controller.link(self._id)
        answer = await link.request(request, reply, cert_type=cert_type, limit_s=limit_s, remaining_s=self._remaining_s)
        if reply != "cert_types_response":
            raise_error(answer.error)
        return answer


def raise_error(message: Any) -> None:
    """Raise what a Node says is wrong. One of AosCore 9.1 may leave out codes or text (iam.md §13)."""
    if error := from_error_info(convert.error_from_pb(message)):
        raise error
    if message.message:
        raise FailedError(message.message)


async def system_id(identifier: Identifier | None) -> str:
    """The subject of certificates that nobody has named another one for. Raises NotFoundError without identifier."""
    if identifier is None:
        raise NotFoundError("the request names no subject, and no identifier tells the system id")
    return (await identifier.system_info()).system_id


class NodeRouter:
    """Finds the Node of a request. An empty id stands for this Node. `last_use_s` is when it was asked to last."""

    def __init__(
        self, node: CurrentNode, local: NodeRequests, remote: Callable[[str, float | None], NodeRequests]
    ) -> None:
        """`remote` makes the requests to another Node, by its id and the time its caller has, seconds."""
        self._node = node
        self._local = local
        self._remote = remote
        self.last_use_s = time.monotonic()

    def of(self, node_id: str, context: Any) -> NodeRequests:
        """The Node, for one call with this context."""
        self.last_use_s = time.monotonic()
        if node_id in ("", self._node.info.node_id):
            return self._local
        return self._remote(node_id, context.time_remaining())
