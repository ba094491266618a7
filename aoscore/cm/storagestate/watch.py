"""Tells which directories had a file changed: inotify(7) on the event loop."""

import asyncio
import contextlib
import ctypes
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

from aoscore.common.errors import RuntimeFailure

_IN_MODIFY = 0x2
_IN_CLOSE_WRITE = 0x8
_IN_MOVED_TO = 0x80
_IN_Q_OVERFLOW = 0x4000
_IN_ONLYDIR = 0x1000000
_EVENT = struct.Struct("iIII")

_libc = ctypes.CDLL(None, use_errno=True)


class DirectoryWatch:
    """Watches directories while `listening`. A directory is watched, not the file, so that a replaced file is seen."""

    def __init__(self) -> None:
        self._fd = -1
        self._paths: dict[int, Path] = {}

    @contextlib.contextmanager
    def listening(self, changed: Callable[[Path, str], None]) -> Iterator[None]:
        """Call `changed(directory, file name)` for every change; with an empty name when events were lost."""
        loop = asyncio.get_running_loop()
        self._fd = _check(_libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC), "can't watch files")
        loop.add_reader(self._fd, self._read, changed)
        try:
            yield
        finally:
            loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1
            self._paths.clear()

    def add(self, directory: Path) -> None:
        """Watch a directory; again is fine."""
        mask = _IN_MODIFY | _IN_CLOSE_WRITE | _IN_MOVED_TO | _IN_ONLYDIR
        number = _libc.inotify_add_watch(self._fd, os.fsencode(directory), mask)
        self._paths[_check(number, f"can't watch {directory}")] = directory

    def remove(self, directory: Path) -> None:
        """Do not watch a directory any more."""
        for number, path in list(self._paths.items()):
            if path == directory:
                del self._paths[number]
                # Fails for a directory that is gone, whose watch the kernel has removed itself.
                _libc.inotify_rm_watch(self._fd, number)

    def _read(self, changed: Callable[[Path, str], None]) -> None:
        with contextlib.suppress(BlockingIOError):
            data = os.read(self._fd, 65536)
            position = 0
            while position < len(data):
                number, mask, _, length = _EVENT.unpack_from(data, position)
                name = data[position + _EVENT.size : position + _EVENT.size + length].rstrip(b"\0")
                position += _EVENT.size + length
                if mask & _IN_Q_OVERFLOW:
                    for path in list(self._paths.values()):
                        changed(path, "")
                elif (directory := self._paths.get(number)) is not None:
                    changed(directory, os.fsdecode(name))


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise RuntimeFailure(f"{what}: {os.strerror(number)}", number)
    return result
