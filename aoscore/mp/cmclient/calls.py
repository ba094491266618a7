"""Single calls of a node to CM through channel 18 (mp-wire §9, "Rpc"). Gateway."""

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError, Message

from aoscore._pb.servicemanager.v5 import network_pb2 as net
from aoscore._pb.servicemanager.v5 import servicemanager_pb2 as sm
from aoscore._pb.transport.v1 import transport_pb2 as pb
from aoscore.common.aio import comes_within, log_and_continue
from aoscore.common.errors import AosError
from aoscore.common.log import kv
from aoscore.common.rpc import LazyChannel, rpc_errors
from aoscore.mp.communication.connection import Connection, Stream, end_tasks
from aoscore.mp.communication.ports import RPC

_log = logging.getLogger(__name__)

GET_BLOBS_INFOS = "/servicemanager.v5.SMService/GetBlobsInfos"
_NETWORK = "/servicemanager.v5.NetworkService/"
SUBSCRIBE_UPDATES = f"{_NETWORK}SubscribeInstanceNetworkUpdates"
UNARY: dict[str, type[Message]] = {
    GET_BLOBS_INFOS: sm.BlobsInfosRequest,
    f"{_NETWORK}GetNodeNetworkParams": net.GetNodeNetworkParamsRequest,
    f"{_NETWORK}AllocateInstanceNetwork": net.AllocateInstanceNetworkRequest,
    f"{_NETWORK}ReleaseInstanceNetwork": net.ReleaseInstanceNetworkRequest,
    f"{_NETWORK}ReleaseNodeNetwork": net.ReleaseNodeNetworkRequest,
    f"{_NETWORK}SyncNetworkState": net.SyncNetworkStateRequest,
}
STREAMS: dict[str, type[Message]] = {SUBSCRIBE_UPDATES: net.SubscribeInstanceNetworkUpdatesRequest}

MAX_CALLS = 64
_SERVER_GONE = (grpc.StatusCode.UNAVAILABLE.value[0], grpc.StatusCode.CANCELLED.value[0])
_DEFAULT_DEADLINE_S = 30.0
# RegisterSM and the calls of an SM come over different channels, so a call may be here first.
_PATIENCE_S = 10.0


class _Refused(Exception):
    """A call ends with a status of our own."""

    def __init__(self, code: grpc.StatusCode, text: str) -> None:
        super().__init__(text)
        self.code = code


class CallServer:
    """Answers the calls of one link.

    `cm` is the channel to CM, `on_urls` is told the addresses of blobs that CM gave to this node.
    """

    def __init__(self, connection: Connection, cm: LazyChannel, on_urls: Callable[[list[str]], None]) -> None:
        self._connection = connection
        self._cm = cm
        self._on_urls = on_urls

    async def serve(self) -> None:
        """Serve the uses of the channel one after the other, until cancelled."""
        while True:
            stream = await self._connection.accept(RPC)
            calls: dict[int, asyncio.Task[None]] = {}
            try:
                async with stream:
                    while True:
                        self._take(stream, await stream.receive(), calls)
            except AosError as error:
                _log.info(kv("Calls of node are off", peer=self._connection.peer, reason=error))
            finally:
                await end_tasks(calls.values())

    def _take(self, stream: Stream, message: bytes, calls: dict[int, asyncio.Task[None]]) -> None:
        try:
            rpc = pb.Rpc.FromString(message)
        except DecodeError as error:
            _log.warning(kv("Call of node is malformed, dropped", peer=self._connection.peer, error=error))
            return
        match rpc.WhichOneof("message"):
            case "request":
                call_id = rpc.request.call_id
                if call_id in calls:
                    _log.warning(kv("Call number is in use, dropped", peer=self._connection.peer, call=call_id))
                    return
                task = asyncio.create_task(self._answer(stream, rpc.request, is_one_too_many=len(calls) >= MAX_CALLS))
                calls[call_id] = task
                task.add_done_callback(lambda _: calls.pop(call_id, None))
            case "cancel":
                if call := calls.get(rpc.cancel.call_id):
                    call.cancel()
            case kind:
                _log.warning(kv("Not expected from a node, dropped", peer=self._connection.peer, kind=kind))

    async def _answer(self, stream: Stream, request: pb.Request, *, is_one_too_many: bool) -> None:
        response = pb.Response(call_id=request.call_id)
        try:
            if is_one_too_many:
                raise _Refused(grpc.StatusCode.RESOURCE_EXHAUSTED, f"more than {MAX_CALLS} calls at a time")
            await self._check(request)
            if request.method in STREAMS:
                await self._pass_stream(stream, request)
            else:
                response.payload = await self._call(request)
        except _Refused as error:
            response.status, response.message = error.code.value[0], str(error)
        except AosError as error:
            cause = error.__cause__
            if isinstance(cause, grpc.aio.AioRpcError):
                response.status, response.message = cause.code().value[0], cause.details() or ""
            else:
                response.status, response.message = grpc.StatusCode.UNAVAILABLE.value[0], str(error)
            if response.status in _SERVER_GONE:
                await self._cm.drop()
        if not stream.is_closed:
            with log_and_continue(_log, "Can't answer a call"):
                await stream.send(pb.Rpc(response=response).SerializeToString())

    async def _check(self, request: pb.Request) -> None:
        """Only what an SM needs, and only in the name of the node that it is."""
        kind = UNARY.get(request.method) or STREAMS.get(request.method)
        if kind is None:
            raise _Refused(grpc.StatusCode.UNIMPLEMENTED, f"{request.method} can't be called through the link")
        try:
            message: Any = kind.FromString(request.payload)
        except DecodeError as error:
            raise _Refused(grpc.StatusCode.INVALID_ARGUMENT, f"{request.method}: {error}") from error
        if not await comes_within(self._connection.node_known, _PATIENCE_S):
            raise _Refused(grpc.StatusCode.FAILED_PRECONDITION, "the SM of this node has not registered")
        node_id = getattr(message, "node_id", self._connection.node_id)
        if node_id != self._connection.node_id:
            _log.error(kv("Node speaks for another one", nodeID=self._connection.node_id, other=node_id))
            raise _Refused(grpc.StatusCode.PERMISSION_DENIED, f"this is not node {node_id}")

    async def _call(self, request: pb.Request) -> bytes:
        channel = await self._cm.open()
        timeout_s = request.deadline_ms / 1000 or _DEFAULT_DEADLINE_S
        method: Any = channel.unary_unary(request.method)
        with rpc_errors(f"{request.method} at CM"):
            answer: bytes = await method(request.payload, timeout=timeout_s)
        if request.method == GET_BLOBS_INFOS:
            self._on_urls(list(sm.BlobsInfos.FromString(answer).urls))
        return answer

    async def _pass_stream(self, stream: Stream, request: pb.Request) -> None:
        channel = await self._cm.open()
        method: Any = channel.unary_stream(request.method)
        call = method(request.payload)
        try:
            while True:
                with rpc_errors(f"{request.method} at CM"):
                    payload = await call.read()
                if payload is grpc.aio.EOF:
                    with rpc_errors(f"{request.method} at CM"):
                        code, details = await call.code(), await call.details()
                    if code is not grpc.StatusCode.OK:
                        raise _Refused(code, details or "")
                    return
                item = pb.Item(call_id=request.call_id, payload=payload)
                await stream.send(pb.Rpc(item=item).SerializeToString())
        finally:
            call.cancel()
