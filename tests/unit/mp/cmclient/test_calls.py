"""Calls through a link to a server: answers, streams, and every way in which they end."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from aoscore._pb.servicemanager.v5 import network_pb2 as net
from aoscore._pb.servicemanager.v5 import servicemanager_pb2 as pb
from aoscore.common.rpc import LazyChannel, Server
from aoscore.mp.cmclient.calls import GET_BLOBS_INFOS, SUBSCRIBE_UPDATES, CallServer
from aoscore.mp.communication.connection import ChannelClosedError
from aoscore.mp.nodeserver.calls import CallClient, CallError
from aoscore.mp.nodeserver.link import NodeLink
from aoscore.mp.nodeserver.services import NETWORK_SERVICE, SM_SERVICE
from tests.support.links import Contexts, Link, contexts, linked
from tests.support.pki import TestCa
from tests.support.running import running, until

REQUEST = pb.BlobsInfosRequest(digests=["d"]).SerializeToString()
ANSWER = pb.BlobsInfos(urls=["http://cm/d"]).SerializeToString()
SUBSCRIBE = net.SubscribeInstanceNetworkUpdatesRequest(node_id="n").SerializeToString()


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> tuple[Contexts, Contexts]:
    ca = TestCa()
    directory = tmp_path_factory.mktemp("pki")
    return contexts("gateway", ca.identity(directory, "main")), contexts("node", ca.identity(directory, "second"))


class FakeCm:
    """What it does with a call is `behaviour`: answer, refuse, hang."""

    def __init__(self) -> None:
        self.behaviour = "answer"
        self.subscribers = 0
        self.release = asyncio.Event()
        self.server = Server("127.0.0.1:0", None, [self._register])

    def _register(self, server: grpc.aio.Server) -> None:
        blobs = {"GetBlobsInfos": grpc.unary_unary_rpc_method_handler(self._blobs)}
        updates = {"SubscribeInstanceNetworkUpdates": grpc.unary_stream_rpc_method_handler(self._updates)}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SM_SERVICE, blobs),))
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(NETWORK_SERVICE, updates),))

    async def _blobs(self, request: bytes, context: Any) -> bytes:
        if self.behaviour == "refuse":
            await context.abort(grpc.StatusCode.INTERNAL, "blob not found")
        if self.behaviour == "hang":
            await asyncio.Event().wait()
        assert request == REQUEST
        return ANSWER

    async def _updates(self, request: bytes, context: Any) -> None:
        self.subscribers += 1
        try:
            await context.write(b"one")
            await context.write(b"two")
            if self.behaviour == "hang":
                await self.release.wait()
        finally:
            self.subscribers -= 1


class Bed:
    def __init__(self, link: Link, client: CallClient, cm: FakeCm, channel: LazyChannel, urls: list[str]) -> None:
        self.link = link
        self.client = client
        self.cm = cm
        self.channel = channel
        self.urls = urls


@contextlib.asynccontextmanager
async def bed(tls: tuple[Contexts, Contexts]) -> AsyncIterator[Bed]:
    cm = FakeCm()
    async with running(cm.server), linked(*tls) as link:
        async with LazyChannel(f"127.0.0.1:{cm.server.port}", lambda: None) as channel:
            link.gateway.node_id = "n"
            link.gateway.node_known.set()
            node_link = NodeLink()
            node_link.set(link.node)
            client = CallClient(node_link)
            urls: list[str] = []
            server = CallServer(link.gateway, channel, urls.extend)
            tasks = [asyncio.create_task(client.run()), asyncio.create_task(server.serve())]
            try:
                yield Bed(link, client, cm, channel, urls)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)


async def test_answer_and_what_the_gateway_remembers(tls: tuple[Contexts, Contexts]) -> None:
    async with bed(tls) as one:
        assert await one.client.call(GET_BLOBS_INFOS, REQUEST) == ANSWER
        assert one.urls == ["http://cm/d"]


async def test_status_of_the_server_reaches_the_caller(tls: tuple[Contexts, Contexts]) -> None:
    async with bed(tls) as one:
        one.cm.behaviour = "refuse"
        with pytest.raises(CallError, match="blob not found") as caught:
            await one.client.call(GET_BLOBS_INFOS, REQUEST)
        assert caught.value.code is grpc.StatusCode.INTERNAL


async def test_deadline_is_the_callers(tls: tuple[Contexts, Contexts]) -> None:
    async with bed(tls) as one:
        one.cm.behaviour = "hang"
        with pytest.raises(CallError) as caught:
            await one.client.call(GET_BLOBS_INFOS, REQUEST, timeout_s=0.1)
        assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED


@pytest.mark.parametrize(
    ("method", "payload", "code"),
    [
        ("/iamanager.v6.IAMNodesService/PauseNode", b"", grpc.StatusCode.UNIMPLEMENTED),
        (GET_BLOBS_INFOS, b"\xff", grpc.StatusCode.INVALID_ARGUMENT),
        (
            SUBSCRIBE_UPDATES,
            net.SubscribeInstanceNetworkUpdatesRequest(node_id="other").SerializeToString(),
            grpc.StatusCode.PERMISSION_DENIED,
        ),
    ],
)
async def test_what_is_refused(
    tls: tuple[Contexts, Contexts], method: str, payload: bytes, code: grpc.StatusCode
) -> None:
    async with bed(tls) as one:
        with pytest.raises(CallError) as caught:
            await one.client.call(method, payload)
        assert caught.value.code is code


async def test_stream_to_its_end(tls: tuple[Contexts, Contexts]) -> None:
    async with bed(tls) as one:
        assert [item async for item in one.client.stream(SUBSCRIBE_UPDATES, SUBSCRIBE)] == [b"one", b"two"]


async def test_who_stops_listening_ends_the_call_at_the_server(tls: tuple[Contexts, Contexts]) -> None:
    async with bed(tls) as one:
        one.cm.behaviour = "hang"
        async with contextlib.aclosing(one.client.stream(SUBSCRIBE_UPDATES, SUBSCRIBE)) as items:
            assert await anext(items) == b"one"
            assert one.cm.subscribers == 1
        await until(lambda: one.cm.subscribers == 0)


async def test_connection_to_the_server_that_is_closed_ends_a_stream(tls: tuple[Contexts, Contexts]) -> None:
    """As when our certificate is renewed: closing looks like a cancellation, and must not end in silence."""
    async with bed(tls) as one:
        one.cm.behaviour = "hang"
        items = one.client.stream(SUBSCRIBE_UPDATES, SUBSCRIBE)
        assert [await anext(items), await anext(items)] == [b"one", b"two"]
        await one.channel.drop()
        # Older grpcio leaves a call that is underway alone; it then ends with the server.
        one.cm.release.set()
        with pytest.raises((CallError, StopAsyncIteration)):
            async with asyncio.timeout(10):
                await anext(items)


async def test_loss_of_the_link_ends_calls(tls: tuple[Contexts, Contexts]) -> None:
    async with bed(tls) as one:
        one.cm.behaviour = "hang"
        items = one.client.stream(SUBSCRIBE_UPDATES, SUBSCRIBE)
        await anext(items)
        waiting = asyncio.create_task(one.client.call(GET_BLOBS_INFOS, REQUEST))
        await asyncio.sleep(0.05)
        one.link.gateway.shut("test")
        with pytest.raises(ChannelClosedError):
            await waiting
        with pytest.raises(ChannelClosedError):
            async for _ in items:
                pass
