"""The Main Node's end of all RegisterNode streams (iam.md §9.1, §9.2)."""

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import grpc

from aoscore._pb.iamanager.v6 import iamanager_pb2 as pb
from aoscore.common import convert
from aoscore.common.errors import AosError, first_cause
from aoscore.common.log import kv
from aoscore.common.rpc import begin_answers
from aoscore.common.types import NodeInfo
from aoscore.iam.iamserver.admission import (
    Accept,
    Evidence,
    Ignore,
    Learn,
    Port,
    Record,
    Refuse,
    SetAside,
    judge,
)
from aoscore.iam.iamserver.nodelink import NodeLink, UnreachableError
from aoscore.iam.iamserver.peer import Peer
from aoscore.iam.nodekeys import NodeKeys
from aoscore.iam.nodemanager import NodeManager

_log = logging.getLogger(__name__)

# The public port takes calls of anybody. A gateway brings the streams of all Nodes behind it from one address.
MAX_PUBLIC_STREAMS = 64
MAX_PUBLIC_STREAMS_OF_PEER = 16
FIRST_MESSAGE_TIMEOUT_S = 10.0
_MAX_TOLD = 256


class RefusedError(AosError):
    """The stream must end. `code` is its status."""

    def __init__(self, text: str, code: grpc.StatusCode = grpc.StatusCode.PERMISSION_DENIED) -> None:
        super().__init__(text)
        self.code = code


