"""Messages to the cloud that outlive the process, table aoscore_outbox (cloud-protocol §10.1).

A row is written before its message is sent and goes when the cloud has acknowledged it. After a crash in between the
message is sent once more with the same txn, by which the cloud knows it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import apsw

from aoscore.cm.communication.messages import Message, message_type
from aoscore.cm.communication.session import KEPT_AT_TIMES, LASTING
from aoscore.common.db import Database

Change = Callable[[apsw.Connection], None]


class StoredMessage(NamedTuple):
    """A message as it goes out."""

    kind: type[Message]
    txn: str
    frame: bytes


class Outbox:
    """Reads and writes the table."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def load(self) -> list[StoredMessage]:
        """All of them in the order in which they were put. Rows of types that are not kept any more are deleted."""
        kinds = {message_type(kind): kind for kind in LASTING | KEPT_AT_TIMES}
        rows = await self._database.select("SELECT type, txn, frame FROM aoscore_outbox ORDER BY rowid")
        unknown = [txn for name, txn, _ in rows if name not in kinds]
        if unknown:
            await self.remove(unknown)
        return [StoredMessage(kinds[name], txn, frame) for name, txn, frame in rows if name in kinds]

    async def put(self, message: StoredMessage, also: Change | None = None) -> None:
        """Keeps a message, and makes another change of the same database with it: both or neither.

        One that is there already stays as it is: whoever was cut short does not know.
        """

        def change(connection: apsw.Connection) -> None:
            connection.execute(
                "INSERT OR IGNORE INTO aoscore_outbox (txn, type, frame) VALUES (?, ?, ?)",
                (message.txn, message_type(message.kind), message.frame),
            )
            if also is not None:
                also(connection)

        await self._database.write(change)

    async def remove(self, txns: Sequence[str]) -> None:
        """Forgets messages."""

        def change(connection: apsw.Connection) -> None:
            connection.executemany("DELETE FROM aoscore_outbox WHERE txn = ?", [(txn,) for txn in txns])

        await self._database.write(change)
