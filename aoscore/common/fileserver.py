"""A small HTTP file server for blobs: GET and HEAD, single ranges, sendfile, bounded connections."""

import asyncio
import contextlib
import errno
import logging
import os
import re
from collections.abc import Awaitable, Callable, Collection
from http import HTTPStatus
from pathlib import Path
from typing import BinaryIO

import h11

from aoscore._speedups.chunker import send_file
from aoscore.common.aio import Backoff, Worker, log_and_continue
from aoscore.common.errors import AlreadyExistsError, AosError
from aoscore.common.log import kv
from aoscore.common.rpc import plain_ip, split_address

_log = logging.getLogger(__name__)

_RANGE = re.compile(r"bytes=(\d*)-(\d*)")
_HEAD_TIMEOUT_S = 30.0
_SEND_TIMEOUT_S = 600.0
_THREADS = 2
_STEP_BYTES = 1024 * 1024
"""What one call sends: the threads serve all connections in turn."""
_FIRST_LOOK_S = 1.0
_LAST_LOOK_S = 30.0
"""Pauses between looks at the addresses to listen at."""


class FileServer:
    """Serves the files that `resolve` names.

    `resolve(url_path)` gives the file for a path, or None or an AosError for "not found": it decides what is
    reachable, the server itself opens nothing else. `allow(ip)` can refuse peers on other machines. `port` is bound
    once started.

    `find` gives the IP addresses to listen at in place of that in `address`. It is asked again and again: an address
    that this machine does not have yet is said in the log and tried again, one that is not named any more is closed.
    """

    def __init__(
        self,
        address: str,
        resolve: Callable[[str], Path | None],
        *,
        allow: Callable[[str], bool] = lambda _: True,
        max_connections: int = 64,
        find: Callable[[], Awaitable[Collection[str]]] | None = None,
    ) -> None:
        self._host, self._wanted_port = split_address(address)
        self._resolve = resolve
        self._allow = allow
        self._where = find
        self._servers: dict[str, asyncio.Server] = {}
        self._failed: dict[str, str] = {}
        self._slots = asyncio.Semaphore(max_connections)
        self._tasks: set[asyncio.Task[None]] = set()
        self._worker = Worker("files", _THREADS)
        self.port = 0

    async def run(self, started: Callable[[], None]) -> None:
        """Serve until cancelled, once; open transfers are cut then, clients resume.

        Raises AlreadyExistsError when somebody else has the port, or when the one address there is can't be used.
        """
        async with self._worker:
            try:
                if self._where is None:
                    await self._listen(self._host)
                    started()
                    await asyncio.get_running_loop().create_future()
                else:
                    await self._follow(self._where, started)
            finally:
                for server in self._servers.values():
                    server.close()
                for task in self._tasks:
                    task.cancel()
                await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _listen(self, host: str) -> None:
        port = self.port or self._wanted_port
        try:
            server = await asyncio.start_server(self._accept, host, port)
        except OSError as error:
            raise AlreadyExistsError(f"file server can't listen on {host}:{port}: {error}") from error
        self._servers[host] = server
        self.port = server.sockets[0].getsockname()[1]
        _log.info("File server listens: address=%s:%d", host, self.port)

    async def _follow(self, find: Callable[[], Awaitable[Collection[str]]], started: Callable[[], None]) -> None:
        is_first = True
        pauses = Backoff(_FIRST_LOOK_S, _LAST_LOOK_S)
        while True:
            wanted = await find()
            for host in [one for one in self._servers if one not in wanted]:
                self._servers.pop(host).close()
                _log.info("File server listens no more: address=%s", host)
            for host in sorted(set(wanted) - self._servers.keys()):
                try:
                    await self._listen(host)
                    self._failed.pop(host, None)
                except AlreadyExistsError as error:
                    if is_first and isinstance(error.__cause__, OSError) and error.__cause__.errno == errno.EADDRINUSE:
                        raise
                    if self._failed.get(host) != str(error):
                        # Without IPv6 there are no such addresses, and there is nothing to wait for.
                        level = logging.DEBUG if host in ("::", "::1") else logging.WARNING
                        _log.log(level, kv("Waiting for the address of the file server", address=host, error=error))
                    self._failed[host] = str(error)
            if is_first:
                started()
                is_first = False
            await asyncio.sleep(pauses.next())

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - asyncio runs us in one
        self._tasks.add(task)
        try:
            with log_and_continue(_log, "File server connection ended"), contextlib.suppress(ConnectionError):
                async with self._slots:
                    peer, here = (plain_ip(writer.get_extra_info(end)[0]) for end in ("peername", "sockname"))
                    # Who is on this machine comes from the address that he asks.
                    allowed = peer == here or self._allow(peer)
                    if not allowed:
                        _log.warning("File server refuses peer: address=%s", peer)
                    await self._serve(reader, writer, allowed)
        except asyncio.CancelledError:
            # Only run() cancels us, when the server stops.
            writer.transport.abort()
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, allowed: bool) -> None:
        connection = h11.Connection(h11.SERVER)
        while True:
            try:
                async with asyncio.timeout(_HEAD_TIMEOUT_S):
                    request = await _read_request(connection, reader)
            except (TimeoutError, h11.RemoteProtocolError):
                return
            if request is None:
                return
            if not allowed:
                _head(connection, writer, HTTPStatus.FORBIDDEN, [("Content-Length", "0"), ("Connection", "close")])
                return
            await self._answer(connection, writer, request)
            if connection.our_state is not h11.DONE or connection.their_state is not h11.DONE:
                return
            connection.start_next_cycle()

    async def _answer(self, connection: h11.Connection, writer: asyncio.StreamWriter, request: h11.Request) -> None:
        if request.method not in (b"GET", b"HEAD"):
            _head(connection, writer, HTTPStatus.METHOD_NOT_ALLOWED, [("Allow", "GET, HEAD"), ("Content-Length", "0")])
            return
        path = self._find(request.target.decode("ascii").partition("?")[0])
        try:
            file = path.open("rb") if path else None
        except OSError:
            file = None
        if path is None or file is None:
            _head(connection, writer, HTTPStatus.NOT_FOUND, [("Content-Length", "0")])
            return
        with file:
            size = path.stat().st_size
            headers = {name.lower(): value for name, value in request.headers}
            etag = f'"{path.name}"'
            first, length, status = 0, size, HTTPStatus.OK
            extra = [("Content-Type", "application/octet-stream"), ("Accept-Ranges", "bytes"), ("ETag", etag)]
            wanted = headers.get(b"range", b"").decode("latin-1")
            if wanted and headers.get(b"if-range", etag.encode()).decode("latin-1") == etag:
                part = parse_range(wanted, size)
                if part is None:
                    _head(
                        connection,
                        writer,
                        HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE,
                        [("Content-Range", f"bytes */{size}"), ("Content-Length", "0")],
                    )
                    return
                first, length = part
                status = HTTPStatus.PARTIAL_CONTENT
                extra.append(("Content-Range", f"bytes {first}-{first + length - 1}/{size}"))
            body = request.method == b"GET"
            _head(connection, writer, status, [*extra, ("Content-Length", str(length))], end=not body)
            if body:
                await self._send(connection, writer, file, first, length)

    async def _send(
        self, connection: h11.Connection, writer: asyncio.StreamWriter, file: BinaryIO, first: int, length: int
    ) -> None:
        if length:
            await self._send_part(connection, writer, file, first, length)
        writer.write(connection.send(h11.EndOfMessage()) or b"")

    async def _send_part(
        self, connection: h11.Connection, writer: asyncio.StreamWriter, file: BinaryIO, first: int, length: int
    ) -> None:
        """Send so many bytes of a file, at least one, as the next part of a body. Raises TimeoutError, OSError."""
        for part in connection.send_with_data_passthrough(h11.Data(data=_Counted(length))) or ():  # type: ignore[arg-type]
            if isinstance(part, _Counted):
                # The kernel sends the bytes; h11 only counts them.
                async with asyncio.timeout(_SEND_TIMEOUT_S):
                    await self._send_bytes(writer, file, first, length)
            else:
                writer.write(part)

    async def _send_bytes(self, writer: asyncio.StreamWriter, file: BinaryIO, first: int, length: int) -> None:
        """Behind all that was written before. In a thread: asyncio's own waits for the disk in the loop."""
        writer.transport.set_write_buffer_limits(high=0)
        await writer.drain()
        # Of our own: the loop does not let us wait for the one that the transport uses.
        descriptor = os.dup(writer.get_extra_info("socket").fileno())
        try:
            while length:
                try:
                    sent = await self._worker.run(send_file, descriptor, file.fileno(), first, min(length, _STEP_BYTES))
                except BlockingIOError:
                    await _until_writable(descriptor)
                    continue
                if not sent:
                    raise OSError(f"file {file.name} became shorter while it was sent")
                first += sent
                length -= sent
        finally:
            os.close(descriptor)

    def _find(self, target: str) -> Path | None:
        try:
            return self._resolve(target)
        except AosError as error:
            _log.warning("File server: no such file: path=%s, error=%s", target, error)
            return None


