"""Links, addresses, speeds and namespaces of instances through netlink (sm-runtime.md §6.2 to §6.4, §6.8).

Blocking; called from one worker thread, which owns the netlink socket. What happens inside a namespace happens in a
thread made for it. Every step looks at what there is and mends what is missing or wrong, so all of it can be repeated.
Links that we make carry an alias, by which leftovers are known.

A speed limit is a token bucket on each end of an instance's link: what the host end sends is the instance's download,
what the inner end sends its upload. AosCore 9.1 turns uploads around through an ifb link to shape them on the host; the
inner end needs fewer features of the kernel, lets senders wait instead of dropping what they sent, and no instance
has the capability to change it.
"""

import contextlib
import errno
import fcntl
import os
import random
import re
import socket
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from aoscore.common import linux
from aoscore.common.errors import NotFoundError, NotSupportedError, RuntimeFailure
from aoscore.sm.launcher.runtimes.base import is_instance_id
from aoscore.sm.networkmanager import netlink
from aoscore.sm.networkmanager.ipv6 import Ipv6
from aoscore.sm.networkmanager.model import (
    NETNS_DIR,
    Network,
    NetworkConfig,
    fnv1a,
    netns_path,
    parse_subnet,
    veth_name,
)
from aoscore.sm.networkmanager.netlink import Address, Link, Message, Route

ALIAS = "aos"
INSIDE = "eth0"
"""Name of the link inside an instance."""
_HAIRPIN = 1
_UP = 0x1
"""IFF_UP."""
_SIOCSIFFLAGS = 0x8914
_MIN_BURST_BYTES = 12800
_MAX_RATE_BYTES = 2**32 - 1
# What AosCore 9.1 made has no alias: it is known by name and kind, its links by the bridge they are on.
_FORMER = {
    "bridge": re.compile(r"br-[0-9a-f]{8}"),
    "vlan": re.compile(r"vlan-[0-9a-f]{8}"),
    "ifb": re.compile(r"ifb-[0-9a-f]{8}"),
}


class Inventory(msgspec.Struct, frozen=True):
    """What there is of ours: names of links, namespaces by instance id."""

    links: frozenset[str]
    namespaces: frozenset[str]


