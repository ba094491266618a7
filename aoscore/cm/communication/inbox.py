"""Messages of the cloud that are still to be acted on, table aoscore_inbox.

A row is written before its message is acknowledged, for the cloud says nothing twice that has its ack, and goes when
the message has been handled. What an earlier process left is handled in its order by the next one.
"""

from __future__ import annotations

import hashlib
import logging
from typing import Final, NamedTuple

import apsw

from aoscore.cm.communication.envelope import from_json, to_json
from aoscore.cm.communication.messages import FROM_CLOUD, Message, message_type
from aoscore.common.aio import log_and_continue
from aoscore.common.db import Database
from aoscore.common.log import kv

_log = logging.getLogger(__name__)

MAX_TRIES: Final = 3
"""A message in whose handling so many processes have ended is not tried again: it may be why they did."""


class StoredRequest(NamedTuple):
    """A message that an earlier process has not finished with, and its key."""

    key: str
    message: Message


class Inbox:
    """Reads and writes the table."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def load(self) -> list[StoredRequest]:
        """All of them in the order in which they came. What cannot be read or was tried too often goes."""

        def change(connection: apsw.Connection) -> list[tuple[str, str, str, int]]:
            connection.execute("UPDATE aoscore_inbox SET tries = tries + 1")
            return list(connection.execute("SELECT frame, type, message, tries FROM aoscore_inbox ORDER BY rowid"))

        found = []
        for key, kind, text, tries in await self._database.write(change):
            with log_and_continue(_log, f"Can't read a stored {kind}"):
                if kind in FROM_CLOUD and tries <= MAX_TRIES:
                    found.append(StoredRequest(key, from_json(FROM_CLOUD[kind], text, kind)[0]))
                    continue
                _log.error(kv("A message of the cloud is given up", type=kind, tries=tries - 1))
            await self.remove(key)
        return found

    async def put(self, frame: bytes | str, message: Message) -> str:
        """Keeps the message of a frame, without the passwords in it; its key. The same frame again is no other one."""
        key = hashlib.sha256(frame.encode() if isinstance(frame, str) else frame).hexdigest()
        await self._database.execute(
            "INSERT OR IGNORE INTO aoscore_inbox (frame, type, message, tries) VALUES (?, ?, ?, 0)",
            (key, message_type(message), to_json(message.without_secrets()).decode()),
        )
        return key

    async def remove(self, key: str) -> None:
        """Forgets a message."""
        await self._database.execute("DELETE FROM aoscore_inbox WHERE frame = ?", (key,))
