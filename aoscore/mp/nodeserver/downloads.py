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

from google.protobuf.message import DecodeError

from aoscore._pb.servicemanager.v5 import servicemanager_pb2 as pb
from aoscore.common import convert
from aoscore.common.aio import comes_within
from aoscore.common.errors import (
    AosError,
    DeadlineError,
    FailedError,
    InvalidArgumentError,
    from_error_info,
)
from aoscore.mp.communication.connection import ChannelClosedError, Stream
from aoscore.mp.communication.ports import PROXY
from aoscore.mp.nodeserver.link import NodeLink, OnDemandChannel

_WAITING_PIECES = 256
# The most that a reader which falls behind holds up the link, and with it what is more urgent.
_HELD_UP_S = 0.002
_IDLE_TIMEOUT_S = 90.0


class _Download:
    def __init__(self) -> None:
        self.pieces: deque[pb.DownloadContent] = deque()
        self.news = asyncio.Event()
        self.room = asyncio.Event()
        self.room.set()
        self.error: AosError | None = None
        self.is_behind = False
        """Pieces were left out: what follows the ones that wait has to be asked for again."""

    def add(self, piece: pb.DownloadContent) -> None:
        self.pieces.append(piece)
        self.news.set()
        if len(self.pieces) >= _WAITING_PIECES:
            self.room.clear()

    def fail(self, error: AosError) -> None:
        self.error = self.error or error
        self.news.set()

    async def take(self, url: str) -> pb.DownloadContent:
        """The next piece. Raises the error after the last, DeadlineError when nothing comes."""
        if not (self.pieces or self.error):
            self.news.clear()
            if not await comes_within(self.news, _IDLE_TIMEOUT_S):
                raise DeadlineError(f"nothing of {url} came for {_IDLE_TIMEOUT_S:g} s")
        if not self.pieces and self.error is not None:
            raise self.error
        piece = self.pieces.popleft()
        if len(self.pieces) <= _WAITING_PIECES // 2:
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
            async with contextlib.aclosing(self._fetch_once(url, offset)) as contents:
                async for content in contents:
                    if content.data and content.offset != offset:
                        raise FailedError(f"the gateway sent byte {content.offset} where {offset} was due")
                    is_complete = content.state == pb.COMPLETED
                    if data := content.data:
                        offset += len(data)
                        yield data

    async def _fetch_once(self, url: str, offset: int) -> AsyncGenerator[pb.DownloadContent, None]:
        """Until it is complete, or we have fallen behind."""
        stream = await self._channel.stream()
        request_id, download = next(self._ids), _Download()
        self._downloads[request_id] = download
        is_over = False
        try:
            request = pb.DownloadRequest(url=url, request_id=request_id, offset=offset)
            await stream.send(pb.ProxyOutgoingMessages(download_request=request).SerializeToString())
            while not is_over:
                if download.is_behind and not download.pieces:
                    is_over = True  # it is cancelled already
                    return
                content = await download.take(url)
                is_over = content.state != pb.IN_PROGRESS
                match content.state:
                    case pb.FAILED:
                        error = convert.error_from_pb(content.error)
                        raise from_error_info(error) or FailedError(f"the gateway can't fetch {url}")
                    case pb.CANCELED:
                        raise FailedError(f"the gateway gave up {url}")
                yield content
        finally:
            del self._downloads[request_id]
            if not is_over:
                self._cancel(request_id)

    def _cancel(self, request_id: int) -> None:
        cancel = pb.CancelDownload(request_id=request_id)
        self._channel.send_soon(pb.ProxyOutgoingMessages(cancel_download=cancel).SerializeToString())

    async def _introduce(self, stream: Stream) -> None:
        await stream.send(pb.ProxyOutgoingMessages(node_id=self._link.node_id).SerializeToString())

    async def _take(self, messages: list[bytes]) -> None:
        for message in messages:
            self._take_one(message)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_HELD_UP_S):
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
        download = self._downloads.get(content.request_id)
        if download is not None and not download.is_behind:
            download.add(content)

    def _lost(self, reason: str) -> None:
        for download in self._downloads.values():
            download.fail(ChannelClosedError(reason))
