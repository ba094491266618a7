"""One RegisterNode stream on the Main Node: requests out one after the other, replies back to who waits for them."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import msgspec

from aoscore._pb.iamanager.v6 import iamanager_pb2 as pb
from aoscore.common.errors import FailedError
from aoscore.iam.iamserver.admission import Port

Write = Callable[[pb.IAMIncomingMessages], Awaitable[None]]

_QUEUE_LIMIT = 64


class UnreachableError(FailedError):
    """The Node could not be asked, or did not answer; nothing is known of what it did."""


class CallerTimeError(UnreachableError):
    """The caller did not want to wait longer. Its own end of the call says the same, and either may be first."""

    grpc_status = grpc.StatusCode.DEADLINE_EXCEEDED


class Exchange:
    """Pure. Which reply is due on a stream.

    Replies carry no id, and a Node answers in the order in which it was asked (iam.md §8.1). So there is one request
    at a time, and what nobody has asked for, or is of another kind, is surplus.
    """

    def __init__(self) -> None:
        self._reply = ""
        self._cert_type = ""

    def ask(self, reply: str, cert_type: str = "") -> None:
        """A request leaves whose answer is the member `reply`; to be called before it is written."""
        self._reply, self._cert_type = reply, cert_type

    def take(self, reply: str, cert_type: str = "") -> bool:
        """A reply has come: whether it answers the request. A reply may leave out its certificate type."""
        if reply != self._reply or (cert_type and self._cert_type and cert_type != self._cert_type):
            return False
        self._reply = ""
        return True


class _Request(msgspec.Struct):
    message: pb.IAMIncomingMessages
    reply: str
    cert_type: str
    limit_s: float
    answer: "asyncio.Future[Any]"


class NodeLink:
    """A Node as its stream shows it, from the address `host`. `node_id` is empty until it has said who it is."""

    def __init__(self, port: Port, host: str = "") -> None:
        self.port = port
        self.host = host
        self.node_id = ""
        self._exchange = Exchange()
        self._queue: asyncio.Queue[_Request] = asyncio.Queue(_QUEUE_LIMIT)
        self._present: asyncio.Future[Any] | None = None
        self._closed = False

    async def request(
        self,
        message: pb.IAMIncomingMessages,
        reply: str,
        *,
        cert_type: str = "",
        limit_s: float,
        remaining_s: float | None,
    ) -> Any:
        """The member `reply` of the Node's answer.

        `limit_s` is how long the Node may take, `remaining_s` how long the caller waits. A request that was written is
        never written again; when its caller gives up, its answer is awaited all the same, and nothing else is written
        before. Raises UnreachableError.
        """
        if self._closed or self._queue.full():
            raise UnreachableError(f"node {self.node_id!r} " + ("is not connected" if self._closed else "is busy"))
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._queue.put_nowait(_Request(message, reply, cert_type, limit_s, answer))
        try:
            async with asyncio.timeout(remaining_s):
                return await answer
        except TimeoutError:
            raise CallerTimeError(f"node {self.node_id!r} did not answer in the time of the caller") from None

    async def work(self, write: Write) -> None:
        """Write requests and await their answers, until cancelled. Raises UnreachableError when the Node is silent."""
        try:
            while True:
                request = await self._queue.get()
                if not request.answer.done():
                    await self._ask(request, write)
        finally:
            self._close()

    async def _ask(self, request: _Request, write: Write) -> None:
        kind = request.message.WhichOneof("IAMIncomingMessage")
        reply = asyncio.get_running_loop().create_future()
        self._present = reply
        self._exchange.ask(request.reply, request.cert_type)
        try:
            async with asyncio.timeout(request.limit_s):
                await write(request.message)
                value = await reply
        except TimeoutError:
            # A late answer would be taken for that of the next request.
            text = f"node {self.node_id!r} did not answer {kind} within {request.limit_s:g} s"
            _fail(request.answer, text)
            raise UnreachableError(text) from None
        except BaseException:
            _fail(request.answer, f"node {self.node_id!r} was disconnected before it answered {kind}")
            raise
        finally:
            self._present = None
        if not request.answer.done():
            request.answer.set_result(value)

    def on_reply(self, reply: str, value: Any) -> bool:
        """Hand a reply to its request; False when it is surplus."""
        cert_type = {
            "create_key_response": lambda: value.type,
            "apply_cert_response": lambda: value.cert_info.type,
        }.get(reply, str)()
        if self._present is None or self._present.done() or not self._exchange.take(reply, cert_type):
            return False
        self._present.set_result(value)
        return True

    def give_up(self) -> None:
        """The Node has another stream now: nobody shall wait for answers on this one."""
        self._close()
        if self._present is not None and not self._present.done():
            self._present.set_exception(UnreachableError(f"node {self.node_id!r} has connected anew"))

    def _close(self) -> None:
        self._closed = True
        with contextlib.suppress(asyncio.QueueEmpty):
            while True:
                _fail(self._queue.get_nowait().answer, f"node {self.node_id!r} was disconnected")


def _fail(answer: "asyncio.Future[Any]", text: str) -> None:
    if not answer.done():
        answer.set_exception(UnreachableError(text))
