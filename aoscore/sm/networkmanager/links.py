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
import re
import socket
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from aoscore.common import linux
from aoscore.common.errors import NotFoundError, NotSupportedError, RuntimeFailure
from aoscore.sm.launcher.runtimes.base import is_instance_id
from aoscore.sm.networkmanager.model import (
    NETNS_DIR,
    Network,
    NetworkConfig,
    fnv1a,
    netns_path,
    parse_subnet,
    veth_name,
)
from aoscore.sm.networkmanager.netlink import netlink_error, open_route

ALIAS = "aos"
INSIDE = "eth0"
"""Name of the link inside an instance."""
_HAIRPIN = 1
_UP = 0x1
"""IFF_UP."""
_SIOCSIFFLAGS = 0x8914
_MAIN_TABLE = 254
_ROOT, _ROOT_HANDLE = 0xFFFFFFFF, 0x10000
"""TC_H_ROOT, and 1: as AosCore 9.1 numbers its queue."""
_MIN_BURST_BYTES = 12800
_MAX_RATE_BYTES = 2**32 - 1
# What AosCore 9.1 made has no alias: it is known by name and kind, its links by the bridge they are on.
_FORMER = {
    "bridge": re.compile(r"br-[0-9a-f]{8}"),
    "vlan": re.compile(r"vlan-[0-9a-f]{8}"),
    "ifb": re.compile(r"ifb-[0-9a-f]{8}"),
}
_OUR_NAMES = re.compile(r"(br-|veth|vlan-|ifb-)[0-9a-f]{8}")


class Inventory(msgspec.Struct, frozen=True):
    """What there is of ours: names of links, namespaces by instance id."""

    links: frozenset[str]
    namespaces: frozenset[str]


