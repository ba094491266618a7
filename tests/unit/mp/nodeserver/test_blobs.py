"""Blobs over HTTP while they come: one transfer for all, failures, outages, what is kept."""

import asyncio
import contextlib
import json
import os
import threading
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Any, cast

import grpc
import pytest

from aoscore._pb.servicemanager.v5 import servicemanager_pb2 as pb
from aoscore._speedups.unpack import Owners
from aoscore.common.aio import Backoff, Worker
from aoscore.common.errors import FailedError
from aoscore.common.http import open_stream
from aoscore.common.oci import MEDIA_TYPE_LAYER_GZIP, ImageManifest
from aoscore.mp.communication.connection import ChannelClosedError
from aoscore.mp.nodeserver.blobs import Blobs, BlobServer
from aoscore.mp.nodeserver.calls import CallClient, CallError
from aoscore.mp.nodeserver.downloads import DownloadClient
from aoscore.mp.nodeserver.store import NodeStore
from aoscore.sm.imagemanager.store import ImageStore
from tests.support.items import packed, sha256, tar
from tests.support.running import running, until

PIECE = 100_000


class FakeMain:
    """The Main Node: what it offers, and how its downloads go. `failures` are raised, one per attempt, first."""

    def __init__(self) -> None:
        self.contents: dict[str, bytes] = {}
        self.failures: list[Exception] = []
        self.call_failures: list[Exception] = []
        self.offsets: list[int] = []
        self.pause_at: int | None = None
        self.go_on = asyncio.Event()
        self.ended = 0

    def put(self, content: bytes) -> str:
        self.contents[sha256(content)] = content
        return sha256(content)

    async def call(self, method: str, payload: bytes, *, timeout_s: float = 0) -> bytes:
        if self.call_failures:
            raise self.call_failures.pop(0)
        (digest,) = pb.BlobsInfosRequest.FromString(payload).digests
        if digest not in self.contents:
            raise CallError(grpc.StatusCode.INTERNAL, "not found")
        return pb.BlobsInfos(urls=[digest]).SerializeToString()

    async def fetch(self, url: str, offset: int) -> AsyncGenerator[bytes, None]:
        self.offsets.append(offset)
        content = self.contents[url]
        try:
            for begin in range(offset, len(content), PIECE):
                yield content[begin : begin + PIECE]
                if self.pause_at is not None and begin >= self.pause_at:
                    await self.go_on.wait()
                if self.failures:
                    raise self.failures.pop(0)
        finally:
            self.ended += 1


class Bed:
    def __init__(self, root: Path, main: FakeMain, store: NodeStore, blobs: Blobs, server: BlobServer) -> None:
        self.root = root
        self.main = main
        self.store = store
        self.blobs = blobs
        self.server = server

    async def get(self, digest: str) -> tuple[int, bytes]:
        body = bytearray()
        url = f"http://127.0.0.1:{self.server.port}/sha256/{digest.removeprefix('sha256:')}"
        async with open_stream("GET", url) as stream:
            async for chunk in stream.chunks(20):
                body += chunk
            return stream.status, bytes(body)


@contextlib.asynccontextmanager
async def bed(root: Path, *, prefetch: bool = False, **limits: Any) -> AsyncIterator[Bed]:
    main = FakeMain()
    async with Worker("test", 2) as worker:
        store = await worker.run(
            lambda: NodeStore(root, **{"ttl_s": 1000.0, "min_free_bytes": 0, "max_size_bytes": 0, **limits})
        )
        blobs = Blobs(
            store,
            worker,
            cast("CallClient", main),
            cast("DownloadClient", main),
            clean_period_s=1000,
            unpacker=worker if prefetch else None,
            backoff=lambda: Backoff(0.01, 0.02),
        )
        server = BlobServer("127.0.0.1:0", blobs)
        async with running(blobs, server):
            yield Bed(root, main, store, blobs, server)


async def test_many_readers_and_one_transfer(tmp_path: Path) -> None:
    async with bed(tmp_path) as one:
        content = os.urandom(3_000_000)
        digest = one.main.put(content)
        assert await asyncio.gather(*(one.get(digest) for _ in range(5))) == [(200, content)] * 5
        assert one.main.offsets == [0]
        assert await one.get(digest) == (200, content)
        assert one.main.offsets == [0]


async def test_goes_on_where_it_stopped(tmp_path: Path) -> None:
    async with bed(tmp_path) as one:
        content = os.urandom(3_000_000)
        digest = one.main.put(content)
        one.main.failures = [ChannelClosedError("cut"), FailedError("broken"), ChannelClosedError("cut")]
        assert await one.get(digest) == (200, content)
        assert one.main.offsets == [0, PIECE, 2 * PIECE, 3 * PIECE]


async def test_absence_of_the_link_is_no_failure(tmp_path: Path) -> None:
    async with bed(tmp_path) as one:
        digest = one.main.put(b"content")
        one.main.call_failures = [ChannelClosedError("no link")] * 10
        one.main.call_failures += [CallError(grpc.StatusCode.FAILED_PRECONDITION, "not registered")] * 10
        assert await one.get(digest) == (200, b"content")


