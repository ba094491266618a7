"""Processes take turns at a token (SoftHSM).

SoftHSM writes the file of a token at each login, and whoever reads it in that moment finds no token, or one without an
owner. So who logs in or looks at a token takes a lock on its PIN file first: all that may log in can read it. Tokens
without a PIN file (OP-TEE) keep order themselves.
"""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

# Who does not get the lock by then goes on without: a process whose library hangs must not hold up all others.
_LIMIT_S = 2.0
_PAUSE_S = 0.005


@contextlib.contextmanager
def turn(pin_file: Path | None) -> Iterator[None]:
    """Work with the token of this PIN file while nobody else does; blocks until then."""
    try:
        fd = os.open(pin_file, os.O_RDONLY | os.O_CLOEXEC) if pin_file is not None else None
    except OSError:
        # It is made with the token; and who can't read it does not log in.
        fd = None
    if fd is None:
        yield
        return
    try:
        end_s = time.monotonic() + _LIMIT_S
        while not _locked(fd) and time.monotonic() < end_s:
            time.sleep(_PAUSE_S)
        yield
    finally:
        os.close(fd)


def _locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
