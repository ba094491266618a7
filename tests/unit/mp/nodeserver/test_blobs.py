"""Blobs over HTTP while they come: one transfer for all, failures, outages, what is kept."""

import asyncio
import contextlib
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
                    await asyncio.Event().wait()
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
async def bed(root: Path, **limits: Any) -> AsyncIterator[Bed]:
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
