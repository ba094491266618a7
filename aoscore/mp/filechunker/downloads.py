"""Downloads that nodes ask for on channel 17 (mp-wire §9). Gateway.

The gateway fetches only what CM has offered to this very node, over HTTP, and passes it on as fast as the link takes
it. It keeps nothing: a node that comes back says how far it got.
"""

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Container
from urllib.parse import urlsplit

from google.protobuf.message import DecodeError

from aoscore._pb.servicemanager.v5 import servicemanager_pb2 as pb
from aoscore.common import convert
from aoscore.common.aio import comes_within, log_and_continue
from aoscore.common.errors import (
    AlreadyExistsError,
    AosError,
    FailedError,
    InvalidArgumentError,
    WrongStateError,
    to_error_info,
)
from aoscore.common.http import Stream as HttpStream
from aoscore.common.http import open_stream
from aoscore.common.log import kv
from aoscore.mp.clock import main_time
from aoscore.mp.communication.connection import Connection, Stream, end_tasks
from aoscore.mp.communication.ports import PROXY
from aoscore.mp.filechunker.chunker import Chunker

_log = logging.getLogger(__name__)

PARALLEL = 4
MAX_REQUESTS = 64
_IDLE_TIMEOUT_S = 60.0
_PATIENCE_S = 10.0
_CONTENT_RANGE_START = re.compile(r"bytes (\d+)-")


class DownloadServer:
    """Serves the downloads of one link. `offered` are the addresses that CM gave to the node."""

    def __init__(self, connection: Connection, offered: Container[str]) -> None:
        self._connection = connection
        self._offered = offered
        self._slots = asyncio.Semaphore(PARALLEL)

    async def serve(self) -> None:
        """Serve the uses of the channel one after the other, until cancelled."""
        while True:
            stream = await self._connection.accept(PROXY)
            running: dict[int, asyncio.Task[None]] = {}
            try:
                async with stream:
                    await self._check_node(await stream.receive())
                    while True:
                        await self._take(stream, await stream.receive(), running)
            except AosError as error:
                _log.info(kv("Downloads of node are off", peer=self._connection.peer, reason=error))
            finally:
                await end_tasks(running.values())

    async def _check_node(self, message: bytes) -> None:
        node_id = _parse(message).node_id
        if not await comes_within(self._connection.node_known, _PATIENCE_S):
            raise WrongStateError("the SM of this node has not registered")
        if node_id != self._connection.node_id:
            _log.error(kv("Node speaks for another one", nodeID=self._connection.node_id, other=node_id))
            raise InvalidArgumentError(f"this is not node {node_id!r}")

    async def _take(self, stream: Stream, message: bytes, running: dict[int, asyncio.Task[None]]) -> None:
        outgoing = _parse(message)
        match outgoing.WhichOneof("ProxyOutgoingMessage"):
            case "download_request":
                request = outgoing.download_request
                try:
                    self._check_request(request, running)
                except AosError as error:
                    await stream.send(_failed(request.request_id, error))
                    return
                task = asyncio.create_task(self._download(stream, request))
                running[request.request_id] = task
                task.add_done_callback(lambda _: running.pop(request.request_id, None))
            case "cancel_download":
                if download := running.get(outgoing.cancel_download.request_id):
                    download.cancel()
                    await asyncio.wait({download})
                    await stream.send(_content(outgoing.cancel_download.request_id, state=pb.CANCELED))
            case "clock_sync_request":
                await stream.send(clock_sync().SerializeToString())
            case kind:
                _log.warning(kv("Not expected from a node, dropped", peer=self._connection.peer, kind=kind))

    def _check_request(self, request: pb.DownloadRequest, running: dict[int, asyncio.Task[None]]) -> None:
        if request.request_id in running:
            raise AlreadyExistsError(f"download {request.request_id} is already running")
        if len(running) >= MAX_REQUESTS:
            raise FailedError(f"more than {MAX_REQUESTS} downloads at a time")
        if request.url not in self._offered or urlsplit(request.url).scheme not in ("http", "https"):
            raise InvalidArgumentError("this address was not offered to the node")

    async def _download(self, stream: Stream, request: pb.DownloadRequest) -> None:
        with log_and_continue(_log, f"Download for {self._connection.node_id} failed"):
            try:
                async with self._slots:
                    await self._fetch(stream, request)
            except (AosError, OSError) as error:
                if stream.is_closed:
                    return
                _log.warning(kv("Download failed", nodeID=self._connection.node_id, url=request.url, error=error))
                await stream.send(_failed(request.request_id, error))

    async def _fetch(self, stream: Stream, request: pb.DownloadRequest) -> None:
        headers = {"Range": f"bytes={request.offset}-"} if request.offset else {}
        async with open_stream("GET", request.url, headers=headers) as answer:
            if answer.status == 416:
                # Nothing lies behind the offset: the node has it all, and will check it.
                await stream.send(_content(request.request_id, request.offset, state=pb.COMPLETED))
                return
            chunker = Chunker(request.request_id, request.offset, _bytes_before(answer, request.offset))
            await send_pieces(stream, chunker, answer.chunks(_IDLE_TIMEOUT_S))


async def send_pieces(stream: Stream, chunker: Chunker, chunks: AsyncIterator[bytes]) -> None:
    """Send a download to its end."""
    async for chunk in chunks:
        rest = chunker.wanted(chunk)
        while rest:
            quantum_bytes = stream.quantum_bytes
            await stream.send_encoded(chunker.encode(rest[:quantum_bytes]))
            rest = rest[quantum_bytes:]
    await stream.send(_content(chunker.request_id, chunker.offset, state=pb.COMPLETED))


def clock_sync() -> pb.ProxyIncomingMessages:
    """Our time, as the answer to a question for it."""
    return pb.ProxyIncomingMessages(clock_sync=pb.ClockSync(current_time=main_time()))


def _bytes_before(answer: HttpStream, offset: int) -> int:
    """How many bytes of the answer come before the wanted one."""
    match answer.status:
        case 200:
            return offset  # the file server of AosCore 9.1 knows no ranges
        case 206:
            start = _CONTENT_RANGE_START.match(answer.headers.get("content-range", ""))
            if start and int(start[1]) == offset:
                return 0
            raise FailedError("the server sent another range than asked for")
        case status:
            raise FailedError(f"the server answered {status}")


def _parse(message: bytes) -> pb.ProxyOutgoingMessages:
    try:
        return pb.ProxyOutgoingMessages.FromString(message)
    except DecodeError as error:
        raise InvalidArgumentError(f"message is malformed: {error}") from error


def _content(request_id: int, offset: int = 0, *, state: pb.DownloadState) -> bytes:
    content = pb.DownloadContent(request_id=request_id, offset=offset, state=state)
    return pb.ProxyIncomingMessages(download_content=content).SerializeToString()


def _failed(request_id: int, error: BaseException) -> bytes:
    content = pb.DownloadContent(
        request_id=request_id, state=pb.FAILED, error=convert.error_to_pb(to_error_info(error))
    )
    return pb.ProxyIncomingMessages(download_content=content).SerializeToString()
