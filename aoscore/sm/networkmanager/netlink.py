"""rtnetlink (rtnetlink(7), tc(8)): links, addresses, routes and queues, as far as instance networks need them.

pyroute2 does all of this and more; at the scale of a node it costs ten times the CPU time per instance and 8 MB of
memory, both measured, which is why it is not used. Messages go out in batches: one system call, one answer per message.

What the kernel tells is given as values of attributes by number; a name here is that of the kernel's header without its
prefix. Blocking, but never for long: the kernel answers within the call.
"""

import errno
import os
import socket
import struct
import sys
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Self, TypeAlias

import msgspec

AttributeValue: TypeAlias = "bytes | str | int | Mapping[int, AttributeValue]"
"""Integers are 32 bits, text ends with a zero byte, mappings are nested attributes."""
Attributes: TypeAlias = Mapping[int, AttributeValue]

_HEADER = struct.Struct("=IHHII")
_ATTRIBUTE = struct.Struct("=HH")
_LINK = struct.Struct("=BxHiII")
_ADDRESS = struct.Struct("=BBBBI")
_ROUTE = struct.Struct("=BBBBBBBBI")
_QUEUE = struct.Struct("=BxxxiIII")
_CODE = struct.Struct("=i")
_RATE = struct.Struct("=BBHhHI")
_NESTED = 0x8000
_TYPE_MASK = 0x3FFF
_BUFFER_BYTES = 1 << 17
_BATCH_BYTES = 32 * 1024

# Messages and their flags.
_ERROR, _DONE = 2, 3
_NEW_LINK, _DELETE_LINK, _GET_LINK = 16, 17, 18
_NEW_ADDRESS, _DELETE_ADDRESS, _GET_ADDRESS = 20, 21, 22
_NEW_ROUTE, _DELETE_ROUTE, _GET_ROUTE = 24, 25, 26
_NEW_QUEUE, _DELETE_QUEUE = 36, 37
_REQUEST, _ACKNOWLEDGE, _DUMP, _REPLACE, _EXCLUSIVE, _CREATE = 0x1, 0x4, 0x300, 0x100, 0x200, 0x400

# Attributes of links.
_ADDRESS_OF_LINK, _NAME, _PARENT, _QDISC, _MASTER = 1, 3, 5, 6, 10
_LINK_INFO, _ALIAS, _GROUP, _NAMESPACE_FD = 18, 20, 27, 28
_KIND, _DATA, _PORT_KIND, _PORT_DATA = 1, 2, 4, 5
_VLAN_ID, _VETH_PEER, _PORT_HAIRPIN = 1, 1, 4
_UP = 1

_LOCAL_ADDRESS, _ADDRESS_ITSELF, _BROADCAST = 2, 1, 4
_DESTINATION, _OUT_LINK, _GATEWAY, _PRIORITY = 1, 4, 5, 6
_MAIN_TABLE, _PROTOCOL_BOOT, _UNICAST, _SCOPE_ANY = 254, 3, 1, 255
_QUEUE_KIND, _QUEUE_OPTIONS = 1, 2
_TBF_PARAMETERS, _TBF_BURST = 1, 6
_ETHERNET = 1
_ROOT, _INGRESS, _FIRST_HANDLE = 0xFFFFFFFF, 0xFFFFFFF1, 0x10000


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
    """An IPv4 address of a link."""

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
        return [_link(body) for body in self._dump(_GET_LINK, _LINK.pack(0, 0, 0, 0, 0))]

    def link(self, name: str) -> Link | None:
        """The link of that name; None when there is none."""
        body = _LINK.pack(0, 0, 0, 0, 0) + _encoded({_NAME: name})
        try:
            _, answer = next(self._answers(self._send(Message(_GET_LINK, _REQUEST, body))))
        except OSError as error:
            if error.errno == errno.ENODEV:
                return None
            raise
        return _link(answer)

    def addresses(self, index: int) -> list[Address]:
        """IPv4 addresses of a link."""
        found = []
        for body in self._dump(_GET_ADDRESS, _ADDRESS.pack(socket.AF_INET, 0, 0, 0, 0)):
            _, length, _, _, owner = _ADDRESS.unpack_from(body)
            if owner == index:
                attributes = _decoded(body[_ADDRESS.size :])
                ip = attributes.get(_LOCAL_ADDRESS) or attributes[_ADDRESS_ITSELF]
                found.append(Address(socket.inet_ntoa(ip), length))
        return found

    def default_routes(self) -> list[DefaultRoute]:
        """IPv4 default routes of the main table."""
        found = []
        for body in self._dump(_GET_ROUTE, _ROUTE.pack(socket.AF_INET, 0, 0, 0, 0, 0, 0, 0, 0)):
            _, length, _, _, table, *_ = _ROUTE.unpack_from(body)
            attributes = _decoded(body[_ROUTE.size :])
            if length == 0 and table == _MAIN_TABLE and _DESTINATION not in attributes:
                gateway = attributes.get(_GATEWAY)
                found.append(
                    DefaultRoute(
                        _number(attributes, _OUT_LINK),
                        socket.inet_ntoa(gateway) if gateway else "",
                        _number(attributes, _PRIORITY),
                    )
                )
        return found

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
    return _new_link({_NAME: name, _ADDRESS_OF_LINK: _mac(address), _LINK_INFO: {_KIND: "bridge"}})


