"""Downloads over a link: both ends in one process, an HTTP server behind the gateway."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path

import h11
import pytest

from aoscore.common.errors import AosError, FailedError, InvalidArgumentError
from aoscore.common.fileserver import FileServer
from aoscore.mp.communication.connection import ChannelClosedError
from aoscore.mp.filechunker.downloads import DownloadServer
from aoscore.mp.nodeserver import downloads
from aoscore.mp.nodeserver.downloads import DownloadClient
from aoscore.mp.nodeserver.link import NodeLink
from tests.support.links import Contexts, Link, contexts, linked
from tests.support.pki import TestCa
from tests.support.running import running, until


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> tuple[Contexts, Contexts]:
    ca = TestCa()
    directory = tmp_path_factory.mktemp("pki")
    return contexts("gateway", ca.identity(directory, "main")), contexts("node", ca.identity(directory, "second"))


class NoRanges(FileServer):
    """As the file server of AosCore 9.1."""

    async def _answer(self, connection: h11.Connection, writer: asyncio.StreamWriter, request: h11.Request) -> None:
        headers = [(name, value) for name, value in request.headers if name != b"range"]
        plain = h11.Request(method=request.method, target=request.target, headers=headers)
        await super()._answer(connection, writer, plain)


class Counting(FileServer):
    """Knows how often it was asked."""

    asked = 0

    async def _answer(self, connection: h11.Connection, writer: asyncio.StreamWriter, request: h11.Request) -> None:
        Counting.asked += 1
        await super()._answer(connection, writer, request)


class Bed:
    def __init__(self, link: Link, client: DownloadClient, base: str, offered: set[str]) -> None:
        self.link = link
        self.client = client
        self.base = base
        self.offered = offered

    def offer(self, name: str) -> str:
        url = f"{self.base}/{name}"
        self.offered.add(url)
        return url

    async def fetch(self, name: str, offset: int = 0) -> bytes:
        content = bytearray()
        async with contextlib.aclosing(self.client.fetch(self.offer(name), offset)) as pieces:
            async for piece in pieces:
                content += piece
        return bytes(content)


@contextlib.asynccontextmanager
async def bed(
    tls: tuple[Contexts, Contexts], root: Path, *, node_id: str = "n", server: type[FileServer] = FileServer
) -> AsyncIterator[Bed]:
    files = server("127.0.0.1:0", lambda target: root / target.rpartition("/")[2])
    async with running(files), linked(*tls) as link:
        link.gateway.node_id = "n"
        link.gateway.node_known.set()
        node_link = NodeLink()
        node_link.node_id = node_id
        node_link.set(link.node)
        offered: set[str] = set()
        client = DownloadClient(node_link)
        tasks = [
            asyncio.create_task(client.run()),
            asyncio.create_task(DownloadServer(link.gateway, offered).serve()),
        ]
        try:
            yield Bed(link, client, f"http://127.0.0.1:{files.port}", offered)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.parametrize("server", [FileServer, NoRanges])
@pytest.mark.parametrize("offset", [0, 1, 15_360, 99_999, 100_000])
async def test_from_any_place_on(
    tls: tuple[Contexts, Contexts], tmp_path: Path, offset: int, server: type[FileServer]
) -> None:
    content = os.urandom(100_000)
    (tmp_path / "file").write_bytes(content)
    async with bed(tls, tmp_path, server=server) as one:
        assert await one.fetch("file", offset) == content[offset:]


async def test_many_at_once(tls: tuple[Contexts, Contexts], tmp_path: Path) -> None:
    contents = [os.urandom(200_000) for _ in range(12)]
    for number, content in enumerate(contents):
        (tmp_path / str(number)).write_bytes(content)
    async with bed(tls, tmp_path) as one:
        assert await asyncio.gather(*(one.fetch(str(number)) for number in range(12))) == contents


async def test_slow_reader_stops_nobody_and_gets_everything(tls: tuple[Contexts, Contexts], tmp_path: Path) -> None:
    content = os.urandom(12_000_000)
    (tmp_path / "big").write_bytes(content)
    (tmp_path / "small").write_bytes(b"small")
    async with bed(tls, tmp_path) as one:
        received = bytearray()
        async with contextlib.aclosing(one.client.fetch(one.offer("big"), 0)) as pieces:
            received += await anext(pieces)
            # Not read for a while: everything else goes on.
            for _ in range(20):
                assert await one.fetch("small") == b"small"
            stream = await one.link.node.connect(4)
            await stream.send(b"status")
            assert await (await one.link.gateway.accept(4)).receive() == b"status"
            async for piece in pieces:
                received += piece
        assert bytes(received) == content


async def test_reader_that_is_only_slower_than_the_link_is_sent_nothing_twice(
    tls: tuple[Contexts, Contexts], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Far below what this reader takes: it is not to depend on how busy the machine is.
    monkeypatch.setattr(downloads, "_LEAST_BYTES_PER_S", 1024 * 1024)
    monkeypatch.setattr(Counting, "asked", 0)
    content = os.urandom(24_000_000)
    (tmp_path / "big").write_bytes(content)
    async with bed(tls, tmp_path, server=Counting) as one:
        received = bytearray()
        async with contextlib.aclosing(one.client.fetch(one.offer("big"), 0)) as pieces:
            async for piece in pieces:
                received += piece
                await asyncio.sleep(len(piece) / 60e6)
        assert bytes(received) == content
        assert Counting.asked == 1


async def test_only_what_was_offered(tls: tuple[Contexts, Contexts], tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    async with bed(tls, tmp_path) as one:
        for url in (f"{one.base}/secret", "file:///etc/passwd"):
            with pytest.raises(InvalidArgumentError, match="was not offered"):
                await anext(one.client.fetch(url, 0))
        one.offered.add("file:///etc/passwd")
        with pytest.raises(InvalidArgumentError, match="was not offered"):
            await anext(one.client.fetch("file:///etc/passwd", 0))


async def test_failure_reaches_the_node(tls: tuple[Contexts, Contexts], tmp_path: Path) -> None:
    async with bed(tls, tmp_path) as one:
        with pytest.raises(FailedError, match="the server answered 404"):
            await one.fetch("absent")


async def test_another_nodes_name_is_refused(tls: tuple[Contexts, Contexts], tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    async with bed(tls, tmp_path, node_id="other") as one:
        with pytest.raises(AosError, match="this is not node 'other'"):
            await one.fetch("file")


async def test_reader_that_goes_stops_the_gateway(tls: tuple[Contexts, Contexts], tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(os.urandom(50_000_000))
    async with bed(tls, tmp_path) as one:
        async with contextlib.aclosing(one.client.fetch(one.offer("big"), 0)) as pieces:
            await anext(pieces)
        (tmp_path / "small").write_bytes(b"small")
        assert await one.fetch("small") == b"small"
        await until(lambda: one.link.gateway.pending_bytes(17) == 0)


async def test_broken_link_ends_a_download(tls: tuple[Contexts, Contexts], tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(os.urandom(20_000_000))
    async with bed(tls, tmp_path) as one:
        pieces = one.client.fetch(one.offer("big"), 0)
        await anext(pieces)
        one.link.gateway.shut("test")
        with pytest.raises(ChannelClosedError):
            async for _ in pieces:
                pass
