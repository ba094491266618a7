"""Files of the image store: unpacking, links, tree digests, damage."""

import hashlib
import io
import os
import tarfile
from pathlib import Path

import pytest

from aoscore.common.errors import ChecksumError, InvalidArgumentError, NotFoundError
from aoscore.common.layers import tree_digest
from aoscore.common.oci import MEDIA_TYPE_LAYER_GZIP, MEDIA_TYPE_LAYER_TAR
from aoscore.sm.imagemanager.store import ImageStore
from tests.support.items import packed, sha256, tar

PLENTY = 1 << 30


def put(store: ImageStore, data: bytes) -> str:
    digest = sha256(data)
    temporary = store.partial(digest)
    temporary.write_bytes(data)
    store.blobs.adopt(temporary, digest)
    return digest


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    return ImageStore(tmp_path / "images")


def files_of(tree: Path) -> dict[str, bytes]:
    return {str(path.relative_to(tree)): path.read_bytes() for path in tree.rglob("*") if path.is_file()}


def test_unpack_replaces_the_blob_by_a_link(store: ImageStore) -> None:
    layer = tar({"bin/app": b"program", "etc/conf": b"x" * 1000})
    digest = put(store, packed(layer))
    assert store.unpacked_bytes(digest, MEDIA_TYPE_LAYER_GZIP) == len(layer) > len(packed(layer))
    assert store.unpack(digest, sha256(layer), MEDIA_TYPE_LAYER_GZIP, max_bytes=PLENTY) == 1007
    assert files_of(store.tree(sha256(layer))) == {"bin/app": b"program", "etc/conf": b"x" * 1000}
    # The layout that AosCore 9.1 reads (sm.md §3.2).
    blob = store.root / "blobs" / "sha256" / digest.removeprefix("sha256:")
    assert blob.read_text() == sha256(layer)
    assert blob.stat().st_mode & 0o777 == 0o600
    beside = store.root / "layers" / "sha256" / sha256(layer).removeprefix("sha256:")
    assert (beside / "size").read_text() == "1007"
    lines = f"{hashlib.sha256(b'program').hexdigest()}  bin/app\n{hashlib.sha256(b'x' * 1000).hexdigest()}  etc/conf\n"
    assert (beside / "digest").read_text() == sha256(lines.encode())
    assert store.has_layer(digest, sha256(layer))
    store.verify_layer(digest, sha256(layer), again=True)
    assert not list((store.root / "staging").iterdir())


def test_wrong_diff_id_leaves_nothing(store: ImageStore) -> None:
    digest = put(store, tar({"a": b"1"}))
    with pytest.raises(ChecksumError, match="its image says"):
        store.unpack(digest, sha256(b"other"), MEDIA_TYPE_LAYER_TAR, max_bytes=PLENTY)
    assert not store.has_layer(digest, sha256(b"other"))
    assert not list((store.root / "staging").iterdir())
    assert set(store.digests()) == {digest}


@pytest.mark.parametrize("name", ["../escape", "/escape", "a/../../escape"])
def test_member_that_escapes_is_named_and_nothing_is_written(store: ImageStore, name: str) -> None:
    layer = tar({"good": b"1", name: b"bad"})
    digest = put(store, layer)
    with pytest.raises(InvalidArgumentError, match="escape"):
        store.unpack(digest, sha256(layer), MEDIA_TYPE_LAYER_TAR, max_bytes=PLENTY)
    assert not list(store.root.parent.rglob("escape"))
    assert not list((store.root / "staging").iterdir())


def test_link_that_leaves_the_root_is_not_followed(store: ImageStore, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        link = tarfile.TarInfo("out")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path)
        archive.addfile(link)
        archive.addfile(tarfile.TarInfo("out/escape"), io.BytesIO())
    digest = put(store, buffer.getvalue())
    with pytest.raises(InvalidArgumentError, match="out/escape"):
        store.unpack(digest, sha256(buffer.getvalue()), MEDIA_TYPE_LAYER_TAR, max_bytes=PLENTY)
    assert not (tmp_path / "escape").exists()