def new_vlan(name: str, parent: int, vlan_id: int, address: str) -> Message:
    """Make a VLAN link on another."""
    data: Attributes = {_VLAN_ID: struct.pack("=H", vlan_id)}
    info: Attributes = {_KIND: "vlan", _DATA: data}
    return _new_link({_NAME: name, _PARENT: parent, _ADDRESS_OF_LINK: _mac(address), _LINK_INFO: info})


def new_pair(name: str, bridge: int, peer: str, peer_address: str, namespace_fd: int) -> Message:
    """Make a pair of links: one on a bridge of ours and up, its peer in another namespace and down, as it must be."""
    inner = _encoded({_NAME: peer, _ADDRESS_OF_LINK: _mac(peer_address), _NAMESPACE_FD: namespace_fd})
    data: Attributes = {_VETH_PEER: _LINK.pack(0, 0, 0, 0, 0) + inner}
    info: Attributes = {_KIND: "veth", _DATA: data}
    return _new_link({_NAME: name, _MASTER: bridge, _LINK_INFO: info}, flags=_UP)


def _new_link(attributes: Attributes, flags: int = 0) -> Message:
    body = _LINK.pack(0, 0, 0, flags, flags) + _encoded(attributes)
    return Message(_NEW_LINK, _REQUEST | _CREATE | _EXCLUSIVE, body)


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
    attributes: dict[int, AttributeValue] = {_NAME: name} if name else {}
    if alias:
        attributes[_ALIAS] = alias.encode()
    if address:
        attributes[_ADDRESS_OF_LINK] = _mac(address)
    if master:
        attributes[_MASTER] = master
    if hairpin:
        attributes[_LINK_INFO] = {_PORT_KIND: "bridge", _PORT_DATA: {_PORT_HAIRPIN: b"\1"}}
    if group:
        attributes[_GROUP] = group
    flags = _UP if up else 0
    return Message(_NEW_LINK, _REQUEST, _LINK.pack(0, 0, index, flags, flags) + _encoded(attributes))


def delete_link(index: int) -> Message:
    """Delete a link, and the other end of a pair with it."""
    return Message(_DELETE_LINK, _REQUEST, _LINK.pack(0, 0, index, 0, 0))


def delete_group(group: int) -> Message:
    """Delete all links of a group at once: the kernel waits for its readers once, not once per link."""
    return Message(_DELETE_LINK, _REQUEST, _LINK.pack(0, 0, 0, 0, 0) + _encoded({_GROUP: group}))


def new_address(index: int, address: Address, broadcast: str = "") -> Message:
    """Give a link an IPv4 address."""
    packed = socket.inet_aton(address.ip)
    attributes: dict[int, AttributeValue] = {_LOCAL_ADDRESS: packed, _ADDRESS_ITSELF: packed}
    if broadcast:
        attributes[_BROADCAST] = socket.inet_aton(broadcast)
    body = _ADDRESS.pack(socket.AF_INET, address.prefix_length, 0, 0, index) + _encoded(attributes)
    return Message(_NEW_ADDRESS, _REQUEST | _CREATE | _EXCLUSIVE, body)


def delete_address(index: int, address: Address) -> Message:
    """Take an address away from a link."""
    body = _ADDRESS.pack(socket.AF_INET, address.prefix_length, 0, 0, index)
    return Message(_DELETE_ADDRESS, _REQUEST, body + _encoded({_LOCAL_ADDRESS: socket.inet_aton(address.ip)}))


