"""Connections of clients: the same for a key in a file and for one that goes through the relay."""

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from aoscore.common.connect import open_connection
from aoscore.common.errors import DeadlineError, FailedError
from aoscore.common.tls import TlsIdentity, TokenContext
from tests.support.pki import TestCa, relayed

Way = Callable[[TlsIdentity], TlsIdentity]
BIG_BYTES = 3 * 1024 * 1024

ways = pytest.mark.parametrize("way", [lambda identity: identity, relayed], ids=["file", "relay"])


@pytest.fixture
def ca() -> TestCa:
    return TestCa()


@contextlib.asynccontextmanager
async def echo(context: ssl.SSLContext | None) -> AsyncIterator[int]:
    """A server that sends back what it gets until the client has ended; its port."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "localhost", 0, ssl=context)
    async with server:
        yield int(server.sockets[0].getsockname()[1])


@ways
async def test_bytes_go_both_ways(way: Way, ca: TestCa, tmp_path: Path) -> None:
    serving = ca.identity(tmp_path, "server", ("localhost",)).ssl_server_context()
    context = way(ca.identity(tmp_path, "client")).ssl_client_context()
    assert isinstance(context, TokenContext) == (way is relayed)
    async with echo(serving) as port:
        async with open_connection("localhost", port, context, timeout_s=10) as (reader, writer):

            async def send() -> None:
                writer.write(bytes(BIG_BYTES))
                await writer.drain()

            received, _ = await asyncio.gather(reader.readexactly(BIG_BYTES), send())
            assert received == bytes(BIG_BYTES)
    # Nothing goes on behind a connection that was left.
    async with asyncio.timeout(10):
        while any(task.get_name() == "tls pipe" for task in asyncio.all_tasks()):
            await asyncio.sleep(0)


@ways
async def test_the_end_of_the_server_is_seen(way: Way, ca: TestCa, tmp_path: Path) -> None:
    serving = ca.identity(tmp_path, "server", ("localhost",)).ssl_server_context()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"bye")
        writer.close()

    server = await asyncio.start_server(serve, "localhost", 0, ssl=serving)
    async with server:
        port = server.sockets[0].getsockname()[1]
        context = way(ca.identity(tmp_path, "client")).ssl_client_context()
        async with open_connection("localhost", port, context, timeout_s=10) as (reader, _):
            assert await asyncio.wait_for(reader.read(), 10) == b"bye"


@ways
async def test_a_server_with_another_name_or_root_is_refused(way: Way, ca: TestCa, tmp_path: Path) -> None:
    serving = ca.identity(tmp_path, "server", ("elsewhere",)).ssl_server_context()
    (tmp_path / "foreign").mkdir()
    client = ca.identity(tmp_path, "client")
    foreign = TlsIdentity(TestCa("Foreign").write_root(tmp_path / "foreign"), client.cert_url, client.key_url)
    async with echo(serving) as port:
        for identity in (client, foreign):
            with pytest.raises(FailedError, match=f"TLS with localhost:{port} failed: CERTIFICATE_VERIFY_FAILED"):
                async with open_connection("localhost", port, way(identity).ssl_client_context(), timeout_s=10):
                    pass


@ways
async def test_a_server_that_says_nothing(way: Way, ca: TestCa, tmp_path: Path) -> None:
    context = way(ca.identity(tmp_path, "client")).ssl_client_context()
    async with echo(None) as port:
        # A plain server sends the greeting back, which is no answer.
        with pytest.raises(FailedError, match=f"TLS with localhost:{port} failed"):
            async with open_connection("localhost", port, context, timeout_s=10):
                pass
    # Connections are made by the kernel and taken by nobody.
    with socket.create_server(("localhost", 0)) as silent:
        port = silent.getsockname()[1]
        with pytest.raises(DeadlineError, match=f"can't connect to localhost:{port} within 0.3 s"):
            async with open_connection("localhost", port, context, timeout_s=0.3):
                pass


async def test_nobody_listens() -> None:
    async with echo(None) as port:
        pass
    with pytest.raises(FailedError, match=f"can't connect to localhost:{port}: "):
        async with open_connection("localhost", port, None, timeout_s=10):
            pass
