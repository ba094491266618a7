"""Services made from their descriptors: every kind of call over a real connection."""

import contextlib
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf.empty_pb2 import Empty

from aoscore._pb.iamanager.v6 import iamanager_pb2 as pb
from aoscore._pb.iamanager.v6 import iamanager_pb2_grpc as stubs
from aoscore.common.rpc import Server, open_channel
from tests.support.running import running


class Nodes(stubs.IAMPublicNodesServiceServicer):
    """GetAllNodeIDs is left out."""

    async def GetNodeInfo(self, request: pb.GetNodeInfoRequest, context: Any) -> pb.NodeInfo:
        return pb.NodeInfo(node_id=request.node_id)

    async def SubscribeNodeChanged(self, request: Empty, context: Any) -> AsyncIterator[pb.NodeInfo]:
        for name in ("n1", "n2"):
            yield pb.NodeInfo(node_id=name)

    async def RegisterNode(
        self, requests: AsyncIterator[pb.IAMOutgoingMessages], context: Any
    ) -> AsyncIterator[pb.IAMIncomingMessages]:
        async for message in requests:
            request = pb.StartProvisioningRequest(node_id=message.node_info.node_id)
            yield pb.IAMIncomingMessages(start_provisioning_request=request)


@contextlib.asynccontextmanager
async def nodes() -> AsyncIterator[Any]:
    server = Server("127.0.0.1:0", None, [partial(stubs.add_IAMPublicNodesServiceServicer_to_server, Nodes())])
    async with running(server), open_channel(f"127.0.0.1:{server.port}", None) as channel:
        yield stubs.IAMPublicNodesServiceStub(channel)


async def test_every_kind_of_call() -> None:
    async with nodes() as stub:
        assert (await stub.GetNodeInfo(pb.GetNodeInfoRequest(node_id="n1"), timeout=5)).node_id == "n1"
        assert [info.node_id async for info in stub.SubscribeNodeChanged(Empty(), timeout=5)] == ["n1", "n2"]
        both = stub.RegisterNode(timeout=5)
        for name in ("a", "b"):
            await both.write(pb.IAMOutgoingMessages(node_info=pb.NodeInfo(node_id=name)))
            assert (await both.read()).start_provisioning_request.node_id == name


async def test_a_method_that_nobody_answers() -> None:
    async with nodes() as stub:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.GetAllNodeIDs(Empty(), timeout=5)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_method_that_is_not_in_the_proto_file() -> None:
    async with nodes() as stub:
        with pytest.raises(AttributeError, match=r"iamanager\.v6\.IAMPublicNodesService has no method Sing"):
            await stub.Sing(Empty())
