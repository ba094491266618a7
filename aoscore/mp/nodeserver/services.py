"""gRPC services of the Main Node, served to the local SM and IAM (mp.md §2). Node.

Messages are passed as the bytes they are; only where something of them must be known are they read.
"""

import contextlib
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from aoscore._pb.servicemanager.v5 import servicemanager_pb2 as pb
from aoscore.common.errors import AosError, InvalidArgumentError
from aoscore.mp.communication.ports import Ports
from aoscore.mp.nodeserver.calls import CALL_TIMEOUT_S, CallClient, answer_with
from aoscore.mp.nodeserver.link import NodeLink
from aoscore.mp.nodeserver.registration import StreamProxy
from aoscore.mp.nodeserver.smmessages import SmMessages

_log = logging.getLogger(__name__)

Register = Callable[[grpc.aio.Server], None]

SM_SERVICE = "servicemanager.v5.SMService"
NETWORK_SERVICE = "servicemanager.v5.NetworkService"
NODES_SERVICE = "iamanager.v6.IAMPublicNodesService"
_NETWORK_CALLS = (
    "GetNodeNetworkParams",
    "AllocateInstanceNetwork",
    "ReleaseInstanceNetwork",
    "ReleaseNodeNetwork",
    "SyncNetworkState",
)


def _service(name: str, methods: dict[str, Any]) -> Register:
    def register(server: grpc.aio.Server) -> None:
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, methods),))

    return register


def node_services(link: NodeLink, port: int) -> list[Register]:
    """RegisterNode of the main IAM, over one of IAM's channels."""
    proxy = StreamProxy("RegisterNode", partial(link.connect, port))
    return [_service(NODES_SERVICE, {"RegisterNode": grpc.stream_stream_rpc_method_handler(proxy.serve)})]


def cm_services(
    link: NodeLink, ports: Ports, calls: CallClient, blob_url: Callable[[str], str], messages: SmMessages
) -> list[Register]:
    """SMService and NetworkService of CM.

    `blob_url(digest)` gives the address under which the local SM gets a blob that CM offers; what the SM says goes
    through `messages`.
    """
    proxy = StreamProxy("RegisterSM", partial(link.connect, ports.cm_secure), messages.take)

    async def get_blobs_infos(request: bytes, context: Any) -> bytes:
        try:
            answer = await calls.call(f"/{SM_SERVICE}/GetBlobsInfos", request, timeout_s=_time_left(context))
            digests, urls = pb.BlobsInfosRequest.FromString(request).digests, pb.BlobsInfos.FromString(answer).urls
            if len(digests) != len(urls):
                raise InvalidArgumentError(f"CM answered {len(urls)} addresses for {len(digests)} blobs")
            return pb.BlobsInfos(urls=map(blob_url, digests)).SerializeToString()
        except (AosError, DecodeError) as error:
            await answer_with(context, error)

    async def subscribe(request: bytes, context: Any) -> None:
        try:
            method = f"/{NETWORK_SERVICE}/SubscribeInstanceNetworkUpdates"
            async with contextlib.aclosing(calls.stream(method, request)) as items:
                async for item in items:
                    await context.write(item)
        except AosError as error:
            await answer_with(context, error)

    return [
        _service(
            SM_SERVICE,
            {
                "RegisterSM": grpc.stream_stream_rpc_method_handler(proxy.serve),
                "GetBlobsInfos": grpc.unary_unary_rpc_method_handler(get_blobs_infos),
            },
        ),
        _service(
            NETWORK_SERVICE,
            {
                name: grpc.unary_unary_rpc_method_handler(_passing(calls, f"/{NETWORK_SERVICE}/{name}"))
                for name in _NETWORK_CALLS
            }
            | {"SubscribeInstanceNetworkUpdates": grpc.unary_stream_rpc_method_handler(subscribe)},
        ),
    ]


def _passing(calls: CallClient, method: str) -> Any:
    async def passing(request: bytes, context: Any) -> bytes:
        try:
            return await calls.call(method, request, timeout_s=_time_left(context))
        except AosError as error:
            await answer_with(context, error)

    return passing


def _time_left(context: Any) -> float:
    """Seconds that the caller gives us."""
    left_s: float | None = context.time_remaining()
    return CALL_TIMEOUT_S if left_s is None else min(max(left_s, 0.001), CALL_TIMEOUT_S)
