"""Files of an image in pieces: counts, order, what is no file."""

import hashlib
import os
from pathlib import Path

import pytest

from aoscore.common.errors import InvalidArgumentError
from aoscore.mp.filechunker.files import CHUNK_BYTES, files_of, pieces_of, tree_digest


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 5 * CHUNK_BYTES])
def test_number_of_pieces(tmp_path: Path, size: int) -> None:
    content = os.urandom(size)
    (tmp_path / "file").write_bytes(content)
    (file,) = files_of(tmp_path)
    pieces = list(pieces_of(tmp_path, file))
    assert [part for part, _ in pieces] == list(range(1, file.parts_count + 1))
    assert b"".join(data for _, data in pieces) == content
    assert all(len(data) == CHUNK_BYTES for _, data in pieces[:-1])


def test_only_regular_files_in_the_order_of_their_paths(tmp_path: Path) -> None:
    for name in ("b", "a/z", "a0", "a.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "link").symlink_to("/etc/passwd")
    (tmp_path / "inner").symlink_to("b")
    os.mkfifo(tmp_path / "fifo")
    files = files_of(tmp_path)
    assert [file.path for file in files] == ["a.txt", "a/z", "a0", "b"]
    assert files[0].sha256 == hashlib.sha256(b"a.txt").digest()
    lines = "".join(f"{hashlib.sha256(name.encode()).hexdigest()}  {name}\n" for name in ("a.txt", "a/z", "a0", "b"))
    assert tree_digest(files) == f"sha256:{hashlib.sha256(lines.encode()).hexdigest()}"
    assert [file.path for file in files_of(tmp_path, follow_links=True)].count("b") == 2


@pytest.mark.parametrize("name", ["two\nlines", "x" * 200 + "/" + "y" * 200])
def test_names_that_cant_be_sent(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("x")
    with pytest.raises(InvalidArgumentError, match="name that can't be sent"):
        files_of(tmp_path)


def test_file_that_changes_is_no_longer_that_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(3000))
    (file,) = files_of(tmp_path)
    (tmp_path / "file").write_bytes(bytes(2000))
    with pytest.raises(InvalidArgumentError, match="changed while it was read"):
        list(pieces_of(tmp_path, file))
