"""Downloads through channel 17 (mp-wire §9). Node.

The channel is shared by all downloads and by nothing else, but it lies on the same link as all else: pieces are not
left waiting there for longer than a moment. A download whose reader falls behind is cancelled, and asked for again from
where the reader is.
"""

import asyncio
import contextlib
import itertools
from collections import deque
from collections.abc import AsyncGenerator
from typing import NamedTuple

from google.protobuf.message import DecodeError

from aoscore._pb.servicemanager.v5 import servicemanager_pb2 as pb
from aoscore._speedups.frames import join_pieces
from aoscore.common import convert
from aoscore.common.errors import (
    AosError,
    DeadlineError,
    FailedError,
    InvalidArgumentError,
    from_error_info,
)
from aoscore.mp.communication.connection import ChannelClosedError, Stream
from aoscore.mp.communication.connector import READ_BYTES
from aoscore.mp.communication.frames import Bytes
from aoscore.mp.communication.ports import PROXY
from aoscore.mp.nodeserver.link import NodeLink, OnDemandChannel

_WAITING_BYTES = 4 * 1024 * 1024
# The most that a reader which falls behind holds up the link, and with it what is more urgent: one that takes so much
# per second just slows it down.
_LEAST_BYTES_PER_S = 32 * 1024 * 1024
_HELD_UP_S = 0.002
_IDLE_TIMEOUT_S = 90.0


class _Piece(NamedTuple):
    """What came of a download; `state` and `error` as in DownloadContent."""

    offset: int
    data: bytes
    state: pb.DownloadState = pb.IN_PROGRESS
    error: AosError | None = None


class _Download:
    def __init__(self, url: str) -> None:
        self._url = url
        self._now = asyncio.get_running_loop().time
        self._heard_s = self._now()
        self.pieces: deque[_Piece] = deque()
        self.waiting_bytes = 0
        self.news = asyncio.Event()
        self.room = asyncio.Event()
        self.room.set()
        self.error: AosError | None = None
        self.is_behind = False
        """Pieces were left out: what follows the ones that wait has to be asked for again."""

    def add(self, piece: _Piece) -> None:
        self.pieces.append(piece)
        self._heard_s = self._now()
        self.waiting_bytes += len(piece.data)
        self.news.set()
        if self.waiting_bytes >= _WAITING_BYTES:
            self.room.clear()

    def fail(self, error: AosError) -> None:
        self.error = self.error or error
        self.news.set()

    async def fail_in_silence(self) -> None:
        """Give it up when nothing comes for too long; until cancelled. Cheaper than a time limit for each piece."""
        while True:
            left_s = self._heard_s + _IDLE_TIMEOUT_S - self._now()
            if left_s <= 0 and not self.pieces:
                break
            await asyncio.sleep(max(left_s, 1.0))
        self.fail(DeadlineError(f"nothing of {self._url} came for {_IDLE_TIMEOUT_S:g} s"))

    async def take(self) -> _Piece:
        """The next piece. Raises the error after the last."""
        while not (self.pieces or self.error):
            self.news.clear()
            await self.news.wait()
        if not self.pieces and self.error is not None:
            raise self.error
        piece = self.pieces.popleft()
        self.waiting_bytes -= len(piece.data)
        if self.waiting_bytes <= _WAITING_BYTES // 2:
            self.room.set()
        return piece


class DownloadClient:
    """Fetches what CM has offered; `run` belongs to it."""

    def __init__(self, link: NodeLink) -> None:
        self._link = link
        self._channel = OnDemandChannel(link, PROXY, begin=self._introduce, take=self._take, lost=self._lost)
        self._downloads: dict[int, _Download] = {}
        self._ids = itertools.count(1)

    async def run(self) -> None:
        """Keep the channel, until cancelled."""
        await self._channel.run()

    async def fetch(self, url: str, offset: int) -> AsyncGenerator[bytes, None]:
        """The content of `url` from `offset` on, in its order, to the end.

        Raises what the gateway met, DeadlineError when nothing comes, ChannelClosedError when the link breaks.
        """
        is_complete = False
        while not is_complete:
            async with contextlib.aclosing(self._fetch_once(url, offset)) as pieces:
                async for piece in pieces:
                    if piece.data and piece.offset != offset:
                        raise FailedError(f"the gateway sent byte {piece.offset} where {offset} was due")
                    is_complete = piece.state == pb.COMPLETED
                    if piece.data:
                        offset += len(piece.data)
                        yield piece.data

    async def _fetch_once(self, url: str, offset: int) -> AsyncGenerator[_Piece, None]:
        """Until it is complete, or we have fallen behind."""
        stream = await self._channel.stream()
        request_id, download = next(self._ids), _Download(url)
        self._downloads[request_id] = download
        watching = asyncio.create_task(download.fail_in_silence())
        is_over = False
        try:
            request = pb.DownloadRequest(url=url, request_id=request_id, offset=offset)
            await stream.send(pb.ProxyOutgoingMessages(download_request=request).SerializeToString())
            while not is_over:
                if download.is_behind and not download.pieces:
                    is_over = True  # it is cancelled already
                    return
                piece = await download.take()
                is_over = piece.state != pb.IN_PROGRESS
                match piece.state:
                    case pb.FAILED:
                        raise piece.error or FailedError(f"the gateway can't fetch {url}")
                    case pb.CANCELED:
                        raise FailedError(f"the gateway gave up {url}")
                yield piece
        finally:
            watching.cancel()
            del self._downloads[request_id]
            if not is_over:
                self._cancel(request_id)

    def _cancel(self, request_id: int) -> None:
        cancel = pb.CancelDownload(request_id=request_id)
        self._channel.send_soon(pb.ProxyOutgoingMessages(cancel_download=cancel).SerializeToString())

    async def _introduce(self, stream: Stream) -> None:
        await stream.send(pb.ProxyOutgoingMessages(node_id=self._link.node_id).SerializeToString())

    async def _take(self, messages: list[Bytes]) -> None:
        # Pieces that come together are handed on together; not larger than what malloc keeps for the next ones.
        for piece in join_pieces(messages, READ_BYTES):
            if isinstance(piece, tuple):
                self._add(piece[0], _Piece(*piece[1:]))
            else:
                self._take_one(bytes(piece))
        if all(download.room.is_set() for download in self._downloads.values()):
            return
        patience_s = max(_HELD_UP_S, sum(map(len, messages)) / _LEAST_BYTES_PER_S)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience_s):
                for download in list(self._downloads.values()):
                    if not download.is_behind:
                        await download.room.wait()
                return
        for request_id, download in self._downloads.items():
            if not download.room.is_set() and not download.is_behind:
                download.is_behind = True
                self._cancel(request_id)

    def _take_one(self, message: bytes) -> None:
        try:
            incoming = pb.ProxyIncomingMessages.FromString(message)
        except DecodeError as error:
            raise InvalidArgumentError(f"piece of a download is malformed: {error}") from error
        if incoming.WhichOneof("ProxyIncomingMessage") != "download_content":
            return
        content = incoming.download_content
        failure = from_error_info(convert.error_from_pb(content.error))
        self._add(content.request_id, _Piece(content.offset, content.data, content.state, failure))

    def _add(self, request_id: int, piece: _Piece) -> None:
        download = self._downloads.get(request_id)
        if download is not None and not download.is_behind:
            download.add(piece)

    def _lost(self, reason: str) -> None:
        for download in self._downloads.values():
            download.fail(ChannelClosedError(reason))
