"""Messages of rtnetlink: what we write, read back; what the kernel really says of a machine's loopback link."""

import socket
import struct
import subprocess
import sys

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
    peer = netlink._read(netlink._classes().link, pair.body).get_nested(
        "IFLA_LINKINFO", "IFLA_INFO_DATA", "VETH_INFO_PEER"
    )
    inner = {name: peer.get_attr(name) for name in ("IFLA_IFNAME", "IFLA_ADDRESS", "IFLA_NET_NS_FD")}
    assert inner == {"IFLA_IFNAME": "eth0", "IFLA_ADDRESS": "02:a0:00:00:00:03", "IFLA_NET_NS_FD": 5}
    assert not peer["flags"]


def test_changes_say_only_what_is_given() -> None:
    changed = as_link(netlink.change_link(3, alias="aos", master=4))
    assert (changed.index, changed.alias, changed.master, changed.is_up) == (3, "aos", 4, False)
    assert netlink.change_link(3, up=True).body == struct.pack("=BxHiII", 0, 0, 3, 1, 1)
    assert netlink.delete_link(3).body == struct.pack("=BxHiII", 0, 0, 3, 0, 0)


def test_only_the_messages_of_the_library_are_loaded() -> None:
    """In a process of its own: others may have loaded all of it here."""
    code = (
        "import sys\n"
        "from aoscore.sm.networkmanager.netlink import Route\n"
        "with Route() as route: assert route.link('lo')\n"
        "print('pyroute2.netlink.rtnl.ifinfmsg' in sys.modules, 'pyroute2.ndb' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["True", "False"]


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
