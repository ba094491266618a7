"""Between a channel and a gRPC stream: messages in both directions until either ends (mp.md §2).

Messages pass as the bytes they are; nothing is kept over a break. Whichever side ends first ends the other, so each
end of the link always sees the truth.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, NoReturn

import grpc
import grpc.aio

from aoscore.common.errors import AosError, FailedError, InvalidArgumentError, first_cause
from aoscore.common.log import kv
from aoscore.common.rpc import begin_answers, open_channel, open_tls_channel, rpc_errors
from aoscore.common.tls import TlsRoots
from aoscore.mp.communication.connection import Connection, Stream, until_one_ends

_log = logging.getLogger(__name__)

Check = Callable[[Connection, bytes], bool]
"""Whether a message of the node behind a link may pass; one that may not is dropped. AosError ends the relay."""


Way = Callable[[], TlsRoots | None]
"""How to speak to a server: TLS with what it gives, plain text for None. May raise AosError."""

_CONNECT_TIMEOUT_S = 3.0


class ServerRelay:
    """A gateway's relay between one channel and one method of a server, for all links.

    `path` is the gRPC method at `address`, `what` names it in messages, `ways` are tried in turn. `on_end` is told of
    the end of each use of the channel.
    """

    def __init__(
        self,
        port: int,
        address: str,
        path: str,
        ways: Sequence[Way],
        *,
        what: str,
        check: Check,
        on_end: Callable[[Connection], None] = lambda _: None,
    ) -> None:
        self._port = port
        self._address = address
        self._path = path
        self._ways = ways
        self._what = what
        self._check = check
        self._on_end = on_end

    async def serve(self, connection: Connection) -> None:
        """Relay the uses of the channel of a link one after the other, until cancelled."""
        while True:
            stream = await connection.accept(self._port)
            try:
                async with stream:
                    first = await self._next(connection, stream)
                    async with server_channel(self._address, self._ways) as server:
                        _log.info(kv(f"{self._what} for node", nodeID=connection.node_id, peer=connection.peer))
                        await self._relay(connection, stream, first, server)
            except AosError as error:
                _log.info(kv(f"{self._what} ended", nodeID=connection.node_id, peer=connection.peer, reason=error))
                self._on_end(connection)

    async def _relay(self, connection: Connection, stream: Stream, first: bytes, server: grpc.aio.Channel) -> None:
        """Pass messages in both directions. Raises AosError saying which side ended it and why."""
        method: Any = server.stream_stream(self._path)
        call = method()
        turn = asyncio.Lock()

        async def write(message: bytes) -> None:
            async with turn:
                with rpc_errors(self._what):
                    await call.write(message)

        async def to_server() -> None:
            message = first
            while True:
                await write(message)
                message = await self._next(connection, stream)

        async def to_node() -> None:
            while True:
                with rpc_errors(self._what):
                    message = await call.read()
                if message is grpc.aio.EOF:
                    with rpc_errors(self._what):
                        code, details = await call.code(), await call.details()
                    raise FailedError(f"{self._what} ended: {details or code.name}")
                self._see(message)
                try:
                    await stream.send(message)
                except InvalidArgumentError as error:
                    _log.error(kv("Message can't be passed to the node", nodeID=connection.node_id, error=error))

        try:
            await until_one_ends(to_server(), to_node(), self._beside(stream, write))
        finally:
            call.cancel()

    def _see(self, message: bytes) -> None:
        """Look at a message of the server on its way to the node."""

    async def _beside(self, stream: Stream, write: Callable[[bytes], Awaitable[None]]) -> None:
        """What else there is to do while messages pass; `write` sends one more to the server."""
        await asyncio.get_running_loop().create_future()

    async def _next(self, connection: Connection, stream: Stream) -> bytes:
        while True:
            message = await stream.receive()
            if self._check(connection, message):
                return message


async def relay_to_client(
    stream: Stream, requests: AsyncIterable[bytes], context: Any, *, through: Callable[[bytes], Sequence[bytes]]
) -> None:
    """Node: pass what a local gRPC client sends to the gateway and its answers back. Raises like ServerRelay.

    `through` gives what to send in place of a message.
    """

    async def to_gateway() -> None:
        async for message in requests:
            for one in through(message):
                await stream.send(one)
        raise FailedError("the local client ended its stream")

    async def to_client() -> None:
        while True:
            await context.write(await stream.receive())

    await begin_answers(context)
    await until_one_ends(to_gateway(), to_client())


@contextlib.asynccontextmanager
async def server_channel(address: str, ways: Sequence[Way]) -> AsyncIterator[grpc.aio.Channel]:
    """A channel of its own for one relay, by the first way that works. Raises FailedError with all reasons."""
    reasons: list[str] = []
    for way in ways:
        channel = None
        try:
            tls = way()
            channel = open_channel(address, None) if tls is None else await open_tls_channel(address, tls)
            async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                await channel.channel_ready()
            break
        except (AosError, TimeoutError) as error:
            reasons.append(str(error) or f"no answer from {address} within {_CONNECT_TIMEOUT_S:g} s")
            if channel is not None:
                await channel.close()
        except asyncio.CancelledError:
            if channel is not None:
                await channel.close()
            raise
    else:
        raise FailedError("; ".join(reasons))
    try:
        yield channel
    finally:
        await channel.close()


async def unavailable(context: Any, error: BaseException) -> NoReturn:
    """End a local call: the Main Node can't be reached, or has ended it."""
    cause = first_cause(error)
    await context.abort(grpc.StatusCode.UNAVAILABLE, str(cause) or type(cause).__name__)
    raise AosError("abort raises")