class Links:
    """The node's links. Not thread-safe: one worker thread.

    Methods that make or mend something return what they had to do, in words; an empty list means all was well.
    """

    def __init__(self) -> None:
        self._route: Any = None

    def close(self) -> None:
        """Close the netlink socket."""
        if self._route is not None:
            self._route.close()
            self._route = None

    @property
    def _ip(self) -> Any:
        if self._route is None:
            self._route = open_route()
        return self._route

    def ensure_bridge(self, network: Network) -> list[str]:
        """The bridge of an owner, up, with its address and no other."""
        done = []
        # A fixed address: otherwise it changes with every link that joins, and instances lose their gateway. Bridges
        # of one network on several nodes are in one Ethernet, so each node has its own.
        mac = mac_address(f"{network.network_id} {network.ip}")
        subnet = parse_subnet(network.subnet)
        with _netlink_errors(f"bridge {network.bridge}"):
            link = self._link(network.bridge)
            if link is None:
                self._ip.link("add", ifname=network.bridge, kind="bridge", address=mac)
                link = self._need(network.bridge)
                done.append("bridge")
            elif _kind(link) != "bridge":
                raise RuntimeFailure(f"link {network.bridge} is in the way, it is no bridge")
            index = link["index"]
            _refuse_ipv6(network.bridge)
            if link.get_attr("IFLA_IFALIAS") != ALIAS or link.get_attr("IFLA_ADDRESS") != mac:
                self._ip.link("set", index=index, ifalias=ALIAS, address=mac)
            wanted = (network.ip, subnet.prefixlen)
            done += _ensure_address(self._ip, index, wanted, broadcast=str(subnet.broadcast_address))
            if not link["flags"] & _UP:
                self._ip.link("set", index=index, state="up")
                done.append("bridge up")
        return done

    def ensure_vlan(self, network: Network) -> list[str]:
        """The VLAN that joins an owner's bridges of all nodes, on the link that has the default route.

        Raises NotFoundError while there is no default route, NotSupportedError where there can be no VLAN on its link.
        """
        name = network.vlan_if_name
        with _netlink_errors(f"VLAN {network.vlan_id} of network {network.network_id}"):
            parent, bridge = self._uplink(), self._need(network.bridge)["index"]
            if parent is None:
                raise NotFoundError("there is no default route, whose link would carry the VLAN")
            link = self._link(name)
            if link is not None and (
                _kind(link) != "vlan"
                or link.get_attr("IFLA_LINK") != parent
                or link.get_nested("IFLA_LINKINFO", "IFLA_INFO_DATA", "IFLA_VLAN_ID") != network.vlan_id
            ):
                self._ip.link("del", index=link["index"])
                link = None
            done = []
            if link is None:
                mac = mac_address(f"{name} {network.ip}")
                try:
                    self._ip.link("add", ifname=name, kind="vlan", link=parent, vlan_id=network.vlan_id, address=mac)
                except Exception as error:
                    if getattr(error, "code", None) == errno.EOPNOTSUPP:
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
        if _index(name) is None:
            return
        with _netlink_errors(f"link {name}"):
            index = _index(name)
            if index is not None:
                self._ip.link("del", index=index)

    def attach(self, instance_id: str, network: Network, ip: str, config: NetworkConfig) -> list[str]:
        """Namespace of an instance and its link to the bridge, with addresses, route and speeds.

        A namespace that is there is kept: a container may be running in it.
        """
        name, namespace = veth_name(instance_id), netns_path(instance_id)
        done = []
        with _netlink_errors(f"network of instance {instance_id}"):
            done += self.ensure_namespace(instance_id)
            inside = None if done else linux.in_own_thread(_index_inside, namespace)
            link = self._link(name)
            if link is not None and (inside is None or link.get_attr("IFLA_LINK") != inside):
                self._ip.link("del", index=link["index"])
                link = None
            if link is None:
                self._make_link(instance_id, namespace)
                link = self._need(name)
                done.append("link")
            else:
                # AosCore 9.1 shapes uploads there; without its ifb link everything would be dropped.
                with contextlib.suppress(netlink_error()):
                    self._ip.tc("del", "ingress", link["index"])
            self._own(link)
            done += self._enslave(link, self._need(network.bridge)["index"])
            self._ip.brport("set", index=link["index"], mode=_HAIRPIN)
            _ensure_rate(self._ip, link, config.download_speed_kbit)
            address = (ip, parse_subnet(network.subnet).prefixlen)
            done += linux.in_own_thread(_configure_inside, namespace, address, network.ip, config.upload_speed_kbit)
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
        self.remove_link(veth_name(instance_id))
        _remove_namespace(netns_path(instance_id))

    def inventory(self) -> Inventory:
        """Links and namespaces of ours, whoever made them and when (sm-runtime.md §7, D39)."""
        links: set[str] = set()
        # Asked without netlink first: a node without instances need not load its library.
        if any(_OUR_NAMES.fullmatch(name) for _, name in socket.if_nameindex()):
            with _netlink_errors("list of links"):
                links = _ours(list(self._ip.get_links()))
        names = NETNS_DIR.iterdir() if NETNS_DIR.is_dir() else ()
        return Inventory(frozenset(links), frozenset(path.name for path in names if is_instance_id(path.name)))

    def _make_link(self, instance_id: str, namespace: Path) -> None:
        fd = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
        try:
            # The same address at every start: neighbours remember it.
            peer = {"ifname": INSIDE, "net_ns_fd": fd, "address": mac_address(instance_id)}
            self._ip.link("add", ifname=veth_name(instance_id), kind="veth", peer=peer)
        finally:
            os.close(fd)

    def _own(self, link: Any) -> None:
        if link.get_attr("IFLA_IFALIAS") != ALIAS:
            self._ip.link("set", index=link["index"], ifalias=ALIAS)

    def _enslave(self, link: Any, bridge: int) -> list[str]:
        done = []
        if link.get_attr("IFLA_MASTER") != bridge:
            self._ip.link("set", index=link["index"], master=bridge)
            done.append("place on bridge")
        if not link["flags"] & _UP:
            self._ip.link("set", index=link["index"], state="up")
            done.append("link up")
        return done

    def _uplink(self) -> int | None:
        """Index of the link with the preferred default route."""
        routes = [
            route for route in self._ip.get_routes(family=socket.AF_INET, table=_MAIN_TABLE) if _is_default(route)
        ]
        routes = [route for route in routes if route.get_attr("RTA_OIF")]
        best = min(routes, key=lambda route: route.get_attr("RTA_PRIORITY") or 0, default=None)
        return int(best.get_attr("RTA_OIF")) if best is not None else None

    def _link(self, name: str) -> Any:
        index = _index(name)
        return next(iter(self._ip.get_links(index)), None) if index is not None else None

    def _need(self, name: str) -> Any:
        link = self._link(name)
        if link is None:
            raise RuntimeFailure(f"link {name} was made and is gone")
        return link


@contextlib.contextmanager
def _netlink_errors(what: str) -> Any:
    try:
        yield
    except netlink_error() as error:
        raise RuntimeFailure(f"{what}: {os.strerror(error.code)}", error.code) from error
    except OSError as error:
        raise RuntimeFailure(f"{what}: {error.strerror or error}", error.errno or 0) from error


def _index(name: str) -> int | None:
    try:
        return socket.if_nametoindex(name)
    except OSError:
        return None


