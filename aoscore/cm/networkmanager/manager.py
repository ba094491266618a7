"""Addresses, rules and names of all instances of the Unit (cm-orchestration §6).

Each call plans its change, writes it in one transaction, and only then changes what is kept in memory.
"""

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from ipaddress import IPv4Address, IPv4Network
from typing import Protocol

import msgspec

from aoscore.cm.networkmanager.firewall import (
    Endpoint,
    Rules,
    derive_rules,
    parse_connections,
    parse_ports,
)
from aoscore.cm.networkmanager.hosts import check_names, hosts_text
from aoscore.cm.networkmanager.pools import DEFAULT_POOLS, AddressPool, Route, SubnetPool, choose_vlan
from aoscore.cm.networkmanager.store import Change, EndpointRow, NetworkRow, NodeRow, Stored
from aoscore.common.aio import log_and_continue
from aoscore.common.errors import NotFoundError
from aoscore.common.log import kv
from aoscore.common.types import (
    FirewallRule,
    InstanceIdent,
    InstanceNetwork,
    InstanceNetworkState,
    NetworkWishes,
    NodeNetwork,
)

_log = logging.getLogger(__name__)

MAX_RULES_PER_INSTANCE = 10
"""A C++ SM drops the whole answer when there are more (grpc.md, "Caps of C++ peers")."""


class Store(Protocol):
    """Where networks are kept."""

    async def load(self) -> Stored: ...

    async def apply(self, change: Change) -> None: ...


class Dns(Protocol):
    """The name server."""

    @property
    def servers(self) -> tuple[str, ...]: ...

    def write(self, text: str) -> None: ...


class RuleUpdate(msgspec.Struct, frozen=True):
    """Rules that a node has to add for one of its instances."""

    ident: InstanceIdent
    rules: tuple[FirewallRule, ...]


class _Network:
    def __init__(self, row: NetworkRow) -> None:
        self.row = row
        self.pool = AddressPool(IPv4Network(row.subnet))
        self.nodes: dict[str, str] = {}
        """Own address of each node, by node id."""


