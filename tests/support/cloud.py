"""A cloud for tests of the link: discovery and WebSocket on one port, plain or mutual TLS, every frame recorded."""

import asyncio
import contextlib
import json
import ssl
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from aiohttp import WSMsgType, web

Document = dict[str, Any]
Answer = Callable[[Document], Awaitable[Document]]


class FakeCloud:
    """What the Unit sees of its cloud. Acknowledges everything unless `acks` is switched off."""

    def __init__(self, system_id: str, ssl_context: ssl.SSLContext | None = None) -> None:
        self.system_id = system_id
        self.acks = True
        self.token = "token-1"
        self.discovery: Document = {}
        self.discovery_status = 200
        self.discoveries: list[Document] = []
        self.handshakes: list[dict[str, str]] = []
        self.frames: list[Document] = []
        self.received: asyncio.Queue[Document] = asyncio.Queue()
        self.sockets: list[web.WebSocketResponse] = []
        self.answers: dict[str, Answer] = {}
        """By message type: what is sent back, with the correlation id of the message."""
        self.port = 0
        self._ssl = ssl_context
        self._connected = asyncio.Event()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator["FakeCloud"]:
        """Serve for the length of the block."""
        app = web.Application()
        app.router.add_post("/sd/v7/", self._discover)
        app.router.add_get("/ws", self._talk)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", self.port, ssl_context=self._ssl)
        await site.start()
        self.port = runner.addresses[0][1]
        try:
            yield self
        finally:
            for socket in self.sockets:
                await socket.close()
            await runner.cleanup()

    @property
    def discovery_url(self) -> str:
        return f"http{'s' if self._ssl else ''}://127.0.0.1:{self.port}/sd/v7/"

    @property
    def ws_url(self) -> str:
        return f"ws{'s' if self._ssl else ''}://127.0.0.1:{self.port}/ws"

    async def _discover(self, request: web.Request) -> web.Response:
        self.discoveries.append(await request.json())
        answer = {
            "version": 7,
            "systemId": self.system_id,
            "nextRequestDelay": 0,
            "connectionInfo": [self.ws_url],
            "authToken": self.token,
            "errorCode": 0,
            **self.discovery,
        }
        return web.json_response(answer, status=self.discovery_status)

    async def _talk(self, request: web.Request) -> web.StreamResponse:
        self.handshakes.append(dict(request.headers))
        if request.headers.get("Authorization") != f"Bearer {self.token}":
            return web.Response(status=401)
        socket = web.WebSocketResponse(max_msg_size=0, compress=True)
        await socket.prepare(request)
        self.sockets.append(socket)
        self._connected.set()
        async for message in socket:
            if message.type is not WSMsgType.BINARY:
                continue
            document = json.loads(message.data)
            self.frames.append(document)
            if document["data"]["messageType"] != "ack":
                self.received.put_nowait(document)
                if self.acks:
                    await self.send_frame({"messageType": "ack"}, txn=document["header"]["txn"])
                if answer := self.answers.get(document["data"]["messageType"]):
                    data = await answer(document["data"])
                    await self.send_frame({**data, "correlationId": document["data"].get("correlationId", "")})
        self._connected.clear()
        return socket

    async def connected(self) -> None:
        """Wait for the Unit."""
        async with asyncio.timeout(10):
            await self._connected.wait()

    async def send_frame(self, data: Document, *, txn: str | None = None, text: bool = False) -> str:
        """Send a message in its envelope; returns its txn."""
        txn = txn or str(uuid.uuid4())
        header = {"version": 7, "systemId": self.system_id, "createdAt": "2026-03-01T08:16:00Z", "txn": txn}
        raw = json.dumps({"header": header, "data": data})
        await (self.sockets[-1].send_str(raw) if text else self.sockets[-1].send_bytes(raw.encode()))
        return txn

    async def next(self, kind: str) -> Document:
        """Data of the next message of a type; others are passed over."""
        async with asyncio.timeout(10):
            while True:
                document = await self.received.get()
                if document["data"]["messageType"] == kind:
                    return document
