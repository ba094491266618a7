"""Container layers and incremental updates: a tree, a second one, and what turns the one into the other."""

import os
import stat
import sys
import tarfile
from pathlib import Path

import pytest

from tests.layer import parser

sys.path.insert(0, str(parser.LAYER / "lib"))
from aoscore_build import trees


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    old, new = tmp_path / "old", tmp_path / "new"
    for root in (old, new):
        (root / "etc" / "keep").mkdir(parents=True)
        (root / "etc" / "same").write_text("same")
        (root / "etc" / "changed").write_text(root.name)
        (root / "etc" / "link").symlink_to(root.name)
    (old / "gone" / "deep").mkdir(parents=True)
    (old / "gone" / "deep" / "file").write_text("x")
    (old / "etc" / "gone").write_text("x")
    (old / "becomes-dir").write_text("x")
    (new / "becomes-dir").mkdir()
    (new / "becomes-dir" / "inside").write_text("y")
    (old / "becomes-file").mkdir()
    (old / "becomes-file" / "was").write_text("x")
    (new / "becomes-file").write_text("y")
    (new / "new").mkdir(mode=0o711)
    (new / "new" / "tool").write_text("#!")
    (new / "new" / "tool").chmod(0o4755)
    (old / "etc" / "mode").write_text("m")
    (new / "etc" / "mode").write_text("m")
    (new / "etc" / "mode").chmod(0o600)
    return old, new


def test_changes(pair: tuple[Path, Path]) -> None:
    changed, removed = trees.changes(*pair)
    assert changed == [
        "becomes-dir",
        "becomes-dir/inside",
        "becomes-file",
        "etc/changed",
        "etc/link",
        "etc/mode",
        "new",
        "new/tool",
    ]
    assert removed == ["etc/gone", "gone"]


def apply_layer(archive: Path, root: Path) -> None:
    """As the OCI image specification says a layer is applied."""
    with tarfile.open(archive) as tar:
        for member in tar.getmembers():
            name = Path(member.name)
            if name.name == trees.OPAQUE:
                continue
            target = root / name
            if name.name.startswith(trees.WHITEOUT):
                gone = target.with_name(name.name.removeprefix(trees.WHITEOUT))
                os.system(f"rm -rf {gone}")
                continue
            if target.is_symlink() or (target.exists() and not (target.is_dir() and member.isdir())):
                os.system(f"rm -rf {target}")
            tar.extract(member, root, filter="fully_trusted")


def test_a_layer_turns_the_parent_into_the_new_tree(pair: tuple[Path, Path], tmp_path: Path) -> None:
    old, new = pair
    trees.layer_archive(old, new, tmp_path / "layer.tar.gz")
    with tarfile.open(tmp_path / "layer.tar.gz") as tar:
        names = tar.getnames()
        assert {member.mtime for member in tar.getmembers()} == {0}
        assert {member.uname for member in tar.getmembers()} == {""}
    assert "etc/.wh.gone" in names and ".wh.gone" in names and "becomes-dir/.wh..wh..opq" in names
    apply_layer(tmp_path / "layer.tar.gz", old)
    assert trees.changes(old, new) == ([], [])


def test_layers_are_the_same_bytes_each_time(pair: tuple[Path, Path], tmp_path: Path) -> None:
    old, new = pair
    trees.layer_archive(old, new, tmp_path / "one.tar.gz")
    for path in new.rglob("*"):
        if not path.is_symlink():
            os.utime(path, (1, 1))
    trees.layer_archive(old, new, tmp_path / "two.tar.gz")
    assert (tmp_path / "one.tar.gz").read_bytes() == (tmp_path / "two.tar.gz").read_bytes()


def test_a_first_layer_is_the_whole_tree(pair: tuple[Path, Path], tmp_path: Path) -> None:
    _, new = pair
    trees.layer_archive(None, new, tmp_path / "layer.tar.gz")
    (tmp_path / "empty").mkdir()
    apply_layer(tmp_path / "layer.tar.gz", tmp_path / "empty")
    assert trees.changes(tmp_path / "empty", new) == ([], [])


def test_nothing_changed_is_a_mistake(pair: tuple[Path, Path], tmp_path: Path) -> None:
    old, _ = pair
    with pytest.raises(ValueError, match="is empty"):
        trees.layer_archive(old, old, tmp_path / "layer.tar.gz")
    with pytest.raises(ValueError, match="does not differ"):
        trees.incremental_tree(old, old, tmp_path / "update")


@pytest.mark.skipif(os.geteuid() != 0, reason="makes device files: needs root")
def test_an_incremental_update(pair: tuple[Path, Path], tmp_path: Path) -> None:
    old, new = pair
    trees.incremental_tree(old, new, tmp_path / "update")
    update = tmp_path / "update"
    for name in ("gone", "etc/gone"):
        status = (update / name).lstat()
        assert stat.S_ISCHR(status.st_mode) and status.st_rdev == 0
    assert (update / "etc" / "changed").read_text() == "new"
    assert (update / "new" / "tool").stat().st_mode & 0o7777 == 0o4755
    assert (update / "new").stat().st_mode & 0o7777 == 0o711
    assert not (update / "etc" / "same").exists()


def test_order_of_layers() -> None:
    assert trees.layer_order({"c": "b", "b": "a", "a": "", "d": ""}) == ["a", "b", "c", "d"]
    with pytest.raises(ValueError, match="a -> b -> a"):
        trees.layer_order({"a": "b", "b": "a"})
