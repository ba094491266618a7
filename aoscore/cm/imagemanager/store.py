"""Rows of the known item versions (database.md §2.2) and what we note beside them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

import apsw
import msgspec

from aoscore.cm.communication.messages import ItemState
from aoscore.cm.rows import from_ns, to_ns
from aoscore.common.db import Database
from aoscore.common.types import ErrorInfo, ItemType

_log = logging.getLogger(__name__)

BlobState = tuple[int, int, int]
"""Size, modification time in ns and inode of a verified blob."""


class Item(msgspec.Struct, frozen=True):
    """One version of an update item that the Unit knows."""

    item_id: str
    type: ItemType
    version: str
    index_digest: str
    state: ItemState
    timestamp: datetime
    """When the version became known, later when it was removed."""
    error: ErrorInfo | None = None
    final: bool = False
    """The error will not go away by itself: not tried again until the desired status changes."""

    @property
    def key(self) -> tuple[str, str]:
        """What identifies the version."""
        return self.item_id, self.version


class ItemStore:
    """All items, in memory and in the database; memory follows after the commit."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._items: dict[tuple[str, str], Item] = {}

    async def load(self) -> None:
        """Reads the rows. One that cannot be understood is left in the file and not used."""
        rows = await self._database.select(
            "SELECT i.itemID, i.type, i.version, i.indexDigest, i.state, i.timestamp,"
            " n.aosCode, n.exitCode, n.message, n.final"
            " FROM imagemanager i LEFT JOIN aoscore_items n ON n.itemID = i.itemID AND n.version = i.version"
        )
        self._items = {}
        for row in rows:
            try:
                item = _from_row(row)
            except ValueError as error:
                _log.error(
                    "Item in the database is passed over: itemID=%s, version=%s, error=%s", row[0], row[2], error
                )
                continue
            self._items[item.key] = item

    def all(self) -> list[Item]:
        """Every version, ordered by item and version."""
        return [self._items[key] for key in sorted(self._items)]

    def get(self, item_id: str, version: str) -> Item | None:
        """One version, None when it is not known."""
        return self._items.get((item_id, version))

    def versions(self, item_id: str) -> list[Item]:
        """All versions of an item."""
        return [item for item in self.all() if item.item_id == item_id]

    def note(self, item: Item) -> None:
        """Keeps what cannot be stored now in memory, to be shown."""
        self._items[item.key] = item

    async def write(self, put: Iterable[Item] = (), delete: Iterable[Item] = ()) -> None:
        """Stores and forgets versions in one transaction."""
        put, delete = list(put), list(delete)

        def change(connection: apsw.Connection) -> None:
            for item in delete:
                for table in ("imagemanager", "aoscore_items"):
                    connection.execute(f"DELETE FROM {table} WHERE itemID = ? AND version = ?", item.key)  # noqa: S608
            for item in put:
                connection.execute(
                    "INSERT OR REPLACE INTO imagemanager (itemID, type, version, indexDigest, state, timestamp)"
                    " VALUES (?, ?, ?, ?, ?, ?)",
                    (
                        item.item_id,
                        item.type.value,
                        item.version,
                        item.index_digest,
                        item.state.value,
                        to_ns(item.timestamp),
                    ),
                )
                connection.execute("DELETE FROM aoscore_items WHERE itemID = ? AND version = ?", item.key)
                if item.error is not None:
                    connection.execute(
                        "INSERT INTO aoscore_items (itemID, version, aosCode, exitCode, message, final)"
                        " VALUES (?, ?, ?, ?, ?, ?)",
                        (*item.key, item.error.aos_code, item.error.exit_code, item.error.message, int(item.final)),
                    )

        if not put and not delete:
            return
        await self._database.write(change)
        for item in delete:
            self._items.pop(item.key, None)
        for item in put:
            self._items[item.key] = item

    async def take_verified(self) -> dict[str, BlobState]:
        """What the last orderly stop noted about verified blobs.

        The note is removed with reading: after a crash there is none, and every blob is checked again before use.
        """

        def take(connection: apsw.Connection) -> dict[str, BlobState]:
            rows: list[Any] = list(
                connection.execute("SELECT digest, size, mtimeNs, inode FROM aoscore_verified_blobs")
            )
            connection.execute("DELETE FROM aoscore_verified_blobs")
            return {digest: (size, mtime_ns, inode) for digest, size, mtime_ns, inode in rows}

        return await self._database.write(take)

    async def note_verified(self, states: dict[str, BlobState]) -> None:
        """Notes what is known about verified blobs, at an orderly stop."""

        def note(connection: apsw.Connection) -> None:
            connection.execute("DELETE FROM aoscore_verified_blobs")
            connection.executemany(
                "INSERT INTO aoscore_verified_blobs (digest, size, mtimeNs, inode) VALUES (?, ?, ?, ?)",
                [(digest, *state) for digest, state in states.items()],
            )

        await self._database.write(note)


def _from_row(row: Sequence[Any]) -> Item:
    item_id, kind, version, digest, state, timestamp, code, exit_code, message, final = row
    return Item(
        item_id,
        ItemType(kind),
        version,
        digest or "",
        ItemState(state),
        from_ns(timestamp) or datetime.fromtimestamp(0, UTC),
        None if code is None else ErrorInfo(code, exit_code, message),
        bool(final),
    )
