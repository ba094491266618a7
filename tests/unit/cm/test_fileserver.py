"""Blobs for SMs: URLs, ranges, and nothing but blobs."""

from pathlib import Path

import pytest

from aoscore.cm.fileserver import BlobServer
from aoscore.common.blobstore import BlobStore
from aoscore.common.errors import ConfigError, NotFoundError
from aoscore.common.http import request
from tests.support.items import sha256
from tests.support.running import running

DATA = b"0123456789" * 100


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
    server = BlobServer(address, store.existing)
    assert server.url(digest) == f"{base}/blobs/sha256/{digest[7:]}"
    with pytest.raises(NotFoundError):
        server.url("sha256:" + "0" * 64)


@pytest.mark.parametrize("address", ["https://main:8094", "main:port", "ftp://x"])
def test_addresses_that_cannot_be_served(tmp_path: Path, address: str) -> None:
    with pytest.raises(ConfigError, match="fileServerUrl"):
        BlobServer(address, lambda digest: tmp_path)


@pytest.fixture
def stored(tmp_path: Path) -> tuple[BlobStore, str]:
    return store_with_blob(tmp_path)


async def test_only_blobs_are_served(stored: tuple[BlobStore, str]) -> None:
    store, digest = stored
    server = BlobServer("http://127.0.0.1:80", store.existing).server
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
