"""The system journal as SM reads it. Blocking: each reader belongs to one worker thread."""

from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

_SOCKET = Path("/run/systemd/journal/socket")
_DIRECTORIES = (Path("/run/log/journal"), Path("/var/log/journal"))


class JournalEntry(msgspec.Struct, frozen=True):
    """The fields of an entry that SM looks at; absent ones are empty, an absent priority counts as "info"."""

    time: datetime
    cursor: str
    message: str
    priority: int = 6
    unit: str = ""
    about_unit: str = ""
    """The unit that a message of systemd itself is about."""
    cgroup: str = ""
    identifier: str = ""


Match = Sequence[str]
"""Conditions "FIELD=value" that must all hold; several values of one field are alternatives."""


class Journal:
    """A reader with its position. Use as a context manager."""

    def __init__(self, matches: Iterable[Match] = (), *, directory: Path | None = None) -> None:
        """Entries that fulfil any of `matches`; all entries without."""
        from systemd import journal

        self._reader: Any = journal.Reader(path=str(directory) if directory else None)
        for number, match in enumerate(matches):
            if number:
                self._reader.add_disjunction()
            for condition in match:
                self._reader.add_match(condition)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let the journal files go."""
        self._reader.close()

    def seek_start(self, since: datetime | None) -> None:
        """To the first entry at or after `since`."""
        if since is None:
            self._reader.seek_head()
        else:
            self._reader.seek_realtime(int(since.timestamp() * 1_000_000))

    def seek_end(self) -> None:
        """Behind the last entry."""
        self._reader.seek_tail()
        self._reader.get_previous()

    def seek_after(self, cursor: str) -> bool:
        """Behind a known entry; False when the journal does not have it any more, or it is no position at all."""
        try:
            self._reader.seek_cursor(cursor)
        except (OSError, ValueError):
            return False
        found = self._reader.get_next()
        return bool(found) and _text(found.get("__CURSOR")) == cursor

    def entries(self, limit: int) -> Iterator[JournalEntry]:
        """The next entries, at most `limit`; fewer mean that the end was reached."""
        for _ in range(limit):
            fields = self._reader.get_next()
            if not fields:
                return
            yield _entry(fields)

    def wait(self, timeout_s: float) -> None:
        """Until something is added, at most `timeout_s`."""
        self._reader.wait(timeout_s)


def is_available() -> bool:
    """Whether journald runs on this machine and keeps its entries where they can be read."""
    return _SOCKET.is_socket() and any(directory.is_dir() for directory in _DIRECTORIES)


def _entry(fields: dict[str, Any]) -> JournalEntry:
    when = fields["__REALTIME_TIMESTAMP"]
    priority = _text(fields.get("PRIORITY"))
    return JournalEntry(
        time=when.astimezone(UTC) if isinstance(when, datetime) else datetime.fromtimestamp(int(when) / 1e6, UTC),
        cursor=_text(fields.get("__CURSOR")),
        message=_text(fields.get("MESSAGE")),
        priority=int(priority) if priority.isdigit() else 6,
        unit=_text(fields.get("_SYSTEMD_UNIT")),
        about_unit=_text(fields.get("UNIT")),
        cgroup=_text(fields.get("_SYSTEMD_CGROUP")),
        identifier=_text(fields.get("SYSLOG_IDENTIFIER")),
    )


def _text(value: Any) -> str:
    if isinstance(value, list):
        value = value[0] if value else ""
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return "" if value is None else str(value)
