"""What was read out of certificates, by their SHA-256: table aoscore_certificate_notes.

A certificate says the same each time it is shown. Noting it spares an idle CM the X.509 library, 9 MB, which it would
load at each start only to read again what it has read before.
"""

from __future__ import annotations

import hashlib
from typing import Final

import apsw

from aoscore.common.db import Database

MAX_NOTES: Final = 256
"""The oldest go first."""


class CertificateNotes:
    """Notes are of a topic; a certificate may have several of one. Made once, `load` before anything else."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._notes: dict[tuple[bytes, str, str], None] = {}

    async def load(self) -> None:
        """Reads what is stored."""
        rows = await self._database.select("SELECT sha256, topic, note FROM aoscore_certificate_notes ORDER BY rowid")
        self._notes = {(bytes(sha256), str(topic), str(note)): None for sha256, topic, note in rows}

    def find(self, der: bytes, topic: str) -> list[str]:
        """The notes of a topic on a certificate."""
        digest = hashlib.sha256(der).digest()
        return [note for sha256, of, note in self._notes if (sha256, of) == (digest, topic)]

    async def add(self, der: bytes, topic: str, note: str) -> None:
        """Keeps a note."""
        entry = hashlib.sha256(der).digest(), topic, note
        if entry in self._notes:
            return
        old = list(self._notes)[: max(0, len(self._notes) + 1 - MAX_NOTES)]

        def change(connection: apsw.Connection) -> None:
            for one in old:
                connection.execute(
                    "DELETE FROM aoscore_certificate_notes WHERE sha256 = ? AND topic = ? AND note = ?", one
                )
            connection.execute("INSERT INTO aoscore_certificate_notes (sha256, topic, note) VALUES (?, ?, ?)", entry)

        await self._database.write(change)
        for one in old:
            del self._notes[one]
        self._notes[entry] = None
