"""Blobs over HTTP while they come: one transfer for all, failures, outages, what is kept."""

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Any, cast

import grpc
import pytest

from aoscore._pb.servicemanager.v5 import servicemanager_pb2 as pb
from aoscore.common.aio import Backoff, Worker
from aoscore.common.errors import FailedError
from aoscore.common.http import open_stream
from aoscore.mp.communication.connection import ChannelClosedError
from aoscore.mp.nodeserver.blobs import Blobs, BlobServer
from aoscore.mp.nodeserver.calls import CallClient, CallError
from aoscore.mp.nodeserver.downloads import DownloadClient
from aoscore.mp.nodeserver.store import NodeStore
from tests.support.items import sha256
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
    def __init__(self, main: FakeMain, store: NodeStore, server: BlobServer) -> None:
        self.main = main
        self.store = store
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
            prefetch=prefetch,
            backoff=lambda: Backoff(0.01, 0.02),
        )
        server = BlobServer("127.0.0.1:0", blobs)
        async with running(blobs, server):
            yield Bed(main, store, server)


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


async def test_only_manifests_name_anything(tmp_path: Path) -> None:
    async with bed(tmp_path) as one:
        for content in (b"{}", b'{"config": {}}', b"\0" * 100, b'{"config": {"digest": "../../etc/passwd"}}', b"[1]"):
            digest = one.main.put(content)
            await one.get(digest)
            assert one.store.named_by(digest) == ()
        assert one.store.named_by("sha256:" + "0" * 64) == ()
