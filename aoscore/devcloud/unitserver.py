"""Service discovery and the WebSocket link of Units (cloud-protocol-v7 §§1-3): sockets and timers around `Link`."""

import asyncio
import contextlib
import json
import logging
import time

import aiohttp
from aiohttp import web

from aoscore.common.aio import comes_within, log_and_continue
from aoscore.common.certs import serial_hex
from aoscore.devcloud.core import Core, UnitSession
from aoscore.devcloud.faults import DISCOVERY, WEBSOCKET
from aoscore.devcloud.peer import abort, apply_request_faults, peer_certificate

_log = logging.getLogger(__name__)

_SEND_TIMEOUT_S = 30.0
# A Unit that has not answered a ping half of this later is offline.
_PING_PERIOD_S = 10.0


class UnitServer:
    """Handlers of the discovery and link listeners."""

    def __init__(self, core: Core, *, next_request_delay_ms: int = 1000) -> None:
        self._core = core
        self._next_request_delay_ms = next_request_delay_ms
        self._open: set[web.WebSocketResponse] = set()

    def discovery_app(self) -> web.Application:
        """Answers POST on every path: the Unit takes the path from its own configuration (§1.2)."""
        app = web.Application()
        app.router.add_post("/{path:.*}", self._discovery)
        return app

    def websocket_app(self, app: web.Application | None = None) -> web.Application:
        """Answers /ws; added to `app` when link and discovery share a port."""
        app = app or web.Application()
        app.router.add_get("/ws", self._websocket)
        app.on_shutdown.append(self._shutdown)
        return app

    async def _shutdown(self, _: web.Application) -> None:
        for websocket in list(self._open):
            await websocket.close(code=aiohttp.WSCloseCode.GOING_AWAY)

    async def _unit_of(self, request: web.Request) -> str:
        """System id of the Unit that the client certificate was issued for as `online` certificate."""
        certificate = peer_certificate(request)
        if certificate is None:
            raise web.HTTPForbidden(text="client certificate required")
        serial = serial_hex(certificate)
        system_id = await self._core.transact(lambda store: store.system_id_of_online_certificate(serial))
        if system_id is None:
            raise web.HTTPForbidden(text="client certificate is no online certificate of a registered Unit")
        return system_id

    async def _discovery(self, request: web.Request) -> web.Response:
        system_id = await self._unit_of(request)
        if (answer := await apply_request_faults(self._core.faults, request, DISCOVERY, system_id)) is not None:
            return answer
        try:
            body = await request.json()
            version, claimed = body["version"], body["systemId"]
            protocols = body["supportedProtocols"]
        except (ValueError, KeyError, TypeError) as error:
            raise web.HTTPBadRequest(text=f"no discovery request: {error!r}") from error
        if version != 7 or "wss" not in protocols:
            raise web.HTTPBadRequest(text="only protocol version 7 over wss is served")
        if claimed != system_id:
            raise web.HTTPForbidden(text="system id is not that of the client certificate")
        return web.json_response(
            {
                "version": 7,
                "systemId": system_id,
                "nextRequestDelay": self._next_request_delay_ms,
                "connectionInfo": [self._core.endpoints.websocket_url],
                "authToken": self._core.new_link_token(system_id),
                "errorCode": 0,
            }
        )

    async def _websocket(self, request: web.Request) -> web.StreamResponse:
        system_id = await self._unit_of(request)
        if (answer := await apply_request_faults(self._core.faults, request, WEBSOCKET, system_id)) is not None:
            return answer
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        if scheme != "Bearer" or self._core.link_token_owner(token) != system_id:
            raise web.HTTPUnauthorized(text="bearer token is unknown or expired")
        websocket = web.WebSocketResponse(compress=False, max_msg_size=0, timeout=2, heartbeat=_PING_PERIOD_S)
        await websocket.prepare(request)
        self._open.add(websocket)
        session = self._core.session(system_id)

        def close() -> None:
            abort(request)

        session.connect(close)
        self._core.publish_connection(system_id, "online")
        connection = _Connection(self._core, system_id, session, websocket, request)
        try:
            await connection.run()
        finally:
            self._open.discard(websocket)
            session.disconnect(close)
            self._core.publish_connection(system_id, "offline")
        return websocket


class _Connection:
    """One WebSocket connection of a Unit."""

    def __init__(
        self,
        core: Core,
        system_id: str,
        session: UnitSession,
        websocket: web.WebSocketResponse,
        request: web.Request,
    ) -> None:
        self._core = core
        self._system_id = system_id
        self._session = session
        self._websocket = websocket
        self._request = request

    async def run(self) -> None:
        """Read and write until either side ends."""
        writer = asyncio.create_task(self._write())
        try:
            await self._read()
        finally:
            writer.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await writer

    async def _read(self) -> None:
        async for frame in self._websocket:
            if frame.type == aiohttp.WSMsgType.BINARY:
                await self._received(frame.data)
            elif frame.type == aiohttp.WSMsgType.TEXT:
                problems = ["frame is text, the Unit sends binary frames only (§1.4)"]
                await self._core.violation(self._system_id, "", problems, frame.data.encode())

    async def _received(self, raw: bytes) -> None:
        link, faults = self._session.link, self._core.faults
        received = link.receive(raw, time.monotonic())
        kind = received.message_type
        if received.data is not None:
            if fault := faults.take("delay", on=kind, unit=self._system_id):
                await asyncio.sleep(fault.seconds)
            for name in ("silence", "drop_connection", "nack"):
                if fault := faults.take(name, on=kind, unit=self._system_id):
                    link.forget(raw)
                    if name == "drop_connection":
                        abort(self._request)
                    elif name == "nack":
                        txn = json.loads(raw)["header"]["txn"]
                        nack = {"messageType": "nack", "retryAfter": fault.retry_after_ms}
                        await self._send(link.answer(txn, nack))
                    return
        answers = await self._core.take(self._system_id, received, raw)
        if received.reply is not None:
            await self._send(received.reply)
        for answer in answers:
            with log_and_continue(_log, f"Can't answer {kind} of Unit {self._system_id}"):
                await self._core.post(self._system_id, answer)
        if received.data is not None and kind == "unitStatus":
            if self._session.greeted:
                await self._core.refresh(self._system_id)
            elif not received.data.get("isDeltaInfo"):
                await self._core.greet(self._system_id)
        self._session.wake.set()

    async def _write(self) -> None:
        link, wake = self._session.link, self._session.wake
        while True:
            wake.clear()
            frames, dropped = link.due(time.monotonic())
            for message_type, frame in frames:
                await self._send_message(message_type, frame)
            for message_type in dropped:
                problems = ["not acked after the last transmission"]
                await self._core.violation(self._system_id, message_type, problems, b"")
            due_s = link.next_due_s()
            await comes_within(wake, None if due_s is None else due_s - time.monotonic())

    async def _send_message(self, message_type: str, frame: bytes) -> None:
        faults, unit = self._core.faults, self._system_id
        if faults.take("malformed_json", on=message_type, unit=unit):
            frame = frame[: len(frame) // 2]
        if faults.take("text_frame", on=message_type, unit=unit):
            await self._websocket.send_str(frame.decode())
            return
        await self._send(frame)
        if faults.take("duplicate", on=message_type, unit=unit):
            await self._send(frame)

    async def _send(self, frame: bytes) -> None:
        """Send one binary frame; a connection that is gone or stuck is cut, the reader then ends."""
        try:
            async with asyncio.timeout(_SEND_TIMEOUT_S):
                await self._websocket.send_bytes(frame)
        except (ConnectionError, TimeoutError):
            abort(self._request)
