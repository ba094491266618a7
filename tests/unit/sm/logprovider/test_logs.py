"""Log lines, parts and replies, with a source in memory."""

import asyncio
import gzip
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aoscore.common.types import InstanceFilter, InstanceIdent, LogData, LogKind, LogRequest, LogStatus
from aoscore.sm.launcher.runtimes.container.history import InstanceHistory, Run, RunHistory
from aoscore.sm.logprovider.parts import build_parts, format_line
from aoscore.sm.logprovider.provider import LogProvider, last_crash
from aoscore.sm.logprovider.source import AllSources, FileSource, LogLine, parse_lines
from tests.support.running import running

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


def test_line_formats() -> None:
    assert format_line(LogLine(NOON, "hello", "ssh.service")) == b"20260101120000Z ssh.service hello\n"
    assert format_line(LogLine(NOON, "hello")) == b"20260101120000Z hello \n"
    assert format_line(LogLine(NOON, "\udc80")) == b"20260101120000Z ? \n"


@given(st.lists(st.text(max_size=200), max_size=60), st.integers(20, 2000))
def test_parts_together_are_the_log(messages: list[str], size: int) -> None:
    lines = [LogLine(NOON, message) for message in messages]
    parts = build_parts(lines, max_size_bytes=size, max_count=10_000)
    unpacked = [gzip.decompress(part) for part in parts.data]
    whole = [format_line(line) for line in lines]
    assert b"".join(unpacked) == b"".join(text if len(text) <= size else text[: size - 1] + b"\n" for text in whole)
    assert all(0 < len(part) <= size for part in unpacked) and parts.dropped == 0


def test_too_long_a_log_keeps_its_newest_parts() -> None:
    lines = [LogLine(NOON, f"{number:04}") for number in range(100)]
    parts = build_parts(lines, max_size_bytes=2 * len(format_line(lines[0])), max_count=3)
    assert parts.dropped == 47
    assert [int(line.split()[1]) for part in parts.data for line in gzip.decompress(part).splitlines()] == list(
        range(94, 100)
    )


def test_conmon_lines() -> None:
    text = (
        "2026-01-01T12:00:00.123456789+00:00 stdout F first line\n"
        "2026-01-01T13:00:00.000000000+01:00 stderr P begin, \n"
        "2026-01-01T12:00:01.000000000+00:00 stderr F end\n"
        "garbage\n"
        "notatime stdout F x\n"
        "2026-01-01T12:00:02.000000000+00:00 stdout F \n"
        "2026-01-01T12:00:03.000000000+00:00 stdout P cut off"
    )
    lines = list(parse_lines(text))
    assert [line.message for line in lines] == ["first line", "begin, end", "", "cut off"]
    assert lines[1].time == NOON and lines[0].time.microsecond == 123456


def test_runtimes_that_write_to_different_places_make_one_log(tmp_path: Path) -> None:
    for folder, seconds in (("one", (0, 3)), ("two", (1, 2))):
        log = tmp_path / folder / "id" / "output.log"
        log.parent.mkdir(parents=True)
        times = [(NOON + timedelta(seconds=second)).isoformat() for second in seconds]
        log.write_text("".join(f"{when} stdout F {second}\n" for when, second in zip(times, seconds, strict=True)))
    source = AllSources([FileSource(tmp_path / "one"), FileSource(tmp_path / "two")])
    assert [line.message for line in source.instances(["id"], None, None)] == ["0", "1", "2", "3"]
    assert list(source.system(None, None)) == [] == list(AllSources([]).instances(["id"], None, None))


@given(st.text())
def test_any_file_can_be_read(text: str) -> None:
    list(parse_lines(text))


def test_files_of_several_instances_are_merged_and_cut_by_time(tmp_path: Path) -> None:
    def write(path: Path, *seconds: int) -> None:
        path.parent.mkdir(exist_ok=True)
        times = [(second, NOON + timedelta(seconds=second)) for second in seconds]
        path.write_text("".join(f"{when.isoformat()} stdout F {second}\n" for second, when in times))

    write(tmp_path / "a" / "output.log.1", 0, 2)
    write(tmp_path / "a" / "output.log", 4)
    write(tmp_path / "b" / "output.log", 1, 3, 5)
    source = FileSource(tmp_path)

    def seconds(*names: str, since: datetime | None = None, till: datetime | None = None) -> list[str]:
        return [line.message for line in source.instances(names, since, till)]

    assert seconds("a", "b", "absent") == ["0", "1", "2", "3", "4", "5"]
    assert seconds("a", "b", since=NOON + timedelta(seconds=2), till=NOON + timedelta(seconds=4)) == ["2", "3", "4"]
    assert list(source.system(None, None)) == []


class Source:
    """Ten lines of the system, one per second; two per instance."""

    def system(self, since: datetime | None, till: datetime | None) -> Iterator[LogLine]:
        lines = [LogLine(NOON + timedelta(seconds=second), str(second), "unit") for second in range(10)]
        return (line for line in lines if (not since or line.time >= since) and (not till or line.time <= till))

    def instances(
        self, instance_ids: Sequence[str], since: datetime | None, till: datetime | None
    ) -> Iterator[LogLine]:
        if "broken" in instance_ids:
            raise OSError(5, "journal is broken")
        return (LogLine(NOON, f"{name} {number}") for name in instance_ids for number in range(2))


