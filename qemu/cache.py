"""Things that take long to build, kept under a key of what they are made of, below ~/.cache/aoscore/guests."""

import fcntl
import hashlib
import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from aoscore.common.errors import FailedError
from aoscore.common.files import remove_tree
from aoscore.ctl.host import run

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "aoscore" / "guests"
# Of each kind the last used stay, and what somebody may still be using.
_KEEP = 3
_IN_USE_S = 4 * 3600.0


def kept(kind: str, key_parts: Iterable[str | bytes], build: Callable[[Path], None]) -> Path:
    """The directory of this kind for this key; `build` fills it when it is not there.

    It appears whole or not at all, and one process at a time builds a kind. What was not used for long is removed.
    """
    state = hashlib.sha256()
    for part in key_parts:
        state.update(hashlib.sha256(part.encode() if isinstance(part, str) else part).digest())
    target = CACHE / f"{kind}-{state.hexdigest()[:16]}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / f"{kind}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.is_dir():
            building = CACHE / f"building-{kind}"
            # Of a builder that was killed; the lock says that it is gone.
            _remove(building)
            try:
                build(building)
                building.rename(target)
            finally:
                _remove(building)
        os.utime(target)
        _remove_old(kind)
    return target


def run_builder(args: Sequence[str | Path], timeout_s: float) -> str:
    """Run a program that mounts things, in namespaces of its own: its mounts and its children end with it."""
    namespaces = ("--mount", "--pid", "--fork", "--kill-child")
    return run(["setpriv", "--pdeathsig", "KILL", "unshare", *namespaces, *args], timeout_s)


def _remove(directory: Path) -> None:
    """Raises FailedError when something is mounted there: it would be emptied."""
    if f" {directory}/" in Path("/proc/self/mountinfo").read_text():
        raise FailedError(f"something is mounted below {directory}: unmount it, and run again")
    if directory.exists():
        remove_tree(directory)


def _remove_old(kind: str) -> None:
    found = sorted(CACHE.glob(f"{kind}-*"), key=lambda path: path.stat().st_mtime, reverse=True)
    for old in found[_KEEP:]:
        if old.stat().st_mtime < time.time() - _IN_USE_S:
            _remove(old)


def tree_digest(root: Path) -> str:
    """SHA-256 over names, modes, link targets and contents of all below `root`."""
    state = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        mode = path.lstat().st_mode
        content = os.fsencode(path.readlink()) if path.is_symlink() else path.read_bytes() if path.is_file() else b""
        for part in (os.fsencode(path.relative_to(root)), oct(mode).encode(), content):
            state.update(hashlib.sha256(part).digest())
    return state.hexdigest()
