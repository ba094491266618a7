"""Calls of the kernel that the standard library lacks."""

import errno
from pathlib import Path

import pytest

from aoscore.common import linux


def test_defect_10_a_failed_mount_says_why(tmp_path: Path) -> None:
    """AosCore 9.1 always logs that permission was denied (observed.md, defect 10)."""
    with pytest.raises(OSError, match="No such file or directory") as failure:
        linux.mount("tmpfs", tmp_path / "missing", "tmpfs")
    assert failure.value.errno == errno.ENOENT
    assert str(tmp_path / "missing") in str(failure.value)
