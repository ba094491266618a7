"""Links, addresses and namespaces of instances through netlink (sm-runtime.md §6.2 to §6.4).

Blocking; called from one worker thread, which owns the netlink socket. What happens inside a namespace happens in a
thread made for it. Every step looks at what there is and does what is missing, so all of it can be repeated.
Links that we make carry an alias, by which leftovers are known.
"""

import contextlib
import errno
import logging
import os
import re
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from aoscore.common import linux
from aoscore.common.errors import RuntimeFailure
from aoscore.sm.launcher.runtimes.base import is_instance_id
from aoscore.sm.networkmanager.model import NETNS_DIR, Network, fnv1a, netns_path, parse_subnet, veth_name

_log = logging.getLogger(__name__)

ALIAS = "aos"
_INSIDE = "eth0"
_HAIRPIN = 1
_OUR_NAMES = re.compile(r"(br-|veth)[0-9a-f]{8}")


class Inventory(msgspec.Struct, frozen=True):
    """What there is of ours: link names by alias, namespaces by instance id."""

    links: frozenset[str]
    namespaces: frozenset[str]


class Links:
    """The node's links. Not thread-safe: one worker thread."""

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
            self._route = _open_route()
        return self._route

    def ensure_bridge(self, network: Network) -> None:
        """The bridge of an owner, up, with its address."""
        with _netlink_errors(f"bridge {network.bridge}"):
            index = self._index(network.bridge)
            if index is None:
                # A fixed address: otherwise it changes with every link that joins, and instances lose their gateway.
                self._ip.link("add", ifname=network.bridge, kind="bridge", address=_mac(network.network_id))
                index = self._need(network.bridge)
                self._ip.link("set", index=index, ifalias=ALIAS)
            subnet = parse_subnet(network.subnet)
            if (network.ip, subnet.prefixlen) not in self._addresses(index):
                self._ip.addr(
                    "add",
                    index=index,
                    address=network.ip,
                    prefixlen=subnet.prefixlen,
                    broadcast=str(subnet.broadcast_address),
                )
            self._ip.link("set", index=index, state="up")

    def remove_link(self, name: str) -> None:
        """Delete a link; an absent one is success."""
        if name not in {known for _, known in socket.if_nameindex()}:
            return
        with _netlink_errors(f"link {name}"):
            index = self._index(name)
            if index is not None:
                self._ip.link("del", index=index)

    def attach(self, instance_id: str, network: Network, ip: str) -> str:
        """Namespace and link of an instance on its bridge; returns the name of the host end."""
        name = veth_name(instance_id)
        if self.is_attached(instance_id, network, ip):
            return name
        self.detach(instance_id)
        with _netlink_errors(f"network of instance {instance_id}"):
            namespace = _make_namespace(instance_id)
            fd = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
            try:
                # The same address at every start: neighbours remember it.
                peer = {"ifname": _INSIDE, "net_ns_fd": fd, "address": _mac(instance_id)}
                self._ip.link("add", ifname=name, kind="veth", peer=peer)
            finally:
                os.close(fd)
            index, bridge = self._need(name), self._need(network.bridge)
            self._ip.link("set", index=index, ifalias=ALIAS)
            self._ip.link("set", index=index, master=bridge)
            self._ip.brport("set", index=index, mode=_HAIRPIN)
            self._ip.link("set", index=index, state="up")
            prefix_length = parse_subnet(network.subnet).prefixlen
            linux.in_own_thread(_configure_inside, namespace, ip, prefix_length, network.ip)
        return name

    def is_attached(self, instance_id: str, network: Network, ip: str) -> bool:
        """Whether link and namespace are complete and on the right bridge."""
        namespace = netns_path(instance_id)
        if not os.path.ismount(namespace):
            return False
        with _netlink_errors(f"network of instance {instance_id}"):
            bridge = self._index(network.bridge)
            found = (
                list(self._ip.get_links(ifname=veth_name(instance_id))) if self._index(veth_name(instance_id)) else []
            )
            if bridge is None or not found or found[0].get_attr("IFLA_MASTER") != bridge:
                return False
            return linux.in_own_thread(_is_configured_inside, namespace, ip)

    def detach(self, instance_id: str) -> None:
        """Remove link and namespace of an instance; repeatable."""
        self.remove_link(veth_name(instance_id))
        _remove_namespace(netns_path(instance_id))

    def inventory(self) -> Inventory:
        """Links and namespaces of ours, whoever made them and when."""
        links: frozenset[str] = frozenset()
        # Asked without netlink first: a node without instances need not load its library.
        if any(_OUR_NAMES.fullmatch(name) for _, name in socket.if_nameindex()):
            with _netlink_errors("list of links"):
                links = frozenset(
                    str(link.get_attr("IFLA_IFNAME"))
                    for link in self._ip.get_links()
                    if link.get_attr("IFLA_IFALIAS") == ALIAS
                )
        names = NETNS_DIR.iterdir() if NETNS_DIR.is_dir() else ()
        return Inventory(links, frozenset(path.name for path in names if is_instance_id(path.name)))

    def _index(self, name: str) -> int | None:
        found = self._ip.link_lookup(ifname=name)
        return int(found[0]) if found else None

    def _need(self, name: str) -> int:
        index = self._index(name)
        if index is None:
            raise RuntimeFailure(f"link {name} was made and is gone")
        return index

    def _addresses(self, index: int) -> set[tuple[str, int]]:
        addresses: Iterable[Any] = self._ip.get_addr(index=index, family=socket.AF_INET)
        return {(address.get_attr("IFA_ADDRESS"), address["prefixlen"]) for address in addresses}


@contextlib.contextmanager
def _netlink_errors(what: str) -> Any:
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        yield
    except NetlinkError as error:
        raise RuntimeFailure(f"{what}: {os.strerror(error.code)}", error.code) from error
    except OSError as error:
        raise RuntimeFailure(f"{what}: {error.strerror or error}", error.errno or 0) from error


def _open_route() -> Any:
    # Imported on use: it takes time and memory that a node without instances can save.
    from pyroute2 import IPRoute

    return IPRoute()


def _mac(text: str) -> str:
    """A locally administered address out of a name."""
    digits = fnv1a(text)
    return ":".join(["02", "a0", *(digits[index : index + 2] for index in range(0, 8, 2))])


def _make_namespace(instance_id: str) -> Path:
    _share_directory()
    path = netns_path(instance_id)
    path.touch(mode=0o444)
    linux.in_own_thread(_bind_new_namespace, path)
    return path


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


def _configure_inside(namespace: Path, ip: str, prefix_length: int, gateway: str) -> None:
    """In a thread of its own."""
    linux.setns(namespace, linux.CLONE_NEWNET)
    with contextlib.closing(_open_route()) as route:
        route.link("set", index=route.link_lookup(ifname="lo")[0], state="up")
        index = route.link_lookup(ifname=_INSIDE)[0]
        route.addr("add", index=index, address=ip, prefixlen=prefix_length)
        route.link("set", index=index, state="up")
        route.route("add", dst="default", gateway=gateway)


def _is_configured_inside(namespace: Path, ip: str) -> bool:
    """In a thread of its own."""
    linux.setns(namespace, linux.CLONE_NEWNET)
    with contextlib.closing(_open_route()) as route:
        found = route.link_lookup(ifname=_INSIDE)
        addresses = route.get_addr(index=found[0], family=socket.AF_INET) if found else ()
        return any(address.get_attr("IFA_ADDRESS") == ip for address in addresses)
