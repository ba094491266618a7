"""Networks in the database (database.md §2.4). Every change is one transaction."""

import logging
from collections.abc import Sequence
from typing import Any

import apsw
import msgspec

from aoscore.cm.networkmanager.firewall import Connection, Endpoint, Port
from aoscore.cm.rows import ident_of, ident_values, json_text
from aoscore.common.aio import log_and_continue
from aoscore.common.db import Database
from aoscore.common.types import InstanceIdent

_log = logging.getLogger(__name__)

_DROP_ENDPOINT = (
    "DELETE FROM pending_connections WHERE requesterItemID = ? AND requesterSubjectID = ? AND requesterInstance = ?"
    " AND requesterType = ? AND requesterPreinstalled = ?",
    "DELETE FROM aoscore_network_wishes"
    " WHERE itemID = ? AND subjectID = ? AND instance = ? AND type = ? AND preinstalled = ?",
    "DELETE FROM networkmanager_instances"
    " WHERE itemID = ? AND subjectID = ? AND instance = ? AND type = ? AND preinstalled = ?",
)


class NetworkRow(msgspec.Struct, frozen=True):
    """A network: its subnet as CIDR text and its VLAN id."""

    network_id: str
    subnet: str
    vlan_id: int


class NodeRow(msgspec.Struct, frozen=True):
    """A node's own address in a network."""

    network_id: str
    node_id: str
    ip: str


class Stored(msgspec.Struct, frozen=True):
    """All that was stored."""

    networks: tuple[NetworkRow, ...]
    nodes: tuple[NodeRow, ...]
    endpoints: tuple[Endpoint, ...]


class EndpointRow(msgspec.Struct, frozen=True):
    """An instance with what AosCore 9.1 keeps beside it: subnet and connections that wait for their server."""

    endpoint: Endpoint
    subnet: str
    dns_servers: tuple[str, ...]
    pending: tuple[Connection, ...]


class Change(msgspec.Struct, kw_only=True):
    """Rows to write and to delete, together."""

    networks: Sequence[NetworkRow] = ()
    nodes: Sequence[NodeRow] = ()
    endpoints: Sequence[EndpointRow] = ()
    dropped_endpoints: Sequence[InstanceIdent] = ()
    dropped_nodes: Sequence[NodeRow] = ()
    dropped_networks: Sequence[str] = ()


class NetworkStore:
    """Reads and writes the network tables."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def load(self) -> Stored:
        """Everything stored; rows that cannot be read are logged and left out."""
        return await self._database.read(_load)

    async def apply(self, change: Change) -> None:
        """Make the change durable as a whole."""
        await self._database.write(lambda connection: _apply(connection, change))


def _load(connection: apsw.Connection) -> Stored:
    networks = [NetworkRow(*row) for row in connection.execute("SELECT networkID, subnet, vlanID FROM networks")]
    nodes = [NodeRow(*row) for row in connection.execute("SELECT networkID, nodeID, ip FROM hosts")]
    wishes = {
        tuple(row[:5]): (row[5], row[6])
        for row in connection.execute(
            "SELECT itemID, subjectID, instance, type, preinstalled, hosts, connections FROM aoscore_network_wishes"
        )
    }
    waiting: dict[tuple[Any, ...], list[Connection]] = {}
    for row in connection.execute(
        "SELECT requesterItemID, requesterSubjectID, requesterInstance, requesterType, requesterPreinstalled,"
        " targetItemID, port, protocol FROM pending_connections"
    ):
        waiting.setdefault(tuple(row[:5]), []).append(Connection(row[5], Port(row[7], row[6])))
    endpoints = []
    for row in connection.execute(
        "SELECT itemID, subjectID, instance, type, preinstalled, networkID, nodeID, ip, exposedPorts"
        " FROM networkmanager_instances ORDER BY rowid"
    ):
        with log_and_continue(_log, f"Can't restore network of instance {row[0]}:{row[1]}:{row[2]}"):
            endpoints.append(_endpoint(row, wishes.get(tuple(row[:5])), waiting.get(tuple(row[:5]), [])))
    return Stored(tuple(networks), tuple(nodes), tuple(endpoints))


class _PortJson(msgspec.Struct, frozen=True):
    protocol: str
    port: str


def _endpoint(row: Sequence[Any], wish: tuple[str, str] | None, waiting: list[Connection]) -> Endpoint:
    ports = msgspec.json.decode(row[8] or "[]", type=tuple[_PortJson, ...])
    hosts: tuple[str, ...] = ()
    connections = tuple(dict.fromkeys(waiting))
    if wish is not None:
        hosts = msgspec.json.decode(wish[0], type=tuple[str, ...])
        connections = tuple(map(Connection.parse, msgspec.json.decode(wish[1], type=list[str])))
    return Endpoint(
        ident=ident_of(row),
        network_id=row[5],
        node_id=row[6],
        ip=row[7],
        exposed_ports=tuple(Port(port.protocol, port.port) for port in ports),
        connections=connections,
        hosts=hosts,
    )


def _apply(connection: apsw.Connection, change: Change) -> None:
    for ident in [*change.dropped_endpoints, *(row.endpoint.ident for row in change.endpoints)]:
        for statement in _DROP_ENDPOINT:
            connection.execute(statement, ident_values(ident))
    for node in change.dropped_nodes:
        connection.execute("DELETE FROM hosts WHERE networkID = ? AND nodeID = ?", (node.network_id, node.node_id))
    for network_id in change.dropped_networks:
        connection.execute("DELETE FROM networks WHERE networkID = ?", (network_id,))
    for network in change.networks:
        connection.execute(
            "INSERT INTO networks (networkID, subnet, vlanID) VALUES (?, ?, ?)",
            (network.network_id, network.subnet, network.vlan_id),
        )
    for node in change.nodes:
        connection.execute(
            "INSERT INTO hosts (networkID, nodeID, ip) VALUES (?, ?, ?)", (node.network_id, node.node_id, node.ip)
        )
    for row in change.endpoints:
        _insert_endpoint(connection, row)


def _insert_endpoint(connection: apsw.Connection, row: EndpointRow) -> None:
    endpoint = row.endpoint
    ident = ident_values(endpoint.ident)
    ports = [_PortJson(port.protocol, port.port) for port in endpoint.exposed_ports]
    connection.execute(
        "INSERT INTO networkmanager_instances (itemID, subjectID, instance, type, preinstalled, networkID, nodeID, ip,"
        " exposedPorts, dnsServers) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (*ident, endpoint.network_id, endpoint.node_id, endpoint.ip, json_text(ports), json_text(row.dns_servers)),
    )
    wanted = [f"{one.item_id}/{one.port.port}/{one.port.protocol}" for one in endpoint.connections]
    connection.execute(
        "INSERT INTO aoscore_network_wishes (itemID, subjectID, instance, type, preinstalled, hosts, connections)"
        " VALUES (?, ?, ?, ?, ?, ?, ?)",
        (*ident, json_text(endpoint.hosts), json_text(wanted)),
    )
    for one in row.pending:
        connection.execute(
            "INSERT INTO pending_connections (requesterItemID, requesterSubjectID, requesterInstance, requesterType,"
            " requesterPreinstalled, nodeID, networkID, requesterIP, requesterSubnet, targetItemID, port, protocol)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                *ident,
                endpoint.node_id,
                endpoint.network_id,
                endpoint.ip,
                row.subnet,
                one.item_id,
                one.port.port,
                one.port.protocol,
            ),
        )
