"""System calls that Python 3.11 does not offer: mounts and namespaces. All raise OSError naming the path.

Blocking: call from a worker thread. Namespace changes hold for the calling *thread*; only `in_own_thread` may be used
for them, so that no thread of a pool is left in a foreign namespace (sm-runtime.md §7, D42).
"""

import ctypes
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

MS_RDONLY = 0x1
MS_NOSUID = 0x2
MS_NODEV = 0x4
MS_NOEXEC = 0x8
MS_BIND = 0x1000
MS_REC = 0x4000
MS_PRIVATE = 0x40000
MS_SHARED = 0x100000
MNT_DETACH = 0x2
CLONE_NEWNET = 0x40000000

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def mount(source: Path | str, target: Path, kind: str, flags: int = 0, data: str = "") -> None:
    """mount(2)."""
    result = _libc.mount(os.fsencode(source), os.fsencode(target), kind.encode(), ctypes.c_ulong(flags), data.encode())
    _check(result, f"mount {kind or source} on {target}")


def umount(target: Path, flags: int = 0) -> None:
    """umount2(2)."""
    _check(_libc.umount2(os.fsencode(target), flags), f"unmount {target}")


def syncfs(path: Path) -> None:
    """syncfs(2): all of the file system of `path` that is not on its disk yet goes there."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _check(_libc.syncfs(fd), f"write the file system of {path} to its disk")
    finally:
        os.close(fd)


def unshare(flags: int) -> None:
    """unshare(2) for the calling thread."""
    _check(_libc.unshare(flags), f"unshare {flags:#x}")


def setns(namespace: Path, kind: int) -> None:
    """setns(2) of the calling thread into the namespace that the file stands for."""
    fd = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _check(_libc.setns(fd, kind), f"enter namespace {namespace}")
    finally:
        os.close(fd)


def in_own_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run the function in a thread that exists only for it and wait for the result.

    Whatever namespace it has entered ends with the thread.
    """
    outcome: list[T] = []
    failure: list[BaseException] = []

    def body() -> None:
        try:
            outcome.append(function(*args, **kwargs))
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=body, name="namespace", daemon=True)
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return outcome[0]
