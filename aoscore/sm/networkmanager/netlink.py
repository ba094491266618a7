"""rtnetlink (rtnetlink(7), tc(8)): links, addresses, routes and queues, as far as instance networks need them.

pyroute2 knows how messages look; sending them is done here, in batches: one system call, one answer per message. The
`IPRoute` of pyroute2 takes ten times the CPU time per instance. Of the package only the messages are loaded: importing
`pyroute2` would load all of its parts, its network database among them, 8 MB instead of 3. Tested with 0.7.10 and the
newest.

Blocking, but never for long: the kernel answers within the call.
"""

import errno
import functools
import importlib.util
import os
import socket
import struct
import sys
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeAlias

import msgspec

_HEADER = struct.Struct("=IHHII")
_CODE = struct.Struct("=i")
_BUFFER_BYTES = 1 << 17
_BATCH_BYTES = 32 * 1024
_PACKAGE = "pyroute2"
# Making a message takes longer than sending it, and inside their namespaces instances differ in their address alone.
_KEPT_MESSAGES = 64

# Messages and their flags.
_ERROR, _DONE = 2, 3
_NEW_LINK, _DELETE_LINK, _GET_LINK = 16, 17, 18
_NEW_ADDRESS, _DELETE_ADDRESS, _GET_ADDRESS = 20, 21, 22
_NEW_ROUTE, _DELETE_ROUTE, _GET_ROUTE = 24, 25, 26
_NEW_QUEUE, _DELETE_QUEUE = 36, 37
_REQUEST, _ACKNOWLEDGE, _DUMP, _REPLACE, _EXCLUSIVE, _CREATE = 0x1, 0x4, 0x300, 0x100, 0x200, 0x400

_UP = 1
_HAIRPIN = 1
_NO_DETECTION = 0x02  # IFA_F_NODAD
_MAIN_TABLE, _PROTOCOL_BOOT, _UNICAST, _SCOPE_ANY = 254, 3, 1, 255
_ROOT, _INGRESS, _FIRST_HANDLE, _INGRESS_HANDLE = 0xFFFFFFFF, 0xFFFFFFF1, 0x10000, 0xFFFF0000

Attributes: TypeAlias = list[tuple[str, Any]]


class Link(msgspec.Struct, frozen=True):
    """A link as the kernel describes it; 0 and empty texts for what it does not have."""

    index: int
    name: str
    is_up: bool
    kind: str = ""
    alias: str = ""
    address: str = ""
    master: int = 0
    parent: int = 0
    """Of a VLAN its carrier; of one end of a pair the other, by its index in its own namespace."""
    vlan_id: int = 0
    queue: str = ""


class Address(msgspec.Struct, frozen=True):
    """An address of a link."""

    ip: str
    prefix_length: int


class DefaultRoute(msgspec.Struct, frozen=True):
    """A default route of the main table."""

    link: int
    gateway: str
    priority: int = 0


class Message(msgspec.Struct, frozen=True):
    """A request to the kernel, without its number."""

    kind: int
    flags: int
    body: bytes