class Links:
    """The node's links. Not thread-safe: one worker thread.

    Methods that make or mend something return what they had to do, in words; an empty list means all was well.
    """

    def __init__(self, ipv6: Ipv6 | None = None) -> None:
        """`ipv6`: what gives instances an IPv6 address beside the other."""
        self._route: Route | None = None
        self._ipv6 = ipv6

    def close(self) -> None:
        """Close the netlink socket."""
        if self._route is not None:
            self._route.close()
            self._route = None

    @property
    def _host(self) -> Route:
        if self._route is None:
            self._route = Route()
        return self._route

    def ensure_bridge(self, network: Network) -> list[str]:
        """The bridge of an owner, up, with its address and no other."""
        done = []
        # A fixed address: otherwise it changes with every link that joins, and instances lose their gateway. Bridges
        # of one network on several nodes are in one Ethernet, so each node has its own.
        mac = mac_address(f"{network.network_id} {network.ip}")
        subnet = parse_subnet(network.subnet)
        with _netlink_errors(f"bridge {network.bridge}"):
            link = self._host.link(network.bridge)
            if link is None:
                self._host.do(netlink.new_bridge(network.bridge, mac))
                link = self._need(network.bridge)
                done.append("bridge")
            elif link.kind != "bridge":
                raise RuntimeFailure(f"link {network.bridge} is in the way, it is no bridge")
            _set_ipv6(network.bridge, self._ipv6 is not None)
            if link.alias != ALIAS or link.address != mac:
                self._host.do(netlink.change_link(link.index, alias=ALIAS, address=mac))
            wanted = Address(network.ip, subnet.prefixlen)
            done += _ensure_address(self._host, link.index, wanted, broadcast=str(subnet.broadcast_address))
            if not link.is_up:
                self._host.do(netlink.change_link(link.index, up=True))
                done.append("bridge up")
            if self._ipv6 is not None:
                self._host.do(netlink.put_ipv6_address(link.index, self._twin(self._ipv6, wanted)))
        return done

    @staticmethod
    def _twin(ipv6: Ipv6, address: Address) -> Address:
        return Address(ipv6.address(address.ip), ipv6.prefix_length(address.prefix_length))

    def ensure_vlan(self, network: Network) -> list[str]:
        """The VLAN that joins an owner's bridges of all nodes, on the link that has the default route.

        Raises NotFoundError while there is no default route, NotSupportedError where there can be no VLAN on its link.
        """
        name = network.vlan_if_name
        with _netlink_errors(f"VLAN {network.vlan_id} of network {network.network_id}"):
            parent, bridge = self._uplink(), self._need(network.bridge).index
            if parent is None:
                raise NotFoundError("there is no default route, whose link would carry the VLAN")
            link = self._host.link(name)
            if link is not None and (link.kind, link.parent, link.vlan_id) != ("vlan", parent, network.vlan_id):
                self._host.do(netlink.delete_link(link.index))
                link = None
            done = []
            if link is None:
                mac = mac_address(f"{name} {network.ip}")
                try:
                    self._host.do(netlink.new_vlan(name, parent, network.vlan_id, mac))
                except OSError as error:
                    if error.errno == errno.EOPNOTSUPP:
                        where = socket.if_indextoname(parent)
                        raise NotSupportedError(
                            f"link {where} can carry no VLAN, or the kernel has none (8021q)"
                        ) from error
                    raise
                link = self._need(name)
                done.append(f"VLAN {network.vlan_id}")
            self._own(link)
            done += self._enslave(link, bridge)
        return done

    def remove_link(self, name: str) -> None:
        """Delete a link; an absent one is success."""
        index = _index(name)
        if index is not None:
            with _netlink_errors(f"link {name}"):
                self._host.do(netlink.delete_link(index))

    def attach(self, instance_id: str, network: Network, ip: str, config: NetworkConfig) -> list[str]:
        """Namespace of an instance and its link to the bridge, with addresses, route and speeds.

        A namespace that is there is kept: a container may be running in it.
        """
        name, namespace = veth_name(instance_id), netns_path(instance_id)
        address = Address(ip, parse_subnet(network.subnet).prefixlen)
        done = self.ensure_namespace(instance_id)
        with _netlink_errors(f"network of instance {instance_id}"):
            bridge = _index(network.bridge)
            if bridge is None:
                raise RuntimeFailure(f"bridge {network.bridge} was made and is gone")
            is_new = bool(done)
            link = None if is_new else self._host.link(name)
            if link is not None and link.parent != linux.in_own_thread(_index_inside, namespace):
                self._host.do(netlink.delete_link(link.index))
                link = None
            if link is None:
                self._make_link(instance_id, namespace, bridge)
                index = socket.if_nametoindex(name)
                # What a queue of the new link would be is known: there is none.
                self._host.do(
                    netlink.change_link(index, alias=ALIAS, hairpin=True), *_rate(index, config.download_speed_kbit)
                )
                done.append("link")
            else:
                # AosCore 9.1 shapes uploads there; without its ifb link everything would be dropped.
                with contextlib.suppress(OSError):
                    self._host.do(netlink.delete_ingress(link.index))
                self._own(link)
                done += self._enslave(link, bridge)
                self._host.do(netlink.change_link(link.index, hairpin=True))
                _ensure_rate(self._host, link, config.download_speed_kbit)
            configure = _configure_new if is_new else _configure_inside
            done += linux.in_own_thread(configure, namespace, address, network.ip, config.upload_speed_kbit)
            if self._ipv6 is not None:
                twin, gateway = self._twin(self._ipv6, address), self._ipv6.address(network.ip)
                linux.in_own_thread(_configure_ipv6, namespace, twin, gateway)
        return done

    def ensure_namespace(self, instance_id: str) -> list[str]:
        """Namespace of an instance, empty but for a loopback link, which is up."""
        namespace = netns_path(instance_id)
        if os.path.ismount(namespace):
            return []
        self.detach(instance_id)
        with _netlink_errors(f"network namespace of instance {instance_id}"):
            _make_namespace(namespace)
        return ["namespace"]

    def detach(self, instance_id: str) -> None:
        """Remove link and namespace of an instance; repeatable."""
        self.remove_pairs([instance_id])
        self.remove_namespace(instance_id)

    def remove_pairs(self, instance_ids: Iterable[str]) -> None:
        """Delete the links of instances; absent ones are success."""
        indexes = [index for name in instance_ids if (index := _index(veth_name(name))) is not None]
        with _netlink_errors("links of instances"):
            if len(indexes) == 1:
                self._host.do(netlink.delete_link(indexes[0]))
            elif indexes:
                # The kernel waits 30 ms for its readers: per deletion, or once for a group of any size.
                group = random.randrange(1 << 30, 1 << 31)  # noqa: S311 - a number that nobody else uses
                self._host.do(*(netlink.change_link(index, group=group) for index in indexes))
                self._host.do(netlink.delete_group(group))

    def remove_namespace(self, instance_id: str) -> None:
        """Give up the namespace of an instance; an absent one is success."""
        with _netlink_errors(f"network namespace of instance {instance_id}"):
            _remove_namespace(netns_path(instance_id))

    def inventory(self) -> Inventory:
        """Links and namespaces of ours, whoever made them and when (sm-runtime.md §7, D39)."""
        with _netlink_errors("list of links"):
            links = _ours(self._host.links())
        names = NETNS_DIR.iterdir() if NETNS_DIR.is_dir() else ()
        return Inventory(frozenset(links), frozenset(path.name for path in names if is_instance_id(path.name)))

    def _make_link(self, instance_id: str, namespace: Path, bridge: int) -> None:
        fd = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
        try:
            # The same address at every start: neighbours remember it.
            mac = mac_address(instance_id)
            self._host.do(netlink.new_pair(veth_name(instance_id), bridge, INSIDE, mac, fd))
        finally:
            os.close(fd)

    def _own(self, link: Link) -> None:
        if link.alias != ALIAS:
            self._host.do(netlink.change_link(link.index, alias=ALIAS))

    def _enslave(self, link: Link, bridge: int) -> list[str]:
        done = []
        if link.master != bridge:
            self._host.do(netlink.change_link(link.index, master=bridge))
            done.append("place on bridge")
        if not link.is_up:
            self._host.do(netlink.change_link(link.index, up=True))
            done.append("link up")
        return done

    def _uplink(self) -> int | None:
        """Index of the link with the preferred default route."""
        routes = [route for route in self._host.default_routes() if route.link]
        best = min(routes, key=lambda route: route.priority, default=None)
        return best.link if best is not None else None

    def _need(self, name: str) -> Link:
        link = self._host.link(name)
        if link is None:
            raise RuntimeFailure(f"link {name} was made and is gone")
        return link


