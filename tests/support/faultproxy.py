"""A TCP proxy that makes every kind of trouble a network makes, and takes it back."""

import asyncio
import contextlib
import socket
import ssl
import struct
from collections.abc import AsyncIterator
from typing import Literal

Fault = Literal["none", "refuse", "drop", "delay", "reset", "half-open", "captive", "trickle"]
FAULTS: tuple[Fault, ...] = ("refuse", "drop", "delay", "reset", "half-open", "captive", "trickle")

_READ_BYTES = 65536
_TRICKLE_BYTES = 64


class FaultProxy:
    """Forwards to a port of loopback. What `fault` says acts on connections that are open as well as on new ones.

    refuse: connections end, new ones are not accepted. drop: data is taken and thrown away. delay: every piece waits
    `delay_s`. reset: a connection is reset when it has carried `reset_bytes`. half-open: nothing is taken nor sent any
    more, nothing ends. captive: new connections reach a portal with a certificate of its own. trickle: a few bytes at a
    time.
    """

    def __init__(self, target_port: int, captive: ssl.SSLContext) -> None:
        self._target_port = target_port
        self._captive = captive
        self._fault: Fault = "none"
        self._changed = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._portal: asyncio.Server | None = None
        self.port = 0
        self.delay_s = 0.3
        self.reset_bytes = 6000
        self.connections = 0

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator["FaultProxy"]:
        """Forward for the length of the block."""
        self._portal = await asyncio.start_server(_portal_page, "127.0.0.1", 0, ssl=self._captive)
        await self._listen()
        try:
            yield self
        finally:
            await self._end()
            self._portal.close()

    async def set(self, fault: Fault) -> None:
        """From now on this is wrong. `refuse` and `none` end what is half-open."""
        before, self._fault = self._fault, fault
        self._changed.set()
        self._changed = asyncio.Event()
        if fault == "refuse" or (fault == "none" and before in ("drop", "half-open", "captive")):
            await self._end()
        if fault != "refuse" and self._server is None:
            await self._listen()

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _end(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        tasks, self._tasks = self._tasks, set()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        port = self._target_port
        if self._fault == "captive":
            assert self._portal is not None
            port = self._portal.sockets[0].getsockname()[1]
        writers = [writer]
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", port)
            writers.append(far_writer)
            both = [
                asyncio.create_task(self._pump(reader, far_writer)),
                asyncio.create_task(self._pump(far_reader, writer)),
            ]
            try:
                await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for one in both:
                    one.cancel()
                await asyncio.gather(*both, return_exceptions=True)
        except OSError:
            pass
        finally:
            for one in writers:
                if self._fault == "reset":
                    linger = struct.pack("ii", 1, 0)
                    one.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                one.close()
            self._tasks.discard(task)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        carried = 0
        while True:
            while self._fault == "half-open":
                await self._changed.wait()
            data = await reader.read(_READ_BYTES)
            if not data:
                return
            while self._fault == "half-open":
                await self._changed.wait()
            if self._fault == "drop":
                continue
            if self._fault == "delay":
                await asyncio.sleep(self.delay_s)
            carried += len(data)
            if self._fault == "reset" and carried > self.reset_bytes:
                return
            while data and self._fault == "trickle":
                piece, data = data[:_TRICKLE_BYTES], data[_TRICKLE_BYTES:]
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0.02)
            writer.write(data)
            await writer.drain()


async def _portal_page(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        await reader.read(_READ_BYTES)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\nwelcome")
        await writer.drain()
    writer.close()