class NodeController:
    """Knows by which stream each Node is connected.

    A stream shows one Node. Only the stream that holds a Node may change what is known of it, and only its end makes
    the Node disconnected. Streams that are set aside hold Nodes of which the record says that they are in service
    while they say that they are new: `readmit` takes them up.
    """

    def __init__(
        self,
        nodes: NodeManager,
        keys: NodeKeys,
        own_id: str,
        *,
        evidence: Callable[[Peer], Awaitable[Evidence]],
        learn_keys: bool = False,
    ) -> None:
        """`evidence` says what the certificate of a peer is worth."""
        self._nodes = nodes
        self._keys = keys
        self._own_id = own_id
        self._evidence = evidence
        self._learn_keys = learn_keys
        self._links: dict[str, NodeLink] = {}
        self._aside: dict[str, tuple[NodeLink, NodeInfo]] = {}
        self._public_streams: Counter[str] = Counter()
        self._told: dict[str, str] = {}
        self._lock = asyncio.Lock()

    def link(self, node_id: str) -> NodeLink:
        """The stream of a Node. Raises UnreachableError at once when it has none."""
        if link := self._links.get(node_id):
            return link
        if node_id in self._aside:
            raise UnreachableError(
                f"node {node_id!r} is in service but shows up as new: deprovision it or start provisioning to use it"
            )
        raise UnreachableError(
            f"node {node_id!r} is not {'known' if self._nodes.find(node_id) is None else 'connected'}"
        )

    async def readmit(self, node_id: str) -> bool:
        """Somebody wants a Node that was set aside to be what it says, an unprovisioned one; whether there was one."""
        async with self._lock:
            link, node = self._aside.pop(node_id, (None, None))
            if link is None or node is None:
                return False
            _log.warning(kv("Node in service that shows up as new is taken up as new", nodeID=node_id))
            await self._keys.forget(node_id)
            await self._nodes.connect(node)
            self._links[node_id] = link
            return True

    async def serve(self, requests: AsyncIterable[pb.IAMOutgoingMessages], context: Any, port: Port) -> None:
        """One Node, from its call to the end of its stream."""
        peer = Peer.of(context)
        link = NodeLink(port, peer.host)
        try:
            with self._place_of(peer, port):
                await begin_answers(context)
                async with asyncio.TaskGroup() as tasks:
                    work = tasks.create_task(link.work(context.write))
                    try:
                        await self._read(link, peer, requests)
                    finally:
                        work.cancel()
        except Exception as error:
            cause = first_cause(error)
            if not isinstance(cause, RefusedError | UnreachableError):
                raise
            self._tell(link.node_id or peer.host, str(cause), peer)
            code = cause.code if isinstance(cause, RefusedError) else grpc.StatusCode.INTERNAL
            await context.abort(code, str(cause))
        finally:
            await self._forget(link)

    @contextlib.contextmanager
    def _place_of(self, peer: Peer, port: Port) -> Iterator[None]:
        """A place among the streams of the public port, while there is one."""
        if port is Port.PROTECTED:
            yield
            return
        if (
            self._public_streams.total() >= MAX_PUBLIC_STREAMS
            or self._public_streams[peer.host] >= MAX_PUBLIC_STREAMS_OF_PEER
        ):
            raise RefusedError("too many nodes are registering", grpc.StatusCode.RESOURCE_EXHAUSTED)
        self._public_streams[peer.host] += 1
        try:
            yield
        finally:
            self._public_streams[peer.host] -= 1
            if not self._public_streams[peer.host]:
                del self._public_streams[peer.host]

    async def _read(self, link: NodeLink, peer: Peer, requests: AsyncIterable[pb.IAMOutgoingMessages]) -> None:
        async for message in _prompt(requests):
            kind = message.WhichOneof("IAMOutgoingMessage")
            match kind:
                case None:
                    pass
                case "node_info":
                    await self._on_node_info(link, peer, convert.node_info_from_pb(message.node_info))
                case _:
                    if not link.on_reply(kind, getattr(message, kind)):
                        _log.warning(kv("Reply that nobody waits for", nodeID=link.node_id, kind=kind))

    async def _on_node_info(self, link: NodeLink, peer: Peer, node: NodeInfo) -> None:
        evidence = await self._evidence(peer) if link.port is Port.PROTECTED else Evidence()
        async with self._lock:
            if link.node_id not in ("", node.node_id):
                raise RefusedError(f"the stream of node {link.node_id!r} shows node {node.node_id!r}")
            link.node_id = node.node_id
            verdict = judge(
                node, link.port, evidence, self._record(link), own_id=self._own_id, learn_keys=self._learn_keys
            )
            match verdict:
                case Accept():
                    await self._accept(link, node)
                case Learn():
                    _log.warning(kv("Key of Node taken on trust", nodeID=node.node_id, peer=peer.address))
                    await self._keys.bind(node.node_id, peer.key)
                    await self._accept(link, node)
                case SetAside():
                    await self._drop(link)
                    # An error becomes an alert in the cloud.
                    self._tell(node.node_id, "it is in service and shows up as new", peer, level=logging.ERROR)
                    self._aside[node.node_id] = link, node
                case Ignore(reason):
                    self._tell(node.node_id, reason, peer)
                    await self._drop(link)
                case Refuse(reason):
                    raise RefusedError(f"node {node.node_id!r} is refused: {reason}")

    def _record(self, link: NodeLink) -> Record:
        known = self._nodes.find(link.node_id)
        other = self._links.get(link.node_id, link)
        return Record(
            state=known.state if known else None,
            has_protected_link=other is not link and other.port is Port.PROTECTED,
            has_link_elsewhere=other.port is Port.PUBLIC and other.host != link.host,
            has_keys=self._keys.knows(link.node_id),
        )

    async def _accept(self, link: NodeLink, node: NodeInfo) -> None:
        await self._nodes.connect(node)
        self._told.pop(node.node_id, None)
        self._aside.pop(node.node_id, None)
        older = self._links.get(node.node_id)
        if older is not link:
            if older is not None:
                older.give_up()
            self._links[node.node_id] = link
            _log.info(kv("Node connected", nodeID=node.node_id, state=node.state, port=link.port.value))

    async def _drop(self, link: NodeLink) -> None:
        """The stream holds its Node no longer; nothing happens when another one does."""
        if self._aside.get(link.node_id, (None,))[0] is link:
            del self._aside[link.node_id]
        if self._links.get(link.node_id) is link:
            del self._links[link.node_id]
            _log.info(kv("Node disconnected", nodeID=link.node_id))
            await self._nodes.disconnect(link.node_id)

    async def _forget(self, link: NodeLink) -> None:
        if link.node_id:
            async with self._lock:
                await self._drop(link)

    def _tell(self, about: str, text: str, peer: Peer, *, level: int = logging.WARNING) -> None:
        """Log what is wrong with a stream once: Nodes try again every few seconds."""
        if self._told.get(about) == text:
            return
        if len(self._told) >= _MAX_TOLD:
            self._told.clear()
        self._told[about] = text
        _log.log(level, kv("Node can't be used", nodeID=about, reason=text, peer=peer.address))


async def _prompt(requests: AsyncIterable[pb.IAMOutgoingMessages]) -> AsyncIterator[pb.IAMOutgoingMessages]:
    """The messages of a stream, of which the first must come soon."""
    messages = aiter(requests)
    try:
        async with asyncio.timeout(FIRST_MESSAGE_TIMEOUT_S):
            first = await anext(messages, None)
    except TimeoutError:
        raise RefusedError("no node_info came", grpc.StatusCode.DEADLINE_EXCEEDED) from None
    if first is not None:
        yield first
        async for message in messages:
            yield message
