"""inotify(7), which the standard library lacks: notice of a file's next change. Nothing here blocks."""

import ctypes
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

_MODIFY = 0x2
_ONE_SHOT = 0x80000000
_EVENT = struct.Struct("=iIII")
_BUFFER_BYTES = 64 * 1024

_libc = ctypes.CDLL(None, use_errno=True)


class Inotify:
    """Watches that each tell one change and are over then. A context manager."""

    def __init__(self) -> None:
        """Raises OSError when there are too many instances of it."""
        self._fd = _checked(_libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC), "inotify")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._fd)

    def fileno(self) -> int:
        """Readable when a watch has something to tell."""
        return self._fd

    def watch(self, path: Path) -> int:
        """Wait for the next change of a file; the number of the watch. Raises OSError naming the file."""
        number = _libc.inotify_add_watch(self._fd, os.fsencode(path), ctypes.c_uint32(_MODIFY | _ONE_SHOT))
        return _checked(number, f"watch {path}")

    def changed(self) -> Iterator[int]:
        """Numbers of the watches whose files have changed since the last call."""
        try:
            data = os.read(self._fd, _BUFFER_BYTES)
        except BlockingIOError:
            return
        at = 0
        while at < len(data):
            number, mask, _, name_bytes = _EVENT.unpack_from(data, at)
            at += _EVENT.size + name_bytes
            if mask & _MODIFY:
                yield number


def _checked(result: int, what: str) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result
