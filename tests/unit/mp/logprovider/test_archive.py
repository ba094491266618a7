"""Logs that come as text: parts within limits, how they end, what is refused."""

import gzip

from hypothesis import given
from hypothesis import strategies as st

from aoscore.common.types import ErrorInfo
from aoscore.mp.logprovider.archive import IDLE_S, MAX_LOGS, Archive, LogArchiver, is_packed


def texts(archive: Archive) -> list[bytes]:
    return [gzip.decompress(part) if part else b"" for part in archive.parts]


def add(logs: LogArchiver, text: bytes, status: str = "ok", error: ErrorInfo | None = None) -> Archive | None:
    return logs.add("1", text, status, error, 0.0)


@given(st.lists(st.binary(max_size=40), max_size=12))
def test_parts_join_to_the_whole_and_keep_the_limit(pieces: list[bytes]) -> None:
    logs = LogArchiver(16, 1000)
    assert not any(add(logs, piece) for piece in pieces)
    archive = add(logs, b"", "empty")
    assert archive is not None
    assert b"".join(texts(archive)) == b"".join(pieces)
    assert all(0 < len(text) <= 16 for text in texts(archive)) or archive.parts == (b"",)
    assert archive.status == ("ok" if b"".join(pieces) else "empty")


def test_text_that_does_not_fit_begins_a_new_part() -> None:
    logs = LogArchiver(10, 10)
    for text in (b"1234567", b"abcdefg", b"xyz"):
        assert add(logs, text) is None
    archive = add(logs, b"", "empty")
    assert archive is not None and texts(archive) == [b"1234567", b"abcdefgxyz"]


def test_status_and_error_of_the_node_are_kept() -> None:
    logs, error = LogArchiver(10, 10), ErrorInfo(1, 0, "disk")
    assert add(logs, b"text") is None
    archive = add(logs, b" more", "error", error)
    assert archive is not None and texts(archive) == [b"text more"]
    assert (archive.status, archive.error) == ("error", error)
    assert add(logs, b"", "absent") == Archive("1", (b"",), "absent", None)


def test_too_long_a_log_is_closed_with_an_error_once() -> None:
    logs = LogArchiver(4, 2)
    archive = add(logs, b"0123456789")
    assert archive is not None
    assert (texts(archive), archive.status) == ([b"0123", b"4567"], "error")
    assert archive.error is not None and archive.error.message == "log truncated"
    assert add(logs, b"more") is None
    assert add(logs, b"", "empty") is None
    again = add(logs, b"abc", "empty")
    assert again is not None and (texts(again), again.status) == ([b"abc"], "ok")


def test_silent_logs_end_with_what_is_there() -> None:
    logs = LogArchiver(10, 10)
    assert logs.add("old", b"text", "ok", None, 0.0) is None
    assert logs.add("new", b"text", "ok", None, IDLE_S - 1) is None
    (archive,) = logs.overdue(IDLE_S)
    assert (archive.log_id, texts(archive), archive.status) == ("old", [b"text"], "error")
    assert not list(logs.overdue(IDLE_S))


def test_number_of_logs_at_a_time_is_limited() -> None:
    logs = LogArchiver(10, 10)
    for number in range(MAX_LOGS):
        assert logs.add(str(number), b"x", "ok", None, 0.0) is None
    refused = logs.add("one more", b"x", "ok", None, 0.0)
    assert refused is not None and refused.status == "error"


def test_packed_or_not() -> None:
    assert is_packed(b"") and is_packed(gzip.compress(b"x"))
    assert not is_packed(b"text")
