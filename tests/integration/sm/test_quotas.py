"""Storage and state of instances on a real file system with quotas: full is full, and nobody else suffers.

Kernels without quotas can't show it, so it is a test of bed D (testbed.md §7); with `pytest -m vm` it runs wherever
it is started as root on a kernel that has them, and says so where not.
"""

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from aoscore.sm.resourcemanager.quotas import STATES, STORAGES, Claim, DiskQuotas

pytestmark = pytest.mark.vm

MIB = 1024 * 1024
UID = 5000


@pytest.fixture
def mounted(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """An ext4 file system with quotas of the kind that the test names."""
    features, option = {"project": ("quota,project", "prjquota"), "user": ("quota", "usrquota")}[request.param]
    image, mount = tmp_path / "image", tmp_path / "mount"
    mount.mkdir()
    with image.open("wb") as file:
        file.truncate(64 * MIB)
    types = {"project": "usrquota:grpquota:prjquota", "user": "usrquota:grpquota"}[request.param]
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-O", features, "-E", f"quotatype={types}", image], check=True)
    done = subprocess.run(["mount", "-o", f"loop,{option}", image, mount], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"this kernel mounts no ext4 with {option}: {done.stderr.strip()}")
    try:
        yield mount
    finally:
        subprocess.run(["umount", mount], check=True)


def filled(path: Path, uid: int) -> tuple[int, int]:
    """Bytes that a user could write until it failed, and the errno; root would not be limited."""
    script = (
        "import os, sys\n"
        "uid, total = int(sys.argv[2]), 0\n"
        "fd = os.open(sys.argv[1], os.O_CREAT | os.O_WRONLY | os.O_APPEND)\n"
        "os.fchown(fd, uid, uid); os.setgid(uid); os.setuid(uid)\n"
        "try:\n"
        "    while total < 16 << 20:\n"
        "        total += os.write(fd, bytes(65536)); os.fsync(fd)\n"
        "except OSError as error:\n"
        "    print(total, error.errno)\n"
        "else:\n"
        "    print(total, 0)\n"
    )
    done = subprocess.run(["python3", "-c", script, path, str(uid)], capture_output=True, text=True, check=True)
    total, code = done.stdout.split()
    return int(total), int(code)


def claims(mount: Path, uid: int) -> list[Claim]:
    """A storage with 2 MiB and a state with 1 MiB, as SM makes them."""
    storage, state = mount / f"storage{uid}", mount / f"state{uid}.dat"
    storage.mkdir()
    state.touch(0o600)
    for path in (mount, storage, state):
        os.chown(path, uid if path != mount else 0, uid if path != mount else 0)
    return [Claim(STORAGES, storage, 2 * MIB), Claim(STATES, state, MIB)]


@pytest.mark.parametrize("mounted", ["project"], indirect=True)
def test_storage_and_state_are_limited_apart(mounted: Path) -> None:
    quotas = DiskQuotas()
    mine, other = claims(mounted, UID), claims(mounted, UID + 1)
    # What was there before the first limit counts too.
    (mine[0].path / "old").write_bytes(bytes(MIB))
    for uid, wanted in ((UID, mine), (UID + 1, other)):
        quotas.limit(uid, wanted)
    total, code = filled(mine[0].path / "data", UID)
    assert code in (errno.EDQUOT, errno.ENOSPC) and total <= MIB
    total, code = filled(mine[1].path, UID)
    assert code in (errno.EDQUOT, errno.ENOSPC) and MIB // 2 <= total <= MIB
    assert filled(other[0].path / "data", UID + 1)[0] >= MIB, "others are undisturbed"
    used = quotas.used_bytes(UID, STORAGES, mine[0].path)
    assert used is not None and MIB <= used <= 2 * MIB
    quotas.limit(UID, [Claim(STORAGES, mine[0].path, 0)])
    assert filled(mine[0].path / "data", UID) == (16 * MIB, 0)


@pytest.mark.parametrize("mounted", ["user"], indirect=True)
def test_the_user_is_limited_where_there_are_no_projects(mounted: Path) -> None:
    quotas = DiskQuotas()
    mine = claims(mounted, UID)
    quotas.limit(UID, mine)
    total, code = filled(mine[0].path / "data", UID)
    assert code == errno.EDQUOT and 2 * MIB <= total <= 3 * MIB
    assert quotas.used_bytes(UID, STORAGES, mine[0].path) is None
