"""The firewall of instances: table ``inet aos`` as one nftables transaction (sm-runtime.md §6.5). Pure.

The table is always written as a whole, from nothing: what the kernel has afterwards depends on the given state alone,
and packets see either the old or the new table. No other table is ever touched.

What instances may ask of the node itself is not limited unless the node says so: services written for AosCore 9.1 may
use any port of it (sm-runtime.md §7, D36).

A packet between two instances meets the rules of both: first those of the sender, which pass it on rather than accept
it, then those of the receiver, which decide. So it does not matter who was started first (D35).
"""

import functools
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
from aoscore.sm.networkmanager.nft import Command, Expression, Table, ip, match, prefix

TABLE = Table("aos")
_ACCEPT: Expression = {"accept": None}
_DROP: Expression = {"drop": None}
_UNCLEAN = re.compile(r"[^A-Za-z0-9_]")


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


# Every change of one instance writes the rules of all.
@functools.lru_cache(maxsize=1024)
def instance_rules(instance: StoredInstance) -> InstanceRules:
    """Check what CM and the item say about an instance. Raises InvalidArgumentError naming the wrong part."""
    return InstanceRules(
        chain=f"instance_{clean_id(instance.instance_id)}",
        ip=str(parse_address(instance.allocated.ip)),
        subnet=str(parse_subnet(instance.allocated.subnet)),
        exposed=tuple(parse_ports(text) for text in instance.config.exposed_ports),
        allowed=tuple(_allowed(rule) for rule in instance.allocated.firewall_rules),
    )


def ruleset(
    networks: Sequence[Network], instances: Sequence[InstanceRules], host_ports: Sequence[Ports] | None = None
) -> list[Command]:
    """The transaction that makes the table what the state says.

    `host_ports` are the node's own ports that instances reach beside its DNS server; None leaves all of them open.
    """
    established = match({"ct": {"key": "state"}}, {"set": ["established", "related"]}, "in")
    commands = [
        *TABLE.begin(),
        TABLE.add("chain", "forward", type="filter", hook="forward", prio=0, policy="drop"),
        TABLE.add("chain", "postrouting", type="nat", hook="postrouting", prio=100, policy="accept"),
        *(TABLE.add("chain", instance.chain) for instance in instances),
        TABLE.rule("forward", [match({"ct": {"key": "state"}}, "invalid", "in"), _DROP]),
        TABLE.rule("forward", [established, _ACCEPT]),
    ]
    for network in networks:
        subnet = match(ip("saddr"), prefix(str(parse_subnet(network.subnet))))
        leaves = match({"meta": {"key": "oifname"}}, network.bridge, "!=")
        commands.append(TABLE.rule("postrouting", [subnet, leaves, {"masquerade": None}]))
    for instance in instances:
        commands += _instance_commands(instance)
    if host_ports is not None:
        commands += _host_commands([network.bridge for network in networks], host_ports)
    if instances:
        # Senders first, then receivers; what is left comes from an instance and goes outside.
        for direction in ("saddr", "daddr"):
            jumps = [[instance.ip, {"jump": {"target": instance.chain}}] for instance in instances]
            commands.append(TABLE.rule("forward", [{"vmap": {"key": ip(direction), "data": {"set": jumps}}}]))
        # Who is in another network on another node has no chain here: the way there is over that network's bridge, and
        # the sender's chain has accepted what it may.
        for network in networks:
            others = sorted({other.bridge for other in networks} - {network.bridge})
            if others:
                subnet = match(ip("saddr"), prefix(str(parse_subnet(network.subnet))))
                enters = match({"meta": {"key": "oifname"}}, {"set": others})
                commands.append(TABLE.rule("forward", [subnet, enters, _DROP]))
        sources = {"set": [instance.ip for instance in instances]}
        commands.append(TABLE.rule("forward", [match(ip("saddr"), sources), _ACCEPT]))
    return commands


def _host_commands(bridges: Sequence[str], ports: Sequence[Ports]) -> Iterable[Command]:
    """What comes from bridges to the node itself, by whatever address and protocol."""
    yield TABLE.add("chain", "input", type="filter", hook="input", prio=0, policy="accept")
    yield TABLE.add("chain", "host")
    if bridges:
        from_bridge = match({"meta": {"key": "iifname"}}, {"set": sorted(bridges)})
        yield TABLE.rule("input", [from_bridge, {"jump": {"target": "host"}}])
    yield TABLE.rule("host", [match({"ct": {"key": "state"}}, {"set": ["established", "related"]}, "in"), _ACCEPT])
    yield TABLE.rule("host", [match({"meta": {"key": "l4proto"}}, "icmp"), _ACCEPT])
    for allowed in (Ports("tcp", 53, 53), Ports("udp", 53, 53), *ports):
        yield TABLE.rule("host", [_port_match(allowed), _ACCEPT])
    yield TABLE.rule("host", [_DROP])


def _instance_commands(instance: InstanceRules) -> Iterable[Command]:
    to_me, from_me = match(ip("daddr"), instance.ip), match(ip("saddr"), instance.ip)
    from_subnet, to_subnet = (match(ip(field), prefix(instance.subnet)) for field in ("saddr", "daddr"))
    yield TABLE.rule(instance.chain, [from_subnet, to_me, _ACCEPT])
    yield TABLE.rule(instance.chain, [from_me, to_subnet, _ACCEPT])
    for ports in instance.exposed:
        yield TABLE.rule(instance.chain, [to_me, _port_match(ports), _ACCEPT])
    for allowed in instance.allowed:
        destination = match(ip("daddr"), prefix(allowed.destination))
        yield TABLE.rule(instance.chain, [from_me, destination, _port_match(allowed.ports), _ACCEPT])
    yield TABLE.rule(instance.chain, [to_me, _DROP])
    yield TABLE.rule(instance.chain, [from_me, {"return": None}])


def _allowed(rule: FirewallRule) -> Allowed:
    ports = parse_ports(f"{rule.dst_port}/{rule.proto or 'tcp'}")
    return Allowed(str(parse_subnet(rule.dst_ip)), ports)


def _port_match(ports: Ports) -> Expression:
    value: Any = ports.first if ports.first == ports.last else {"range": [ports.first, ports.last]}
    return match({"payload": {"protocol": ports.proto, "field": "dport"}}, value)