class Route:
    """A socket in the network namespace of the thread that makes it. A context manager; not thread-safe."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        self._socket.bind((0, 0))
        self._number = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def do(self, *messages: Message) -> None:
        """Have the kernel do all, in order. Raises OSError with the first refusal, after trying the others too."""
        failed = 0
        waiting = list(messages)
        while waiting:
            batch, numbers = bytearray(), set()
            while waiting and (not batch or len(batch) + len(waiting[0].body) < _BATCH_BYTES):
                batch += self._numbered(waiting.pop(0), _ACKNOWLEDGE)
                numbers.add(self._number)
            self._socket.send(batch)
            while numbers:
                for kind, number, body in self._receive():
                    if kind == _ERROR and number in numbers:
                        numbers.remove(number)
                        failed = failed or -int(_CODE.unpack_from(body)[0])
        if failed:
            raise OSError(failed, os.strerror(failed))

    def links(self) -> list[Link]:
        """All links."""
        return [_link(body) for body in self._dump(_GET_LINK, _body(_classes().link, {}, []))]

    def link(self, name: str) -> Link | None:
        """The link of that name; None when there is none."""
        body = _body(_classes().link, {}, [("IFLA_IFNAME", name)])
        try:
            _, answer = next(self._answers(self._send(Message(_GET_LINK, _REQUEST, body))))
        except OSError as error:
            if error.errno == errno.ENODEV:
                return None
            raise
        return _link(answer)

    def addresses(self, index: int) -> list[Address]:
        """IPv4 addresses of a link."""
        kind = _classes().address
        found = (_read(kind, body) for body in self._dump(_GET_ADDRESS, _body(kind, {"family": socket.AF_INET}, [])))
        return [
            Address(one.get_attr("IFA_LOCAL") or one.get_attr("IFA_ADDRESS"), one["prefixlen"])
            for one in found
            if one["index"] == index
        ]

    def default_routes(self) -> list[DefaultRoute]:
        """IPv4 default routes of the main table."""
        kind = _classes().route
        found = (_read(kind, body) for body in self._dump(_GET_ROUTE, _body(kind, {"family": socket.AF_INET}, [])))
        return [
            DefaultRoute(
                one.get_attr("RTA_OIF") or 0, one.get_attr("RTA_GATEWAY") or "", one.get_attr("RTA_PRIORITY") or 0
            )
            for one in found
            if one["dst_len"] == 0 and one["table"] == _MAIN_TABLE and one.get_attr("RTA_DST") is None
        ]

    def _dump(self, kind: int, body: bytes) -> Iterator[bytes]:
        """Bodies of a list."""
        for answer, content in self._answers(self._send(Message(kind, _REQUEST | _DUMP, body))):
            if answer == _DONE:
                return
            yield content

    def _answers(self, number: int) -> Iterator[tuple[int, bytes]]:
        """Kind and body of each answer to a request, without end. Raises OSError for a refusal."""
        while True:
            for kind, answered, body in self._receive():
                if answered != number:
                    continue
                if kind == _ERROR:
                    code = -int(_CODE.unpack_from(body)[0])
                    raise OSError(code, os.strerror(code))
                yield kind, body

    def _send(self, message: Message) -> int:
        self._socket.send(self._numbered(message, 0))
        return self._number

    def _numbered(self, message: Message, flags: int) -> bytes:
        self._number += 1
        size = _HEADER.size + len(message.body)
        return _HEADER.pack(size, message.kind, message.flags | flags, self._number, 0) + message.body

    def _receive(self) -> Iterator[tuple[int, int, bytes]]:
        """Kind, number and body of each message of one datagram."""
        data = self._socket.recv(_BUFFER_BYTES)
        at = 0
        while at < len(data):
            size, kind, _, number, _ = _HEADER.unpack_from(data, at)
            yield kind, number, data[at + _HEADER.size : at + size]
            at += (size + 3) & ~3


# What can be asked for.


def new_bridge(name: str, address: str) -> Message:
    """Make a bridge with a fixed link address."""
    info = _nested(("IFLA_INFO_KIND", "bridge"))
    return _new_link([("IFLA_IFNAME", name), ("IFLA_ADDRESS", address), ("IFLA_LINKINFO", info)])


def new_vlan(name: str, parent: int, vlan_id: int, address: str) -> Message:
    """Make a VLAN link on another."""
    info = _nested(("IFLA_INFO_KIND", "vlan"), ("IFLA_INFO_DATA", _nested(("IFLA_VLAN_ID", vlan_id))))
    return _new_link([("IFLA_IFNAME", name), ("IFLA_LINK", parent), ("IFLA_ADDRESS", address), ("IFLA_LINKINFO", info)])


def new_pair(name: str, bridge: int, peer: str, peer_address: str, namespace_fd: int) -> Message:
    """Make a pair of links: one on a bridge of ours and up, its peer in another namespace and down, as it must be."""
    inner = _nested(("IFLA_IFNAME", peer), ("IFLA_ADDRESS", peer_address), ("IFLA_NET_NS_FD", namespace_fd))
    info = _nested(("IFLA_INFO_KIND", "veth"), ("IFLA_INFO_DATA", _nested(("VETH_INFO_PEER", inner))))
    return _new_link([("IFLA_IFNAME", name), ("IFLA_MASTER", bridge), ("IFLA_LINKINFO", info)], flags=_UP)


def _new_link(attributes: Attributes, flags: int = 0) -> Message:
    body = _body(_classes().link, {"flags": flags, "change": flags}, attributes)
    return Message(_NEW_LINK, _REQUEST | _CREATE | _EXCLUSIVE, body)


@functools.lru_cache(_KEPT_MESSAGES)
def change_link(
    index: int = 0,
    *,
    name: str = "",
    up: bool = False,
    alias: str = "",
    address: str = "",
    master: int = 0,
    hairpin: bool = False,
    group: int = 0,
) -> Message:
    """Change what is given of a link, known by index or name."""
    attributes: Attributes = [
        (attribute, value)
        for attribute, value in (
            ("IFLA_IFNAME", name),
            ("IFLA_IFALIAS", alias),
            ("IFLA_ADDRESS", address),
            ("IFLA_MASTER", master),
            ("IFLA_GROUP", group),
        )
        if value
    ]
    if hairpin:
        port = _nested(("IFLA_BRPORT_MODE", _HAIRPIN))
        info = _nested(("IFLA_INFO_SLAVE_KIND", "bridge"), ("IFLA_INFO_SLAVE_DATA", port))
        attributes.append(("IFLA_LINKINFO", info))
    flags = _UP if up else 0
    body = _body(_classes().link, {"index": index, "flags": flags, "change": flags}, attributes)
    return Message(_NEW_LINK, _REQUEST, body)


def delete_link(index: int) -> Message:
    """Delete a link, and the other end of a pair with it."""
    return Message(_DELETE_LINK, _REQUEST, _body(_classes().link, {"index": index}, []))


def delete_group(group: int) -> Message:
    """Delete all links of a group at once: the kernel waits for its readers once, not once per link."""
    return Message(_DELETE_LINK, _REQUEST, _body(_classes().link, {}, [("IFLA_GROUP", group)]))


def new_address(index: int, address: Address, broadcast: str = "") -> Message:
    """Give a link an IPv4 address."""
    attributes: Attributes = [("IFA_LOCAL", address.ip), ("IFA_ADDRESS", address.ip)]
    if broadcast:
        attributes.append(("IFA_BROADCAST", broadcast))
    return Message(_NEW_ADDRESS, _REQUEST | _CREATE | _EXCLUSIVE, _address(index, address, attributes))


def put_ipv6_address(index: int, address: Address) -> Message:
    """See that a link has an IPv6 address; at once, since nobody else can have it."""
    fields = {"family": socket.AF_INET6, "prefixlen": address.prefix_length, "index": index, "flags": _NO_DETECTION}
    body = _body(_classes().address, fields, [("IFA_ADDRESS", address.ip)])
    return Message(_NEW_ADDRESS, _REQUEST | _CREATE | _REPLACE, body)


@functools.lru_cache(_KEPT_MESSAGES)
def put_ipv6_default_route(gateway: str) -> Message:
    """See that there is an IPv6 default route."""
    fields = {"family": socket.AF_INET6, "table": _MAIN_TABLE, "proto": _PROTOCOL_BOOT, "type": _UNICAST}
    body = _body(_classes().route, fields, [("RTA_GATEWAY", gateway)])
    return Message(_NEW_ROUTE, _REQUEST | _CREATE | _REPLACE, body)


def delete_address(index: int, address: Address) -> Message:
    """Take an address away from a link."""
    return Message(_DELETE_ADDRESS, _REQUEST, _address(index, address, [("IFA_LOCAL", address.ip)]))


def _address(index: int, address: Address, attributes: Attributes) -> bytes:
    fields = {"family": socket.AF_INET, "prefixlen": address.prefix_length, "index": index}
    return _body(_classes().address, fields, attributes)


@functools.lru_cache(_KEPT_MESSAGES)
def new_default_route(gateway: str) -> Message:
    """A default route in the main table."""
    fields = {"family": socket.AF_INET, "table": _MAIN_TABLE, "proto": _PROTOCOL_BOOT, "type": _UNICAST}
    body = _body(_classes().route, fields, [("RTA_GATEWAY", gateway)])
    return Message(_NEW_ROUTE, _REQUEST | _CREATE | _EXCLUSIVE, body)


def delete_default_route(priority: int) -> Message:
    """Delete the default route of that priority."""
    fields = {"family": socket.AF_INET, "table": _MAIN_TABLE, "scope": _SCOPE_ANY}
    body = _body(_classes().route, fields, [("RTA_PRIORITY", priority)] if priority else [])
    return Message(_DELETE_ROUTE, _REQUEST, body)


def limit_rate(index: int, rate_bytes: int, burst_bytes: int) -> Message:
    """A token bucket as root queue of a link; one that is there is changed and keeps its packets.

    `rate_bytes`: bytes per second; `burst_bytes`: what may go at once.
    """
    options = _classes().tbf_parameters({"rate": rate_bytes, "burst": burst_bytes, "limit": 4 * burst_bytes})
    fields = {"index": index, "handle": _FIRST_HANDLE, "parent": _ROOT}
    body = _body(_classes().queue, fields, [("TCA_KIND", "tbf"), ("TCA_OPTIONS", options)])
    return Message(_NEW_QUEUE, _REQUEST | _CREATE | _REPLACE, body)


def unlimit_rate(index: int) -> Message:
    """Remove the token bucket."""
    fields = {"index": index, "handle": _FIRST_HANDLE, "parent": _ROOT}
    return Message(_DELETE_QUEUE, _REQUEST, _body(_classes().queue, fields, []))


def delete_ingress(index: int) -> Message:
    """Remove what handles arriving packets of a link."""
    fields = {"index": index, "handle": _INGRESS_HANDLE, "parent": _INGRESS}
    return Message(_DELETE_QUEUE, _REQUEST, _body(_classes().queue, fields, [("TCA_KIND", "ingress")]))


# Messages as pyroute2 writes and reads them.


class _Classes(NamedTuple):
    link: Any
    address: Any
    route: Any
    queue: Any
    tbf_parameters: Callable[[dict[str, int]], Any]


@functools.cache
def _classes() -> _Classes:
    # Imported on use: it takes time and memory that a node without instances can save.
    if _PACKAGE not in sys.modules:
        # Entered without running its `__init__`, which would load everything.
        spec = importlib.util.find_spec(_PACKAGE)
        if spec is None:
            raise ModuleNotFoundError(f"no module named {_PACKAGE!r}", name=_PACKAGE)
        sys.modules[_PACKAGE] = importlib.util.module_from_spec(spec)
    from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
    from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg
    from pyroute2.netlink.rtnl.rtmsg import rtmsg
    from pyroute2.netlink.rtnl.tcmsg import sched_tbf, tcmsg

    return _Classes(ifinfmsg, ifaddrmsg, rtmsg, tcmsg, sched_tbf.get_parameters)


def _nested(*attributes: tuple[str, Any]) -> dict[str, Attributes]:
    return {"attrs": list(attributes)}


def _body(kind: Any, fields: Mapping[str, int], attributes: Attributes) -> bytes:
    """A message without its header."""
    message = kind()
    for name, value in fields.items():
        message[name] = value
    message["attrs"] = attributes
    message.encode()
    return bytes(message.data[_HEADER.size :])


def _read(kind: Any, body: bytes) -> Any:
    message = kind(_HEADER.pack(_HEADER.size + len(body), 0, 0, 0, 0) + body)
    message.decode()
    return message


def _link(body: bytes) -> Link:
    message = _read(_classes().link, body)
    kind = message.get_nested("IFLA_LINKINFO", "IFLA_INFO_KIND") or ""
    vlan = ("IFLA_LINKINFO", "IFLA_INFO_DATA", "IFLA_VLAN_ID")
    return Link(
        index=message["index"],
        name=message.get_attr("IFLA_IFNAME") or "",
        is_up=bool(message["flags"] & _UP),
        kind=kind,
        alias=message.get_attr("IFLA_IFALIAS") or "",
        address=message.get_attr("IFLA_ADDRESS") or "",
        master=message.get_attr("IFLA_MASTER") or 0,
        parent=message.get_attr("IFLA_LINK") or 0,
        vlan_id=message.get_nested(*vlan) or 0 if kind == "vlan" else 0,
        queue=message.get_attr("IFLA_QDISC") or "",
    )
