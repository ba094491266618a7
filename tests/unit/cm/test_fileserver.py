"""Blobs for SMs: URLs, ranges, and nothing but blobs."""

import asyncio
import logging
from pathlib import Path

import pytest

from aoscore.cm import fileserver as module
from aoscore.cm.fileserver import BlobServer, listen_addresses
from aoscore.common import fileserver as common_server
from aoscore.common.blobstore import BlobStore
from aoscore.common.errors import ConfigError, NotFoundError
from aoscore.common.http import request
from tests.support.items import sha256
from tests.support.running import running, until

DATA = b"0123456789" * 100


def nobody(ip: str) -> bool:
    return False


def store_with_blob(tmp_path: Path) -> tuple[BlobStore, str]:
    store = BlobStore(tmp_path / "install")
    (tmp_path / "new").write_bytes(DATA)
    store.adopt(tmp_path / "new", sha256(DATA))
    (tmp_path / "install" / "secret").write_bytes(b"secret")
    return store, sha256(DATA)


@pytest.mark.parametrize(
    ("address", "base"),
    [
        ("main:8094", "http://main:8094"),
        ("http://main:8094", "http://main:8094"),
        ("http://main:8094/", "http://main:8094"),
        ("http://main", "http://main"),
        (":8094", "http://localhost:8094"),
    ],
)
def test_urls(tmp_path: Path, address: str, base: str) -> None:
    store, digest = store_with_blob(tmp_path)
    server = BlobServer(address, store.existing, is_node=nobody)
    assert server.url(digest) == f"{base}/blobs/sha256/{digest[7:]}"
    with pytest.raises(NotFoundError):
        server.url("sha256:" + "0" * 64)


@pytest.mark.parametrize("address", ["https://main:8094", "main:port", "ftp://x"])
def test_addresses_that_cannot_be_served(tmp_path: Path, address: str) -> None:
    with pytest.raises(ConfigError, match="fileServerUrl"):
        BlobServer(address, lambda digest: tmp_path, is_node=nobody)


@pytest.mark.parametrize(
    ("host", "resolved", "more", "expected"),
    [
        ("main", ["10.0.0.1"], [], {"10.0.0.1"}),
        ("main", ["10.0.0.1", "fd00::1"], ["10.0.1.1"], {"10.0.0.1", "fd00::1", "10.0.1.1"}),
        ("main", ["127.0.1.1"], ["10.0.0.1"], {"127.0.1.1", "10.0.0.1"}),
        ("main", ["127.0.1.1"], [], {"0.0.0.0", "::"}),
        ("main", ["10.0.0.1"], ["0.0.0.0"], {"0.0.0.0", "::"}),
        ("main", [], ["10.0.0.1"], {"10.0.0.1"}),
        ("main", [], [], set()),
        ("localhost", ["::1", "127.0.0.1"], [], {"::1", "127.0.0.1"}),
        ("127.0.0.5", ["127.0.0.5"], [], {"127.0.0.5"}),
    ],
)
def test_where_it_listens(host: str, resolved: list[str], more: list[str], expected: set[str]) -> None:
    assert set(listen_addresses(host, resolved, more)) == expected


async def test_it_listens_where_its_name_leads_and_nowhere_else(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A name that nobody knows at first, or never answers, holds nothing up; then it moves to another address."""
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(common_server, "_FIRST_LOOK_S", 0.01)
    monkeypatch.setattr(common_server, "_LAST_LOOK_S", 0.01)
    monkeypatch.setattr(module, "_RESOLVE_TIMEOUT_S", 0.05)
    addresses: list[str] | None = []
    loop = asyncio.get_running_loop()

    async def getaddrinfo(host: str, port: object, **more: object) -> list[object]:
        assert (host, port) == ("main", None)
        if addresses is None:
            await asyncio.Event().wait()
        if not addresses:
            raise OSError("Name or service not known")
        return [(2, 1, 6, "", (address, 0)) for address in addresses]

    monkeypatch.setattr(loop, "getaddrinfo", getaddrinfo)
    server = BlobServer("http://main:80", Path, is_node=nobody, listen_at=["127.0.0.9"]).server
    server._wanted_port = 0

    async def listens(at: str) -> bool:
        try:
            _, writer = await asyncio.open_connection(at, server.port)
        except ConnectionRefusedError:
            return False
        writer.close()
        return True

    async with running(server):
        assert [at for at in ("127.0.0.1", "127.0.0.2", "127.0.0.9") if await listens(at)] == ["127.0.0.9"]
        await until(lambda: "host=main, error=Name or service not known" in caplog.text)
        addresses = None
        await until(lambda: "host=main, error=no answer in time" in caplog.text)
        addresses = ["127.0.0.2"]
        await until(lambda: "File server listens: address=127.0.0.2:" in caplog.text)
        assert await listens("127.0.0.2") and not await listens("127.0.0.1")
        addresses = []
        await until(lambda: caplog.text.count("host=main, error=Name or service not known") == 2)
        assert await listens("127.0.0.2"), "what cannot be asked any more has not changed"
        addresses = ["127.0.0.3"]
        await until(lambda: "File server listens: address=127.0.0.3:" in caplog.text)
        assert "File server listens no more: address=127.0.0.2" in caplog.text
        assert await listens("127.0.0.3") and await listens("127.0.0.9") and not await listens("127.0.0.2")
    assert not await listens("127.0.0.3")


@pytest.fixture
def stored(tmp_path: Path) -> tuple[BlobStore, str]:
    return store_with_blob(tmp_path)


async def test_only_blobs_are_served(stored: tuple[BlobStore, str]) -> None:
    store, digest = stored
    server = BlobServer("http://127.0.0.1:80", store.existing, is_node=nobody).server
    server._wanted_port = 0
    async with running(server):
        base = f"http://127.0.0.1:{server.port}"
        path = f"/blobs/sha256/{digest[7:]}"
        whole = await request("GET", base + path)
        assert (whole.status, whole.body) == (200, DATA)
        part = await request("GET", base + path, headers={"Range": "bytes=10-19"})
        assert (part.status, part.body) == (206, b"0123456789")
        for target in (
            "/secret",
            "/blobs/sha256/../../secret",
            "/blobs/sha256/..%2f..%2fsecret",
            "/blobs/sha256/" + "0" * 64,
            "/blobs/sha256/",
            "/blobs/sha512/" + digest[7:],
            "/",
        ):
            assert (await request("GET", base + target)).status == 404, target
        assert (await request("POST", base + path)).status == 405


@pytest.mark.parametrize(("nodes", "status"), [({"127.0.0.2"}, 200), ({"127.0.0.3"}, 403)])
async def test_only_nodes_of_the_unit_are_served(
    stored: tuple[BlobStore, str], caplog: pytest.LogCaptureFixture, nodes: set[str], status: int
) -> None:
    store, digest = stored
    server = BlobServer("http://127.0.0.1:80", store.existing, is_node=nodes.__contains__).server
    server._wanted_port = 0
    async with running(server):
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port, local_addr=("127.0.0.2", 0))
        writer.write(f"GET /blobs/sha256/{digest[7:]} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        answer = await reader.read()
        writer.close()
    assert answer.startswith(f"HTTP/1.1 {status} ".encode())
    assert (DATA in answer) == (status == 200)
    assert ("refuses peer: address=127.0.0.2" in caplog.text) == (status == 403)
