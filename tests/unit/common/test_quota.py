"""Disk quotas: what the kernel is asked and how its answers are read."""

import ctypes
import errno
from pathlib import Path

import pytest

from aoscore.common import quota
from aoscore.common.errors import NotSupportedError, RuntimeFailure
from aoscore.common.quota import Kind, Limits, Usage, set_limit, set_user_quota, usage
from tests.support.kernelquota import KernelQuotas


def test_the_structure_is_the_kernels() -> None:
    """struct if_dqblk of linux/quota.h: eight 64 bit numbers and a 32 bit one, padded."""
    assert ctypes.sizeof(Limits) == 72
    assert (Limits.block_hard.offset, Limits.space.offset, Limits.valid.offset) == (0, 16, 64)
    assert quota._ATTRIBUTES.size == 28, "struct fsxattr of linux/fs.h"


def test_limits_are_set_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = KernelQuotas(0, 2)
    monkeypatch.setattr(quota, "_libc", kernel)
    set_limit(tmp_path, Kind.PROJECT, 10001, 1025)
    set_user_quota(tmp_path, 5000, 4096)
    assert kernel.limits == {(2, 10001): 2048, (0, 5000): 4096}, "rounded up to KiB"
    kernel.used[2, 10001] = 77
    assert usage(tmp_path, Kind.PROJECT, 10001) == Usage(77, 2048)
    set_limit(tmp_path, Kind.PROJECT, 10001, 0)
    assert usage(tmp_path, Kind.PROJECT, 10001) == Usage(77, 0)


@pytest.mark.parametrize("code", [errno.ESRCH, errno.ENOSYS, errno.ENOTBLK, errno.EINVAL])
def test_no_quotas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    monkeypatch.setattr(quota, "_libc", KernelQuotas(refuse=code))
    with pytest.raises(NotSupportedError, match=f"can't limit user 5000 to 1024 bytes on .*, where {tmp_path} is"):
        set_user_quota(tmp_path, 5000, 1024)
    with pytest.raises(NotSupportedError, match="can't tell what project 1 uses"):
        usage(tmp_path, Kind.PROJECT, 1)


def test_another_refusal_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quota, "_libc", KernelQuotas(refuse=errno.EPERM))
    with pytest.raises(RuntimeFailure, match="Operation not permitted") as caught:
        set_user_quota(tmp_path, 5000, 1024)
    assert caught.value.errno == errno.EPERM
