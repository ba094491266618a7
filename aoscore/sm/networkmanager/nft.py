"""nftables through the ``nft`` program with JSON in and out: one call is one transaction."""

from collections.abc import Sequence
from typing import Any

import msgspec

from aoscore.common.config import from_json, to_json
from aoscore.common.errors import AosError
from aoscore.common.process import run_program

_TIMEOUT_S = 20.0


class CounterState(msgspec.Struct, frozen=True):
    """A named counter."""

    name: str
    bytes: int


class _Entry(msgspec.Struct, frozen=True):
    counter: CounterState | None = None


class _Listing(msgspec.Struct, frozen=True):
    nftables: list[_Entry]


async def apply(commands: Sequence[dict[str, Any]]) -> None:
    """Do all commands or none. Raises FailedError with nft's reason."""
    await run_program(["nft", "-j", "-f", "-"], stdin=to_json({"nftables": commands}), timeout_s=_TIMEOUT_S)


async def counters(family: str, table: str) -> dict[str, int] | None:
    """Bytes of a table's named counters; None when the table does not exist."""
    try:
        done = await run_program(["nft", "-j", "list", "counters", "table", family, table], timeout_s=_TIMEOUT_S)
    except AosError:
        tables = await run_program(["nft", "list", "tables", family], timeout_s=_TIMEOUT_S)
        if f"table {family} {table}" not in tables.stdout.decode().splitlines():
            return None
        raise
    listing = from_json(done.stdout, _Listing, what="nft's list of counters")
    return {entry.counter.name: entry.counter.bytes for entry in listing.nftables if entry.counter is not None}
