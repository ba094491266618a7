"""Blobs for SMs: URLs, ranges, and nothing but blobs."""

import asyncio
from pathlib import Path

import pytest

from aoscore.cm.fileserver import BlobServer
from aoscore.common.blobstore import BlobStore
from aoscore.common.errors import ConfigError, NotFoundError
from aoscore.common.http import request
from tests.support.items import sha256
from tests.support.running import running

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
