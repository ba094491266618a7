"""The row of the update in progress (database.md §2.1). Desired status and phase change together."""

from __future__ import annotations

import apsw

from aoscore.cm.communication import envelope
from aoscore.cm.communication.messages import DesiredStatus
from aoscore.cm.updatemanager.phases import Phase
from aoscore.common.db import Database
from aoscore.common.errors import FailedError, InvalidArgumentError

_EMPTY = "{}"


class UpdateStore:
    """Reads and writes the row."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def load(self) -> tuple[DesiredStatus | None, Phase]:
        """The last desired status (None before the first) and the phase.

        Raises FailedError when one of them cannot be understood: a run must not go on with a guess.
        """
        rows = await self._database.select("SELECT desiredStatus, updateState FROM updatemanager")
        if not rows:
            return None, Phase.NONE
        text, word = rows[0]
        try:
            phase = Phase(word)
            if not text or text == _EMPTY:
                if phase is not Phase.NONE:
                    raise FailedError(f"update is {word}, but there is no desired status")
                return None, phase
            desired, problems = envelope.from_json(DesiredStatus, text, "stored desired status")
        except (ValueError, InvalidArgumentError) as error:
            raise FailedError(f"stored update can't be read: {error}") from error
        if problems:
            raise FailedError(f"stored desired status can't be read: {problems[0]}")
        return desired, phase

    async def save(self, desired: DesiredStatus, phase: Phase) -> None:
        """Stores a new desired status together with the phase."""
        document = envelope.to_document(desired)
        # 9.1 stores neither of them (database.md §2.1).
        document.pop("messageType", None)
        document.pop("correlationId", None)
        text = envelope.encode_document(document).decode()
        await self._write("UPDATE updatemanager SET desiredStatus = ?, updateState = ?", (text, phase.value))

    async def save_phase(self, phase: Phase) -> None:
        """Stores the phase."""
        await self._write("UPDATE updatemanager SET updateState = ?", (phase.value,))

    async def keep_copy(self) -> None:
        """Keeps a copy of the whole database: an update has ended, all of it fits together."""
        await self._database.keep_copy()

    async def forget_loss(self) -> None:
        """Another database has taken the place of the damaged one."""
        await self._database.forget_recovery()

    async def _write(self, statement: str, values: tuple[str, ...]) -> None:
        def change(connection: apsw.Connection) -> None:
            connection.execute(statement, values)
            if connection.changes() == 0:
                connection.execute("INSERT INTO updatemanager VALUES (?, ?)", (_EMPTY, Phase.NONE.value))
                connection.execute(statement, values)

        await self._database.write(change)
