"""NetworkService: network calls of SMs (cm-orchestration §2.8). Errors travel in the answer, which has status OK."""

import functools
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

from aoscore._pb.servicemanager.v5 import network_pb2 as pb
from aoscore._pb.servicemanager.v5 import network_pb2_grpc as stubs
from aoscore.cm.networkmanager.manager import RuleUpdate
from aoscore.common import convert
from aoscore.common.errors import InvalidArgumentError, to_error_info
from aoscore.common.log import kv
from aoscore.common.rpc import handler
from aoscore.common.types import InstanceIdent, InstanceNetwork, InstanceNetworkState, NetworkWishes, NodeNetwork

_log = logging.getLogger(__name__)

Admit = Callable[[str, Any], Awaitable[None]]
"""Raises AosError when the caller of a method (its context) may not speak for a node."""

S = TypeVar("S", bound="NetworkService")
Q = TypeVar("Q")
A = TypeVar("A")


class Updates(Protocol):
    """Late rules, one after the other."""

    async def get(self) -> RuleUpdate: ...


class Networks(Protocol):
    """The network manager."""

    async def get_node_network(self, network_id: str, node_id: str) -> NodeNetwork: ...

    async def allocate(
        self, ident: InstanceIdent, network_id: str, node_id: str, wishes: NetworkWishes
    ) -> InstanceNetwork: ...

    async def release_instance(self, ident: InstanceIdent, node_id: str) -> None: ...

    async def release_node(self, network_id: str, node_id: str) -> None: ...

    async def sync(self, node_id: str, states: Sequence[InstanceNetworkState]) -> None: ...

    def subscribe(self, node_id: str) -> AbstractContextManager[Updates]: ...


def _error_in_answer(
    answer: Callable[..., A],
) -> Callable[[Callable[[S, Q], Awaitable[A]]], Callable[[S, Q, Any], Awaitable[A]]]:
    """Errors of the method become `answer(error=…)`; on success `error` stays absent, as C++ SMs demand."""

    def decorate(method: Callable[[S, Q], Awaitable[A]]) -> Callable[[S, Q, Any], Awaitable[A]]:
        @functools.wraps(method)
        async def call(self: S, request: Q, context: Any) -> A:
            try:
                await self.admit(request.node_id, context)  # type: ignore[attr-defined]  # all requests have it
                return await method(self, request)
            except Exception as error:
                _log.error(kv("Network request failed", method=method.__name__, error=error))
                return answer(error=convert.error_to_pb(to_error_info(error)))

        return call

    return decorate


def _need(**members: str) -> None:
    for name, value in members.items():
        if not value:
            raise InvalidArgumentError(f"{name} is empty")


class NetworkService(stubs.NetworkServiceServicer):
    """The gRPC service."""

    def __init__(self, networks: Networks, admit: Admit) -> None:
        self._networks = networks
        self.admit = admit

    @_error_in_answer(pb.GetNodeNetworkParamsResponse)
    async def GetNodeNetworkParams(self, request: pb.GetNodeNetworkParamsRequest) -> pb.GetNodeNetworkParamsResponse:
        _need(network_id=request.network_id, node_id=request.node_id)
        return convert.node_network_to_pb(await self._networks.get_node_network(request.network_id, request.node_id))

    @_error_in_answer(pb.AllocateInstanceNetworkResponse)
    async def AllocateInstanceNetwork(
        self, request: pb.AllocateInstanceNetworkRequest
    ) -> pb.AllocateInstanceNetworkResponse:
        _need(network_id=request.network_id, node_id=request.node_id, item_id=request.instance.item_id)
        ident = convert.ident_from_pb(request.instance)
        wishes = convert.network_wishes_from_pb(request.service_data)
        network = await self._networks.allocate(ident, request.network_id, request.node_id, wishes)
        return convert.instance_network_to_pb(network)

    @_error_in_answer(pb.ReleaseInstanceNetworkResponse)
    async def ReleaseInstanceNetwork(
        self, request: pb.ReleaseInstanceNetworkRequest
    ) -> pb.ReleaseInstanceNetworkResponse:
        await self._networks.release_instance(convert.ident_from_pb(request.instance), request.node_id)
        return pb.ReleaseInstanceNetworkResponse()

    @_error_in_answer(pb.ReleaseNodeNetworkResponse)
    async def ReleaseNodeNetwork(self, request: pb.ReleaseNodeNetworkRequest) -> pb.ReleaseNodeNetworkResponse:
        await self._networks.release_node(request.network_id, request.node_id)
        return pb.ReleaseNodeNetworkResponse()

    @_error_in_answer(pb.SyncNetworkStateResponse)
    async def SyncNetworkState(self, request: pb.SyncNetworkStateRequest) -> pb.SyncNetworkStateResponse:
        _need(node_id=request.node_id)
        states = [convert.instance_network_state_from_pb(state) for state in request.instances]
        await self._networks.sync(request.node_id, states)
        return pb.SyncNetworkStateResponse()

    @handler
    async def SubscribeInstanceNetworkUpdates(
        self, request: pb.SubscribeInstanceNetworkUpdatesRequest, context: Any
    ) -> None:
        _need(node_id=request.node_id)
        await self.admit(request.node_id, context)
        with self._networks.subscribe(request.node_id) as updates:
            while True:
                update = await updates.get()
                await context.write(convert.firewall_update_to_pb(update.ident, update.rules))
