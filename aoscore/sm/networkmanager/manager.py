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
from collections import deque
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
from aoscore.sm.networkmanager.backend import Attachment, Backend, BuiltinBackend
from aoscore.sm.networkmanager.cni import CniBackend, CniSettings
from aoscore.sm.networkmanager.dns import DNS_DIR, DnsServer, Records, stop_unknown
from aoscore.sm.networkmanager.firewall import instance_rules, ruleset
from aoscore.sm.networkmanager.ipv6 import Ipv6
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
# Changes in one round: many, since each round writes the whole firewall; few enough that the first need not wait for
# the last of hundreds. Starts that run beside small rounds make all of it slower than one after the other.
_ROUND = 64
_IP_FORWARD = Path("/proc/sys/net/ipv4/ip_forward")
_IPV6_FORWARD = Path("/proc/sys/net/ipv6/conf/all/forwarding")


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
        ipv6: Ipv6 | None = None,
        dns_dir: Path = DNS_DIR,
    ) -> None:
        """With `cni` instances are connected by CNI plugins, otherwise by ourselves. `host_ports`: see `ruleset`.

        `ipv6`: what gives instances IPv6 addresses too; not with `cni`.
        """
        self._store = store
        self._cm = cm
        self._dns_dir = dns_dir
        self._ipv6 = ipv6
        self._links = Links(ipv6)
        # Netlink in one thread, since its socket is not to be shared; files in another.
        self._netlink = Worker("netlink")
        self._files = Worker("network-files")
        self._backend: Backend = BuiltinBackend(self._links, self._netlink)
        if cni is not None:
            self._backend = CniBackend(self._links, self._netlink, self._files, cni)
        self._traffic = Traffic(store, traffic_period, ipv6)
        self._host_ports = host_ports
        self._networks: dict[str, Network] = {}
        self._instances: dict[str, StoredInstance] = {}
        self._dns: dict[str, DnsServer] = {}
        self._alone: dict[str, str] = {}
        """Networks that should be joined with other nodes and are not, and why."""
        self._waiting: deque[_Change] = deque()
        self._wake = asyncio.Event()
        self._links_lock = asyncio.Lock()
        """Held by whoever changes links."""
        self._rules_lock = asyncio.Lock()
        """Held by whoever changes or reads tables of nftables."""
        self._tasks: asyncio.TaskGroup | None = None

    # The service

    async def run(self, started: Callable[[], None]) -> None:
        """Repair, then count traffic and keep DNS servers alive until cancelled. Networks stay up."""
        async with self._files, self._netlink, asyncio.TaskGroup() as self._tasks:
            try:
                await self._restore()
                self._tasks.create_task(self._follow_routes(), name="routes")
                self._tasks.create_task(self._work(), name="network changes")
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
        if self._ipv6 is not None and await self._files.run(_IPV6_FORWARD.read_text) != "1\n":
            _log.warning("Instances reach nothing outside by IPv6: set net.ipv6.conf.all.forwarding=1")
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
        await self._write_rules()
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
        instances = self._attached(network.network_id)
        results = await self._backend.attach(
            [Attachment(one.instance_id, network, one.allocated.ip, one.config) for one in instances]
        )
        for instance, attached in zip(instances, results, strict=True):
            name = instance.instance_id
            if isinstance(attached, BaseException):
                await self._give_up(instance, attached)
                continue
            if attached.done:
                _log.warning(kv("Network of instance mended", id=name, what=", ".join(attached.done)))
            if attached.host_if_name != instance.host_if_name:
                instance = msgspec.structs.replace(instance, host_if_name=attached.host_if_name)
                await self._store.save((network, instance))
                self._instances[name] = instance

    async def _give_up(self, instance: StoredInstance, reason: BaseException) -> None:
        """Remove what can't be mended: the runtime then finds no namespace and starts the instance anew."""
        name = instance.instance_id
        _log.warning(kv("Network of instance can't be mended and is removed", id=name, reason=reason))
        self._instances[name] = msgspec.structs.replace(instance, host_if_name="")
        with log_and_continue(_log, f"Can't remove network of instance {name}"):
            await self._detach_at_once(name)

    async def _remove_leftovers(self, up: dict[str, StoredInstance]) -> None:
        found = await self._netlink.run(self._links.inventory)
        for name in (found.namespaces | await self._backend.known()) - up.keys():
            with log_and_continue(_log, f"Can't remove leftover network of instance {name}"):
                await self._detach_at_once(name)
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
        try:
            await self._submit(_Change(instance_id, check_network_id(network_id), config))
        except asyncio.CancelledError:
            with log_and_continue(_log, f"Can't take down network of instance {instance_id}"):
                await self.detach(instance_id)
            raise
        network, instance = self._networks[network_id], self._instances[instance_id]
        return AttachedNetwork(
            hosts=hosts_file(
                instance.allocated.ip, _own_names(config), network_id, config.hosts, ipv6=self._twin(instance)
            ),
            resolv_conf=resolv_conf(network.ip, instance.allocated.dns_servers),
        )

    async def detach(self, instance_id: str) -> None:
        """Take an instance's network down and keep its allocation; repeatable."""
        await self._submit(_Change(instance_id))

    # Changes go in rounds: what comes while a round is being made waits for the next, so that many instances cost
    # little more than one where the cost is a transaction, a program or a wait in the kernel.

    async def _submit(self, change: "_Change") -> None:
        if self._tasks is None:
            raise FailedError("the network manager is not running")
        self._waiting.append(change)
        self._wake.set()
        await change.done

    async def _work(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while changes := self._next_round():
                async with self._links_lock:
                    await self._make(changes)

    def _next_round(self) -> list["_Change"]:
        """At most one change of an instance, in the order in which they came."""
        taken: dict[str, _Change] = {}
        while self._waiting and len(taken) < _ROUND and self._waiting[0].instance_id not in taken:
            change = self._waiting.popleft()
            if not change.done.done():
                taken[change.instance_id] = change
        return list(taken.values())

    async def _make(self, changes: Sequence["_Change"]) -> None:
        """Make all changes or tell each why not. One that spoils a common step fails alone."""
        try:
            await self._make_together(changes)
        except Exception as error:
            left = [change for change in changes if not change.done.done()]
            if len(changes) > 1:
                for change in left:
                    await self._make([change])
                return
            for change in left:
                if change.config is not None:
                    with log_and_continue(_log, f"Can't take down network of instance {change.instance_id}"):
                        await self._make_together([_Change(change.instance_id)])
                change.end(error)

    async def _make_together(self, changes: Sequence["_Change"]) -> None:
        up = await self._allocate([change for change in changes if change.config is not None])
        up, failed = await self._attach(up)
        down = [change for change in changes if change.config is None]
        down = await self._detach([*down, *failed])
        touched = [self._instances[one.instance_id] for one in (*up, *down) if one.instance_id in self._instances]
        await self._store.save(*((self._networks[instance.network_id], instance) for instance in touched))
        for network_id in dict.fromkeys(instance.network_id for instance in touched):
            await self._update_dns(network_id)
            if not self._attached(network_id):
                await self._remove_bridge(self._networks[network_id])
        await self._write_rules(
            [_counted(self._instances[change.instance_id]) for change in up], [change.instance_id for change in down]
        )
        for change in (*up, *down):
            change.end(change.error)

    async def _allocate(self, changes: Sequence["_Change"]) -> list["_Change"]:
        """See that networks and addresses are known and stored; those for which they are."""
        new = [change for change in changes if not self._is_allocated(change)]
        unknown = sorted({change.network_id for change in new} - self._networks.keys())
        answers = await asyncio.gather(*map(self._cm.get_node_network_params, unknown), return_exceptions=True)
        joined: dict[str, NodeNetwork | BaseException] = dict(zip(unknown, answers, strict=True))

        async def allocate(change: _Change) -> tuple[Network, StoredInstance]:
            assert change.config is not None  # noqa: S101 - it is to come up
            network_id, config = change.network_id, change.config
            network = self._networks.get(network_id)
            if network is None:
                node = joined[network_id]
                if isinstance(node, BaseException):
                    raise node
                network = node_network(network_id, node)
            allocated = await self._cm.allocate_instance_network(config.ident, network_id, wishes(config, network_id))
            instance = StoredInstance(change.instance_id, network_id, config, allocated)
            instance_rules(instance)
            return network, instance

        results = await asyncio.gather(*map(allocate, new), return_exceptions=True)
        rows = [result for result in results if not isinstance(result, BaseException)]
        await self._store.save(*rows)
        for network, instance in rows:
            self._networks[network.network_id] = network
            self._instances[instance.instance_id] = instance
        for change, result in zip(new, results, strict=True):
            if isinstance(result, BaseException):
                change.end(result)
        return [change for change in changes if self._is_allocated(change)]

    def _is_allocated(self, change: "_Change") -> bool:
        stored = self._instances.get(change.instance_id)
        return stored is not None and (stored.network_id, stored.config) == (change.network_id, change.config)

    async def _attach(self, changes: Sequence["_Change"]) -> tuple[list["_Change"], list["_Change"]]:
        """Bridges and links of instances; those that are up, and those that are not and must be cleaned."""
        bridged: dict[str, AosError | None] = {}
        for network_id in dict.fromkeys(change.network_id for change in changes):
            try:
                await self._netlink.run(self._links.ensure_bridge, self._networks[network_id])
                await self._join_nodes(self._networks[network_id])
                bridged[network_id] = None
            except AosError as error:
                bridged[network_id] = error
        names = {(one.network_id, alias(one.config)): one for one in self._instances.values() if one.host_if_name}
        for change in changes:
            change.error = bridged[change.network_id] or self._claim_name(self._instances[change.instance_id], names)
        wanted = [change for change in changes if change.error is None]
        results = await self._backend.attach([self._attachment(change.instance_id) for change in wanted])
        up = []
        for change, result in zip(wanted, results, strict=True):
            if isinstance(result, BaseException):
                change.error = result
            else:
                up.append(change)
                self._set_link(change.instance_id, result.host_if_name)
        return up, [change for change in changes if change.error is not None]

    def _claim_name(
        self, instance: StoredInstance, names: dict[tuple[str, str], StoredInstance]
    ) -> AlreadyExistsError | None:
        """Two items may ask for one host name; then the second has to wait (sm.md §12, D10)."""
        wanted = alias(instance.config)
        holder = names.setdefault((instance.network_id, wanted), instance)
        if not wanted or holder.instance_id == instance.instance_id:
            return None
        whose = f"instance {holder.config.ident} in network {instance.network_id}"
        return AlreadyExistsError(f"host name {wanted} is that of {whose}")

    async def _detach(self, changes: Sequence["_Change"]) -> list["_Change"]:
        """Take links down; those that are. An instance that is not known has none of the rest either."""
        results = await self._backend.detach([change.instance_id for change in changes])
        for change, error in zip(changes, results, strict=True):
            if error is None:
                self._set_link(change.instance_id, "")
            else:
                change.end(change.error or error)
        return [change for change, error in zip(changes, results, strict=True) if error is None]

    async def _detach_at_once(self, instance_id: str) -> None:
        for error in await self._backend.detach([instance_id]):
            if error is not None:
                raise error

    def _attachment(self, instance_id: str) -> Attachment:
        instance = self._instances[instance_id]
        return Attachment(instance_id, self._networks[instance.network_id], instance.allocated.ip, instance.config)

    def _set_link(self, instance_id: str, host_if_name: str) -> None:
        if instance := self._instances.get(instance_id):
            self._instances[instance_id] = msgspec.structs.replace(instance, host_if_name=host_if_name)

    async def _remove_bridge(self, network: Network) -> None:
        for link in filter(None, (network.vlan_if_name, network.bridge)):
            await self._netlink.run(self._links.remove_link, link)
        self._alone.pop(network.network_id, None)

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
        await self._store.save((self._networks[instance.network_id], instance))
        self._instances[instance.instance_id] = instance
        await self._write_rules()

    # For monitoring

    async def refresh_traffic(self) -> None:
        """Read the traffic counters."""
        async with self._rules_lock:
            await self._traffic.refresh(datetime.now(UTC))

    def traffic(self, instance_id: str | None = None) -> Totals:
        """Totals of an instance or of the node, as last read."""
        return self._traffic.totals(instance_id or SYSTEM)

    # Inside

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
                    async with self._links_lock:
                        if self._attached(name):
                            await self._join_nodes(self._networks[name])

    def _twin(self, instance: StoredInstance) -> str:
        """Its IPv6 address; empty when it has none."""
        return self._ipv6.address(instance.allocated.ip) if self._ipv6 is not None else ""

    async def _update_dns(self, network_id: str) -> None:
        records = {
            instance.instance_id: Records(
                instance.allocated.ip,
                tuple(host_names(instance.config, network_id)),
                instance.allocated.dns_servers,
                self._twin(instance),
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

    async def _write_rules(self, counted: Sequence[Counted] = (), not_counted: Sequence[str] = ()) -> None:
        """Write the firewall as a whole and change what is counted, in one transaction."""
        async with self._rules_lock:
            up = [instance for instance in self._instances.values() if instance.host_if_name]
            networks = {instance.network_id for instance in up}
            rules = ruleset(
                [self._networks[network_id] for network_id in sorted(networks)],
                [instance_rules(instance) for instance in sorted(up, key=lambda item: item.instance_id)],
                self._host_ports,
            )
            await self._traffic.change(counted, not_counted, rules)

    def _attached(self, network_id: str) -> list[StoredInstance]:
        return [
            instance
            for instance in self._instances.values()
            if instance.network_id == network_id and instance.host_if_name
        ]


class _Change:
    """An instance's network that is to come up, or to go down where there is no `config`; `done` when it has."""

    def __init__(self, instance_id: str, network_id: str = "", config: NetworkConfig | None = None) -> None:
        self.instance_id = instance_id
        self.network_id = network_id
        self.config = config
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.error: BaseException | None = None
        """Why it does not come up, while what there is of it is being removed."""

    def end(self, error: BaseException | None) -> None:
        """Tell whoever waits for it."""
        if self.done.done():
            return
        if error is None:
            self.done.set_result(None)
        else:
            self.done.set_exception(error)


def _own_names(config: NetworkConfig) -> tuple[str, ...]:
    return (config.hostname,) if config.hostname else ()


def _counted(instance: StoredInstance) -> Counted:
    return Counted(
        instance.instance_id,
        instance.allocated.ip,
        instance.config.download_limit_bytes,
        instance.config.upload_limit_bytes,
    )
