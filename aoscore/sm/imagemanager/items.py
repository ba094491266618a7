"""Table `items`: which item versions are on this node (database.md §3)."""

import logging
from collections.abc import Iterable

import apsw
import msgspec

from aoscore.common.db import Database
from aoscore.common.types import ItemType
from aoscore.sm.imagemanager.model import ItemKey

_log = logging.getLogger(__name__)

_INSTALLED = "installed"
_REMOVED = "removed"
_KEY = "itemID = ? AND type = ? AND version = ?"


class ItemRow(msgspec.Struct, frozen=True):
    """One item version; `removed_ns` is the time since which nobody wants it (ns since 1970), None while wanted."""

    key: ItemKey
    removed_ns: int | None = None


class ItemTable:
    """Rows of item versions. Every method is one transaction."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def load(self) -> list[ItemRow]:
        """All rows; one that cannot be read is logged, left in the file and skipped."""

        def read(connection: apsw.Connection) -> list[ItemRow]:
            rows: list[ItemRow] = []
            for item_id, kind, version, digest, state, timestamp in connection.execute(
                "SELECT itemID, type, version, manifestDigest, state, timestamp FROM items"
            ):
                try:
                    key = ItemKey(item_id, ItemType(kind), version, digest)
                except ValueError as error:
                    _log.error("Stored item can't be read, skipped: item=%s, error=%s", item_id, error)
                    continue
                rows.append(ItemRow(key, None if state == _INSTALLED else timestamp or 0))
            return rows

        return await self._database.read(read)

    async def set_installed(self, key: ItemKey, time_ns: int) -> None:
        """The item is complete; another manifest of the same version is replaced."""
        await self._database.execute(
            "INSERT OR REPLACE INTO items (itemID, type, version, manifestDigest, state, timestamp) "
            "VALUES (?, ?, ?, ?, ?, ?)",
            (key.item_id, key.type.value, key.version, key.manifest_digest, _INSTALLED, time_ns),
        )

    async def set_removed(self, keys: Iterable[ItemKey], time_ns: int) -> None:
        """Nobody wants these any more; their files stay as a cache."""
        rows = [(_REMOVED, time_ns, key.item_id, key.type.value, key.version) for key in keys]

        def write(connection: apsw.Connection) -> None:
            for row in rows:
                connection.execute(f"UPDATE items SET state = ?, timestamp = ? WHERE {_KEY}", row)  # noqa: S608

        await self._database.write(write)

    async def delete(self, key: ItemKey) -> None:
        """Forget an item version."""
        await self._database.execute(
            f"DELETE FROM items WHERE {_KEY}",  # noqa: S608
            (key.item_id, key.type.value, key.version),
        )