async def test_blob_that_nobody_has(tmp_path: Path) -> None:
    async with bed(tmp_path) as one:
        status, _ = await one.get(sha256(b"absent"))
        assert status == 502


async def test_wrong_content_is_cut_short_and_forgotten(tmp_path: Path) -> None:
    async with bed(tmp_path) as one:
        digest = one.main.put(b"right" * 100_000)
        one.main.contents[digest] = b"wrong" * 100_000
        with pytest.raises(FailedError, match="cut"):
            await one.get(digest)
        one.main.contents[digest] = b"right" * 100_000
        assert await one.get(digest) == (200, b"right" * 100_000)
        assert one.main.offsets == [0, 0]


async def test_no_room(tmp_path: Path) -> None:
    async with bed(tmp_path, max_size_bytes=1_000_000) as one:
        status, _ = await one.get(one.main.put(os.urandom(1_100_000)))
        assert status == 507


async def test_readers_that_go_end_the_transfer_and_what_came_is_kept(tmp_path: Path) -> None:
    async with bed(tmp_path) as one:
        content = os.urandom(30_000_000)
        digest = one.main.put(content)
        url = f"http://127.0.0.1:{one.server.port}/sha256/{digest.removeprefix('sha256:')}"
        one.main.pause_at = 20_000_000
        async with open_stream("GET", url) as stream:
            await anext(stream.chunks(20))
            await until(lambda: one.store.part(digest).stat().st_size > 15_000_000)
        await until(lambda: one.main.ended == 1)
        one.main.pause_at = None
        assert await one.get(digest) == (200, content)
        assert one.main.offsets[1] > 15_000_000


async def test_nothing_but_blobs(tmp_path: Path) -> None:
    async with bed(tmp_path) as one:
        for target in ("/", "/sha256/../tmp", "/sha256/" + "0" * 63, "/blobs/sha256/" + "0" * 64):
            async with open_stream("GET", f"http://127.0.0.1:{one.server.port}{target}") as stream:
                assert stream.status == 404


def image(main: FakeMain, *layers: bytes) -> tuple[str, list[str]]:
    """A manifest on the Main Node, and what it names, in order."""
    config, item = main.put(b'{"rootfs": {"type": "layers", "diff_ids": []}}'), main.put(b'{"author": "me"}')
    digests = [config, item, *(main.put(layer) for layer in layers)]
    described = [{"mediaType": "x", "digest": digest, "size": len(main.contents[digest])} for digest in digests]
    manifest = {"schemaVersion": 2, "config": described[0], "aosItemConfig": described[1], "layers": described[2:]}
    return main.put(json.dumps(manifest).encode()), digests


async def test_what_a_manifest_names_comes_before_it_is_asked_for(tmp_path: Path) -> None:
    async with bed(tmp_path, prefetch=True) as one:
        manifest, named = image(one.main, os.urandom(500_000), os.urandom(PIECE))
        await one.get(manifest)
        await until(lambda: all(one.store.path(digest).exists() for digest in named))
        count = len(one.main.offsets)
        for digest in named:
            assert await one.get(digest) == (200, one.main.contents[digest])
        assert len(one.main.offsets) == count == 5