@pytest.mark.parametrize(
    ("data", "media_type"),
    [
        (packed(tar({"a": os.urandom(5000)}))[:-2000], MEDIA_TYPE_LAYER_GZIP),
        (b"no archive", MEDIA_TYPE_LAYER_TAR),
        (tar({"a": b"1"}), "application/unknown"),
    ],
    ids=["cut", "garbage", "media type"],
)
def test_bad_archive_is_a_clear_error(store: ImageStore, data: bytes, media_type: str) -> None:
    digest = put(store, data)
    with pytest.raises(InvalidArgumentError, match="can't be unpacked"):
        store.unpack(digest, sha256(b""), media_type, max_bytes=PLENTY)


def test_archive_larger_than_allowed(store: ImageStore) -> None:
    layer = tar({"zeros": bytes(1 << 20)})
    digest = put(store, packed(layer))
    with pytest.raises(InvalidArgumentError, match="more than is allowed"):
        store.unpack(digest, sha256(layer), MEDIA_TYPE_LAYER_GZIP, max_bytes=1 << 16)


def test_changed_tree_is_found_and_replaced(store: ImageStore) -> None:
    layer = tar({"a": b"1"})
    digest = put(store, layer)
    store.unpack(digest, sha256(layer), MEDIA_TYPE_LAYER_TAR, max_bytes=PLENTY)
    (store.tree(sha256(layer)) / "a").write_bytes(b"2")
    store.verify_layer(digest, sha256(layer))
    with pytest.raises(ChecksumError, match="damaged"):
        store.verify_layer(digest, sha256(layer), again=True)
    store.forget_layer(digest, sha256(layer))
    with pytest.raises(NotFoundError):
        store.verify_layer(digest, sha256(layer))
    put(store, layer)
    store.unpack(digest, sha256(layer), MEDIA_TYPE_LAYER_TAR, max_bytes=PLENTY)
    assert files_of(store.tree(sha256(layer))) == {"a": b"1"}


def test_tree_digest_counts_regular_files_only(tmp_path: Path) -> None:
    (tmp_path / "b").write_bytes(b"1")
    (tmp_path / "a.txt").write_bytes(b"2")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "c").write_bytes(b"3")
    plain = tree_digest(tmp_path)
    (tmp_path / "dangling").symlink_to("/nowhere/at/all")
    assert tree_digest(tmp_path, follow_links=True) == plain
    (tmp_path / "link").symlink_to("b")
    assert tree_digest(tmp_path) == plain
    # Bytewise by path: "." sorts before "/".
    lines = [(b"2", "a.txt"), (b"3", "a/c"), (b"1", "b"), (b"1", "b")]
    text = "".join(f"{hashlib.sha256(data).hexdigest()}  {name}\n" for data, name in lines)
    assert tree_digest(tmp_path, follow_links=True) == sha256(text.encode())


def test_layer_unpacked_by_aoscore_9_stays_usable(store: ImageStore) -> None:
    layer = tar({"a": b"1"})
    digest = put(store, layer)
    store.unpack(digest, sha256(layer), MEDIA_TYPE_LAYER_TAR, max_bytes=PLENTY)
    (store.tree(sha256(layer)) / "link").symlink_to("a")
    noted = tree_digest(store.tree(sha256(layer)), follow_links=True)
    (store.tree(sha256(layer)).parent / "digest").write_text(noted)
    store.verify_layer(digest, sha256(layer), again=True)


def test_new_store_keeps_downloads_and_clears_staging(store: ImageStore) -> None:
    store.partial(sha256(b"x")).write_bytes(b"half")
    (store.root / "staging" / "left").mkdir()
    again = ImageStore(store.root)
    assert not (store.root / "staging" / "left").exists()
    assert again.partial(sha256(b"x")).read_bytes() == b"half"


def test_discard_everything(store: ImageStore) -> None:
    layer = tar({"a": b"1"})
    digest = put(store, layer)
    store.unpack(digest, sha256(layer), MEDIA_TYPE_LAYER_TAR, max_bytes=PLENTY)
    store.partial(sha256(b"x")).write_bytes(b"half")
    assert set(store.digests()) == {digest, sha256(layer), sha256(b"x")}
    assert store.used_bytes() == 71 + 1 + 4
    for one in list(store.digests()):
        store.discard(one)
    store.empty_trash()
    assert not list(store.digests())
    assert files_of(store.root) == {}