class Replies:
    """A running provider and what it sends."""

    def __init__(self, directory: Path, max_part_size_bytes: int = 60) -> None:
        self.history = RunHistory(directory)
        self.sent: asyncio.Queue[LogData] = asyncio.Queue()
        source = Source()
        self.provider = LogProvider(
            source,
            source,
            self.history,
            self.sent.put,
            max_part_size_bytes=max_part_size_bytes,
            max_part_count=3,
        )

    async def ask(self, kind: LogKind, **members: object) -> list[LogData]:
        """All parts of one reply."""
        await self.provider.request(LogRequest(kind, "corr", **members))  # type: ignore[arg-type]
        async with asyncio.timeout(5):
            parts = [await self.sent.get()]
            while parts[-1].part < parts[-1].part_count:
                parts.append(await self.sent.get())
        assert {part.correlation_id for part in parts} == {"corr"}
        return parts


def text(parts: list[LogData]) -> str:
    return b"".join(gzip.decompress(part.data) for part in parts).decode()


async def test_replies(tmp_path: Path) -> None:
    replies = Replies(tmp_path)
    one, two = (InstanceIdent("item", "subject", number) for number in (1, 2))
    async with running(replies.provider):
        [absent] = await replies.ask(LogKind.INSTANCE)
        assert (absent.status, absent.part, absent.part_count, absent.error) == (LogStatus.ABSENT, 1, 1, None)
        await asyncio.to_thread(replies.history.note_start, "one", one, "1.0.0")
        await asyncio.to_thread(replies.history.note_start, "two", two, "1.0.0")
        parts = await replies.ask(LogKind.INSTANCE, filter=InstanceFilter(instance=2))
        assert text(parts) == "20260101120000Z two 0 \n20260101120000Z two 1 \n"

        [empty] = await replies.ask(LogKind.SYSTEM, since=NOON + timedelta(hours=1))
        assert (empty.status, empty.part_count) == (LogStatus.EMPTY, 1)
        parts = await replies.ask(LogKind.SYSTEM, till=NOON + timedelta(seconds=3))
        assert [part.status for part in parts] == [LogStatus.OK] * 2 and parts[0].error is None
        assert [line.split()[2] for line in text(parts).splitlines()] == ["0", "1", "2", "3"]
        parts = await replies.ask(LogKind.SYSTEM)
        assert len(parts) == 3 and parts[0].error is not None and "2 oldest parts" in parts[0].error.message
        assert [line.split()[2] for line in text(parts).splitlines()] == ["4", "5", "6", "7", "8", "9"]

        await asyncio.to_thread(replies.history.note_start, "broken", InstanceIdent("item", "subject", 3), "1.0.0")
        [failed] = await replies.ask(LogKind.INSTANCE, filter=InstanceFilter(instance=3))
        assert (failed.status, failed.part, failed.part_count) == (LogStatus.ERROR, 0, 0)
        assert failed.error is not None and "journal is broken" in failed.error.message


async def test_crash_log(tmp_path: Path) -> None:
    replies = Replies(tmp_path, 1000)
    async with running(replies.provider):
        await asyncio.to_thread(replies.history.note_start, "one", InstanceIdent("item", "subject", 1), "1.0.0")
        [absent] = await replies.ask(LogKind.CRASH)
        assert absent.status is LogStatus.ABSENT
        run = Run(NOON, NOON + timedelta(seconds=5), 139, "killed by SIGSEGV (139)", crashed=True)
        await asyncio.to_thread(replies.history.note_end, "one", run)
        lines = text(await replies.ask(LogKind.CRASH)).splitlines()
        assert lines[0] == "20260101120000Z instance item:subject:1 version 1.0.0 started "
        assert lines[1:3] == ["20260101120000Z one 0 ", "20260101120000Z one 1 "]
        assert lines[3] == "20260101120005Z instance item:subject:1 killed by SIGSEGV (139) "


def test_last_crash_in_a_period() -> None:
    def run(minute: int, *, crashed: bool = True) -> Run:
        return Run(NOON, NOON + timedelta(minutes=minute), minute, "", crashed)

    history = InstanceHistory(InstanceIdent("i", "s", 0), "1", (run(1), run(2), run(3, crashed=False)))
    assert last_crash(history, None, None) == run(2)
    assert last_crash(history, None, NOON + timedelta(seconds=90)) == run(1)
    assert last_crash(history, NOON + timedelta(minutes=2, seconds=1), None) is None


async def test_too_many_waiting_requests_are_refused(tmp_path: Path) -> None:
    replies = Replies(tmp_path)
    for number in range(65):
        await replies.provider.request(LogRequest(LogKind.SYSTEM, f"corr{number}"))
    refused = replies.sent.get_nowait()
    assert (refused.correlation_id, refused.status) == ("corr64", LogStatus.ERROR)
    with pytest.raises(asyncio.QueueEmpty):
        replies.sent.get_nowait()