async def test_last_reader_that_goes_does_not_stop_the_look_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader has all of a manifest before it is known what that names."""
    async with bed(tmp_path, prefetch=True) as one:
        manifest, named = image(one.main, os.urandom(1000))
        go_on = threading.Event()
        look = one.store.manifest

        def slow(digest: str) -> ImageManifest | None:
            go_on.wait(20)
            return look(digest)

        monkeypatch.setattr(one.store, "manifest", slow)
        async with one.blobs.reading(manifest) as transfer:
            await until(lambda: transfer.is_complete)
        go_on.set()
        await until(lambda: all(one.store.path(digest).exists() for digest in named))


async def test_nothing_is_begun_ahead_while_somebody_waits(tmp_path: Path) -> None:
    async with bed(tmp_path, prefetch=True) as one:
        one.main.pause_at = PIECE
        slow = asyncio.create_task(one.get(one.main.put(os.urandom(3 * PIECE))))
        await until(lambda: len(one.main.offsets) == 1)
        manifest, named = image(one.main, os.urandom(PIECE))
        await one.get(manifest)
        await asyncio.sleep(0.1)
        assert not any(one.store.path(digest).exists() for digest in named)
        one.main.go_on.set()
        await slow
        await until(lambda: all(one.store.path(digest).exists() for digest in named))


async def test_what_does_not_fit_is_not_begun_ahead(tmp_path: Path) -> None:
    async with bed(tmp_path, prefetch=True, max_size_bytes=200_000) as one:
        manifest, (_, _, big, small) = image(one.main, os.urandom(500_000), os.urandom(PIECE))
        await one.get(manifest)
        await until(lambda: one.store.path(small).exists())
        assert not one.store.path(big).exists() and not one.store.part(big).exists()
        # What SM asks for is as it was: the answer says what is wrong.
        assert await one.get(small) == (200, one.main.contents[small])


def service(main: FakeMain, *layers: bytes) -> tuple[str, list[str]]:
    """A manifest of a service with real layers, and the digests of their blobs."""
    config = main.put(
        json.dumps({"rootfs": {"type": "layers", "diff_ids": [sha256(layer) for layer in layers]}}).encode()
    )
    blobs = [packed(layer) for layer in layers]
    described = [{"mediaType": MEDIA_TYPE_LAYER_GZIP, "digest": main.put(blob), "size": len(blob)} for blob in blobs]
    manifest = {"schemaVersion": 2, "config": {"digest": config}, "layers": described}
    return main.put(json.dumps(manifest).encode()), [one["digest"] for one in described]  # type: ignore[misc]


async def test_layers_are_unpacked_ahead_and_sm_can_take_them(tmp_path: Path) -> None:
    first, second = tar({"bin/one": b"1"}), tar({"bin/two": b"22"})
    async with bed(tmp_path / "mp", prefetch=True) as one:
        manifest, digests = service(one.main, first, second)
        await one.get(manifest)
        await until(
            lambda: all((one.root / f"layers/sha256/{sha256(layer)[7:]}/size").exists() for layer in (first, second))
        )
        assert not list((one.root / "unpacking").iterdir())
        store = await asyncio.to_thread(ImageStore, tmp_path / "sm", Owners.PROCESS, one.root)
        assert await asyncio.to_thread(store.take_layer, digests[0], sha256(first))
        assert (store.tree(sha256(first)) / "bin/one").read_bytes() == b"1"
        store.verify_layer(digests[0], sha256(first), again=True)
        assert not (one.root / f"layers/sha256/{sha256(first)[7:]}").exists()
        # Whole blobs as well, and MP gives neither again.
        assert await asyncio.to_thread(store.take_blob, manifest)
        assert not await asyncio.to_thread(store.take_blob, manifest)
        assert not await asyncio.to_thread(store.take_layer, digests[0], sha256(first))


async def test_what_sm_reads_itself_is_not_unpacked(tmp_path: Path) -> None:
    layer = tar({"file": os.urandom(300_000)})
    async with bed(tmp_path, prefetch=True) as one:
        manifest, (digest,) = service(one.main, layer)
        one.main.pause_at = 2 * PIECE
        reading = asyncio.create_task(one.get(digest))
        await until(lambda: len(one.main.offsets) == 1)
        await one.get(manifest)
        one.main.go_on.set()
        assert await reading == (200, one.main.contents[digest])
        config = json.loads(one.main.contents[manifest])["config"]["digest"]
        await until(lambda: one.store.path(config).exists() and one.blobs._ahead.empty())
        assert not list((one.root / "layers/sha256").iterdir())


async def test_layer_that_can_not_be_unpacked_is_left_to_sm(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with bed(tmp_path, prefetch=True) as one:
        manifest, (digest,) = service(one.main, tar({"../escape": b"x"}))
        await one.get(manifest)
        await until(lambda: "can't be unpacked" in caplog.text)
        assert await one.get(digest) == (200, one.main.contents[digest])
        assert not list((one.root / "layers/sha256").iterdir()) and not list((one.root / "unpacking").iterdir())


async def test_more_than_the_manifest_says_is_refused_and_not_kept(tmp_path: Path) -> None:
    async with bed(tmp_path, prefetch=True) as one:
        manifest, (_, _, layer) = image(one.main, os.urandom(2_000_000))
        one.main.contents[layer] += bytes(3_000_000)
        await one.get(manifest)
        await until(lambda: len(one.main.offsets) == 4)
        with contextlib.suppress(FailedError):
            assert (await one.get(layer))[0] == 502
        assert not one.store.part(layer).exists() and not one.store.path(layer).exists()


async def test_size_of_a_growing_blob_is_told_where_a_manifest_says_it(tmp_path: Path) -> None:
    async with bed(tmp_path, prefetch=True) as one:
        manifest, (_, _, layer) = image(one.main, os.urandom(1_000_000))
        url = f"http://127.0.0.1:{one.server.port}/sha256/{layer.removeprefix('sha256:')}"
        with one.blobs.asked():  # so that nothing is fetched ahead
            await one.get(manifest)
            await until(lambda: one.blobs.size_bytes(layer) is not None)
            one.main.pause_at = 0
            go_on = asyncio.get_running_loop().call_later(0.1, one.main.go_on.set)
            async with open_stream("GET", url) as stream:
                assert stream.headers["content-length"] == "1000000"
                body = b"".join([chunk async for chunk in stream.chunks(20)])
            assert body == one.main.contents[layer]
            go_on.cancel()


async def test_only_manifests_name_anything(tmp_path: Path) -> None:
    async with bed(tmp_path) as one:
        for content in (b"{}", b'{"config": {}}', b"\0" * 100, b'{"config": {"digest": "../../etc/passwd"}}', b"[1]"):
            digest = one.main.put(content)
            await one.get(digest)
            assert one.store.manifest(digest) is None
        assert one.store.manifest("sha256:" + "0" * 64) is None
