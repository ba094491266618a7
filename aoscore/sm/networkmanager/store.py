"""The network manager's tables, as AosCore 9.1 writes them (database.md §3)."""

import logging
from collections.abc import Iterable
from datetime import UTC, datetime

import apsw
import msgspec

from aoscore.common.config import from_json, to_json
from aoscore.common.db import Database
from aoscore.common.errors import InvalidArgumentError
from aoscore.common.log import kv
from aoscore.common.types import FirewallRule, InstanceIdent, InstanceNetwork
from aoscore.sm.networkmanager.model import Network, NetworkConfig, StoredInstance, bridge_name, host_names, vlan_name
from aoscore.sm.networkmanager.traffic import StoredTraffic
from aoscore.sm.resourcemanager.resources import HostConfig

_log = logging.getLogger(__name__)

_NS = 1_000_000_000


class _Ident(msgspec.Struct, frozen=True):
    item_id: str = msgspec.field(name="itemID")
    subject_id: str = msgspec.field(name="subjectID")
    instance: int


class _Host(msgspec.Struct, frozen=True):
    ip: str
    hostname: str


class _Config(msgspec.Struct, frozen=True, rename="camel"):
    ident: _Ident = msgspec.field(name="instanceIdent")
    hostname: str = ""
    ingress_kbit: int = 0
    egress_kbit: int = 0
    upload_limit: int = 0
    download_limit: int = 0
    aliases: tuple[str, ...] = ()
    exposed_ports: tuple[str, ...] = ()
    allowed_connections: tuple[str, ...] = ()
    hosts: tuple[_Host, ...] = ()


class _Rule(msgspec.Struct, frozen=True):
    dst_ip: str = msgspec.field(name="dstIP", default="")
    dst_port: str = msgspec.field(name="dstPort", default="")
    proto: str = ""
    src_ip: str = msgspec.field(name="srcIP", default="")


class _Allocated(msgspec.Struct, frozen=True, rename="camel"):
    network_id: str = msgspec.field(name="networkID", default="")
    subnet: str = ""
    ip: str = ""
    dns_servers: tuple[str, ...] = ()
    firewall_rules: tuple[_Rule, ...] = ()


