"""One WebSocket connection as a client: the sans-I/O core of `websockets` over asyncio streams."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
from collections.abc import AsyncIterator, Mapping
from types import MappingProxyType
from typing import Final

from websockets.client import ClientProtocol
from websockets.exceptions import InvalidURI, WebSocketException
from websockets.frames import Frame, Opcode
from websockets.http11 import Response
from websockets.protocol import State
from websockets.uri import parse_uri

from aoscore.common.connect import open_connection
from aoscore.common.errors import DeadlineError, FailedError, InvalidArgumentError

CONNECT_TIMEOUT_S: Final = 30.0
WRITE_TIMEOUT_S: Final = 30.0
_CLOSE_TIMEOUT_S: Final = 2.0
_READ_BYTES: Final = 64 * 1024
# The contract of the cloud has no limit and states of hundreds of kilobytes are normal; this only bounds memory.
MAX_MESSAGE_BYTES: Final = 64 * 1024 * 1024

# At debug level the library writes the handshake, and with it the token.
_library_log = logging.getLogger(f"{__name__}.library")
_library_log.setLevel(logging.INFO)


class UnauthorizedError(FailedError):
    """The server refused who we are (HTTP 401)."""


class WebSocket:
    """An open connection. Made by `connect`."""

    def __init__(
        self, protocol: ClientProtocol, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, url: str
    ) -> None:
        self._protocol = protocol
        self._reader = reader
        self._writer = writer
        self._url = url
        self.pongs = 0

    async def _flush(self) -> None:
        for data in self._protocol.data_to_send():
            if data:
                self._writer.write(data)
            elif self._writer.can_write_eof():  # TLS cannot close one direction
                self._writer.write_eof()
        try:
            async with asyncio.timeout(WRITE_TIMEOUT_S):
                await self._writer.drain()
        except TimeoutError:
            raise DeadlineError(f"{self._url} took no data for {WRITE_TIMEOUT_S:g} s") from None
        except OSError as error:
            raise FailedError(f"connection to {self._url} failed: {error.strerror or error}") from error

    async def _receive(self) -> bool:
        """Feeds what has come to the protocol; False at the end of the connection."""
        try:
            data = await self._reader.read(_READ_BYTES)
        except OSError as error:
            raise FailedError(f"connection to {self._url} failed: {error.strerror or error}") from error
        if data:
            self._protocol.receive_data(data)
        else:
            self._protocol.receive_eof()
        await self._flush()  # pongs and the answer to a close frame
        return bool(data)

    async def handshake(self, headers: Mapping[str, str]) -> None:
        """Upgrades the connection.

        Raises UnauthorizedError, FailedError.
        """
        request = self._protocol.connect()
        for name, value in headers.items():
            request.headers[name] = value
        self._protocol.send_request(request)
        await self._flush()
        while self._protocol.state is State.CONNECTING and self._protocol.handshake_exc is None:
            if not await self._receive():
                break
        # The answer is the first event; frames that came with it stay for `messages`.
        self._early = self._protocol.events_received()
        for event in self._early:
            if isinstance(event, Response) and event.status_code == 401:
                raise UnauthorizedError(f"{self._url} refuses the token")
        if self._protocol.state is not State.OPEN:
            reason = self._protocol.handshake_exc or "connection closed"
            raise FailedError(f"WebSocket handshake with {self._url} failed: {reason}")

    async def messages(self) -> AsyncIterator[bytes]:
        """The messages of the peer, binary or text, fragments put together. Ends when the connection is closed.

        Raises FailedError when it breaks.
        """
        parts: list[bytes] = []
        events, self._early = self._early, []
        while True:
            for event in events:
                if not isinstance(event, Frame):
                    continue
                if event.opcode is Opcode.PONG:
                    self.pongs += 1
                elif event.opcode in (Opcode.TEXT, Opcode.BINARY, Opcode.CONT):
                    parts.append(bytes(event.data))
                    if event.fin:
                        yield b"".join(parts)
                        parts.clear()
            if self._protocol.state is not State.OPEN:
                break
            more = await self._receive()
            events = self._protocol.events_received()
            if not more and not events:
                break
        if self._protocol.parser_exc is not None and not isinstance(self._protocol.parser_exc, EOFError):
            raise FailedError(f"{self._url} breaks the WebSocket protocol: {self._protocol.parser_exc}")

    async def send(self, frame: bytes) -> None:
        """Sends one message as a binary frame. Raises FailedError or DeadlineError."""
        try:
            self._protocol.send_binary(frame)
        except WebSocketException as error:
            raise FailedError(f"connection to {self._url} is closed") from error
        await self._flush()

    async def send_text(self, text: str) -> None:
        """Sends one message as a text frame. Raises FailedError or DeadlineError."""
        try:
            self._protocol.send_text(text.encode())
        except WebSocketException as error:
            raise FailedError(f"connection to {self._url} is closed") from error
        await self._flush()

    async def ping(self) -> None:
        """Sends a ping; its answer is counted in `pongs`. Raises FailedError or DeadlineError."""
        try:
            self._protocol.send_ping(b"")
        except WebSocketException as error:
            raise FailedError(f"connection to {self._url} is closed") from error
        await self._flush()

    async def close(self) -> None:
        """Says good-bye (code 1000) if that is still possible, and drops the connection."""
        with contextlib.suppress(FailedError, DeadlineError, TimeoutError, WebSocketException):
            if self._protocol.state is State.OPEN:
                self._protocol.send_close(1000)
                async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                    await self._flush()
        self._writer.transport.abort()


@contextlib.asynccontextmanager
async def connect(
    url: str, ssl_context: ssl.SSLContext | None, headers: Mapping[str, str] = MappingProxyType({})
) -> AsyncIterator[WebSocket]:
    """Opens a connection and its WebSocket; leaving the block closes it.

    Args:
        url: `wss:` or `ws:` address.
        ssl_context: for `wss`; the host name is checked as the context says.
        headers: of the handshake, besides those of the protocol.

    Raises:
        InvalidArgumentError: the URL is none.
        UnauthorizedError: the server refuses who we are.
        DeadlineError, FailedError: no connection.
    """
    try:
        parsed = parse_uri(url)
    except InvalidURI as error:
        raise InvalidArgumentError(f"{url!r} is no WebSocket address: {error}") from error
    if parsed.secure and ssl_context is None:
        raise InvalidArgumentError(f"{url} needs a certificate, there is none")
    context = ssl_context if parsed.secure else None
    async with open_connection(parsed.host, parsed.port, context, timeout_s=CONNECT_TIMEOUT_S) as (reader, writer):
        # No extensions: the clouds of 9.1 do not offer compression (cloud-protocol §1.3).
        protocol = ClientProtocol(parsed, max_size=MAX_MESSAGE_BYTES, logger=_library_log)
        socket = WebSocket(protocol, reader, writer, url)
        try:
            try:
                async with asyncio.timeout(CONNECT_TIMEOUT_S):
                    await socket.handshake(headers)
            except TimeoutError:
                raise DeadlineError(f"{url} did not answer within {CONNECT_TIMEOUT_S:g} s") from None
            yield socket
        finally:
            await socket.close()
