"""Twins in IPv6 of what is said about IPv4."""

import pytest

from aoscore.common.errors import InvalidArgumentError
from aoscore.sm.networkmanager.ipv6 import Ipv6
from aoscore.sm.networkmanager.nft import Command, Table, ip, match, prefix

IPV6 = Ipv6("fd12:3456:789a::/96", ["10.0.0.0/8", "192.168.0.0/16"])
TABLE = Table("aos")
DROP = {"drop": None}


def twins(*commands: Command) -> list[Command]:
    return IPV6.with_twins(commands)[1:]


def test_address() -> None:
    assert IPV6.address("172.31.1.2") == "fd12:3456:789a::ac1f:102"
    assert IPV6.prefix_length(24) == 120


@pytest.mark.parametrize("text", ["", "fd12::/64", "10.0.0.0/8", "fd12:3456:789a::1/96", "fd12:3456:789a::"])
def test_what_is_no_prefix(text: str) -> None:
    with pytest.raises(InvalidArgumentError, match=r"IPv6 prefix|96 bits"):
        Ipv6(text)


def test_what_is_not_about_ipv4_has_no_twin() -> None:
    commands = [
        *TABLE.begin(),
        TABLE.add("chain", "forward", type="filter", hook="forward", prio=0, policy="drop"),
        TABLE.add("counter", "in_id", packets=0, bytes=7),
        TABLE.rule("forward", [match({"ct": {"key": "state"}}, "invalid", "in"), DROP]),
        TABLE.rule("host", [match({"payload": {"protocol": "tcp", "field": "dport"}}, {"range": [1, 2]}), DROP]),
        TABLE.delete("counter", "in_id"),
        TABLE.reset("in_id"),
    ]
    assert IPV6.with_twins(commands) == commands


def test_rules() -> None:
    field = {"payload": {"protocol": "ip6", "field": "saddr"}}
    one = TABLE.rule("instance_1", [match(ip("saddr"), "172.31.1.2"), DROP])
    assert twins(one) == [TABLE.rule("instance_1", [match(field, "fd12:3456:789a::ac1f:102"), DROP])]
    subnet = TABLE.rule("postrouting", [match(ip("saddr"), prefix("172.31.1.0/24")), {"masquerade": None}])
    whole = {"prefix": {"addr": "fd12:3456:789a::ac1f:100", "len": 120}}
    assert twins(subnet) == [TABLE.rule("postrouting", [match(field, whole), {"masquerade": None}])]
    jumps = {"vmap": {"key": ip("saddr"), "data": {"set": [["172.31.1.2", {"jump": {"target": "instance_1"}}]]}}}
    [twin] = twins(TABLE.rule("forward", [jumps]))
    assert twin["add"]["rule"]["expr"] == [
        {"vmap": {"key": field, "data": {"set": [["fd12:3456:789a::ac1f:102", {"jump": {"target": "instance_1"}}]]}}}
    ]
    ping = TABLE.rule("host", [match({"meta": {"key": "l4proto"}}, "icmp"), DROP])
    assert twins(ping) == [TABLE.rule("host", [match({"meta": {"key": "l4proto"}}, "icmpv6"), DROP])]


def test_counters_are_those_of_both() -> None:
    counted = TABLE.add("map", "in_bytes", type="ipv4_addr", map="counter")
    assert twins(counted) == [TABLE.add("map", "in_bytes6", type="ipv6_addr", map="counter")]
    blocked = TABLE.add("set", "blocked_in", type="ipv4_addr")
    assert twins(blocked) == [TABLE.add("set", "blocked_in6", type="ipv6_addr")]
    for change in (TABLE.add_elements, TABLE.delete_elements):
        one = change("in_bytes", [["172.31.1.2", "in_id"]])
        assert twins(one) == [change("in_bytes6", [["fd12:3456:789a::ac1f:102", "in_id"]])]
    public = match(ip("saddr"), {"set": [prefix("10.0.0.0/8"), prefix("192.168.0.0/16")]}, "!=")
    by_map = {"counter": {"map": {"key": ip("daddr"), "data": "@in_bytes"}}}
    [twin] = twins(TABLE.rule("forward", [public, by_map]))
    condition, counter = twin["add"]["rule"]["expr"]
    assert condition["match"]["right"] == {
        "set": ["::1", *(prefix(subnet) for subnet in ("fc00::/7", "fe80::/10", "ff00::/8"))]
    }
    assert counter["counter"]["map"]["data"] == "@in_bytes6"
