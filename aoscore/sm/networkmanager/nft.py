"""nftables through the ``nft`` program with JSON in and out: commands as values, and one call is one transaction."""

import asyncio
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from aoscore.common.config import from_json, to_json
from aoscore.common.process import run_blocking

_TIMEOUT_S = 20.0

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


class _Counter(msgspec.Struct, frozen=True):
    name: str
    bytes: int


class _Entry(msgspec.Struct, frozen=True):
    counter: _Counter | None = None


class _Listing(msgspec.Struct, frozen=True):
    nftables: list[_Entry]


async def apply(commands: Sequence[Command]) -> None:
    """Do all commands or none. Raises FailedError with nft's reason."""
    if not commands:
        return
    await asyncio.to_thread(_apply, commands)


def _apply(commands: Sequence[Command]) -> None:
    done = run_blocking(["nft", "-j", "-f", "-"], stdin=to_json({"nftables": commands}), timeout_s=_TIMEOUT_S)
    done.check("nft")


async def counters(table: Table) -> dict[str, int] | None:
    """Bytes of a table's named counters; None when the table does not exist."""
    return await asyncio.to_thread(_counters, table)


def _counters(table: Table) -> dict[str, int] | None:
    done = run_blocking(["nft", "-j", "list", "counters", "table", table.family, table.name], timeout_s=_TIMEOUT_S)
    if done.code != 0:
        tables = run_blocking(["nft", "list", "tables", table.family], timeout_s=_TIMEOUT_S)
        if f"table {table.family} {table.name}" not in tables.stdout.decode().splitlines():
            return None
        done.check("nft")
    listing = from_json(done.stdout, _Listing, what="nft's list of counters")
    return {entry.counter.name: entry.counter.bytes for entry in listing.nftables if entry.counter is not None}
