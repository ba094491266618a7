"""Network manager: gives each instance the network that CM allocated, and keeps kernel and database in step.

The database says which networks and instances there are; an allocation is stored before anything is made of it. At
start everything is compared with the kernel: what is there is adopted and mended, what is unknown is removed, the
firewall is written anew as a whole. So SM may be killed at any moment (sm-runtime.md §6.10).

A network is joined with the other nodes by a VLAN on the link of the default route. Where that is impossible for now,
or the kernel cannot do it, instances of this node still have their network, and the log says what is missing (D41).
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import msgspec

from aoscore.common.aio import Worker, log_and_continue
from aoscore.common.errors import AlreadyExistsError, AosError, FailedError, NotFoundError
from aoscore.common.log import kv
from aoscore.common.types import (
    InstanceIdent,
    InstanceNetwork,
    InstanceNetworkState,
    NetworkWishes,
    NodeNetwork,
)
from aoscore.sm.launcher.runtimes.base import instance_id as id_of
from aoscore.sm.networkmanager import nft
from aoscore.sm.networkmanager.backend import Backend, BuiltinBackend
from aoscore.sm.networkmanager.cni import CniBackend, CniSettings
from aoscore.sm.networkmanager.dns import DNS_DIR, DnsServer, Records, stop_unknown
from aoscore.sm.networkmanager.firewall import instance_rules, ruleset
from aoscore.sm.networkmanager.links import Links
from aoscore.sm.networkmanager.model import (
    AttachedNetwork,
    Network,
    NetworkConfig,
    Ports,
    StoredInstance,
    alias,
    check_network_id,
    host_names,
    hosts_file,
    netns_path,
    node_network,
    prefix_length,
    resolv_conf,
    wishes,
)
from aoscore.sm.networkmanager.routes import RouteChanges
from aoscore.sm.networkmanager.store import NetworkStore
from aoscore.sm.networkmanager.traffic import SYSTEM, Counted, Period, Totals, Traffic

if TYPE_CHECKING:
    from aoscore.sm.smclient.network import FirewallUpdate

_log = logging.getLogger(__name__)

_TRAFFIC_PERIOD_S = 60.0
_IP_FORWARD = Path("/proc/sys/net/ipv4/ip_forward")


class CmNetworks(Protocol):
    """What the network manager asks of CM."""

    async def get_node_network_params(self, network_id: str) -> NodeNetwork:
        """Where this node sits in a network."""
        ...

    async def allocate_instance_network(
        self, ident: InstanceIdent, network_id: str, wishes: NetworkWishes
    ) -> InstanceNetwork:
        """Address, resolvers and rules of an instance; repeatable."""
        ...

    async def release_instance_network(self, ident: InstanceIdent) -> None:
        """Give an address back."""
        ...

    async def release_node_network(self, network_id: str) -> None:
        """Leave a network."""
        ...


class NetworkManager:
    """See the module text. A Service; the calls work after `started()`."""

    def __init__(
        self,
        store: NetworkStore,
        cm: CmNetworks,
        *,
        cni: CniSettings | None = None,
        traffic_period: Period = "day",
        host_ports: Sequence[Ports] | None = None,
        dns_dir: Path = DNS_DIR,
    ) -> None:
        """With `cni` instances are connected by CNI plugins, otherwise by ourselves. `host_ports`: see `ruleset`."""
        self._store = store
        self._cm = cm
        self._dns_dir = dns_dir
        self._links = Links()
        # Netlink in one thread, since its socket is not to be shared; files in another.
        self._netlink = Worker("netlink")
        self._files = Worker("network-files")
        self._backend: Backend = BuiltinBackend(self._links, self._netlink)
        if cni is not None:
            self._backend = CniBackend(self._links, self._netlink, self._files, cni)
        self._traffic = Traffic(store, traffic_period)
        self._host_ports = host_ports
        self._networks: dict[str, Network] = {}
        self._instances: dict[str, StoredInstance] = {}
        self._dns: dict[str, DnsServer] = {}
        self._alone: dict[str, str] = {}
        """Networks that should be joined with other nodes and are not, and why."""
        self._network_locks: dict[str, asyncio.Lock] = {}
        self._firewall_lock = asyncio.Lock()
        self._firewall_wanted = 0
        self._firewall_applied = 0
        self._traffic_lock = asyncio.Lock()
        self._tasks: asyncio.TaskGroup | None = None

    # The service

    async def run(self, started: Callable[[], None]) -> None:
        """Repair, then count traffic and keep DNS servers alive until cancelled. Networks stay up."""
        async with self._files, self._netlink, asyncio.TaskGroup() as self._tasks:
            try:
                await self._restore()
                self._tasks.create_task(self._follow_routes(), name="routes")
                started()
                while True:
                    await asyncio.sleep(_TRAFFIC_PERIOD_S)
                    with log_and_continue(_log, "Can't count traffic"):
                        await self.refresh_traffic()
                        await self._traffic.save_if_due(datetime.now(UTC), time.monotonic())
            finally:
                await self._netlink.run(self._links.close)

    async def _restore(self) -> None:
        """Bring kernel and database together."""
        if await self._files.run(_IP_FORWARD.read_text) != "1\n":
            _log.warning("Instances reach nothing outside: set net.ipv4.ip_forward=1")
        self._networks = {network.network_id: network for network in await self._store.load_networks()}
        for instance in await self._store.load_instances():
            network = self._networks.get(instance.network_id)
            try:
                if network is None:
                    raise NotFoundError(f"network {instance.network_id} is not known")
                prefix_length(network.subnet)
                instance_rules(instance)
            except AosError as error:
                # One row must not keep all others down; CM allocates anew when the instance starts.
                _log.warning(kv("Stored network of instance can't be used", id=instance.instance_id, reason=error))
                await self._store.remove_instance(instance.instance_id, None)
                continue
            if instance.host_if_name and not netns_path(instance.instance_id).exists():
                instance = msgspec.structs.replace(instance, host_if_name="")
            self._instances[instance.instance_id] = instance
        await self._remove_leftovers({name: one for name, one in self._instances.items() if one.host_if_name})
        for network_id in {instance.network_id for instance in self._instances.values() if instance.host_if_name}:
            await self._mend(self._networks[network_id])
        up = [instance for instance in self._instances.values() if instance.host_if_name]
        await self._apply_firewall()
        await self._traffic.start([_counted(instance) for instance in up], datetime.now(UTC))
        for network_id in {instance.network_id for instance in up}:
            await self._update_dns(network_id)
        for instance in up:
            _log.info(kv("Network of instance adopted", id=instance.instance_id))

    async def _mend(self, network: Network) -> None:
        """See that bridge and links of a network are complete; what can't be mended counts as not there."""
        try:
            mended = await self._netlink.run(self._links.ensure_bridge, network)
        except AosError as error:
            for instance in self._attached(network.network_id):
                await self._give_up(instance, error)
            return
        if mended:
            _log.warning(kv("Network mended", network=network.network_id, what=", ".join(mended)))
        await self._join_nodes(network)
        for instance in self._attached(network.network_id):
            name = instance.instance_id
            try:
                attached = await self._backend.attach(name, network, instance.allocated.ip, instance.config)
            except AosError as error:
                await self._give_up(instance, error)
                continue
            if attached.done:
                _log.warning(kv("Network of instance mended", id=name, what=", ".join(attached.done)))
            if attached.host_if_name != instance.host_if_name:
                instance = msgspec.structs.replace(instance, host_if_name=attached.host_if_name)
                await self._store.save(network, instance)
                self._instances[name] = instance

    async def _give_up(self, instance: StoredInstance, reason: AosError) -> None:
        """Remove what can't be mended: the runtime then finds no namespace and starts the instance anew."""
        name = instance.instance_id
        _log.warning(kv("Network of instance can't be mended and is removed", id=name, reason=reason))
        self._instances[name] = msgspec.structs.replace(instance, host_if_name="")
        with log_and_continue(_log, f"Can't remove network of instance {name}"):
            await self._backend.detach(name)

    async def _remove_leftovers(self, up: dict[str, StoredInstance]) -> None:
        found = await self._netlink.run(self._links.inventory)
        for name in (found.namespaces | await self._backend.known()) - up.keys():
            with log_and_continue(_log, f"Can't remove leftover network of instance {name}"):
                await self._backend.detach(name)
        used = {instance.host_if_name for instance in up.values()}
        networks = [self._networks[instance.network_id] for instance in up.values()]
        used |= {name for network in networks for name in (network.bridge, network.vlan_if_name)}
        for link in found.links - used:
            with log_and_continue(_log, f"Can't remove leftover link {link}"):
                await self._netlink.run(self._links.remove_link, link)
        await stop_unknown({instance.network_id for instance in up.values()}, root=self._dns_dir)

    # For the runtime

    async def attach(self, instance_id: str, network_id: str, config: NetworkConfig) -> AttachedNetwork:
        """Bring the instance's network up; repeatable. CM is asked only for what is not stored.

        Raises AosError; then nothing is up, and an allocation stays stored for the next attempt.
        """
        network, instance = await self._allocate(instance_id, check_network_id(network_id), config)
        rules = instance_rules(instance)
        try:
            async with self._network_lock(network_id):
                self._check_name(instance)
                await self._netlink.run(self._links.ensure_bridge, network)
                await self._join_nodes(network)
                attached = await self._backend.attach(instance_id, network, rules.ip, config)
                instance = msgspec.structs.replace(instance, host_if_name=attached.host_if_name)
                await self._store.save(network, instance)
                self._instances[instance_id] = instance
                await self._update_dns(network_id)
            await self._apply_firewall()
            async with self._traffic_lock:
                await self._traffic.add(_counted(instance))
        except BaseException:
            with log_and_continue(_log, f"Can't take down network of instance {instance_id}"):
                await self.detach(instance_id)
            raise
        return AttachedNetwork(
            netns=netns_path(instance_id),
            hosts=hosts_file(rules.ip, _own_names(config), network_id, config.hosts),
            resolv_conf=resolv_conf(network.ip, instance.allocated.dns_servers),
        )

    async def detach(self, instance_id: str) -> None:
        """Take an instance's network down and keep its allocation; repeatable."""
        instance = self._instances.get(instance_id)
        if instance is None:
            await self._backend.detach(instance_id)
            return
        network = self._networks[instance.network_id]
        async with self._traffic_lock:
            with log_and_continue(_log, f"Can't keep traffic totals of instance {instance_id}"):
                await self._traffic.remove(instance_id)
        async with self._network_lock(network.network_id):
            await self._backend.detach(instance_id)
            if instance.host_if_name:
                instance = msgspec.structs.replace(instance, host_if_name="")
                self._instances[instance_id] = instance
                await self._store.save(network, instance)
            await self._update_dns(network.network_id)
            if not self._attached(network.network_id):
                for link in filter(None, (network.vlan_if_name, network.bridge)):
                    await self._netlink.run(self._links.remove_link, link)
                self._alone.pop(network.network_id, None)
        await self._apply_firewall()

    # For the launcher and the link to CM

    async def release_instance(self, ident: InstanceIdent) -> None:
        """Give the network of a removed instance back; repeatable. CM being away does not matter: it hears of what is
        in use when it is back, and frees the rest."""
        name = id_of(ident)
        instance = self._instances.get(name)
        if instance is None:
            return
        await self.detach(name)
        others = any(other.network_id == instance.network_id for key, other in self._instances.items() if key != name)
        await self._store.remove_instance(name, None if others else instance.network_id)
        del self._instances[name]
        await self._traffic.forget(name)
        with log_and_continue(_log, f"Can't release network of instance {ident} at CM"):
            await self._cm.release_instance_network(ident)
        if not others:
            del self._networks[instance.network_id]
            with log_and_continue(_log, f"Can't release network {instance.network_id} at CM"):
                await self._cm.release_node_network(instance.network_id)

    def states(self) -> list[InstanceNetworkState]:
        """Every allocation in use, also of instances that are not up now: CM frees all others of this node."""
        return [
            InstanceNetworkState(
                ident=instance.config.ident,
                network_id=instance.network_id,
                ip=instance.allocated.ip,
                firewall_rules=instance.allocated.firewall_rules,
            )
            for instance in self._instances.values()
        ]

    async def update_firewall(self, update: "FirewallUpdate") -> None:
        """Rules that became known after an allocation; those that are known already change nothing."""
        instance = self._instances.get(id_of(update.ident))
        if instance is None:
            _log.warning(kv("Firewall rules for an unknown instance", instance=update.ident))
            return
        known = instance.allocated.firewall_rules
        new = tuple(rule for rule in update.rules if rule not in known)
        if not new:
            return
        allocated = msgspec.structs.replace(instance.allocated, firewall_rules=(*known, *new))
        instance = msgspec.structs.replace(instance, allocated=allocated)
        instance_rules(instance)
        await self._store.save(self._networks[instance.network_id], instance)
        self._instances[instance.instance_id] = instance
        await self._apply_firewall()

    # For monitoring

    async def refresh_traffic(self) -> None:
        """Read the traffic counters."""
        async with self._traffic_lock:
            await self._traffic.refresh(datetime.now(UTC))

    def traffic(self, instance_id: str | None = None) -> Totals:
        """Totals of an instance or of the node, as last read."""
        return self._traffic.totals(instance_id or SYSTEM)

    # Inside

    async def _allocate(
        self, instance_id: str, network_id: str, config: NetworkConfig
    ) -> tuple[Network, StoredInstance]:
        stored = self._instances.get(instance_id)
        if stored is not None and stored.network_id == network_id and stored.config == config:
            return self._networks[network_id], stored
        async with self._network_lock(network_id):
            network = self._networks.get(network_id)
            if network is None:
                node = await self._cm.get_node_network_params(network_id)
                network = node_network(network_id, node)
        allocated = await self._cm.allocate_instance_network(config.ident, network_id, wishes(config, network_id))
        instance = StoredInstance(instance_id, network_id, config, allocated)
        instance_rules(instance)
        await self._store.save(network, instance)
        self._networks[network_id] = network
        self._instances[instance_id] = instance
        return network, instance

    def _check_name(self, instance: StoredInstance) -> None:
        """Two items may ask for one host name; then the second has to wait (sm.md §12, D10)."""
        wanted, network_id = alias(instance.config), instance.network_id
        for other in self._attached(network_id) if wanted else ():
            if other.instance_id != instance.instance_id and alias(other.config) == wanted:
                holder = other.config.ident
                raise AlreadyExistsError(f"host name {wanted} is that of instance {holder} in network {network_id}")

    async def _join_nodes(self, network: Network) -> None:
        """Join a network with the other nodes, or say once why that can't be."""
        if not network.vlan_id:
            return
        name, before = network.network_id, self._alone.pop(network.network_id, None)
        try:
            if await self._netlink.run(self._links.ensure_vlan, network):
                _log.info(kv("Network joined with other nodes", network=name, vlan=network.vlan_id))
        except AosError as error:
            self._alone[name] = reason = str(error)
            if reason != before:
                _log.warning(kv("Network is not joined with other nodes", network=name, reason=reason))

    async def _follow_routes(self) -> None:
        """The default route may come late, or move to another link."""
        with RouteChanges() as changes:
            while True:
                await changes.wait()
                for name in sorted({instance.network_id for instance in self._instances.values()}):
                    async with self._network_lock(name):
                        if self._attached(name):
                            await self._join_nodes(self._networks[name])

    async def _update_dns(self, network_id: str) -> None:
        records = {
            instance.instance_id: Records(
                instance.allocated.ip,
                tuple(host_names(instance.config, network_id)),
                instance.allocated.dns_servers,
            )
            for instance in self._attached(network_id)
        }
        if not records:
            if server := self._dns.pop(network_id, None):
                await server.stop()
            return
        if self._tasks is None:
            raise FailedError("the network manager is not running")
        if network_id not in self._dns:
            self._dns[network_id] = DnsServer(self._networks[network_id], self._files, self._tasks, root=self._dns_dir)
        await self._dns[network_id].update(records)

    async def _apply_firewall(self) -> None:
        """Write the table. Callers that come while it is being written share the next round."""
        self._firewall_wanted += 1
        mine = self._firewall_wanted
        async with self._firewall_lock:
            if self._firewall_applied >= mine:
                return
            covers = self._firewall_wanted
            up = [instance for instance in self._instances.values() if instance.host_if_name]
            networks = {instance.network_id for instance in up}
            await nft.apply(
                ruleset(
                    [self._networks[network_id] for network_id in sorted(networks)],
                    [instance_rules(instance) for instance in sorted(up, key=lambda item: item.instance_id)],
                    self._host_ports,
                )
            )
            self._firewall_applied = covers

    def _attached(self, network_id: str) -> list[StoredInstance]:
        return [
            instance
            for instance in self._instances.values()
            if instance.network_id == network_id and instance.host_if_name
        ]

    def _network_lock(self, network_id: str) -> asyncio.Lock:
        return self._network_locks.setdefault(network_id, asyncio.Lock())


def _own_names(config: NetworkConfig) -> tuple[str, ...]:
    return (config.hostname,) if config.hostname else ()


def _counted(instance: StoredInstance) -> Counted:
    return Counted(
        instance.instance_id,
        instance.allocated.ip,
        instance.config.download_limit_bytes,
        instance.config.upload_limit_bytes,
    )