async def _until_writable(descriptor: int) -> None:
    loop = asyncio.get_running_loop()
    writable = asyncio.Event()
    loop.add_writer(descriptor, writable.set)
    try:
        await writable.wait()
    finally:
        loop.remove_writer(descriptor)


class _Counted:
    """Stands for bytes that went out by sendfile: h11 asks only for their number."""

    def __init__(self, length: int) -> None:
        self._length = length

    def __len__(self) -> int:
        return self._length


def parse_range(text: str, size: int) -> tuple[int, int] | None:
    """First byte and length of a single range (RFC 9110 §14.1.2), None when it cannot be satisfied."""
    match = _RANGE.fullmatch(text.strip())
    if not match or not (match[1] or match[2]):
        return None
    if not match[1]:
        length = min(int(match[2]), size)
        return (size - length, length) if length else None
    first = int(match[1])
    last = min(int(match[2]), size - 1) if match[2] else size - 1
    return (first, last - first + 1) if first <= last else None


def _head(
    connection: h11.Connection,
    writer: asyncio.StreamWriter,
    status: HTTPStatus,
    headers: list[tuple[str, str]],
    *,
    end: bool = True,
) -> None:
    writer.write(connection.send(h11.Response(status_code=status, headers=headers, reason=status.phrase)) or b"")
    if end:
        writer.write(connection.send(h11.EndOfMessage()) or b"")


async def _read_request(connection: h11.Connection, reader: asyncio.StreamReader) -> h11.Request | None:
    request = None
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await reader.read(65536))
        elif isinstance(event, h11.Request):
            request = event
        elif isinstance(event, h11.EndOfMessage):
            return request
        elif isinstance(event, h11.ConnectionClosed) or event is h11.PAUSED:
            return None
