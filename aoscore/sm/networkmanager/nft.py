"""nftables through the ``nft`` program with JSON in and out: commands as values, and one call is one transaction.

Counters, which are read often, come from the kernel itself: the program takes longer than all the rest of a sample.
"""

import asyncio
import socket
import struct
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from aoscore._speedups.sampler import take_counters
from aoscore.common.config import to_json
from aoscore.common.errors import FailedError, RuntimeFailure
from aoscore.common.process import run_blocking

_TIMEOUT_S = 20.0
_ATTEMPTS = 5
_RECEIVE_BYTES = 64 * 1024
_NETLINK_NETFILTER = 12
_GET_OBJECT = 10 << 8 | 19
_REQUEST, _DUMP = 0x1, 0x300
_FAMILIES = {"inet": 1}
_OBJECT_TABLE, _OBJECT_TYPE = 1, 3
_COUNTER = 1

Command = dict[str, Any]
Expression = dict[str, Any]


class Table(msgspec.Struct, frozen=True):
    """Commands for one table; nothing here can name another."""

    name: str
    family: str = "inet"

    def begin(self) -> list[Command]:
        """Start from an empty table, whether it existed or not."""
        table = {"table": {"family": self.family, "name": self.name}}
        # Deleting what does not exist is an error: so it is added first.
        return [{"add": table}, {"delete": table}, {"add": table}]

    def add(self, kind: str, name: str, **members: Any) -> Command:
        """Make a chain, set, map or counter."""
        return {"add": {kind: {**self._object(name), **members}}}

    def rule(self, chain: str, expressions: Sequence[Expression]) -> Command:
        """Append a rule."""
        return {"add": {"rule": {"family": self.family, "table": self.name, "chain": chain, "expr": [*expressions]}}}

    def add_elements(self, name: str, elements: Iterable[Any]) -> Command:
        """Put elements into a set or map."""
        return {"add": {"element": {**self._object(name), "elem": [*elements]}}}

    def delete_elements(self, name: str, elements: Iterable[Any]) -> Command:
        """Take elements out of a set or map."""
        return {"delete": {"element": {**self._object(name), "elem": [*elements]}}}

    def delete(self, kind: str, name: str) -> Command:
        """Delete an object."""
        return {"delete": {kind: self._object(name)}}

    def reset(self, counter: str) -> Command:
        """Set a counter to zero."""
        return {"reset": {"counter": self._object(counter)}}

    def _object(self, name: str) -> dict[str, Any]:
        return {"family": self.family, "table": self.name, "name": name}


def match(left: Expression, right: Any, op: str = "==") -> Expression:
    """A condition; `op` "in" is for flags and sets of states."""
    return {"match": {"op": op, "left": left, "right": right}}


def ip(field: str) -> Expression:
    """A field of the IPv4 header."""
    return {"payload": {"protocol": "ip", "field": field}}


def prefix(subnet: str) -> Any:
    """A subnet in CIDR notation, or a single address."""
    address, _, length = subnet.partition("/")
    return address if length in ("", "32") else {"prefix": {"addr": address, "len": int(length)}}


async def apply(commands: Sequence[Command]) -> None:
    """Do all commands or none. Raises FailedError with nft's reason."""
    if not commands:
        return
    await asyncio.to_thread(_apply, commands)


def _apply(commands: Sequence[Command]) -> None:
    done = run_blocking(["nft", "-j", "-f", "-"], stdin=to_json({"nftables": commands}), timeout_s=_TIMEOUT_S)
    done.check("nft")


async def counters(table: Table) -> dict[str, int]:
    """Bytes of a table's named counters, none when it does not exist. Raises FailedError, RuntimeFailure."""
    return await asyncio.to_thread(_counters, table)


def _counters(table: Table) -> dict[str, int]:
    try:
        for _ in range(_ATTEMPTS):
            found: dict[str, int] = {}
            try:
                with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER) as kernel:
                    kernel.settimeout(_TIMEOUT_S)
                    kernel.send(_list_counters(table))
                    while not take_counters(kernel.recv(_RECEIVE_BYTES), found):
                        pass
                return found
            except InterruptedError:
                pass  # the firewall was changed meanwhile
    except OSError as error:
        raise RuntimeFailure(f"can't list counters of {table.name}: {error}", error.errno or 0) from error
    raise FailedError(f"counters of {table.name} change faster than they can be listed")


def _list_counters(table: Table) -> bytes:
    """The request: all counters of a table (netlink(7), linux/netfilter/nf_tables.h)."""
    name = table.name.encode() + b"\0"
    attributes = _attribute(_OBJECT_TABLE, name) + _attribute(_OBJECT_TYPE, struct.pack(">I", _COUNTER))
    body = struct.pack("=BBH", _FAMILIES[table.family], 0, 0) + attributes
    return struct.pack("=IHHII", 16 + len(body), _GET_OBJECT, _REQUEST | _DUMP, 0, 0) + body


def _attribute(kind: int, content: bytes) -> bytes:
    size = 4 + len(content)
    return struct.pack("=HH", size, kind) + content + bytes(-size % 4)