@contextlib.contextmanager
def _netlink_errors(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RuntimeFailure(f"{what}: {error.strerror or error}", error.errno or 0) from error


def _index(name: str) -> int | None:
    try:
        return socket.if_nametoindex(name)
    except OSError:
        return None


def _set_ipv6(name: str, wanted: bool) -> None:
    """Networks of instances are IPv4 (grpc.md): unless IPv6 is wanted, host and instances would reach each other by
    link-local addresses that no rule is about. A kernel without IPv6 has no such file."""
    with contextlib.suppress(FileNotFoundError):
        Path(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6").write_text("0" if wanted else "1")


def _ours(links: Iterable[Link]) -> set[str]:
    """Names of the links that are ours, also those that AosCore 9.1 made."""
    links = list(links)
    known = {link.index: link for link in links if _is_ours(link)}
    bridges = {index for index, link in known.items() if link.kind == "bridge"}
    on_bridge = [link for link in links if link.kind == "veth" and link.master in bridges]
    return {link.name for link in (*known.values(), *on_bridge)}


def _is_ours(link: Link) -> bool:
    former = _FORMER.get(link.kind)
    return link.alias == ALIAS or (former is not None and former.fullmatch(link.name) is not None)


def mac_address(text: str) -> str:
    """A locally administered address out of a name."""
    digits = fnv1a(text)
    return ":".join(["02", "a0", *(digits[index : index + 2] for index in range(0, 8, 2))])


def _ensure_address(route: Route, index: int, wanted: Address, broadcast: str = "") -> list[str]:
    """Exactly one IPv4 address on a link."""
    present = route.addresses(index)
    if present == [wanted]:
        return []
    # One that is to go may take the wanted one of the same subnet along: so all go.
    for address in present:
        with contextlib.suppress(OSError):
            route.do(netlink.delete_address(index, address))
    route.do(netlink.new_address(index, wanted, broadcast))
    return ["address"]


def _rate_bytes(kbit: int) -> int:
    return min(kbit * 1000 // 8 or 1, _MAX_RATE_BYTES)


def burst_bytes(kbit: int) -> int:
    """What may go at once at a speed: fast links send more in one turn of the timer than the least burst."""
    return max(_MIN_BURST_BYTES, _rate_bytes(kbit) // 250)


def _rate(index: int, kbit: int) -> list[Message]:
    """What limits a link that has no limit."""
    return [netlink.limit_rate(index, _rate_bytes(kbit), burst_bytes(kbit))] if kbit > 0 else []


def _ensure_rate(route: Route, link: Link, kbit: int) -> None:
    """Limit what a link sends, or see that nothing limits it."""
    if kbit <= 0 and link.queue == "tbf":
        route.do(netlink.unlimit_rate(link.index))
    # Replaced without a look at what is there: the kernel keeps a queue of the same kind and its packets.
    route.do(*_rate(link.index, kbit))


def _make_namespace(path: Path) -> None:
    _share_directory()
    path.touch(mode=0o444)
    linux.in_own_thread(_bind_new_namespace, path)


def _share_directory() -> None:
    """Make the directory a shared mount, as the ip program does when it comes first.

    Otherwise the first "ip netns add" of somebody would cover our mounts with copies that nobody removes.
    """
    NETNS_DIR.mkdir(mode=0o755, parents=True, exist_ok=True)
    try:
        linux.mount("", NETNS_DIR, "", linux.MS_SHARED | linux.MS_REC)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        linux.mount(NETNS_DIR, NETNS_DIR, "", linux.MS_BIND | linux.MS_REC)
        linux.mount("", NETNS_DIR, "", linux.MS_SHARED | linux.MS_REC)


def _bind_new_namespace(path: Path) -> None:
    linux.unshare(linux.CLONE_NEWNET)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as handle:
        fcntl.ioctl(handle, _SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", _UP))
    linux.mount("/proc/thread-self/ns/net", path, "", linux.MS_BIND)


def _remove_namespace(path: Path) -> None:
    # One mount per round: an interrupted attempt may have left more than one.
    while os.path.ismount(path):
        linux.umount(path, linux.MNT_DETACH)
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        # A copy of the mount lies hidden below: the name stays, the namespace itself is out of the way.
        if error.errno != errno.EBUSY:
            raise


def _index_inside(namespace: Path) -> int | None:
    """In a thread of its own."""
    linux.setns(namespace, linux.CLONE_NEWNET)
    return _index(INSIDE)


def _configure_new(namespace: Path, address: Address, gateway: str, upload_kbit: int) -> list[str]:
    """`_configure_inside` for a namespace that has just been made: nothing has to be looked for in it."""
    linux.setns(namespace, linux.CLONE_NEWNET)
    index = socket.if_nametoindex(INSIDE)
    with Route() as route:
        route.do(
            netlink.new_address(index, address),
            netlink.change_link(index, up=True),
            netlink.new_default_route(gateway),
            *_rate(index, upload_kbit),
        )
    return ["address", f"{INSIDE} up", "default route"]


def _configure_ipv6(namespace: Path, address: Address, gateway: str) -> None:
    """In a thread of its own; repeatable."""
    linux.setns(namespace, linux.CLONE_NEWNET)
    with Route() as route:
        index = socket.if_nametoindex(INSIDE)
        route.do(netlink.put_ipv6_address(index, address), netlink.put_ipv6_default_route(gateway))


def _configure_inside(namespace: Path, address: Address, gateway: str, upload_kbit: int) -> list[str]:
    """In a thread of its own."""
    linux.setns(namespace, linux.CLONE_NEWNET)
    done = []
    with Route() as route:
        links = {link.name: link for link in route.links()}
        inner = links[INSIDE]
        done += _ensure_address(route, inner.index, address)
        for link in (links["lo"], inner):
            if not link.is_up:
                route.do(netlink.change_link(link.index, up=True))
                done.append(f"{link.name} up")
        defaults = route.default_routes()
        if [(known.link, known.gateway) for known in defaults] != [(inner.index, gateway)]:
            route.do(*(netlink.delete_default_route(known.priority) for known in defaults))
            route.do(netlink.new_default_route(gateway))
            done.append("default route")
        _ensure_rate(route, inner, upload_kbit)
    return done
