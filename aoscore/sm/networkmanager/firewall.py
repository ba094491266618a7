"""The firewall of instances: table ``inet aos`` as one nftables transaction (sm-runtime.md §6.5). Pure.

The table is always written as a whole, from nothing: what the kernel has afterwards depends on the given state alone,
and packets see either the old or the new table. No other table is ever touched.

A packet between two instances meets the rules of both: first those of the sender, which pass it on rather than accept
it, then those of the receiver, which decide. So it does not matter who was started first (D35).
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from aoscore.common.types import FirewallRule
from aoscore.sm.networkmanager.model import (
    Network,
    Ports,
    StoredInstance,
    parse_address,
    parse_ports,
    parse_subnet,
)

TABLE = "aos"
FAMILY = "inet"
_UNCLEAN = re.compile(r"[^A-Za-z0-9_]")

Command = dict[str, Any]


class Allowed(msgspec.Struct, frozen=True):
    """A flow that CM allows: from the instance to a destination address or subnet."""

    destination: str
    ports: Ports


class InstanceRules(msgspec.Struct, frozen=True):
    """The checked rules of one instance."""

    chain: str
    ip: str
    subnet: str
    exposed: tuple[Ports, ...]
    allowed: tuple[Allowed, ...]


def clean_id(text: str) -> str:
    """An id as part of a chain's name."""
    return _UNCLEAN.sub("_", text)


def instance_rules(instance: StoredInstance) -> InstanceRules:
    """Check what CM and the item say about an instance. Raises InvalidArgumentError naming the wrong part."""
    return InstanceRules(
        chain=f"instance_{clean_id(instance.instance_id)}",
        ip=str(parse_address(instance.allocated.ip)),
        subnet=str(parse_subnet(instance.allocated.subnet)),
        exposed=tuple(parse_ports(text) for text in instance.config.exposed_ports),
        allowed=tuple(_allowed(rule) for rule in instance.allocated.firewall_rules),
    )


def ruleset(networks: Iterable[Network], instances: Sequence[InstanceRules]) -> list[Command]:
    """The transaction that makes the table what the state says."""
    table = {"family": FAMILY, "name": TABLE}
    # Deleting what may not exist is an error: so it is added first.
    commands: list[Command] = [{"add": {"table": table}}, {"delete": {"table": table}}, {"add": {"table": table}}]
    commands += [
        _chain("forward", type="filter", hook="forward", prio=0, policy="drop"),
        _chain("postrouting", type="nat", hook="postrouting", prio=100, policy="accept"),
        *(_chain(instance.chain) for instance in instances),
        _rule("forward", [_match({"ct": {"key": "state"}}, "invalid", "in"), {"drop": None}]),
        _rule(
            "forward",
            [_match({"ct": {"key": "state"}}, {"set": ["established", "related"]}, "in"), {"accept": None}],
        ),
    ]
    for network in networks:
        subnet = _prefix(str(parse_subnet(network.subnet)))
        leaves = _match({"meta": {"key": "oifname"}}, network.bridge, "!=")
        commands.append(_rule("postrouting", [_match(_ip("saddr"), subnet), leaves, {"masquerade": None}]))
    for instance in instances:
        commands += _instance_commands(instance)
    if instances:
        # Senders first, then receivers; what is left comes from an instance and goes outside.
        for direction in ("saddr", "daddr"):
            jumps = [[instance.ip, {"jump": {"target": instance.chain}}] for instance in instances]
            commands.append(_rule("forward", [{"vmap": {"key": _ip(direction), "data": {"set": jumps}}}]))
        sources = {"set": [instance.ip for instance in instances]}
        commands.append(_rule("forward", [_match(_ip("saddr"), sources), {"accept": None}]))
    return commands


def _instance_commands(instance: InstanceRules) -> Iterable[Command]:
    own, subnet = instance.ip, _prefix(instance.subnet)
    to_me, from_me = _match(_ip("daddr"), own), _match(_ip("saddr"), own)
    accept = {"accept": None}
    yield _rule(instance.chain, [_match(_ip("saddr"), subnet), to_me, accept])
    yield _rule(instance.chain, [from_me, _match(_ip("daddr"), subnet), accept])
    for ports in instance.exposed:
        yield _rule(instance.chain, [to_me, _port_match(ports), accept])
    for allowed in instance.allowed:
        destination = _match(_ip("daddr"), _prefix(allowed.destination))
        yield _rule(instance.chain, [from_me, destination, _port_match(allowed.ports), accept])
    yield _rule(instance.chain, [to_me, {"drop": None}])
    yield _rule(instance.chain, [from_me, {"return": None}])


def _allowed(rule: FirewallRule) -> Allowed:
    ports = parse_ports(f"{rule.dst_port}/{rule.proto or 'tcp'}")
    return Allowed(str(parse_subnet(rule.dst_ip)), ports)


def _chain(name: str, **base: Any) -> Command:
    return {"add": {"chain": {"family": FAMILY, "table": TABLE, "name": name, **base}}}


def _rule(chain: str, expressions: list[Any]) -> Command:
    return {"add": {"rule": {"family": FAMILY, "table": TABLE, "chain": chain, "expr": expressions}}}


def _match(left: Any, right: Any, op: str = "==") -> dict[str, Any]:
    return {"match": {"op": op, "left": left, "right": right}}


def _ip(field: str) -> dict[str, Any]:
    return {"payload": {"protocol": "ip", "field": field}}


def _prefix(subnet: str) -> Any:
    address, _, length = subnet.partition("/")
    return address if length in ("", "32") else {"prefix": {"addr": address, "len": int(length)}}


def _port_match(ports: Ports) -> dict[str, Any]:
    value: Any = ports.first if ports.first == ports.last else {"range": [ports.first, ports.last]}
    return _match({"payload": {"protocol": ports.proto, "field": "dport"}}, value)
