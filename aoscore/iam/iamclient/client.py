"""Registers a Secondary Node with the IAM of the Main Node and does what that asks (iam.md §8).

    in provisioning mode   public port: plain and TLS in turn, for the Main Node may be in service already or not
    in normal mode         protected port: mutual TLS

The client never ends by itself: whatever happens leads to a pause and a new attempt.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from typing import Any, Protocol

import grpc.aio
import msgspec

from aoscore._pb.common.v2 import common_pb2 as common
from aoscore._pb.iamanager.v6 import iamanager_pb2 as pb
from aoscore._pb.iamanager.v6 import iamanager_pb2_grpc as stubs
from aoscore.common import convert
from aoscore.common.aio import raise_if_cancelled, unbroken
from aoscore.common.errors import AosError, DeadlineError, FailedError, first_cause, to_error_info
from aoscore.common.log import kv
from aoscore.common.rpc import open_channel, open_tls_channel, rpc_errors
from aoscore.common.tls import TlsRoots
from aoscore.common.types import CertInfo, NodeInfo
from aoscore.iam.currentnode.node import CurrentNode

_log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 3.0

_stub: Callable[[grpc.aio.Channel], Any] = stubs.IAMPublicNodesServiceStub


class Requests(Protocol):
    """What the Main Node may ask of this one."""

    async def cert_types(self) -> list[str]: ...

    async def start_provisioning(self, password: str) -> None: ...

    async def finish_provisioning(self, password: str) -> None: ...

    async def deprovision(self, password: str) -> None: ...

    async def pause(self) -> None: ...

    async def resume(self) -> None: ...

    async def create_key(self, cert_type: str, subject: str) -> str: ...

    async def apply_cert(self, cert_type: str, pem: str) -> CertInfo: ...


class Way(msgspec.Struct, frozen=True):
    """One way to the Main Node. `tls` gives the certificates to use now; None means plain text."""

    address: str
    tls: Callable[[], TlsRoots] | None


class MainIamClient:
    """A service. `ways` are tried in turn until one leads to the Main Node, which is then used until it fails."""

    def __init__(
        self,
        ways: Sequence[Way],
        node: CurrentNode,
        requests: Requests,
        *,
        renewals: Callable[[], AsyncIterator[CertInfo]] | None = None,
        pause_s: float,
    ) -> None:
        """`renewals` tells of every new certificate of the ways: the connection is then made anew with it."""
        self._ways = ways
        self._node = node
        self._requests = requests
        self._renewals = renewals
        self._pause_s = pause_s
        self._current = 0
        self._outbox: asyncio.Queue[pb.IAMOutgoingMessages] = asyncio.Queue()
        self._renewed = asyncio.Event()
        self._idle = asyncio.Event()
        # While a request changes the state, and its answer says so.
        self._answer_tells = False
        # Why each way failed last: the same reason is told once.
        self._reasons: dict[int, str] = {}
        node.on_change(self._on_change)

    async def run(self, started: Callable[[], None]) -> None:
        """Stay connected until cancelled. Being started does not mean being connected."""
        started()
        async with asyncio.TaskGroup() as tasks:
            if self._renewals is not None:
                tasks.create_task(self._watch_renewals(self._renewals))
            while True:
                await self._connect_once()
                if not self._renewed.is_set():
                    await asyncio.sleep(self._pause_s)

    async def _watch_renewals(self, renewals: Callable[[], AsyncIterator[CertInfo]]) -> None:
        async for _ in renewals():
            self._renewed.set()

    async def _connect_once(self) -> None:
        """One connection from its beginning to its end."""
        number = self._current
        way = self._ways[number]
        self._renewed.clear()
        connected = False
        try:
            async with _opened(way) as channel:
                connected = True
                await self._session(way, channel)
            reason = "the Main Node closed the stream"
        except Exception as error:
            raise_if_cancelled()
            cause = first_cause(error)
            if not isinstance(cause, AosError | OSError):
                _log.error(kv("Link to the Main Node failed unexpectedly", address=way.address), exc_info=cause)
            reason = str(cause) or type(cause).__name__
        if self._renewed.is_set():
            _log.info("Certificate changed, connecting to the Main Node anew")
            return
        if not connected:
            self._current = (self._current + 1) % len(self._ways)
        if self._reasons.get(number) != reason:
            _log.warning(kv("No link to the Main Node", address=way.address, tls=way.tls is not None, reason=reason))
        self._reasons[number] = reason

    async def _session(self, way: Way, channel: grpc.aio.Channel) -> None:
        call = _stub(channel).RegisterNode()
        self._outbox = asyncio.Queue()
        self._idle.set()
        self._tell_node(self._node.info)
        async with asyncio.TaskGroup() as tasks:
            others = [
                tasks.create_task(self._write(call)),
                tasks.create_task(self._end_when_renewed(call)),
            ]
            _log.info(kv("Connected to the Main Node", address=way.address, tls=way.tls is not None))
            self._reasons.clear()
            await self._read(call)
            for task in others:
                task.cancel()

    async def _write(self, call: Any) -> None:
        with rpc_errors("RegisterNode at the Main Node"):
            while True:
                message = await self._outbox.get()
                try:
                    await call.write(message)
                except asyncio.InvalidStateError as error:
                    raise FailedError("the Main Node has ended the stream") from error
                self._outbox.task_done()

    async def _end_when_renewed(self, call: Any) -> None:
        """End the stream for a new certificate, once the answer to what is being done has left."""
        await self._renewed.wait()
        await self._idle.wait()
        await self._outbox.join()
        await call.done_writing()
        # The Main Node ends its side then; one that does not is left.
        await asyncio.sleep(CONNECT_TIMEOUT_S)
        call.cancel()

    async def _read(self, call: Any) -> None:
        """One request after the other, as they come."""
        with rpc_errors("RegisterNode at the Main Node"):
            async for message in call:
                kind = message.WhichOneof("IAMIncomingMessage")
                answer = _ANSWERS.get(kind)
                if answer is None:
                    raise FailedError(f"the Main Node asks for {kind or 'something unknown'}")
                self._idle.clear()
                self._outbox.put_nowait(await answer(self, getattr(message, kind)))
                self._idle.set()

    def _on_change(self, node: NodeInfo) -> None:
        if not self._answer_tells:
            self._tell_node(node)

    def _tell_node(self, node: NodeInfo) -> None:
        self._outbox.put_nowait(pb.IAMOutgoingMessages(node_info=convert.node_info_to_pb(node)))

    async def _get_cert_types(self, request: pb.GetCertTypesRequest) -> pb.IAMOutgoingMessages:
        return pb.IAMOutgoingMessages(cert_types_response=pb.CertTypes(types=await self._requests.cert_types()))

    async def _start(self, request: pb.StartProvisioningRequest) -> pb.IAMOutgoingMessages:
        error = await _error_of("start provisioning", self._requests.start_provisioning(request.password))
        return pb.IAMOutgoingMessages(start_provisioning_response=pb.StartProvisioningResponse(error=error))

    async def _finish(self, request: pb.FinishProvisioningRequest) -> pb.IAMOutgoingMessages:
        with self._told_by_answer():
            error = await _error_of("finish provisioning", self._requests.finish_provisioning(request.password))
        return pb.IAMOutgoingMessages(finish_provisioning_response=pb.FinishProvisioningResponse(error=error))

    async def _deprovision(self, request: pb.DeprovisionRequest) -> pb.IAMOutgoingMessages:
        with self._told_by_answer():
            error = await _error_of("deprovision", self._requests.deprovision(request.password))
        return pb.IAMOutgoingMessages(deprovision_response=pb.DeprovisionResponse(error=error))

    async def _pause(self, request: pb.PauseNodeRequest) -> pb.IAMOutgoingMessages:
        error = await _error_of("pause", self._requests.pause())
        return pb.IAMOutgoingMessages(pause_node_response=pb.PauseNodeResponse(error=error))

    async def _resume(self, request: pb.ResumeNodeRequest) -> pb.IAMOutgoingMessages:
        error = await _error_of("resume", self._requests.resume())
        return pb.IAMOutgoingMessages(resume_node_response=pb.ResumeNodeResponse(error=error))

    async def _create_key(self, request: pb.CreateKeyRequest) -> pb.IAMOutgoingMessages:
        answer = pb.CreateKeyResponse(node_id=request.node_id, type=request.type)

        async def create() -> None:
            answer.csr = await self._requests.create_key(request.type, request.subject)

        if error := await _error_of(f"create key {request.type}", create()):
            answer.error.CopyFrom(error)
        return pb.IAMOutgoingMessages(create_key_response=answer)

    async def _apply_cert(self, request: pb.ApplyCertRequest) -> pb.IAMOutgoingMessages:
        answer = pb.ApplyCertResponse(node_id=request.node_id, cert_info=pb.CertInfo(type=request.type))

        async def apply() -> None:
            info = convert.cert_info_to_pb(await self._requests.apply_cert(request.type, request.cert))
            answer.cert_info.CopyFrom(info)

        if error := await _error_of(f"apply certificate {request.type}", apply()):
            answer.error.CopyFrom(error)
        return pb.IAMOutgoingMessages(apply_cert_response=answer)

    @contextlib.contextmanager
    def _told_by_answer(self) -> Iterator[None]:
        """Finish and deprovision tell the new state by their answer.

        With a node_info before it a Main Node of AosCore 9.1 takes the stream for one of the wrong port (iam.md §8.2,
        §9.1).
        """
        self._answer_tells = True
        try:
            yield
        finally:
            self._answer_tells = False


Answer = Callable[[MainIamClient, Any], Awaitable[pb.IAMOutgoingMessages]]

_ANSWERS: dict[str, Answer] = {
    "get_cert_types_request": MainIamClient._get_cert_types,
    "start_provisioning_request": MainIamClient._start,
    "finish_provisioning_request": MainIamClient._finish,
    "deprovision_request": MainIamClient._deprovision,
    "pause_node_request": MainIamClient._pause,
    "resume_node_request": MainIamClient._resume,
    "create_key_request": MainIamClient._create_key,
    "apply_cert_request": MainIamClient._apply_cert,
}


async def _error_of(what: str, work: Coroutine[Any, Any, None]) -> common.ErrorInfo | None:
    """Do it to its end, also when the link breaks meanwhile; what is wrong goes into the answer."""
    _log.info("The Main Node asks to %s", what)
    try:
        await unbroken(work)
    except Exception as error:
        info = to_error_info(error)
        _log.error(kv(f"Can't {what}", error=info.message))
        _log.debug("Where it failed", exc_info=error)
        return convert.error_to_pb(info)
    return None


@contextlib.asynccontextmanager
async def _opened(way: Way) -> AsyncIterator[grpc.aio.Channel]:
    """A channel that is ready. Raises an AosError when the Main Node can't be reached this way."""
    channel = None
    try:
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                if way.tls is None:
                    channel = open_channel(way.address, None)
                else:
                    channel = await open_tls_channel(way.address, way.tls())
                await channel.channel_ready()
        except TimeoutError:
            raise DeadlineError(f"no connection within {CONNECT_TIMEOUT_S:g} s") from None
        yield channel
    finally:
        if channel is not None:
            await channel.close()
