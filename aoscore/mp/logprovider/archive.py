"""Packs logs that come as text into parts of limited size (mp.md §9). Pure; times are seconds that only grow."""

import zlib
from collections.abc import Iterator
from typing import Any

import msgspec

from aoscore.common.errors import FailedError, to_error_info
from aoscore.common.types import ErrorInfo

MAX_LOGS = 16
"""At a time, of one node: each holds up to all of its parts."""
IDLE_S = 60.0
_OK, _EMPTY, _ERROR = "ok", "empty", "error"
_GZIP_MAGIC = b"\x1f\x8b"
# zlib's word for the gzip format with the largest window. It writes no time: the same text makes the same archive.
_GZIP_WBITS = 31


def is_packed(data: bytes) -> bool:
    """Whether a part of a log is an archive already, or nothing at all: whoever sends such packs its logs itself."""
    return not data or data.startswith(_GZIP_MAGIC)


class Archive(msgspec.Struct, frozen=True):
    """A log, whole: at least one part. `status` and `error` belong to the last one, the others are "ok"."""

    log_id: str
    parts: tuple[bytes, ...]
    status: str
    error: ErrorInfo | None

    def log_data(self) -> Iterator[tuple[dict[str, Any], ErrorInfo | None]]:
        """Members of each part that LogData has in every interface, and the error that belongs to the part."""
        count = len(self.parts)
        for part, data in enumerate(self.parts, 1):
            is_last = part == count
            status = self.status if is_last else _OK
            yield {"part_count": count, "part": part, "data": data, "status": status}, self.error if is_last else None


class _Log:
    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.heard_s = 0.0
        self.is_closed = False
        self._begin()

    def _begin(self) -> None:
        self._packed = bytearray()
        self._stream = zlib.compressobj(9, zlib.DEFLATED, _GZIP_WBITS)
        self.size = 0

    def write(self, text: bytes) -> None:
        self._packed += self._stream.compress(text)
        self.size += len(text)

    def end_part(self) -> None:
        if self.size:
            self.parts.append(bytes(self._packed + self._stream.flush()))
            self._begin()


class LogArchiver:
    """Collects the logs of one node. Limits count bytes of text: of a part, and how many parts a log may have."""

    def __init__(self, max_part_size: int, max_part_count: int) -> None:
        self._max_part_size = max_part_size
        self._max_part_count = max_part_count
        self._logs: dict[str, _Log] = {}

    def has(self, log_id: str) -> bool:
        """Whether the log is being collected."""
        return log_id in self._logs

    def add(self, log_id: str, text: bytes, status: str, error: ErrorInfo | None, now_s: float) -> Archive | None:
        """Take what came; the archive once the log is over. Every status but "ok" ends it."""
        log = self._logs.get(log_id)
        if log is None:
            if len(self._logs) >= MAX_LOGS:
                refused = to_error_info(FailedError(f"more than {MAX_LOGS} logs at a time"))
                return None if status == _OK and not text else Archive(log_id, (b"",), _ERROR, refused)
            log = self._logs[log_id] = _Log()
        log.heard_s = now_s
        archive = None
        if not log.is_closed and not self._write(log, text):
            # What follows of this log is passed over until its end.
            log.is_closed = True
            archive = _archive(log_id, log, _ERROR, to_error_info(FailedError("log truncated")))
        if status != _OK:
            del self._logs[log_id]
            if not log.is_closed:
                is_fine = status == _EMPTY and (log.size or log.parts)
                archive = _archive(log_id, log, _OK if is_fine else status, error)
        return archive

    def overdue(self, now_s: float) -> Iterator[Archive]:
        """Logs of which nothing came for too long, as far as they came."""
        for log_id, log in list(self._logs.items()):
            if now_s - log.heard_s >= IDLE_S:
                del self._logs[log_id]
                if not log.is_closed:
                    silence = FailedError(f"nothing more of the log came for {IDLE_S:g} s")
                    yield _archive(log_id, log, _ERROR, to_error_info(silence))

    def _write(self, log: _Log, text: bytes) -> bool:
        """Whether it found room."""
        rest = memoryview(text)
        while rest:
            room = self._max_part_size - log.size
            if room <= 0 or (log.size and len(rest) > room):
                # As AosCore does: what does not fit as a whole begins a new part.
                log.end_part()
                room = self._max_part_size
            if len(log.parts) >= self._max_part_count:
                return False
            log.write(bytes(rest[:room]))
            rest = rest[room:]
        return True


def _archive(log_id: str, log: _Log, status: str, error: ErrorInfo | None) -> Archive:
    log.end_part()
    return Archive(log_id, tuple(log.parts) or (b"",), status, error)
