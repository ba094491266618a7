"""Unpacked layers that move from one store to another; how they are unpacked is tested with the store of SM."""

import os
import stat
import struct
from pathlib import Path

import pytest

from aoscore._speedups.unpack import Owners
from aoscore.common.errors import ChecksumError, NotFoundError
from aoscore.common.layers import LayerStore
from aoscore.common.oci import MEDIA_TYPE_LAYER_TAR
from tests.support.items import sha256, tar

LAYER = tar({"bin/app": b"application", "etc/conf": b"x"})
DIFF_ID = sha256(LAYER)
PLENTY = 1 << 30
# Revision 2 with the effective bit and CAP_NET_BIND_SERVICE (linux/capability.h).
CAPABILITY = struct.pack("<IIIII", 0x02000001, 1 << 10, 0, 0, 0)
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")


def store(root: Path, owners: Owners = Owners.PROCESS) -> LayerStore:
    return LayerStore(root, root / "work", owners)


def unpacked(root: Path) -> LayerStore:
    one = store(root)
    blob = root / "blob"
    blob.write_bytes(LAYER)
    one.unpack(blob, DIFF_ID, DIFF_ID, MEDIA_TYPE_LAYER_TAR, max_bytes=PLENTY)
    return one


def test_layer_moves_with_what_is_noted_of_it(tmp_path: Path) -> None:
    first, second = unpacked(tmp_path / "first"), store(tmp_path / "second")
    assert second.take(DIFF_ID, tmp_path / "first")
    second.verify(DIFF_ID)
    assert (second.tree(DIFF_ID) / "bin/app").read_bytes() == b"application"
    assert second.size_bytes(DIFF_ID) == 12
    assert list(first.diff_ids()) == [] and list(second.diff_ids()) == [DIFF_ID]
    assert not second.take(DIFF_ID, tmp_path / "first")
    assert not second.take(DIFF_ID, tmp_path / "absent")
    assert not list((tmp_path / "second/work").iterdir())


def test_damaged_layer_is_not_taken(tmp_path: Path) -> None:
    first, second = unpacked(tmp_path / "first"), store(tmp_path / "second")
    (first.tree(DIFF_ID) / "bin/app").write_bytes(b"something else")
    with pytest.raises(ChecksumError, match="is damaged"):
        second.take(DIFF_ID, tmp_path / "first")
    assert list(first.diff_ids()) == list(second.diff_ids()) == []
    assert not list((tmp_path / "second/work").iterdir())


@pytest.mark.parametrize("what", ["no digest", "no tree", "a link"])
def test_layer_that_is_not_whole_is_not_taken(tmp_path: Path, what: str) -> None:
    first, second = unpacked(tmp_path / "first"), store(tmp_path / "second")
    tree = first.tree(DIFF_ID)
    match what:
        case "no digest":
            (first.path(DIFF_ID) / "digest").unlink()
        case "no tree":
            tree.rename(tmp_path / "elsewhere")
        case "a link":
            tree.rename(tmp_path / "elsewhere")
            tree.symlink_to(tmp_path / "elsewhere")
    with pytest.raises((ChecksumError, NotFoundError)):
        second.take(DIFF_ID, tmp_path / "first")
    assert list(second.diff_ids()) == []
    assert what != "a link" or (tmp_path / "elsewhere/bin/app").exists()


@needs_root
def test_taken_layer_gets_the_owners_of_the_store(tmp_path: Path) -> None:
    first, second = unpacked(tmp_path / "first"), store(tmp_path / "second", Owners.ROOT)
    app = first.tree(DIFF_ID) / "bin/app"
    for path in (app, app.parent):
        os.chown(path, 1234, 5678)
    app.chmod(0o6755)
    os.setxattr(app, "security.capability", CAPABILITY)
    (app.parent / "link").symlink_to("/nowhere")
    os.lchown(app.parent / "link", 1234, 5678)
    os.mknod(app.parent / "gone", 0o600 | stat.S_IFCHR, os.makedev(0, 0))
    os.chown(app.parent / "gone", 1234, 5678)
    assert second.take(DIFF_ID, tmp_path / "first")
    taken = second.tree(DIFF_ID) / "bin"
    for name in (".", "app", "link", "gone"):
        status = (taken / name).lstat()
        assert (status.st_uid, status.st_gid) == (0, 0), name
    status = (taken / "app").stat()
    assert stat.S_IMODE(status.st_mode) == 0o6755
    assert os.getxattr(taken / "app", "security.capability") == CAPABILITY
