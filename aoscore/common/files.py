"""Files that survive power loss, paths that cannot escape, directories with one owner."""

import contextlib
import errno
import fcntl
import glob
import os
import shutil
import signal
import tempfile
import time
import uuid
from pathlib import Path
from types import TracebackType
from typing import Self

from aoscore.common.errors import AlreadyExistsError, InvalidArgumentError


def fsync_dir(path: Path) -> None:
    """Make the names inside a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def fsync_file(path: Path) -> None:
    """Make the content of a file durable."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_atomic(path: Path, data: bytes, mode: int = 0o600, *, durable: bool = True) -> None:
    """Replace a file so that after a power cut either the old or the new content is there, whole.

    What is not `durable` is only whole for readers while the power stays on; it costs no wait for the disk.
    """
    fd, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(fd, "wb") as file:
            os.fchmod(fd, mode)
            file.write(data)
            file.flush()
            if durable:
                os.fsync(fd)
        Path(name).rename(path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            Path(name).unlink()
        raise
    if durable:
        fsync_dir(path.parent)


def remove_unfinished(path: Path) -> None:
    """Remove what a `write_atomic` of this file left when its process was killed; to be called while nobody writes."""
    for unfinished in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        unfinished.unlink(missing_ok=True)


def safe_join(root: Path, relative: str) -> Path:
    """`root/relative`, refused when it would lie outside root, symbolic links followed.

    Raises InvalidArgumentError naming the path.
    """
    if not relative or relative.startswith("/") or "\0" in relative or ".." in Path(relative).parts:
        raise InvalidArgumentError(f"path {relative!r} is not inside {root}")
    joined = root / relative
    if not joined.resolve().is_relative_to(root.resolve()):
        raise InvalidArgumentError(f"path {relative!r} leads out of {root}")
    return joined


def remove_tree(path: Path) -> None:
    """Delete a file or a directory with all below it; absent is fine."""
    if not path.is_dir() or path.is_symlink():
        path.unlink(missing_ok=True)
        return
    try:
        shutil.rmtree(path)
    except RecursionError:
        # Before Python 3.13 a tree that is deep on purpose could not be deleted at all.
        _remove_deep_tree(path)


def _remove_deep_tree(path: Path) -> None:
    """Delete a directory however deep it is: every directory found is moved to the top first."""
    left = [path]
    while left:
        current = left[-1]
        with os.scandir(current) as entries:
            found = list(entries)
        if not found:
            left.pop().rmdir()
        for entry in found:
            if entry.is_dir(follow_symlinks=False):
                left.append(Path(entry.path).rename(path / f".{uuid.uuid4().hex}"))
            else:
                Path(entry.path).unlink()


def move(source: Path, target: Path) -> bool:
    """Rename a file or directory; False when it is not there or lies on another file system."""
    try:
        source.rename(target)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EXDEV):
            return False
        raise
    return True


def available_bytes(path: Path) -> int:
    """Free space for us on the file system of path, bytes."""
    stat = os.statvfs(path)
    return stat.f_bavail * stat.f_frsize


_LOCK_FILE = ".lock"


def _holders(path: Path) -> set[int]:
    """Other processes that hold a lock on the file, as far as we may look (proc_pid_fdinfo(5))."""
    name, found = str(path.resolve()), set()
    for process in Path("/proc").iterdir():
        if not process.name.isdecimal() or int(process.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            for fd in (process / "fd").iterdir():
                if str(fd.readlink()) == name and "FLOCK" in (process / "fdinfo" / fd.name).read_text():
                    found.add(int(process.name))
    return found


class DirectoryLock:
    """One process per working directory: held until released or until the process ends, however it ends."""

    def __init__(self, directory: Path) -> None:
        """Creates the directory (0700) if needed. Raises AlreadyExistsError when another process holds it."""
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._fd = os.open(directory / _LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._fd)
            raise AlreadyExistsError(f"working directory {directory} is in use by another process") from None

    @classmethod
    def after_stop(cls, directory: Path, timeout_s: float) -> Self:
        """The same, after whoever holds the directory was told to stop (SIGTERM) and has done so. Blocks.

        Raises AlreadyExistsError when it does not within the time.
        """
        told: set[int] = set()
        end_s = time.monotonic() + timeout_s
        while True:
            try:
                return cls(directory)
            except AlreadyExistsError:
                if time.monotonic() > end_s:
                    raise
            for process in _holders(directory / _LOCK_FILE) - told:
                told.add(process)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGTERM)
            time.sleep(0.05)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def release(self) -> None:
        """Let another process have the directory."""
        os.close(self._fd)
