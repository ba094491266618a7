"""Cutting a log into the parts of a reply (sm.md §9). Pure."""

import gzip
from collections import deque
from collections.abc import Iterable

import msgspec

from aoscore.sm.logprovider.source import LogLine


class Parts(msgspec.Struct, frozen=True):
    """Compressed parts in order; `dropped` oldest ones did not fit."""

    data: tuple[bytes, ...]
    dropped: int


def format_line(line: LogLine) -> bytes:
    """The line as AosCore 9.1 writes it; the blank at the end of instance lines is part of the format."""
    when = f"{line.time:%Y%m%d%H%M%SZ}"
    text = f"{when} {line.unit} {line.message}\n" if line.unit else f"{when} {line.message} \n"
    return text.encode(errors="replace")


def build_parts(lines: Iterable[LogLine], *, max_size_bytes: int, max_count: int) -> Parts:
    """Parts of at most `max_size_bytes` before compression, each a gzip stream of its own.

    When there is more than `max_count` parts can hold, the newest are kept (D21).
    """
    parts: deque[bytes] = deque(maxlen=max_count)
    made = 0
    current: list[bytes] = []
    size = 0

    def close() -> None:
        nonlocal made, size
        if current:
            parts.append(gzip.compress(b"".join(current), compresslevel=6, mtime=0))
            made += 1
            current.clear()
            size = 0

    for line in lines:
        text = format_line(line)
        if len(text) > max_size_bytes:
            text = text[: max_size_bytes - 1] + b"\n"
        if size + len(text) > max_size_bytes:
            close()
        current.append(text)
        size += len(text)
    close()
    return Parts(tuple(parts), made - len(parts))
