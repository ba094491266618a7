"""A small HTTP/1.1 client on h11: bounded requests and streamed bodies."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Mapping, Sequence
from urllib.parse import SplitResult, urlsplit

import h11
import msgspec

from aoscore.common.connect import open_connection
from aoscore.common.errors import DeadlineError, FailedError, InvalidArgumentError, OutOfRangeError

_READ_BYTES = 256 * 1024
CONNECT_TIMEOUT_S = 10.0


def without_query(url: str) -> str:
    """What of a URL may be shown: signed links carry their access in the query."""
    return url.partition("?")[0]


def split_url(url: str) -> SplitResult:
    """The parts of a URL from outside, its port among them. Raises InvalidArgumentError."""
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 - it is checked when it is asked for
    except ValueError as error:
        raise InvalidArgumentError(f"{without_query(url)!r} is no URL: {error}") from None
    return parts


class Response(msgspec.Struct, frozen=True):
    """A whole answer. Header names are lower case."""

    status: int
    headers: dict[str, str]
    body: bytes


class Stream:
    """An answer whose body is read piece by piece."""

    def __init__(
        self,
        status: int,
        headers: dict[str, str],
        connection: h11.Connection,
        reader: asyncio.StreamReader,
        length: int | None,
    ) -> None:
        """`length`: bytes of the body, None where only the body itself shows it."""
        self.status = status
        self.headers = headers
        self._connection = connection
        self._reader = reader
        self._length = length

    async def chunks(self, idle_timeout_s: float) -> AsyncIterator[bytes]:
        """Pieces of the body. Raises DeadlineError when nothing comes for `idle_timeout_s`, FailedError when cut."""
        if self._length is not None:
            async for data in _plain_body(self._connection, self._reader, self._length, idle_timeout_s):
                yield data
            return
        while True:
            event = await _next_event(self._connection, self._reader, idle_timeout_s)
            if isinstance(event, h11.Data):
                yield bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                return


async def _plain_body(
    connection: h11.Connection, reader: asyncio.StreamReader, rest: int, timeout_s: float
) -> AsyncIterator[bytes]:
    """A body of known length, past h11, which would copy it several times."""
    data = connection.trailing_data[0][:rest]
    try:
        while rest:
            if not data:
                async with asyncio.timeout(timeout_s):
                    data = await reader.read(min(rest, _READ_BYTES))
                if not data:
                    raise FailedError(f"HTTP answer is broken or cut: {rest} bytes are missing")
            yield data
            rest -= len(data)
            data = b""
    except TimeoutError:
        raise DeadlineError(f"HTTP server said nothing for {timeout_s:g} s") from None
    except OSError as error:
        raise FailedError(f"HTTP connection failed: {error.strerror or error}") from error


def _length(method: str, status: int, headers: Mapping[str, str]) -> int | None:
    """Bytes of the body, where the head says it (RFC 9112 §6.3)."""
    length = headers.get("content-length", "")
    has_body = method != "HEAD" and status not in (204, 304)
    return int(length) if has_body and length.isdecimal() and "transfer-encoding" not in headers else None


async def _next_event(connection: h11.Connection, reader: asyncio.StreamReader, timeout_s: float) -> h11.Event:
    try:
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                async with asyncio.timeout(timeout_s):
                    connection.receive_data(await reader.read(_READ_BYTES))
            elif isinstance(event, h11.Event):
                return event
            else:
                raise FailedError("HTTP connection was closed too early")
    except TimeoutError:
        raise DeadlineError(f"HTTP server said nothing for {timeout_s:g} s") from None
    except h11.RemoteProtocolError as error:
        raise FailedError(f"HTTP answer is broken or cut: {error}") from error
    except OSError as error:
        raise FailedError(f"HTTP connection failed: {error.strerror or error}") from error


@contextlib.asynccontextmanager
async def open_stream(
    method: str,
    url: str,
    *,
    headers: Mapping[str, str] | None = None,
    body: bytes = b"",
    ssl_context: ssl.SSLContext | None = None,
    timeout_s: float = CONNECT_TIMEOUT_S,
) -> AsyncIterator[Stream]:
    """Send a request and give its answer as a Stream; `timeout_s` limits connecting and waiting for the head.

    `https` uses ssl_context, or the system's CA store without one. Redirects are answers like any other. Raises
    InvalidArgumentError for a bad URL, DeadlineError, FailedError.
    """
    parts = split_url(url)
    is_plain = url.isascii() and url.isprintable() and " " not in url
    if parts.scheme not in ("http", "https") or not parts.hostname or not is_plain:
        raise InvalidArgumentError(f"{without_query(url)!r} is no http or https URL")
    context = (ssl_context or ssl.create_default_context()) if parts.scheme == "https" else None
    port = parts.port or (443 if context else 80)
    async with open_connection(parts.hostname, port, context, timeout_s=timeout_s) as (reader, writer):
        connection = h11.Connection(h11.CLIENT)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        all_headers = {"Host": parts.netloc, "Connection": "close", "Content-Length": str(len(body)), **(headers or {})}
        for event in (
            h11.Request(method=method, target=target, headers=list(all_headers.items())),
            *([h11.Data(data=body)] if body else []),
            h11.EndOfMessage(),
        ):
            writer.write(connection.send(event) or b"")
        while True:
            event = await _next_event(connection, reader, timeout_s)
            if isinstance(event, h11.Response):
                break
        found = _headers(event.headers)
        yield Stream(event.status_code, found, connection, reader, _length(method, event.status_code, found))


async def request(
    method: str,
    url: str,
    *,
    headers: Mapping[str, str] | None = None,
    body: bytes = b"",
    ssl_context: ssl.SSLContext | None = None,
    timeout_s: float = 30.0,
    limit_bytes: int = 1024 * 1024,
) -> Response:
    """One whole exchange within `timeout_s`; raises OutOfRangeError when the body exceeds `limit_bytes`."""
    try:
        async with asyncio.timeout(timeout_s):
            async with open_stream(
                method, url, headers=headers, body=body, ssl_context=ssl_context, timeout_s=timeout_s
            ) as stream:
                received = bytearray()
                async for chunk in stream.chunks(timeout_s):
                    received += chunk
                    if len(received) > limit_bytes:
                        raise OutOfRangeError(f"answer of {without_query(url)} is larger than {limit_bytes} bytes")
                return Response(stream.status, stream.headers, bytes(received))
    except TimeoutError:
        raise DeadlineError(f"no answer from {without_query(url)} within {timeout_s:g} s") from None


def _headers(raw: Sequence[tuple[bytes, bytes]]) -> dict[str, str]:
    return {name.decode("ascii").lower(): value.decode("latin-1") for name, value in raw}
