"""CM's NetworkService as the network manager uses it (sm.md §2.6)."""

from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

import grpc.aio
import msgspec

from aoscore._pb.servicemanager.v5 import network_pb2 as pb
from aoscore._pb.servicemanager.v5 import network_pb2_grpc as stubs
from aoscore.common import convert
from aoscore.common.errors import from_error_info
from aoscore.common.rpc import rpc_errors
from aoscore.common.types import (
    FirewallRule,
    InstanceIdent,
    InstanceNetwork,
    InstanceNetworkState,
    NetworkWishes,
    NodeNetwork,
)

CALL_TIMEOUT_S = 10.0

_stub: Callable[[grpc.aio.Channel], Any] = stubs.NetworkServiceStub


class FirewallUpdate(msgspec.Struct, frozen=True):
    """Rules of an instance that became known after its network was allocated."""

    ident: InstanceIdent
    rules: tuple[FirewallRule, ...]


class NetworkClient:
    """Calls for one node. Each raises AosError; without a connection to CM at once."""

    def __init__(self, node_id: str, channel: Callable[[], grpc.aio.Channel]) -> None:
        """`channel` gives the present channel to CM, or raises."""
        self._node_id = node_id
        self._channel = channel

    async def get_node_network_params(self, network_id: str) -> NodeNetwork:
        """Where this node sits in a network, joining it if needed."""
        request = pb.GetNodeNetworkParamsRequest(network_id=network_id, node_id=self._node_id)
        return convert.node_network_from_pb(await self._call("GetNodeNetworkParams", request))

    async def allocate_instance_network(
        self, ident: InstanceIdent, network_id: str, wishes: NetworkWishes
    ) -> InstanceNetwork:
        """Address, resolvers and rules of an instance; asking again gives the same."""
        request = pb.AllocateInstanceNetworkRequest(
            instance=convert.ident_to_pb(ident),
            network_id=network_id,
            node_id=self._node_id,
            service_data=convert.network_wishes_to_pb(wishes),
        )
        return convert.instance_network_from_pb(await self._call("AllocateInstanceNetwork", request))

    async def release_instance_network(self, ident: InstanceIdent) -> None:
        """Give an address back."""
        request = pb.ReleaseInstanceNetworkRequest(instance=convert.ident_to_pb(ident), node_id=self._node_id)
        await self._call("ReleaseInstanceNetwork", request)

    async def release_node_network(self, network_id: str) -> None:
        """Leave a network."""
        request = pb.ReleaseNodeNetworkRequest(network_id=network_id, node_id=self._node_id)
        await self._call("ReleaseNodeNetwork", request)

    async def sync_network_state(self, states: Iterable[InstanceNetworkState]) -> None:
        """Tell CM which networks are in use here; it frees all others of this node."""
        instances = [convert.instance_network_state_to_pb(state) for state in states]
        await self._call("SyncNetworkState", pb.SyncNetworkStateRequest(node_id=self._node_id, instances=instances))

    async def firewall_updates(self) -> AsyncIterator[FirewallUpdate]:
        """Late rules of instances of this node, until the stream ends."""
        request = pb.SubscribeInstanceNetworkUpdatesRequest(node_id=self._node_id)
        with rpc_errors("SubscribeInstanceNetworkUpdates at CM"):
            async for message in _stub(self._channel()).SubscribeInstanceNetworkUpdates(request):
                if message.WhichOneof("update") == "pending_firewall_update":
                    update = message.pending_firewall_update
                    yield FirewallUpdate(
                        convert.ident_from_pb(update.instance), convert.firewall_rules_from_pb(update.firewall_rules)
                    )

    async def _call(self, method: str, request: Any) -> Any:
        with rpc_errors(f"{method} at CM"):
            answer = await getattr(_stub(self._channel()), method)(request, timeout=CALL_TIMEOUT_S)
        # An error of zeros would end the call of a C++ SM; we read it as what it says (grpc.md, "Error convention").
        if answer.HasField("error") and (error := from_error_info(convert.error_from_pb(answer.error))):
            raise error
        return answer
