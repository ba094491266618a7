"""Where log lines come from: the journal, or the files of containers where there is no journal."""

import heapq
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

import msgspec

from aoscore.sm.journal import Journal, Match
from aoscore.sm.launcher.runtimes.container.output import LOG_NAME, OLD_LOG_NAME

_BATCH = 500


class LogLine(msgspec.Struct, frozen=True):
    """One line; `unit` is empty for lines of instances."""

    time: datetime
    message: str
    unit: str = ""


class LogSource(Protocol):
    """Lines in the order of time. The iterators block and are used in a worker thread."""

    def system(self, since: datetime | None, till: datetime | None) -> Iterator[LogLine]:
        """Everything the machine has logged."""
        ...

    def instances(
        self, instance_ids: Sequence[str], since: datetime | None, till: datetime | None
    ) -> Iterator[LogLine]:
        """What these instances have written."""
        ...


class JournalSource:
    """The system journal. Entries of an instance are known by its control group or, without systemd, its identifier."""

    def __init__(self, *cgroup_parents: str, directory: Path | None = None) -> None:
        """`cgroup_parents` are the groups below which instances have theirs."""
        self._cgroup_parents = cgroup_parents
        self._directory = directory

    def system(self, since: datetime | None, till: datetime | None) -> Iterator[LogLine]:
        """See LogSource."""
        return self._read((), since, till, with_unit=True)

    def instances(
        self, instance_ids: Sequence[str], since: datetime | None, till: datetime | None
    ) -> Iterator[LogLine]:
        """See LogSource."""
        groups = [f"{parent}/{name}" for parent in self._cgroup_parents for name in instance_ids]
        matches: list[Match] = [[f"SYSLOG_IDENTIFIER={name}" for name in instance_ids]]
        if groups:
            matches.append([f"_SYSTEMD_CGROUP={group}" for group in groups])
        return self._read(matches, since, till, with_unit=False)

    def _read(
        self, matches: Iterable[Match], since: datetime | None, till: datetime | None, *, with_unit: bool
    ) -> Iterator[LogLine]:
        with Journal(matches, directory=self._directory) as journal:
            journal.seek_start(since)
            while batch := list(journal.entries(_BATCH)):
                for entry in batch:
                    if till is not None and entry.time > till:
                        return
                    unit = (entry.unit or entry.identifier) if with_unit else ""
                    yield LogLine(entry.time, entry.message, unit)


class FileSource:
    """The files that conmon writes: ``<root>/<instanceID>/output.log``, the older part beside it."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def system(self, since: datetime | None, till: datetime | None) -> Iterator[LogLine]:
        """Nothing: without a journal there is no log of the machine."""
        return iter(())

    def instances(
        self, instance_ids: Sequence[str], since: datetime | None, till: datetime | None
    ) -> Iterator[LogLine]:
        """See LogSource."""
        lines = [line for name in instance_ids for line in self._read(self._root / name)]
        # Files are limited in size, and lines of several instances have to be merged.
        lines.sort(key=lambda line: line.time)
        return (line for line in lines if (since is None or line.time >= since) and (till is None or line.time <= till))

    def _read(self, folder: Path) -> Iterator[LogLine]:
        for name in (OLD_LOG_NAME, LOG_NAME):
            try:
                text = (folder / name).read_text(errors="replace")
            except FileNotFoundError:
                continue
            yield from parse_lines(text)


class AllSources:
    """Several at once, for runtimes whose instances write to different places."""

    def __init__(self, sources: Sequence[LogSource]) -> None:
        self._sources = sources

    def system(self, since: datetime | None, till: datetime | None) -> Iterator[LogLine]:
        """See LogSource."""
        return heapq.merge(*(source.system(since, till) for source in self._sources), key=_time)

    def instances(
        self, instance_ids: Sequence[str], since: datetime | None, till: datetime | None
    ) -> Iterator[LogLine]:
        """See LogSource."""
        return heapq.merge(*(source.instances(instance_ids, since, till) for source in self._sources), key=_time)


def _time(line: LogLine) -> datetime:
    return line.time


def parse_lines(text: str) -> Iterator[LogLine]:
    """conmon's format: time stamp, stream, "P" for a part of a line or "F" for its end, text. Pure."""
    begun: LogLine | None = None
    for line in text.split("\n"):
        words = line.split(" ", 3)
        if len(words) != 4 or words[2] not in ("P", "F"):
            continue
        try:
            when = datetime.fromisoformat(words[0]).astimezone(UTC)
        except ValueError:
            continue
        begun = LogLine(begun.time, begun.message + words[3]) if begun else LogLine(when, words[3])
        if words[2] == "F":
            yield begun
            begun = None
    if begun is not None:
        yield begun