def new_default_route(gateway: str) -> Message:
    """A default route in the main table."""
    header = _ROUTE.pack(socket.AF_INET, 0, 0, 0, _MAIN_TABLE, _PROTOCOL_BOOT, 0, _UNICAST, 0)
    body = header + _encoded({_GATEWAY: socket.inet_aton(gateway)})
    return Message(_NEW_ROUTE, _REQUEST | _CREATE | _EXCLUSIVE, body)


def delete_default_route(priority: int) -> Message:
    """Delete the default route of that priority."""
    header = _ROUTE.pack(socket.AF_INET, 0, 0, 0, _MAIN_TABLE, 0, _SCOPE_ANY, 0, 0)
    return Message(_DELETE_ROUTE, _REQUEST, header + _encoded({_PRIORITY: priority} if priority else {}))


def limit_rate(index: int, rate_bytes: int, burst_bytes: int) -> Message:
    """A token bucket as root queue of a link; one that is there is changed and keeps its packets.

    `rate_bytes`: bytes per second; `burst_bytes`: what may go at once.
    """
    rate = _RATE.pack(0, _ETHERNET, 0, 0, 0, rate_bytes)
    parameters = rate + bytes(_RATE.size) + struct.pack("=III", 4 * burst_bytes, 0, 0)
    options: Attributes = {_TBF_PARAMETERS: parameters, _TBF_BURST: burst_bytes}
    body = _QUEUE.pack(0, index, _FIRST_HANDLE, _ROOT, 0) + _encoded({_QUEUE_KIND: "tbf", _QUEUE_OPTIONS: options})
    return Message(_NEW_QUEUE, _REQUEST | _CREATE | _REPLACE, body)


def unlimit_rate(index: int) -> Message:
    """Remove the token bucket."""
    return Message(_DELETE_QUEUE, _REQUEST, _QUEUE.pack(0, index, _FIRST_HANDLE, _ROOT, 0))


def delete_ingress(index: int) -> Message:
    """Remove what handles arriving packets of a link."""
    body = _QUEUE.pack(0, index, 0xFFFF0000, _INGRESS, 0)
    return Message(_DELETE_QUEUE, _REQUEST, body + _encoded({_QUEUE_KIND: "ingress"}))


# Attributes


def _encoded(attributes: Attributes) -> bytes:
    data = bytearray()
    for kind, value in attributes.items():
        if isinstance(value, Mapping):
            content, kind = _encoded(value), kind | _NESTED
        elif isinstance(value, int):
            content = struct.pack("=I", value)
        else:
            content = value.encode() + b"\0" if isinstance(value, str) else value
        data += _ATTRIBUTE.pack(_ATTRIBUTE.size + len(content), kind) + content
        data += bytes(-len(content) % 4)
    return bytes(data)


def _decoded(data: bytes) -> dict[int, bytes]:
    found = {}
    at = 0
    while at + _ATTRIBUTE.size <= len(data):
        size, kind = _ATTRIBUTE.unpack_from(data, at)
        found[kind & _TYPE_MASK] = data[at + _ATTRIBUTE.size : at + size]
        at += (max(size, _ATTRIBUTE.size) + 3) & ~3
    return found


def _text(attributes: Mapping[int, bytes], kind: int) -> str:
    return attributes.get(kind, b"").rstrip(b"\0").decode(errors="replace")


def _number(attributes: Mapping[int, bytes], kind: int) -> int:
    return int.from_bytes(attributes.get(kind, b"")[:4], sys.byteorder)


def _link(body: bytes) -> Link:
    _, _, index, flags, _ = _LINK.unpack_from(body)
    attributes = _decoded(body[_LINK.size :])
    info = _decoded(attributes.get(_LINK_INFO, b""))
    kind = _text(info, _KIND)
    return Link(
        index=index,
        name=_text(attributes, _NAME),
        is_up=bool(flags & _UP),
        kind=kind,
        alias=_text(attributes, _ALIAS),
        address=attributes.get(_ADDRESS_OF_LINK, b"").hex(":"),
        master=_number(attributes, _MASTER),
        parent=_number(attributes, _PARENT),
        vlan_id=_number(_decoded(info.get(_DATA, b"")), _VLAN_ID) if kind == "vlan" else 0,
        queue=_text(attributes, _QDISC),
    )


def _mac(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))
