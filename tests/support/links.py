"""Both ends of an inter-node link in one test process."""

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Mapping

from aoscore.common.errors import AosError
from aoscore.common.tls import TlsIdentity
from aoscore.mp.communication.connection import Connection, LinkSettings
from aoscore.mp.communication.control import Role
from aoscore.mp.communication.ports import PROXY, RPC, Ports

PORTS = Ports()

Contexts = Mapping[int, Callable[[], ssl.SSLContext]]


def contexts(role: Role, identity: TlsIdentity) -> Contexts:
    """One identity for all secure channels."""
    make = identity.ssl_server_context if role == "gateway" else _client(identity)
    return dict.fromkeys((PORTS.iam_secure, PORTS.cm_secure, PROXY, RPC), make)


def _client(identity: TlsIdentity) -> Callable[[], ssl.SSLContext]:
    return lambda: identity.ssl_client_context(check_hostname=False)


Ends = tuple[asyncio.StreamReader, asyncio.StreamWriter, asyncio.StreamReader, asyncio.StreamWriter]


async def stream_pair() -> Ends:
    """Two connected byte streams."""
    left, right = socket.socketpair()
    return (*await asyncio.open_connection(sock=left), *await asyncio.open_connection(sock=right))


class Link:
    """A gateway's and a node's connection over one socket pair."""

    def __init__(self, gateway: Connection, node: Connection) -> None:
        self.gateway = gateway
        self.node = node
        self.ends: dict[str, BaseException | None] = {}
        self.stop = asyncio.Event()


@contextlib.asynccontextmanager
async def linked(gateway_tls: Contexts, node_tls: Contexts, **settings: object) -> AsyncIterator[Link]:
    """Run both for the length of the block."""
    gateway_reader, gateway_writer, node_reader, node_writer = await stream_pair()
    link = Link(
        Connection(gateway_reader, gateway_writer, _settings("gateway", settings), gateway_tls, peer="node"),
        Connection(node_reader, node_writer, _settings("node", settings), node_tls, peer="gateway"),
    )
    up = [asyncio.Event(), asyncio.Event()]

    async def run(name: str, connection: Connection, is_up: asyncio.Event) -> None:
        async def serve(_: Connection) -> None:
            is_up.set()
            await link.stop.wait()

        try:
            await connection.run(serve)
            link.ends[name] = None
        except (AosError, OSError) as error:
            link.ends[name] = error

    tasks = [
        asyncio.create_task(run("gateway", link.gateway, up[0])),
        asyncio.create_task(run("node", link.node, up[1])),
    ]
    try:
        async with asyncio.timeout(20):
            await asyncio.gather(*(event.wait() for event in up))
        yield link
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _settings(role: Role, changes: dict[str, object]) -> LinkSettings:
    return LinkSettings(role=role, ports=PORTS, **changes)  # type: ignore[arg-type]