def _refuse_ipv6(name: str) -> None:
    """Networks of instances are IPv4 (grpc.md): without this, host and instances would reach each other by link-local
    addresses that no rule is about. A kernel without IPv6 has no such file."""
    with contextlib.suppress(FileNotFoundError):
        Path(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6").write_text("1")


def _kind(link: Any) -> str:
    return str(link.get_nested("IFLA_LINKINFO", "IFLA_INFO_KIND") or "")


def _ours(links: Iterable[Any]) -> set[str]:
    """Names of the links that are ours, also those that AosCore 9.1 made."""
    links = list(links)
    known = {link["index"]: link for link in links if _is_ours(link)}
    bridges = {index for index, link in known.items() if _kind(link) == "bridge"}
    on_bridge = [link for link in links if _kind(link) == "veth" and link.get_attr("IFLA_MASTER") in bridges]
    return {str(link.get_attr("IFLA_IFNAME")) for link in (*known.values(), *on_bridge)}


def _is_ours(link: Any) -> bool:
    former = _FORMER.get(_kind(link))
    is_former = former is not None and former.fullmatch(str(link.get_attr("IFLA_IFNAME"))) is not None
    return is_former or link.get_attr("IFLA_IFALIAS") == ALIAS


def mac_address(text: str) -> str:
    """A locally administered address out of a name."""
    digits = fnv1a(text)
    return ":".join(["02", "a0", *(digits[index : index + 2] for index in range(0, 8, 2))])


def _ensure_address(route: Any, index: int, wanted: tuple[str, int], **members: str) -> list[str]:
    """Exactly one IPv4 address on a link."""
    present = {
        (address.get_attr("IFA_LOCAL") or address.get_attr("IFA_ADDRESS"), address["prefixlen"])
        for address in route.get_addr(index=index, family=socket.AF_INET)
    }
    if present == {wanted}:
        return []
    # One that is to go may take the wanted one of the same subnet along: so all go.
    for address, prefix_length in present:
        with contextlib.suppress(netlink_error()):
            route.addr("del", index=index, address=address, prefixlen=prefix_length)
    route.addr("add", index=index, address=wanted[0], prefixlen=wanted[1], **members)
    return ["address"]


def _rate_bytes(kbit: int) -> int:
    return min(kbit * 1000 // 8 or 1, _MAX_RATE_BYTES)


def burst_bytes(kbit: int) -> int:
    """What may go at once at a speed: fast links send more in one turn of the timer than the least burst."""
    return max(_MIN_BURST_BYTES, _rate_bytes(kbit) // 250)


def _ensure_rate(route: Any, link: Any, kbit: int) -> None:
    """Limit what a link sends, or see that nothing limits it."""
    index = link["index"]
    if kbit > 0:
        rate, burst = _rate_bytes(kbit), burst_bytes(kbit)
        # Replaced without a look at what is there: the kernel keeps a queue of the same kind and its packets.
        route.tc("replace", "tbf", index, handle=_ROOT_HANDLE, rate=rate, burst=burst, limit=4 * burst)
    elif link.get_attr("IFLA_QDISC") == "tbf":
        route.tc("del", index=index, parent=_ROOT, handle=_ROOT_HANDLE)


def _is_default(route: Any) -> bool:
    return route["dst_len"] == 0 and route.get_attr("RTA_DST") is None


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


def _configure_inside(namespace: Path, address: tuple[str, int], gateway: str, upload_kbit: int) -> list[str]:
    """In a thread of its own."""
    linux.setns(namespace, linux.CLONE_NEWNET)
    done = []
    with contextlib.closing(open_route()) as route:
        links = {link.get_attr("IFLA_IFNAME"): link for link in route.get_links()}
        inner = links[INSIDE]
        index = inner["index"]
        done += _ensure_address(route, index, address)
        for link in (links["lo"], inner):
            if not link["flags"] & _UP:
                route.link("set", index=link["index"], state="up")
                done.append(f"{link.get_attr('IFLA_IFNAME')} up")
        defaults = [known for known in route.get_routes(family=socket.AF_INET, table=_MAIN_TABLE) if _is_default(known)]
        if [(known.get_attr("RTA_OIF"), known.get_attr("RTA_GATEWAY")) for known in defaults] != [(index, gateway)]:
            for known in defaults:
                route.route("del", dst="default", priority=known.get_attr("RTA_PRIORITY") or 0)
            route.route("add", dst="default", gateway=gateway)
            done.append("default route")
        _ensure_rate(route, inner, upload_kbit)
    return done
