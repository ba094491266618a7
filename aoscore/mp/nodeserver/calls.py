"""Single calls to CM through channel 18 (mp-wire §9, "Rpc"). Node."""

import asyncio
import itertools
import logging
from collections.abc import AsyncGenerator
from typing import Any, NoReturn

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from aoscore._pb.transport.v1 import transport_pb2 as pb
from aoscore.common.errors import AosError, DeadlineError, FailedError, InvalidArgumentError
from aoscore.common.log import kv
from aoscore.mp.communication.connection import ChannelClosedError
from aoscore.mp.communication.frames import Bytes
from aoscore.mp.communication.ports import RPC
from aoscore.mp.communication.relay import unavailable
from aoscore.mp.nodeserver.link import NodeLink, OnDemandChannel

_log = logging.getLogger(__name__)

CALL_TIMEOUT_S = 30.0
_CODES = {code.value[0]: code for code in grpc.StatusCode}


class CallError(FailedError):
    """CM, or the gateway for it, answered with a status."""

    def __init__(self, code: grpc.StatusCode, text: str) -> None:
        super().__init__(text or code.name)
        self.code = code


class _Call:
    """A call that waits: its answers, or what ended it."""

    def __init__(self) -> None:
        self.items: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.payload = b""
        self.error: AosError | None = None

    def end(self, payload: bytes = b"", error: AosError | None = None) -> None:
        self.payload = payload
        self.error = error
        self.items.put_nowait(None)


class CallClient:
    """Makes calls over whatever link there is; `run` belongs to it."""

    def __init__(self, link: NodeLink) -> None:
        self._channel = OnDemandChannel(link, RPC, take=self._take, lost=self._lost)
        self._calls: dict[int, _Call] = {}
        self._ids = itertools.count(1)

    async def run(self) -> None:
        """Keep the channel, until cancelled."""
        await self._channel.run()

    async def call(self, method: str, payload: bytes, *, timeout_s: float = CALL_TIMEOUT_S) -> bytes:
        """The answer of a unary call. Raises CallError, ChannelClosedError, DeadlineError."""
        try:
            async with asyncio.timeout(timeout_s + 1):
                call_id, call = await self._begin(method, payload, timeout_s)
                try:
                    await call.items.get()
                except asyncio.CancelledError:
                    self._cancel(call_id)
                    raise
                finally:
                    del self._calls[call_id]
        except TimeoutError:
            raise DeadlineError(f"no answer to {method} within {timeout_s:g} s") from None
        if call.error is not None:
            raise call.error
        return call.payload

    async def stream(self, method: str, payload: bytes) -> AsyncGenerator[bytes, None]:
        """The answers of a streaming call, until it ends. Raises CallError, ChannelClosedError."""
        call_id, call = await self._begin(method, payload, 0)
        is_over = False
        try:
            while (item := await call.items.get()) is not None:
                yield item
            is_over = True
        finally:
            del self._calls[call_id]
            if not is_over:
                self._cancel(call_id)
        if call.error is not None:
            raise call.error

    async def _begin(self, method: str, payload: bytes, timeout_s: float) -> tuple[int, _Call]:
        stream = await self._channel.stream()
        call_id, call = next(self._ids), _Call()
        request = pb.Request(call_id=call_id, method=method, payload=payload, deadline_ms=int(timeout_s * 1000))
        self._calls[call_id] = call
        try:
            await stream.send(pb.Rpc(request=request).SerializeToString())
        except BaseException:
            del self._calls[call_id]
            raise
        return call_id, call

    def _cancel(self, call_id: int) -> None:
        self._channel.send_soon(pb.Rpc(cancel=pb.Cancel(call_id=call_id)).SerializeToString())

    def _lost(self, reason: str) -> None:
        for call in self._calls.values():
            call.end(error=ChannelClosedError(reason))

    async def _take(self, messages: list[Bytes]) -> None:
        for message in messages:
            self._take_one(bytes(message))

    def _take_one(self, message: bytes) -> None:
        try:
            rpc = pb.Rpc.FromString(message)
        except DecodeError as error:
            raise InvalidArgumentError(f"answer to a call is malformed: {error}") from error
        match rpc.WhichOneof("message"):
            case "response":
                response = rpc.response
                if call := self._calls.get(response.call_id):
                    code = _CODES.get(response.status, grpc.StatusCode.UNKNOWN)
                    is_ok = code is grpc.StatusCode.OK
                    call.end(response.payload, None if is_ok else CallError(code, response.message))
            case "item":
                if call := self._calls.get(rpc.item.call_id):
                    call.items.put_nowait(rpc.item.payload)
            case kind:
                _log.warning(kv("Not expected from the gateway, dropped", kind=kind))


async def answer_with(context: Any, error: BaseException) -> NoReturn:
    """End a local call as the remote one ended."""
    if isinstance(error, CallError):
        await context.abort(error.code, str(error))
    await unavailable(context, error)
