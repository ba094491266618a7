"""Messages of rtnetlink: what we write, read back; what the kernel really says of a machine's loopback link."""

import socket
import struct

import pytest

from aoscore.sm.networkmanager import netlink
from aoscore.sm.networkmanager.netlink import Address, Link, Message, Route


def as_link(message: Message) -> Link:
    """A request for a new link, read as if the kernel described it."""
    return netlink._link(message.body)


def test_new_links() -> None:
    bridge = as_link(netlink.new_bridge("br-1", "02:a0:00:00:00:01"))
    assert (bridge.name, bridge.kind, bridge.address, bridge.is_up) == ("br-1", "bridge", "02:a0:00:00:00:01", False)
    vlan = as_link(netlink.new_vlan("vlan-1", 7, 4094, "02:a0:00:00:00:02"))
    assert (vlan.kind, vlan.parent, vlan.vlan_id) == ("vlan", 7, 4094)
    pair = netlink.new_pair("veth1", 9, "eth0", "02:a0:00:00:00:03", 5)
    assert (as_link(pair).kind, as_link(pair).master, as_link(pair).is_up) == ("veth", 9, True)
    info = netlink._decoded(netlink._decoded(pair.body[16:])[18])
    peer = netlink._decoded(info[2])[1]
    inner = netlink._link(peer)
    assert (inner.name, inner.address, inner.is_up) == ("eth0", "02:a0:00:00:00:03", False)
    assert netlink._decoded(peer[16:])[28] == struct.pack("=I", 5)


def test_changes_say_only_what_is_given() -> None:
    changed = as_link(netlink.change_link(3, alias="aos", master=4))
    assert (changed.index, changed.alias, changed.master, changed.is_up) == (3, "aos", 4, False)
    assert netlink.change_link(3, up=True).body == struct.pack("=BxHiII", 0, 0, 3, 1, 1)
    assert netlink.delete_link(3).body == struct.pack("=BxHiII", 0, 0, 3, 0, 0)


def test_attributes_are_padded_and_nested() -> None:
    data = netlink._encoded({1: "ab", 2: {3: 7}, 4: b""})
    assert len(data) % 4 == 0
    outer = netlink._decoded(data)
    assert outer[1] == b"ab\0" and outer[4] == b""
    assert netlink._decoded(outer[2]) == {3: struct.pack("=I", 7)}
    # What is cut off or says that it has no size ends the reading, and never loops.
    assert netlink._decoded(struct.pack("=HH", 0, 9) + struct.pack("=HH", 400, 1) + b"x") == {9: b"", 1: b"x"}


def test_the_loopback_link() -> None:
    with Route() as route:
        links = {link.name: link for link in route.links()}
        lo = route.link("lo")
        assert lo is not None and lo == links["lo"]
        assert (lo.index, lo.address, lo.kind) == (socket.if_nametoindex("lo"), "00:00:00:00:00:00", "")
        if lo.is_up:
            assert Address("127.0.0.1", 8) in route.addresses(lo.index)
        assert route.link("no-such-link") is None
        for default in route.default_routes():
            assert socket.if_indextoname(default.link)


def test_a_refusal_is_an_error_with_the_kernels_number() -> None:
    with Route() as route:
        with pytest.raises(OSError, match="No such device") as caught:
            route.do(netlink.delete_link(2**30))
        assert caught.value.errno == 19
        # The others are tried, and the socket is good for more.
        with pytest.raises(OSError, match="No such device"):
            route.do(*(netlink.delete_link(2**30 + number) for number in range(2000)))
        assert route.link("lo") is not None
