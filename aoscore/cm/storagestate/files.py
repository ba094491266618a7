"""Directories and state files of instances on disk. Everything here may block: call it in a worker.

The state file is bound into its container as a file, so its inode must stay: it is written in place, with a complete
copy beside it until that is done, from which an interrupted write is finished.
"""

import contextlib
import hashlib
import os
import shutil
from pathlib import Path

from aoscore.common.errors import OutOfRangeError
from aoscore.common.files import fsync_dir, remove_tree, safe_join, write_atomic
from aoscore.common.types import InstanceIdent

STATE_FILE = "state.dat"
MAX_STATE_BYTES = 64 * 1024
_COPY = ".state.dat.new"


def relative_dir(ident: InstanceIdent) -> str:
    """Directory of an instance below the roots; all its versions share it."""
    return f"{ident.item_id}/{ident.subject_id}/{ident.instance}"


def state_checksum(data: bytes) -> bytes:
    """SHA3-224, the checksum of the cloud protocol."""
    return hashlib.sha3_224(data).digest()


def make_storage(root: Path, ident: InstanceIdent, uid: int, gid: int) -> str:
    """Make the storage directory, owned by the instance with all that is in it; its path below root."""
    relative = relative_dir(ident)
    directory = safe_join(root, relative)
    directory.mkdir(parents=True, exist_ok=True)
    status = directory.stat()
    if (status.st_uid, status.st_gid) != (uid, gid):
        for _, names, files, fd in os.fwalk(directory):
            for name in [*names, *files]:
                os.chown(name, uid, gid, dir_fd=fd, follow_symlinks=False)
        # Last: while the top has its old owner, an interrupted walk is begun anew.
        os.chown(directory, uid, gid)
    return relative


def make_state(root: Path, ident: InstanceIdent, uid: int, gid: int) -> tuple[Path, bool]:
    """Make the state file if needed, and finish an interrupted write; the file, and whether it is new."""
    directory = safe_join(root, relative_dir(ident))
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / STATE_FILE
    is_new = not path.exists()
    if is_new:
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
    os.chown(path, uid, gid, follow_symlinks=False)
    with contextlib.suppress(FileNotFoundError):
        _write_in_place(path, (directory / _COPY).read_bytes())
    return path, is_new


def remove_dir(root: Path, ident: InstanceIdent) -> None:
    """Delete what an instance has below root, and parents that are empty then."""
    directory = safe_join(root, relative_dir(ident))
    remove_tree(directory)
    for parent in (directory.parent, directory.parent.parent):
        with contextlib.suppress(OSError):
            parent.rmdir()


def read_state(path: Path) -> bytes:
    """Content of a state file. Raises OutOfRangeError when it is too large."""
    with path.open("rb") as file:
        data = file.read(MAX_STATE_BYTES + 1)
    if len(data) > MAX_STATE_BYTES:
        raise OutOfRangeError(f"state file {path} is larger than {MAX_STATE_BYTES} bytes")
    return data


def write_copy(path: Path, data: bytes) -> None:
    """First half of a write: after this the content survives."""
    write_atomic(path.with_name(_COPY), data)


def finish_write(path: Path, data: bytes) -> None:
    """Second half of a write."""
    _write_in_place(path, data)


def _write_in_place(path: Path, data: bytes) -> None:
    with path.open("r+b") as file:
        file.write(data)
        file.truncate()
        file.flush()
        os.fsync(file.fileno())
    path.with_name(_COPY).unlink(missing_ok=True)
    fsync_dir(path.parent)


def total_bytes(path: Path) -> int:
    """Size of the whole file system of path."""
    return shutil.disk_usage(path).total