class NetworkManager:
    """Use `load` once before anything else. All calls are safe to repeat."""

    def __init__(
        self,
        store: Store,
        dns: Dns,
        *,
        routes: Callable[[], Iterable[Route]],
        pools: Sequence[str] = DEFAULT_POOLS,
        rng: random.Random | None = None,
    ) -> None:
        self._store = store
        self._dns = dns
        self._routes = routes
        self._subnets = SubnetPool(pools)
        self._rng = rng or random.SystemRandom()
        self._lock = asyncio.Lock()
        self._networks: dict[str, _Network] = {}
        self._endpoints: dict[InstanceIdent, Endpoint] = {}
        self._told: dict[InstanceIdent, frozenset[FirewallRule]] = {}
        """Rules that the instance's node has, as far as we know."""
        self._subscribers: dict[str, asyncio.Queue[RuleUpdate]] = {}

    async def load(self) -> None:
        """Take up what was stored: networks, addresses and names go on as before."""
        stored = await self._store.load()
        for network in stored.networks:
            with log_and_continue(_log, f"Can't restore network {network.network_id}"):
                self._networks[network.network_id] = _Network(network)
                self._subnets.take(IPv4Network(network.subnet))
        for node in stored.nodes:
            with log_and_continue(_log, f"Can't restore node {node.node_id} of network {node.network_id}"):
                self._add_node(node)
        for endpoint in stored.endpoints:
            with log_and_continue(_log, f"Can't restore network of instance {endpoint.ident}"):
                self._network_of(endpoint.network_id).pool.take(IPv4Address(endpoint.ip))
                self._endpoints[endpoint.ident] = endpoint
        self._write_names()

    async def get_node_network(self, network_id: str, node_id: str) -> NodeNetwork:
        """Where the node sits in the network; network and node join on the first call."""
        async with self._lock:
            network = self._networks.get(network_id)
            change = Change()
            if network is None:
                taken = {one.row.vlan_id for one in self._networks.values()}
                subnet = self._subnets.choose(self._routes())
                network = _Network(NetworkRow(network_id, str(subnet), choose_vlan(taken, self._rng)))
                change.networks = [network.row]
            if node_id not in network.nodes:
                row = NodeRow(network_id, node_id, str(network.pool.choose()[0]))
                change.nodes = [row]
                await self._store.apply(change)
                self._networks[network_id] = network
                self._subnets.take(network.pool.subnet)
                self._add_node(row)
                _log.info(kv("Node joins network", nodeID=node_id, networkID=network_id, ip=row.ip))
            return NodeNetwork(network.row.subnet, network.nodes[node_id], network.row.vlan_id)

    async def allocate(
        self, ident: InstanceIdent, network_id: str, node_id: str, wishes: NetworkWishes
    ) -> InstanceNetwork:
        """Address, resolvers and rules of an instance; one that is known keeps its address, on whatever node it is."""
        async with self._lock:
            network = self._network_of(network_id)
            if node_id not in network.nodes:
                raise NotFoundError(f"node {node_id} has not joined network {network_id}")
            known = self._endpoints.get(ident)
            stays = known is not None and known.network_id == network_id
            ip = known.ip if known is not None and stays else str(network.pool.choose()[0])
            endpoint = Endpoint(
                ident=ident,
                network_id=network_id,
                node_id=node_id,
                ip=ip,
                exposed_ports=parse_ports(wishes.exposed_ports),
                connections=parse_connections(wishes.allowed_connections),
                hosts=check_names(wishes.hosts, ident.item_id, self._endpoints.values()),
            )
            await self._replace({ident: endpoint}, Change())
            rules = self._limited(ident, self._rules(endpoint).rules)
            self._told[ident] = frozenset(rules)
            self._push()
            return InstanceNetwork(network.row.subnet, ip, self._dns.servers, rules)

    async def release_instance(self, ident: InstanceIdent, node_id: str) -> None:
        """The instance is gone; a late call of a node it has already left changes nothing."""
        async with self._lock:
            known = self._endpoints.get(ident)
            if known is None or known.node_id != node_id:
                _log.warning(kv("Release of an instance that is not there", instance=ident, nodeID=node_id))
                return
            await self._replace({ident: None}, Change())

    async def release_node(self, network_id: str, node_id: str) -> None:
        """The node leaves the network with all its instances; the last node takes the network with it."""
        async with self._lock:
            network = self._network_of(network_id)
            if node_id not in network.nodes:
                raise NotFoundError(f"node {node_id} has not joined network {network_id}")
            row = NodeRow(network_id, node_id, network.nodes[node_id])
            last = len(network.nodes) == 1
            change = Change(dropped_nodes=[row], dropped_networks=[network_id] if last else [])
            leaving = [
                one.ident for one in self._endpoints.values() if (one.network_id, one.node_id) == (network_id, node_id)
            ]
            await self._replace(dict.fromkeys(leaving), change)
            del network.nodes[node_id]
            network.pool.give_back(IPv4Address(row.ip))
            if last:
                del self._networks[network_id]
                self._subnets.give_back(network.pool.subnet)
            _log.info(kv("Node leaves network", nodeID=node_id, networkID=network_id))

    async def sync(self, node_id: str, states: Sequence[InstanceNetworkState]) -> None:
        """What a node has after a (re)connect: free what it lost, give it the rules it lacks."""
        async with self._lock:
            reported = {state.ident: state for state in states}
            here = [one for one in self._endpoints.values() if one.node_id == node_id]
            lost: dict[InstanceIdent, Endpoint | None] = {one.ident: None for one in here if one.ident not in reported}
            if lost:
                _log.info(kv("Node lost instances", nodeID=node_id, count=len(lost)))
                await self._replace(lost, Change())
            for one in here:
                if one.ident in reported:
                    self._told[one.ident] = frozenset(reported[one.ident].firewall_rules)
            self._push()

    @contextlib.contextmanager
    def subscribe(self, node_id: str) -> Iterator[asyncio.Queue[RuleUpdate]]:
        """Rules that become known later, for one node; a newer subscription replaces an older one."""
        queue: asyncio.Queue[RuleUpdate] = asyncio.Queue()
        self._subscribers[node_id] = queue
        self._push()
        try:
            yield queue
        finally:
            if self._subscribers.get(node_id) is queue:
                del self._subscribers[node_id]

    async def _replace(self, wanted: dict[InstanceIdent, Endpoint | None], change: Change) -> None:
        """Write new, changed and (None) released instances, then remember them."""
        after = {ident: one for ident, one in self._endpoints.items() if ident not in wanted}
        after |= {ident: one for ident, one in wanted.items() if one is not None}
        change.dropped_endpoints = [ident for ident, one in wanted.items() if one is None and ident in self._endpoints]
        change.endpoints = [
            self._row(one, derive_rules(one, after.values()))
            for ident, one in after.items()
            if wanted.get(ident) is not None
            or derive_rules(one, after.values()).pending != derive_rules(one, self._endpoints.values()).pending
        ]
        await self._store.apply(change)
        before = {ident: self._endpoints[ident] for ident in wanted if ident in self._endpoints}
        for ident, old in before.items():
            new = after.get(ident)
            if new is None or new.ip != old.ip:
                self._network_of(old.network_id).pool.give_back(IPv4Address(old.ip))
                self._told.pop(ident, None)
        for one in wanted.values():
            if one is not None:
                self._network_of(one.network_id).pool.take(IPv4Address(one.ip))
        self._endpoints = after
        self._write_names()

    def _row(self, endpoint: Endpoint, rules: Rules) -> EndpointRow:
        subnet = self._network_of(endpoint.network_id).row.subnet
        return EndpointRow(endpoint, subnet, self._dns.servers, rules.pending)

    def _rules(self, endpoint: Endpoint) -> Rules:
        return derive_rules(endpoint, self._endpoints.values())

    def _push(self) -> None:
        """Offer every subscribed node the rules that its instances lack."""
        for endpoint in self._endpoints.values():
            queue = self._subscribers.get(endpoint.node_id)
            if queue is None or not endpoint.connections:
                continue
            told = self._told.get(endpoint.ident)
            if told is None:
                continue  # not allocated nor synced since our start: its node will tell
            wanted = self._limited(endpoint.ident, self._rules(endpoint).rules)
            fresh = tuple(rule for rule in wanted if rule not in told)
            if fresh:
                self._told[endpoint.ident] = told | set(fresh)
                queue.put_nowait(RuleUpdate(endpoint.ident, fresh))

    def _limited(self, ident: InstanceIdent, rules: tuple[FirewallRule, ...]) -> tuple[FirewallRule, ...]:
        if len(rules) > MAX_RULES_PER_INSTANCE:
            _log.error(kv("Too many firewall rules", instance=ident, wanted=len(rules), sent=MAX_RULES_PER_INSTANCE))
        return rules[:MAX_RULES_PER_INSTANCE]

    def _write_names(self) -> None:
        with log_and_continue(_log, "Can't write host names"):
            self._dns.write(hosts_text(self._endpoints.values()))

    def _add_node(self, row: NodeRow) -> None:
        network = self._network_of(row.network_id)
        network.pool.take(IPv4Address(row.ip))
        network.nodes[row.node_id] = row.ip

    def _network_of(self, network_id: str) -> _Network:
        try:
            return self._networks[network_id]
        except KeyError:
            raise NotFoundError(f"network {network_id} not found") from None
