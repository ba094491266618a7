"""A gateway: what it does on the link of each node (mp.md §2, §6).

channel 1, 2    IAM of the node  ->  RegisterNode at main IAM, public and protected
channel 3       its clock        ->  answered here
channel 4       its SM           ->  RegisterSM at CM
channel 18, 17  calls, downloads ->  CM, CM's file server
"""

import asyncio
import logging
from collections.abc import Coroutine, Sequence
from typing import Any

from google.protobuf.message import DecodeError

from aoscore._pb.servicemanager.v5 import servicemanager_pb2 as pb
from aoscore.common.aio import Broadcast
from aoscore.common.errors import AosError, InvalidArgumentError
from aoscore.common.log import kv
from aoscore.common.rpc import LazyChannel
from aoscore.common.tls import TlsIdentity
from aoscore.mp.cmclient.calls import CallServer
from aoscore.mp.communication.connection import Connection, Contexts, LinkSettings, restart_on_renewal
from aoscore.mp.communication.connector import Reader
from aoscore.mp.communication.relay import ServerRelay
from aoscore.mp.filechunker.downloads import DownloadServer, clock_sync
from aoscore.mp.legacy import LegacyGateway
from aoscore.mp.status import Status

_log = logging.getLogger(__name__)

# Addresses of blobs that a link remembers; a node asks again for what is no longer among them.
_MAX_OFFERED = 4096


class NodeIds:
    """Which link belongs to which node (mp-wire §11): the first id that proves a certificate stays."""

    def __init__(self) -> None:
        self._links: dict[str, Connection] = {}

    def claim(self, connection: Connection, node_id: str) -> None:
        """The node at the end of a link says who it is. Raises InvalidArgumentError when it is not.

        A node that comes over a second link has lost the first, which closes. Whoever has another key is not that node,
        as long as that has a link: after a renewal it is let in once the link of before is gone.
        """
        if connection.node_id == node_id:
            return
        if connection.node_id:
            _log.error(kv("Node changes its id, link is closed", nodeID=connection.node_id, other=node_id))
            connection.shut(f"node {connection.node_id} says that it is {node_id}")
            raise InvalidArgumentError(f"this link belongs to node {connection.node_id}, not to {node_id}")
        older = self._links.get(node_id)
        if older is not None and _keys_differ(older, connection):
            _log.error(kv("Another key than that of the node, link is closed", nodeID=node_id, peer=connection.peer))
            connection.shut(f"node {node_id} is connected with another key")
            raise InvalidArgumentError(f"node {node_id} is connected with another key")
        if older is not None:
            _log.error(kv("Node came over a second link, the older is closed", nodeID=node_id, peer=older.peer))
            older.shut("the node came over another link")
        self._links[node_id] = connection
        connection.node_id = node_id
        connection.node_known.set()

    def forget(self, connection: Connection) -> None:
        """A link has ended."""
        if self._links.get(connection.node_id) is connection:
            del self._links[connection.node_id]


def _keys_differ(one: Connection, other: Connection) -> bool:
    """Whether the certificates on a channel that both have are for different keys."""
    return any(
        _public_key(one.certificates[port]) != _public_key(other.certificates[port])
        for port in one.certificates.keys() & other.certificates.keys()
    )


def _public_key(der: bytes) -> bytes:
    # Import on use: only a Node that is here twice is looked at so closely.
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization

    key = x509.load_der_x509_certificate(der).public_key()
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


class Gateway:
    """All links. `cm` is for single calls, None while provisioning; `renewals`: which channels use a certificate.

    `legacy` has what is served to peers of the older kind instead.
    """

    def __init__(
        self,
        settings: LinkSettings,
        contexts: Contexts,
        ids: NodeIds,
        *,
        relays: Sequence[ServerRelay],
        cm: LazyChannel | None,
        legacy: LegacyGateway,
        status: Status,
        renewals: Sequence[tuple[Broadcast[TlsIdentity], Sequence[int]]] = (),
    ) -> None:
        self._settings = settings
        self._contexts = contexts
        self._ids = ids
        self._relays = relays
        self._cm = cm
        self._legacy = legacy
        self._status = status
        self._renewals = renewals

    async def serve(self, reader: Reader, writer: asyncio.StreamWriter, peer: str) -> None:
        """One node, from its connection to the end of its link. Raises AosError or OSError when the link breaks."""
        connection = Connection(reader, writer, self._settings, self._contexts, peer=peer)
        try:
            with self._status.watching(connection):
                await connection.run(self._serve_channels)
        finally:
            self._ids.forget(connection)

    async def _serve_channels(self, connection: Connection) -> None:
        async with asyncio.TaskGroup() as tasks:
            for service in self._legacy.services(connection) if connection.is_legacy else self._services(connection):
                tasks.create_task(service)
            for changed, ports in self._renewals:
                tasks.create_task(restart_on_renewal(connection, changed, ports))

    def _services(self, connection: Connection) -> list[Coroutine[Any, Any, None]]:
        services = [self._answer_clock(connection), *(relay.serve(connection) for relay in self._relays)]
        if self._cm is not None:
            offered = OfferedUrls()
            services.append(CallServer(connection, self._cm, offered.add).serve())
            services.append(DownloadServer(connection, offered).serve())
        return services

    async def _answer_clock(self, connection: Connection) -> None:
        while True:
            stream = await connection.accept(self._settings.ports.cm_open)
            try:
                async with stream:
                    while True:
                        message = await stream.receive()
                        if _is_clock_request(message):
                            await stream.send(clock_sync().SerializeToString())
                        else:
                            connection.counters.refused += 1
                            _log.warning(kv("Only the clock is on the open channel, dropped", peer=connection.peer))
            except AosError as error:
                _log.debug(kv("Clock channel is off", peer=connection.peer, reason=error))


class OfferedUrls:
    """Addresses of blobs that CM gave to a node, newest last; the oldest are forgotten."""

    def __init__(self) -> None:
        self._urls: dict[str, None] = {}

    def add(self, urls: Sequence[str]) -> None:
        """CM gave these."""
        for url in urls:
            self._urls.pop(url, None)
            self._urls[url] = None
        while len(self._urls) > _MAX_OFFERED:
            del self._urls[next(iter(self._urls))]

    def __contains__(self, url: object) -> bool:
        return url in self._urls


def _is_clock_request(message: bytes) -> bool:
    try:
        outgoing = pb.ProxyOutgoingMessages.FromString(message)
    except DecodeError:
        return False
    return bool(outgoing.WhichOneof("ProxyOutgoingMessage") == "clock_sync_request")
