"""The node's blobs: verified, within limits, the least used go first."""

import os
from pathlib import Path
from typing import Any

import pytest

from aoscore.common.errors import ChecksumError, InvalidArgumentError, NoSpaceError
from aoscore.mp.nodeserver.store import NodeStore
from tests.support.items import sha256


def make(root: Path, **limits: Any) -> NodeStore:
    return NodeStore(root, **{"ttl_s": 1000.0, "min_free_bytes": 0, "max_size_bytes": 0, **limits})


def put(store: NodeStore, content: bytes) -> str:
    digest = sha256(content)
    store.part(digest).write_bytes(content)
    store.adopt(digest)
    return digest


def age(store: NodeStore, digest: str, seconds: float) -> None:
    path = store.path(digest)
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns - int(seconds * 1e9), stat.st_mtime_ns))


def test_grown_blob_is_taken_in(tmp_path: Path) -> None:
    store = make(tmp_path)
    digest = put(store, b"content")
    assert store.use(digest)
    assert store.path(digest).read_bytes() == b"content"
    assert not store.part(digest).exists()


def test_wrong_content_is_not_taken_in(tmp_path: Path) -> None:
    store = make(tmp_path)
    digest = sha256(b"right")
    store.part(digest).write_bytes(b"wrong")
    with pytest.raises(ChecksumError):
        store.adopt(digest)
    assert not store.part(digest).exists()
    assert not store.use(digest)


def test_damaged_blob_is_not_given_out(tmp_path: Path) -> None:
    digest = put(make(tmp_path), b"content")
    store = make(tmp_path)
    store.path(digest).write_bytes(b"damaged")
    assert not store.use(digest)
    assert not store.path(digest).exists()


def test_name_that_is_no_digest(tmp_path: Path) -> None:
    for name in ("sha256:../../etc/passwd", "x", "sha256:" + "g" * 64):
        with pytest.raises(InvalidArgumentError):
            make(tmp_path).part(name)


def test_room_is_made_by_the_least_used(tmp_path: Path) -> None:
    store = make(tmp_path, max_size_bytes=100)
    old, fetched, new = (put(store, bytes([number]) * 30) for number in range(3))
    age(store, old, 500)
    store.handed_over(fetched)
    store.make_room(40)
    assert [store.use(digest) for digest in (old, fetched, new)] == [True, False, True]
    age(store, old, 500)
    store.make_room(70)
    assert [store.use(digest) for digest in (old, new)] == [False, True]


def test_no_room_at_all(tmp_path: Path) -> None:
    store = make(tmp_path, max_size_bytes=100)
    with pytest.raises(NoSpaceError, match="no room for 101 bytes"):
        store.make_room(101)
    with pytest.raises(NoSpaceError):
        make(tmp_path, min_free_bytes=1 << 60).make_room(1)


def test_what_does_not_fit_in_any_case_costs_the_others_nothing(tmp_path: Path) -> None:
    store = make(tmp_path, max_size_bytes=100)
    kept = put(store, b"kept")
    with pytest.raises(NoSpaceError):
        store.make_room(101)
    with pytest.raises(NoSpaceError):
        make(tmp_path, min_free_bytes=1 << 60).make_room(1)
    assert store.use(kept)


def test_what_was_long_unused_is_removed(tmp_path: Path) -> None:
    store = make(tmp_path)
    old, new = put(store, b"old"), put(store, b"new")
    age(store, old, 2000)
    part = store.part(sha256(b"never finished"))
    part.write_bytes(b"never")
    os.utime(part, (0, 0))
    growing = store.part(sha256(b"growing"))
    growing.write_bytes(b"grow")
    store.clean()
    assert not store.path(old).exists() and store.path(new).exists()
    assert not part.exists() and growing.exists()


def test_use_keeps_a_blob_and_its_verification(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make(tmp_path)
    digest = put(store, b"content")
    age(store, digest, 2000)
    monkeypatch.setattr("aoscore.common.blobstore.file_digest", lambda *_: pytest.fail("hashed again"))
    assert store.use(digest)
    store.clean()
    assert store.path(digest).exists()
