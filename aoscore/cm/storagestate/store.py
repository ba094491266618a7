"""Quotas and checksums in the database (database.md §2.3)."""

import logging

import apsw
import msgspec

from aoscore.cm.rows import ident_of, ident_values
from aoscore.common.aio import log_and_continue
from aoscore.common.db import Database
from aoscore.common.types import InstanceIdent

_log = logging.getLogger(__name__)

_DELETE = (
    "DELETE FROM storagestate WHERE itemID = ? AND subjectID = ? AND instance = ? AND type = ? AND preinstalled = ?"
)
_DELETE_UNACCEPTED = (
    "DELETE FROM aoscore_state_unaccepted"
    " WHERE itemID = ? AND subjectID = ? AND instance = ? AND type = ? AND preinstalled = ?"
)


class StateRow(msgspec.Struct, frozen=True):
    """Quotas in bytes, the checksum the cloud accepted, and the one it has not accepted yet; empty: none."""

    ident: InstanceIdent
    storage_quota_bytes: int = 0
    state_quota_bytes: int = 0
    accepted: bytes = b""
    unaccepted: bytes = b""


class StateStore:
    """Reads and writes the rows."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def load(self) -> list[StateRow]:
        """All rows; one that cannot be read is logged and left as it is."""
        rows = await self._database.select(
            "SELECT s.itemID, s.subjectID, s.instance, s.type, s.preinstalled, s.storageQuota, s.stateQuota,"
            " s.stateChecksum, u.checksum FROM storagestate s LEFT JOIN aoscore_state_unaccepted u"
            " ON s.itemID = u.itemID AND s.subjectID = u.subjectID AND s.instance = u.instance AND s.type = u.type"
            " AND s.preinstalled = u.preinstalled"
        )
        found = []
        for row in rows:
            with log_and_continue(_log, f"Can't restore quotas and state of instance {row[0]}:{row[1]}:{row[2]}"):
                found.append(StateRow(ident_of(row), row[5] or 0, row[6] or 0, row[7] or b"", row[8] or b""))
        return found

    async def put(self, row: StateRow) -> None:
        """Insert or replace a row."""
        await self._database.write(lambda connection: _put(connection, row))

    async def remove(self, ident: InstanceIdent) -> None:
        """Delete a row; absent is fine."""
        await self._database.write(lambda connection: _remove(connection, ident))


def _put(connection: apsw.Connection, row: StateRow) -> None:
    ident = ident_values(row.ident)
    connection.execute(
        "INSERT OR REPLACE INTO storagestate (itemID, subjectID, instance, type, preinstalled, storageQuota,"
        " stateQuota, stateChecksum) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        (*ident, row.storage_quota_bytes, row.state_quota_bytes, row.accepted),
    )
    if row.unaccepted:
        connection.execute(
            "INSERT OR REPLACE INTO aoscore_state_unaccepted (itemID, subjectID, instance, type, preinstalled,"
            " checksum) VALUES (?, ?, ?, ?, ?, ?)",
            (*ident, row.unaccepted),
        )
    else:
        connection.execute(_DELETE_UNACCEPTED, ident)


def _remove(connection: apsw.Connection, ident: InstanceIdent) -> None:
    connection.execute(_DELETE, ident_values(ident))
    connection.execute(_DELETE_UNACCEPTED, ident_values(ident))
