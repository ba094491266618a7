"""Disk quotas of users and projects: quotactl(2) and project ids, which the standard library lacks. Blocking."""

import ctypes
import enum
import errno
import fcntl
import os
import stat
import struct
from pathlib import Path

import msgspec

from aoscore.common.errors import NotFoundError, NotSupportedError, RuntimeFailure


class Kind(enum.IntEnum):
    """Whose use of a file system is limited; the kernel's numbers (USRQUOTA, PRJQUOTA)."""

    USER = 0
    PROJECT = 2


class Usage(msgspec.Struct, frozen=True):
    """What is used, and the limit; 0 means there is none."""

    used_bytes: int
    limit_bytes: int


_GET, _SET = 0x800007, 0x800008
"""Q_GETQUOTA and Q_SETQUOTA."""
_BLOCK_LIMITS = 1
_BLOCK_BYTES = 1024
_NOT_ENABLED = {errno.ESRCH, errno.ENOTBLK, errno.ENOSYS, errno.ENODEV, errno.EOPNOTSUPP, errno.ENOENT, errno.EINVAL}
_NO_PROJECTS = {errno.ENOTTY, errno.EOPNOTSUPP, errno.EINVAL}
_GET_ATTRIBUTES, _SET_ATTRIBUTES = 0x801C581F, 0x401C5820
"""FS_IOC_FSGETXATTR and FS_IOC_FSSETXATTR with struct fsxattr: flags, two sizes, project, a third size, padding."""
_ATTRIBUTES = struct.Struct("=5I8x")
_INHERIT = 0x200
"""FS_XFLAG_PROJINHERIT: what is made in a directory gets its project."""

_libc = ctypes.CDLL(None, use_errno=True)


class Limits(ctypes.Structure):
    """struct if_dqblk of the kernel."""

    _fields_ = (
        ("block_hard", ctypes.c_uint64),
        ("block_soft", ctypes.c_uint64),
        ("space", ctypes.c_uint64),
        ("inode_hard", ctypes.c_uint64),
        ("inode_soft", ctypes.c_uint64),
        ("inodes", ctypes.c_uint64),
        ("block_time", ctypes.c_uint64),
        ("inode_time", ctypes.c_uint64),
        ("valid", ctypes.c_uint32),
    )


def device_of(path: Path, mounts: Path = Path("/proc/self/mountinfo")) -> str:
    """The device that the file system of path is on. Raises NotFoundError when the mount table does not tell."""
    number = os.stat(path).st_dev  # noqa: PTH116 - works the same for any path-like
    wanted = f"{os.major(number)}:{os.minor(number)}"
    for line in mounts.read_text().splitlines():
        fields, _, rest = line.partition(" - ")
        if fields.split()[2] == wanted:
            return rest.split()[1].replace("\\040", " ")
    raise NotFoundError(f"no mount for {path} in {mounts}")


def set_limit(path: Path, kind: Kind, number: int, limit_bytes: int) -> None:
    """Limit what a user or project may have on the file system of path, bytes rounded up to KiB; 0 removes the limit.

    Raises NotSupportedError where quotas of this kind are not switched on, RuntimeFailure for any other refusal.
    """
    limits = Limits(block_hard=-(-limit_bytes // _BLOCK_BYTES), valid=_BLOCK_LIMITS)
    _call(_SET, path, kind, number, limits, f"limit {kind.name.lower()} {number} to {limit_bytes} bytes")


def usage(path: Path, kind: Kind, number: int) -> Usage:
    """What a user or project has on the file system of path. Raises as `set_limit`."""
    limits = Limits()
    _call(_GET, path, kind, number, limits, f"tell what {kind.name.lower()} {number} uses")
    return Usage(limits.space, limits.block_hard * _BLOCK_BYTES)


def set_user_quota(path: Path, uid: int, limit_bytes: int) -> None:
    """`set_limit` of a user."""
    set_limit(path, Kind.USER, uid, limit_bytes)


def project_of(path: Path) -> int:
    """Project id of a file or directory; 0 where there are no projects."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        return int(_attributes(fd)[3])
    except OSError as error:
        if error.errno in _NO_PROJECTS:
            return 0
        raise
    finally:
        os.close(fd)


def set_project(path: Path, project: int) -> None:
    """Give a file, or a directory with all below it, to a project; what is made there later belongs to it too.

    Raises NotSupportedError where the file system has no projects.
    """
    pending = [path]
    while pending:
        current = pending.pop()
        try:
            fd = os.open(current, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        try:
            is_directory = stat.S_ISDIR(os.fstat(fd).st_mode)
            flags, extent, extents, _, cow_extent = _attributes(fd)
            flags |= _INHERIT if is_directory else 0
            fcntl.ioctl(fd, _SET_ATTRIBUTES, _ATTRIBUTES.pack(flags, extent, extents, project, cow_extent))
            if is_directory:
                with os.scandir(fd) as entries:
                    # Links, pipes and sockets take no space worth counting, and opening them can do harm.
                    pending += [
                        current / entry.name
                        for entry in entries
                        if entry.is_file(follow_symlinks=False) or entry.is_dir(follow_symlinks=False)
                    ]
        except OSError as error:
            if error.errno in _NO_PROJECTS:
                raise NotSupportedError(f"can't give {current} to project {project}: {error.strerror}") from error
            raise
        finally:
            os.close(fd)


def _attributes(fd: int) -> tuple[int, ...]:
    return _ATTRIBUTES.unpack(fcntl.ioctl(fd, _GET_ATTRIBUTES, bytes(_ATTRIBUTES.size)))


def _call(command: int, path: Path, kind: Kind, number: int, limits: Limits, what: str) -> None:
    device = device_of(path)
    # An id is an int for libc and unsigned for the kernel.
    if _libc.quotactl(command << 8 | kind, device.encode(), ctypes.c_int(number), ctypes.byref(limits)) == 0:
        return
    code = ctypes.get_errno()
    text = f"can't {what} on {device}, where {path} is: {os.strerror(code)}"
    if code in _NOT_ENABLED:
        raise NotSupportedError(text)
    raise RuntimeFailure(text, code)
