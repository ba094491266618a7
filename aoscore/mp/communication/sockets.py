"""Links over TCP: the gateway waits for nodes, a node looks for its gateway (mp.md §5)."""

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable

from aoscore._speedups.frames import new_buffer
from aoscore.common.aio import log_and_continue
from aoscore.common.errors import AlreadyExistsError, AosError, DeadlineError, FailedError
from aoscore.common.log import kv
from aoscore.common.rpc import split_address
from aoscore.mp.communication.connector import READ_BYTES, Handler, Reader, Streams

_log = logging.getLogger(__name__)

MAX_LINKS = 64
_CONNECT_TIMEOUT_S = 10.0
STREAM_LIMIT_BYTES = 256 * 1024
# Of each half of an input: with room for two reads nobody has to wait for the reader.
_BUFFER_BYTES = 2 * READ_BYTES
# In the middle of a download, which a read of _DOWNLOAD_BYTES shows, the kernel wakes us (SO_RCVLOWAT, socket(7)) for
# _WORTH_WAKING_BYTES and no less, as long as _STILL_DOWNLOAD_BYTES come between two looks. Who takes each segment at
# once pays twice: with many turns of the event loop, and with a sender that copies to memory in the reader's cache.
_DOWNLOAD_BYTES = 128 * 1024
_WORTH_WAKING_BYTES = 512 * 1024
_STILL_DOWNLOAD_BYTES = 256 * 1024
_LOOK_S = 0.001
WRITE_BUFFER_BYTES = 64 * 1024
_NOT_SENT_BYTES = 128 * 1024
# What is on its way of a download is what an urgent message waits for: the kernel's own choice would be many megabytes.
_RECEIVE_BYTES = 1024 * 1024
# Not in the socket module of Python 3.11 on every platform (linux/tcp.h).
_TCP_NOTSENT_LOWAT = getattr(socket, "TCP_NOTSENT_LOWAT", 25)


def _tune(writer: asyncio.StreamWriter) -> None:
    """Notice a dead peer, and keep little waiting in the kernel: what is urgent would stand behind it."""
    writer.transport.set_write_buffer_limits(high=WRITE_BUFFER_BYTES)
    sock: socket.socket = writer.get_extra_info("socket")
    for level, option, value in (
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BYTES),
        (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10),
        (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
        (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 30_000),
        (socket.IPPROTO_TCP, _TCP_NOTSENT_LOWAT, _NOT_SENT_BYTES),
    ):
        sock.setsockopt(level, option, value)


class _Input:
    """What came in, in one half of a buffer; the other half is with the reader, so that nothing is copied."""

    def __init__(self) -> None:
        # Memory that costs nothing before it is used: on most links little comes at a time.
        self._filling, self._reading = (memoryview(new_buffer(_BUFFER_BYTES)) for _ in range(2))
        self._filled = 0
        self._rest = self._reading[:0]
        self._news = asyncio.Event()
        self._transport: asyncio.ReadTransport | None = None
        self._is_patient = False
        self._came_bytes = 0
        self._is_paused = False
        self._is_over = False
        self._error: Exception | None = None

    async def read(self, n: int, /) -> memoryview:
        """See connector.Reader. Raises the OSError that the connection ended with."""
        if not self._rest:
            while not (self._filled or self._is_over):
                self._news.clear()
                await self._news.wait()
            if self._error is not None and not self._filled:
                raise self._error
            self._filling, self._reading = self._reading, self._filling
            self._rest, self._filled = self._reading[: self._filled], 0
            if self._is_paused and self._transport is not None:
                self._is_paused = False
                self._transport.resume_reading()
        data, self._rest = self._rest[:n], self._rest[n:]
        return data

    # Of the protocol

    def begin(self, transport: asyncio.ReadTransport) -> None:
        self._transport = transport

    def room(self) -> memoryview:
        return self._filling[self._filled : self._filled + READ_BYTES]

    def add(self, count: int) -> None:
        self._filled += count
        self._news.set()
        self._came_bytes += count
        if count >= _DOWNLOAD_BYTES and not self._is_patient:
            self._be_patient()
        if self._filled == _BUFFER_BYTES and self._transport is not None:
            self._is_paused = True
            self._transport.pause_reading()

    def _be_patient(self) -> None:
        """Be woken for much at a time, until `_look` finds that it was in vain: what came last has waited for that."""
        self._is_patient = True
        self._wake_for(_WORTH_WAKING_BYTES)
        self._look_later()

    def _look_later(self) -> None:
        self._came_bytes = 0
        asyncio.get_running_loop().call_later(_LOOK_S, self._look)

    def _look(self) -> None:
        if self._is_over:
            return
        if self._came_bytes >= _STILL_DOWNLOAD_BYTES:
            self._look_later()
        else:
            self._is_patient = False
            self._wake_for(1)

    def _wake_for(self, least_bytes: int) -> None:
        assert self._transport is not None  # noqa: S101 - something came through it
        sock: socket.socket = self._transport.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, least_bytes)

    def end(self, error: Exception | None) -> None:
        self._is_over = True
        self._error = self._error or error
        self._news.set()