class NetworkStore:
    """Rows of `network`, `instancenetwork` and `trafficmonitor`. Every method is one transaction."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def load_networks(self) -> list[Network]:
        """Networks this node has joined."""
        rows = await self._database.select(
            "SELECT networkID, ip, subnet, vlanID, vlanIfName, bridgeIfName FROM network"
        )
        return [
            Network(
                network_id=row[0],
                subnet=row[2] or "",
                ip=row[1] or "",
                bridge=row[5] or bridge_name(row[0]),
                vlan_id=row[3] or 0,
                vlan_if_name=(row[4] or vlan_name(row[0])) if row[3] else "",
            )
            for row in rows
        ]

    async def load_instances(self) -> list[StoredInstance]:
        """Instances with a network; rows of old versions, without content, are left out.

        A row that cannot be read is logged, left in the file and skipped.
        """
        rows = await self._database.select(
            "SELECT instanceID, networkID, networkConfig, allocatedParams, hostIfName FROM instancenetwork"
        )
        instances = []
        for row in rows:
            if not row[2] or not row[3]:
                continue
            try:
                instances.append(_instance_from_row(row))
            except InvalidArgumentError as error:
                _log.error(kv("Stored network of instance can't be read, skipped", id=row[0], error=error))
        return instances

    async def save(self, *rows: tuple[Network, StoredInstance]) -> None:
        """Insert or replace instances together with their networks."""
        networks = {network.network_id: network for network, _ in rows}.values()

        def write(connection: apsw.Connection) -> None:
            connection.executemany(
                "INSERT OR REPLACE INTO network (networkID, ip, subnet, vlanID, vlanIfName, bridgeIfName) "
                "VALUES (?, ?, ?, ?, ?, ?)",
                [
                    (
                        network.network_id,
                        network.ip,
                        network.subnet,
                        network.vlan_id,
                        network.vlan_if_name,
                        network.bridge,
                    )
                    for network in networks
                ],
            )
            connection.executemany(
                "INSERT OR REPLACE INTO instancenetwork "
                "(instanceID, networkID, networkConfig, allocatedParams, hostIfName) VALUES (?, ?, ?, ?, ?)",
                [_instance_to_row(instance) for _, instance in rows],
            )

        await self._database.write(write)

    async def remove_instance(self, instance_id: str, network_id: str | None) -> None:
        """Delete an instance and, if given, its network."""

        def write(connection: apsw.Connection) -> None:
            connection.execute("DELETE FROM instancenetwork WHERE instanceID = ?", (instance_id,))
            if network_id is not None:
                connection.execute("DELETE FROM network WHERE networkID = ?", (network_id,))

        await self._database.write(write)

    async def load_traffic(self) -> list[StoredTraffic]:
        """Totals by counter."""
        rows = await self._database.select("SELECT chain, time, value FROM trafficmonitor")
        return [StoredTraffic(row[0], datetime.fromtimestamp((row[1] or 0) / _NS, UTC), row[2] or 0) for row in rows]

    async def save_traffic(self, totals: Iterable[StoredTraffic]) -> None:
        """Insert or replace totals."""
        rows = [(total.chain, int(total.time.timestamp() * _NS), total.value) for total in totals]
        await self._database.write(
            lambda connection: connection.executemany(
                "INSERT OR REPLACE INTO trafficmonitor (chain, time, value) VALUES (?, ?, ?)", rows
            )
        )

    async def remove_traffic(self, chains: Iterable[str]) -> None:
        """Delete totals."""
        rows = [(chain,) for chain in chains]
        await self._database.write(
            lambda connection: connection.executemany("DELETE FROM trafficmonitor WHERE chain = ?", rows)
        )


def _instance_to_row(instance: StoredInstance) -> tuple[str, str, str, str, str]:
    config, allocated = instance.config, instance.allocated
    stored_config = _Config(
        ident=_Ident(config.ident.item_id, config.ident.subject_id, config.ident.instance),
        hostname=config.hostname,
        ingress_kbit=config.download_speed_kbit,
        egress_kbit=config.upload_speed_kbit,
        upload_limit=config.upload_limit_bytes,
        download_limit=config.download_limit_bytes,
        aliases=tuple(name for name in host_names(config, instance.network_id) if name != config.hostname),
        exposed_ports=config.exposed_ports,
        allowed_connections=config.allowed_connections,
        hosts=tuple(_Host(host.ip, host.hostname) for host in config.hosts),
    )
    stored_allocated = _Allocated(
        network_id=instance.network_id,
        subnet=allocated.subnet,
        ip=allocated.ip,
        dns_servers=allocated.dns_servers,
        firewall_rules=tuple(
            _Rule(rule.dst_ip, rule.dst_port, rule.proto, rule.src_ip) for rule in allocated.firewall_rules
        ),
    )
    return (
        instance.instance_id,
        instance.network_id,
        to_json(stored_config).decode(),
        to_json(stored_allocated).decode(),
        instance.host_if_name,
    )


def _instance_from_row(row: tuple[str, str, str, str, str | None]) -> StoredInstance:
    instance_id, network_id, config_text, allocated_text, host_if_name = row
    config = from_json(config_text, _Config, what=f"stored network configuration of instance {instance_id}")
    allocated = from_json(allocated_text, _Allocated, what=f"stored network of instance {instance_id}")
    return StoredInstance(
        instance_id=instance_id,
        network_id=network_id,
        config=NetworkConfig(
            ident=InstanceIdent(config.ident.item_id, config.ident.subject_id, config.ident.instance),
            hostname=config.hostname,
            exposed_ports=config.exposed_ports,
            allowed_connections=config.allowed_connections,
            hosts=tuple(HostConfig(host.ip, host.hostname) for host in config.hosts),
            download_speed_kbit=config.ingress_kbit,
            upload_speed_kbit=config.egress_kbit,
            download_limit_bytes=config.download_limit,
            upload_limit_bytes=config.upload_limit,
        ),
        allocated=InstanceNetwork(
            subnet=allocated.subnet,
            ip=allocated.ip,
            dns_servers=allocated.dns_servers,
            firewall_rules=tuple(
                FirewallRule(rule.dst_ip, rule.dst_port, rule.proto, rule.src_ip) for rule in allocated.firewall_rules
            ),
        ),
        host_if_name=host_if_name or "",
    )
