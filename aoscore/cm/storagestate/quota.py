"""Disk quotas by user id: quotactl(2), which the standard library lacks."""

import ctypes
import errno
import os
from pathlib import Path

from aoscore.common.errors import NotFoundError, NotSupportedError, RuntimeFailure

_SET_USER_QUOTA = 0x800008 << 8
"""Q_SETQUOTA for user quotas (USRQUOTA is 0)."""
_BLOCK_LIMITS = 1
_BLOCK_BYTES = 1024
_NOT_ENABLED = {errno.ESRCH, errno.ENOTBLK, errno.ENOSYS, errno.ENODEV, errno.EOPNOTSUPP, errno.ENOENT}

_libc = ctypes.CDLL(None, use_errno=True)


class _Limits(ctypes.Structure):
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


def set_user_quota(path: Path, uid: int, limit_bytes: int) -> None:
    """Limit what a user may have on the file system of path, bytes rounded up to KiB; 0 removes the limit.

    Raises NotSupportedError where quotas are not switched on, RuntimeFailure for any other refusal.
    """
    blocks = -(-limit_bytes // _BLOCK_BYTES)
    limits = _Limits(block_hard=blocks, valid=_BLOCK_LIMITS)
    device = device_of(path)
    if _libc.quotactl(_SET_USER_QUOTA, device.encode(), uid, ctypes.byref(limits)) == 0:
        return
    number = ctypes.get_errno()
    text = f"can't limit user {uid} to {limit_bytes} bytes on {device}, where {path} is: {os.strerror(number)}"
    if number in _NOT_ENABLED:
        raise NotSupportedError(text)
    raise RuntimeFailure(text, number)
