"""Follows the journal and sends alerts for what matters (sm.md §8).

The position is kept in the database, so that after a restart nothing is told twice or left out. It is written at most
every ten seconds, and only when an entry of interest came.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from aoscore.common.aio import Backoff, Worker, log_and_continue
from aoscore.common.db import Database
from aoscore.common.log import kv
from aoscore.common.types import InstanceIdent, SystemAlert
from aoscore.sm.alerts.rules import Alert, AlertRules, FloodLimit, source_of
from aoscore.sm.journal import Journal, JournalEntry
from aoscore.sm.launcher.runtimes.base import is_instance_id
from aoscore.sm.launcher.runtimes.container.history import RunHistory

_log = logging.getLogger(__name__)

_WAIT_S = 1.0
_SAVE_PERIOD_S = 10.0
_BATCH = 200
_BURST = 20
_ONE_PER_S = 10.0


class CursorStore:
    """The position in the journal, in the table that AosCore 9.1 uses too."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def load(self) -> str:
        """Empty when there is none."""
        rows = await self._database.select("SELECT cursor FROM config")
        return str(rows[0][0] or "") if rows else ""

    async def save(self, cursor: str) -> None:
        """Replace it."""
        await self._database.execute("UPDATE config SET cursor = ?", (cursor,))


class JournalAlerts:
    """See the module text. A Service."""

    def __init__(
        self,
        rules: AlertRules,
        cursors: CursorStore,
        history: RunHistory,
        send: Callable[[Alert], Awaitable[None]],
        *,
        directory: Path | None = None,
    ) -> None:
        """`directory`: read the journal there instead of the machine's."""
        self._rules = rules
        self._cursors = cursors
        self._history = history
        self._send = send
        self._directory = directory
        self._flood = FloodLimit(_BURST, _ONE_PER_S)
        self._cursor = ""
        self._saved_cursor = ""
        self._saved_s = 0.0

    async def run(self, started: Callable[[], None]) -> None:
        """Follow the journal until cancelled. Errors of the journal are logged, the position is kept."""
        self._cursor = self._saved_cursor = await self._cursors.load()
        backoff = Backoff(1.0, 10.0)
        async with Worker("journal") as worker:
            started()
            try:
                while True:
                    with log_and_continue(_log, "Can't read the journal"):
                        await self._follow(worker, backoff)
                    await asyncio.sleep(backoff.next())
            finally:
                await self._save()

    async def _follow(self, worker: Worker, backoff: Backoff) -> None:
        journal = await worker.run(self._open)
        try:
            while True:
                entries = await worker.run(lambda: list(journal.entries(_BATCH)))
                for entry, alert in await worker.run(self._judge, entries):
                    if alert is not None and self._flood.passes(source_of(entry), time.monotonic()):
                        await self._send(alert)
                    # Only now: an entry that was being handled when we died comes again.
                    self._cursor = entry.cursor
                now_s = time.monotonic()
                for source, count in self._flood.suppressed(now_s):
                    text = f"{count} more alerts of {source} were held back"
                    await self._send(SystemAlert(datetime.now(UTC), text))
                if now_s - self._saved_s >= _SAVE_PERIOD_S:
                    await self._save()
                    self._saved_s = now_s
                backoff.reset()
                if not entries:
                    await worker.run(journal.wait, _WAIT_S)
        finally:
            await worker.run(journal.close)

    def _judge(self, entries: Sequence[JournalEntry]) -> list[tuple[JournalEntry, Alert | None]]:
        return [(entry, self._rules.alert(entry, self._find_instance)) for entry in entries]

    def _open(self) -> Journal:
        journal = Journal(self._rules.matches(), directory=self._directory)
        try:
            if not self._cursor:
                journal.seek_end()
            elif not journal.seek_after(self._cursor):
                _log.warning(kv("Stored place in the journal is gone, going on at its end", cursor=self._cursor))
                journal.seek_end()
        except BaseException:
            journal.close()
            raise
        return journal

    def _find_instance(self, name: str) -> tuple[InstanceIdent, str] | None:
        known = self._history.get(name) if is_instance_id(name) else None
        return (known.ident, known.version) if known else None

    async def _save(self) -> None:
        if self._cursor != self._saved_cursor:
            await self._cursors.save(self._cursor)
            self._saved_cursor = self._cursor
