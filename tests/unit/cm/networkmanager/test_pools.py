"""Subnets, addresses, VLAN ids."""

import random
from ipaddress import IPv4Address, IPv4Network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aoscore.cm.networkmanager.pools import AddressPool, Route, SubnetPool, choose_vlan
from aoscore.cm.networkmanager.routes import parse_routes
from aoscore.common.errors import OutOfRangeError


def net(text: str) -> IPv4Network:
    return IPv4Network(text)


def test_fifteen_subnets_in_order() -> None:
    pool = SubnetPool()
    found = []
    for _ in range(15):
        subnet = pool.choose([])
        pool.take(subnet)
        found.append(str(subnet))
    assert found == [f"172.{number}.0.0/16" for number in range(17, 32)]
    with pytest.raises(OutOfRangeError, match="no available network"):
        pool.choose([])
    pool.give_back(net("172.20.0.0/16"))
    assert pool.choose([]) == net("172.20.0.0/16")


@pytest.mark.parametrize(
    ("route", "first"),
    [
        (Route(net("172.17.4.0/24")), "172.18.0.0/16"),
        (Route(net("172.16.0.0/12")), None),
        (Route(net("0.0.0.0/0"), IPv4Address("10.0.0.1")), "172.17.0.0/16"),
        (Route(net("0.0.0.0/0"), IPv4Address("172.17.0.1")), "172.18.0.0/16"),
    ],
)
def test_routes_are_respected(route: Route, first: str | None) -> None:
    if first is None:
        with pytest.raises(OutOfRangeError):
            SubnetPool().choose([route])
    else:
        assert str(SubnetPool().choose([route])) == first


def test_kernel_table() -> None:
    text = (
        "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n"
        "eth0\t00000000\t010011AC\t0003\t0\t0\t0\t00000000\t0\t0\t0\n"
        "eth0\t000011AC\t00000000\t0001\t0\t0\t0\t0000FFFF\t0\t0\t0\n"
    )
    assert parse_routes(text) == [
        Route(net("0.0.0.0/0"), IPv4Address("172.17.0.1")),
        Route(net("172.17.0.0/16")),
    ]


def test_addresses_in_order_and_returned_ones_last() -> None:
    pool = AddressPool(net("10.0.0.0/29"))
    addresses = []
    for _ in range(3):
        address = pool.choose()[0]
        pool.take(address)
        addresses.append(str(address))
    assert addresses == ["10.0.0.2", "10.0.0.3", "10.0.0.4"]
    pool.give_back(IPv4Address("10.0.0.2"))
    assert [str(one) for one in pool.choose(3)] == ["10.0.0.5", "10.0.0.6", "10.0.0.2"]
    with pytest.raises(OutOfRangeError, match="no available IP"):
        pool.choose(4)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 20)), max_size=60))
def test_no_address_is_given_twice(steps: list[tuple[bool, int]]) -> None:
    pool = AddressPool(net("10.0.0.0/28"))
    used: list[IPv4Address] = []
    for take, index in steps:
        if take and len(used) < 13:
            address = pool.choose()[0]
            assert address not in used
            assert address in net("10.0.0.0/28")
            assert address not in (IPv4Address("10.0.0.0"), IPv4Address("10.0.0.1"), IPv4Address("10.0.0.15"))
            pool.take(address)
            used.append(address)
        elif used and not take:
            pool.give_back(used.pop(index % len(used)))
    assert len(pool.choose(13 - len(used))) == 13 - len(used)


def test_vlan_ids_are_unique_and_usable() -> None:
    taken: set[int] = set()
    rng = random.Random(1)
    for _ in range(4093):
        taken.add(choose_vlan(taken, rng))
    assert taken == set(range(2, 4095))
    with pytest.raises(OutOfRangeError):
        choose_vlan(taken, rng)