class _Protocol(asyncio.StreamReaderProtocol, asyncio.BufferedProtocol):
    """That of a StreamWriter, with an input of its own. `connected` is called like that of asyncio.start_server."""

    def __init__(self, connected: Callable[[Reader, asyncio.StreamWriter], Awaitable[None]] | None = None) -> None:
        self.input = _Input()
        # Gets no data, but has the error that the connection ends with: the writer raises it.
        self.reader = asyncio.StreamReader()

        async def begin(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            assert connected is not None  # noqa: S101 - without it we are not called
            await connected(self.input, writer)

        super().__init__(self.reader, begin if connected else None)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        assert isinstance(transport, asyncio.Transport)  # noqa: S101 - a socket's goes both ways
        self.input.begin(transport)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self.input.room()

    def buffer_updated(self, nbytes: int) -> None:
        self.input.add(nbytes)

    def eof_received(self) -> bool | None:
        self.input.end(None)
        return super().eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self.input.end(exc)
        super().connection_lost(exc)


class Listener:
    """Waits for nodes, as a service. `handler(reader, writer, peer)` has each connection to itself.

    `port` is bound once started. More than MAX_LINKS connections are refused: nobody has proved anything by then.
    """

    def __init__(self, address: str, handler: Handler) -> None:
        self._host, self._wanted_port = split_address(address)
        self._handler = handler
        self._tasks: set[asyncio.Task[None]] = set()
        self.port = 0

    async def run(self, started: Callable[[], None]) -> None:
        """Serve until cancelled; the connections then end, each in its own order."""
        try:
            loop = asyncio.get_running_loop()
            server = await loop.create_server(
                lambda: _Protocol(self._accept), self._host, self._wanted_port, backlog=16
            )
        except OSError as error:
            raise AlreadyExistsError(f"can't wait for nodes on {self._host}:{self._wanted_port}: {error}") from error
        self.port = server.sockets[0].getsockname()[1]
        _log.info(kv("Waiting for nodes", address=f"{self._host}:{self.port}"))
        started()
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            server.close()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: Reader, writer: asyncio.StreamWriter) -> None:
        host, port, *_ = writer.get_extra_info("peername")
        peer = f"{host}:{port}"
        if len(self._tasks) >= MAX_LINKS:
            _log.error(kv("Too many links, one more is refused", peer=peer, limit=MAX_LINKS))
            writer.transport.abort()
            return
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - asyncio runs us in one
        self._tasks.add(task)
        try:
            with log_and_continue(_log, f"Link of {peer} failed"):
                _tune(writer)
                await self._serve(reader, writer, peer)
        except asyncio.CancelledError:
            pass  # only run() cancels us, when the server stops
        finally:
            self._tasks.discard(task)
            writer.transport.abort()

    async def _serve(self, reader: Reader, writer: asyncio.StreamWriter, peer: str) -> None:
        try:
            await self._handler(reader, writer, peer)
            reason = "ended"
        except (AosError, OSError) as error:
            reason = str(error)
        _log.warning(kv("Link is down", peer=peer, reason=reason))


@contextlib.asynccontextmanager
async def connected(address: str) -> AsyncIterator[Streams]:
    """A connection to the gateway for the length of the block. Raises DeadlineError, FailedError."""
    host, port = split_address(address)
    try:
        async with asyncio.timeout(_CONNECT_TIMEOUT_S):
            loop = asyncio.get_running_loop()
            transport, protocol = await loop.create_connection(_Protocol, host, port)
    except TimeoutError:
        raise DeadlineError(f"can't connect to {address} within {_CONNECT_TIMEOUT_S:g} s") from None
    except OSError as error:
        raise FailedError(f"can't connect to {address}: {error.strerror or error}") from error
    try:
        writer = asyncio.StreamWriter(transport, protocol, protocol.reader, loop)
        _tune(writer)
        yield protocol.input, writer
    finally:
        transport.abort()
