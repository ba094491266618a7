"""Results that take long: whole or not at all, built once, kept while they are used."""

import os
import time
from pathlib import Path

import pytest

from aoscore.common.errors import FailedError
from qemu import cache


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "CACHE", tmp_path / "cache")


def write(target: Path) -> None:
    target.mkdir()
    (target / "file").write_text(target.name)


def test_the_same_key_is_built_once() -> None:
    built: list[Path] = []

    def build(target: Path) -> None:
        built.append(target)
        write(target)

    first = cache.kept("thing", ["a", b"b"], build)
    assert cache.kept("thing", ["a", b"b"], build) == first
    assert cache.kept("thing", ["ab"], build) != first
    assert len(built) == 2
    assert (first / "file").read_text() == "building-thing"


def test_a_build_that_fails_leaves_nothing_and_is_repeated() -> None:
    def fail(target: Path) -> None:
        write(target)
        raise FailedError("no network")

    with pytest.raises(FailedError, match="no network"):
        cache.kept("thing", ["a"], fail)
    assert [path.name for path in cache.CACHE.iterdir()] == ["thing.lock"]
    # What a killed builder left is no part of the next result.
    write(cache.CACHE / "building-thing")
    assert (cache.kept("thing", ["a"], write) / "file").exists()


def test_only_what_was_not_used_for_long_goes() -> None:
    paths = [cache.kept("thing", [str(number)], write) for number in range(6)]
    assert all(path.exists() for path in paths), "somebody may be using them"
    yesterday = time.time() - 24 * 3600
    for path in paths[:4]:
        os.utime(path, (yesterday, yesterday))
    cache.kept("thing", ["0"], write)
    assert [path.exists() for path in paths] == [True, False, False, False, True, True]


def test_nothing_is_removed_with_a_mount_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    write_dir = cache.CACHE / "building-thing"
    cache.CACHE.mkdir()
    write(write_dir)
    mounts = f"36 35 0:5 / {write_dir}/sys ro - sysfs sys ro\n"
    read = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda self: mounts if self.name == "mountinfo" else read(self))
    with pytest.raises(FailedError, match="mounted below"):
        cache.kept("thing", ["a"], write)
    assert (write_dir / "file").exists()


def test_the_digest_of_a_tree_sees_names_modes_links_and_contents(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "file").write_text("a")
    (root / "link").symlink_to("file")
    seen = {cache.tree_digest(root)}
    (root / "file").write_text("b")
    seen.add(cache.tree_digest(root))
    (root / "file").chmod(0o600)
    seen.add(cache.tree_digest(root))
    (root / "link").unlink()
    (root / "link").symlink_to("nowhere")
    seen.add(cache.tree_digest(root))
    (root / "file").rename(root / "other")
    seen.add(cache.tree_digest(root))
    assert len(seen) == 5
