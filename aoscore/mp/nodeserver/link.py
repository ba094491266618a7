"""The node's link to its gateway, as those who need it see it: there, or not."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection

from aoscore.common.aio import comes_within
from aoscore.common.errors import AosError
from aoscore.common.log import kv
from aoscore.mp.communication.connection import ChannelClosedError, Connection, Stream
from aoscore.mp.communication.frames import Bytes

_log = logging.getLogger(__name__)

_OPEN_TIMEOUT_S = 10.0
_RETRY_S = 3.0


class NodeLink:
    """Holds the present connection, if any. Nothing waits for it: whoever asks at the wrong time is told so at once.

    `secure` are the channels with certificates: they have dates, so those channels wait for `has_time`.
    """

    def __init__(self, secure: Collection[int] = ()) -> None:
        self._secure = frozenset(secure)
        self.connection: Connection | None = None
        """The present one."""
        self.has_time = asyncio.Event()
        """The clock of this node is right."""
        self.node_id = ""
        """Of this node, once its SM has said it."""

    @property
    def is_up(self) -> bool:
        """There is a link."""
        return self.connection is not None

    def set(self, connection: Connection | None) -> None:
        """The link came up, or went down."""
        self.connection = connection

    def check(self) -> None:
        """Raises ChannelClosedError without a link."""
        if self.connection is None:
            raise ChannelClosedError("there is no link to the Main Node")

    async def connect(self, port: int) -> Stream:
        """Open a channel. Raises ChannelClosedError without a link, and what Connection.connect raises."""
        self.check()
        if port in self._secure and not self.has_time.is_set():
            raise ChannelClosedError("the clock of this node is not set yet")
        assert self.connection is not None  # noqa: S101 - check() has seen to it
        return await self.connection.connect(port)


class OnDemandChannel:
    """A channel that many share: opened once somebody needs it, then read until it closes.

    `begin` may send first messages, `take` gets the messages, in order, `lost` hears why the channel closed.
    """

    def __init__(
        self,
        link: NodeLink,
        port: int,
        *,
        begin: Callable[[Stream], Awaitable[None]] | None = None,
        take: Callable[[list[Bytes]], Awaitable[None]],
        lost: Callable[[str], None],
    ) -> None:
        self._link = link
        self._port = port
        self._begin = begin
        self._take = take
        self._lost = lost
        self._stream: Stream | None = None
        self._wanted = asyncio.Event()
        self._up = asyncio.Event()

    async def run(self) -> None:
        """Keep the channel while it is needed, until cancelled."""
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            reason = "the link to the Main Node is down"
            try:
                async with await self._link.connect(self._port) as stream:
                    if self._begin is not None:
                        await self._begin(stream)
                    self._stream = stream
                    self._up.set()
                    while True:
                        await self._take(await stream.receive_all())
            except AosError as error:
                reason = str(error)
                _log.warning(kv("Channel is off", port=self._port, reason=reason))
            finally:
                self._stream = None
                self._up.clear()
                self._lost(reason)
            await asyncio.sleep(_RETRY_S)

    async def stream(self) -> Stream:
        """The channel, opened if need be. Raises ChannelClosedError."""
        self._link.check()
        self._wanted.set()
        if not await comes_within(self._up, _OPEN_TIMEOUT_S) or self._stream is None:
            raise ChannelClosedError(f"channel {self._port} does not open")
        return self._stream

    def send_soon(self, message: bytes) -> None:
        """Send a small message if the channel is open."""
        if self._stream is not None:
            self._stream.send_soon(message)
