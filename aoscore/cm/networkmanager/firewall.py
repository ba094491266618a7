"""Which flows between instances are allowed. Pure (cm-orchestration §6.4, "do better" 26).

Instances of one network share a bridge and reach each other freely; rules are needed between networks only.
"""

from collections.abc import Iterable, Sequence
from typing import Self

import msgspec

from aoscore.common.errors import InvalidArgumentError
from aoscore.common.types import FirewallRule, InstanceIdent

PROTOCOLS = ("tcp", "udp", "sctp")


class Port(msgspec.Struct, frozen=True, order=True):
    """A port or a range of ports, as text, and its protocol."""

    protocol: str
    port: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `<port>` or `<port>/<protocol>`; tcp is the default. Raises InvalidArgumentError."""
        port, _, protocol = text.partition("/")
        return cls.of(port, protocol, text)

    @classmethod
    def of(cls, port: str, protocol: str, text: str) -> Self:
        """Check the parts of `text`."""
        protocol = protocol or "tcp"
        numbers = port.split("-")
        valid = all(part.isascii() and part.isdecimal() and 0 < int(part) <= 65535 for part in numbers)
        if len(numbers) > 2 or not valid:
            raise InvalidArgumentError(f"{text!r} has no valid port, write for example 8080 or 8080/udp")
        if protocol not in PROTOCOLS:
            raise InvalidArgumentError(f"{text!r} has an unknown protocol, known: {', '.join(PROTOCOLS)}")
        return cls(protocol, port)


class Connection(msgspec.Struct, frozen=True, order=True):
    """A port of another item that an instance wants to reach."""

    item_id: str
    port: Port

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `<item>/<port>` or `<item>/<port>/<protocol>`. Raises InvalidArgumentError."""
        parts = text.split("/")
        if len(parts) not in (2, 3) or not parts[0]:
            raise InvalidArgumentError(f"{text!r} is no allowed connection, write <item>/<port>[/<protocol>]")
        return cls(parts[0], Port.of(parts[1], parts[2] if len(parts) == 3 else "", text))


class Endpoint(msgspec.Struct, frozen=True, kw_only=True):
    """An instance in its network."""

    ident: InstanceIdent
    network_id: str
    node_id: str
    ip: str
    exposed_ports: tuple[Port, ...] = ()
    connections: tuple[Connection, ...] = ()
    hosts: tuple[str, ...] = ()


class Rules(msgspec.Struct, frozen=True):
    """What a client is allowed now, and what it still waits for."""

    rules: tuple[FirewallRule, ...]
    pending: tuple[Connection, ...]


def derive_rules(client: Endpoint, endpoints: Iterable[Endpoint]) -> Rules:
    """Rules of one client towards all others.

    A connection is pending while no instance of the wanted item in any network exposes the port.
    """
    servers: dict[str, list[Endpoint]] = {}
    for endpoint in sorted(endpoints, key=lambda one: one.ident):
        if endpoint.ident != client.ident:
            servers.setdefault(endpoint.ident.item_id, []).append(endpoint)
    rules: list[FirewallRule] = []
    pending: list[Connection] = []
    for connection in client.connections:
        found = servers.get(connection.item_id, ())
        resolved = any(server.network_id == client.network_id for server in found)
        for server in found:
            if server.network_id != client.network_id and connection.port in server.exposed_ports:
                rules.append(FirewallRule(server.ip, connection.port.port, connection.port.protocol, client.ip))
                resolved = True
        if not resolved:
            pending.append(connection)
    return Rules(tuple(dict.fromkeys(rules)), tuple(dict.fromkeys(pending)))


def parse_ports(texts: Sequence[str]) -> tuple[Port, ...]:
    """All exposed ports; raises InvalidArgumentError for the first wrong one."""
    return tuple(dict.fromkeys(Port.parse(text) for text in texts))


def parse_connections(texts: Sequence[str]) -> tuple[Connection, ...]:
    """All allowed connections; raises InvalidArgumentError for the first wrong one."""
    return tuple(dict.fromkeys(Connection.parse(text) for text in texts))
