"""How values are written in the rows of CM's database (database.md §1.3)."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec

from aoscore.common.types import InstanceIdent, ItemType

IdentValues = tuple[str, str, int, str, int]

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def ident_values(ident: InstanceIdent) -> IdentValues:
    """The five columns that name an instance in every table."""
    return ident.item_id, ident.subject_id, ident.instance, ident.type.value, int(ident.preinstalled)


def ident_of(values: Sequence[Any]) -> InstanceIdent:
    """The reverse of ident_values, from the first five values."""
    return InstanceIdent(values[0], values[1], values[2], ItemType(values[3]), bool(values[4]))


def to_ns(time: datetime | None) -> int:
    """Nanoseconds since 1970, 0 for no time; exact, which a float would not be."""
    if time is None:
        return 0
    return (time - EPOCH) // timedelta(microseconds=1) * 1000


def from_ns(value: int | None) -> datetime | None:
    """The reverse of to_ns; parts of a microsecond are dropped."""
    return EPOCH + timedelta(microseconds=value // 1000) if value else None


def json_text(value: object) -> str:
    """Compact JSON for a TEXT column."""
    return msgspec.json.encode(value).decode()
