"""Layers made to do harm, on the way that every layer takes into the store, with both unpackers."""

import gzip
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from aoscore._speedups.unpack import Owners
from aoscore.common import layers
from aoscore.common.errors import AosError, InvalidArgumentError, NoSpaceError
from aoscore.common.layers import MAX_LAYER_MEMBERS
from aoscore.common.oci import MEDIA_TYPE_LAYER_GZIP, MEDIA_TYPE_LAYER_TAR, MEDIA_TYPE_LAYER_ZSTD
from aoscore.sm.imagemanager.store import ImageStore
from tests.support.items import sha256
from tests.support.layers import IMPLEMENTATIONS
from tests.support.tar import END, directory, gnu_sparse, hard_link, header, member, pax, symlink

MIB = 1 << 20
ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: owners and devices")
pytestmark = ROOT_ONLY


@pytest.fixture(params=IMPLEMENTATIONS)
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ImageStore:
    """A store that unpacks with the one and with the other implementation."""
    monkeypatch.setattr(layers, "unpack_layer", IMPLEMENTATIONS[request.param].unpack_layer)
    (tmp_path / "secret").write_text("untouched")
    return ImageStore(tmp_path / "images")


def unpack(
    store: ImageStore, layer: bytes, *, blob: bytes | None = None, media_type: str = "", max_bytes: int = 64 * MIB
) -> None:
    """As at the install of an item."""
    blob = layer if blob is None else blob
    digest = sha256(blob)
    store.partial(digest).write_bytes(blob)
    store.blobs.adopt(store.partial(digest), digest)
    store.unpack(digest, sha256(layer), media_type or MEDIA_TYPE_LAYER_TAR, max_bytes=max_bytes)


def assert_untouched(store: ImageStore) -> None:
    """Nothing outside of the store was changed, and nothing inside is left but the blob."""
    top = store.root.parent
    assert sorted(path.name for path in top.iterdir()) == ["images", "secret"]
    assert (top / "secret").read_text() == "untouched" and (top / "secret").stat().st_nlink == 1
    assert not list((store.root / "staging").iterdir()) and not list((store.root / "layers" / "sha256").iterdir())


# {out} is a place outside of the store, {up} the way there from the layer's root.
ESCAPES: dict[str, Callable[[bytes, bytes], bytes]] = {
    "two dots": lambda out, up: member(up + b"/secret", b"bad"),
    "two dots further in": lambda out, up: member(b"a/b/../../" + up + b"/secret", b"bad"),
    "absolute": lambda out, up: member(out + b"/secret", b"bad"),
    "absolute by two slashes": lambda out, up: member(b"/" + out + b"/secret", b"bad"),
    "pax path": lambda out, up: pax({b"path": up + b"/secret"}) + member(b"innocent", b"bad"),
    "prefix field": lambda out, up: member(b"secret", b"bad", prefix=up),
    "through a symbolic link": lambda out, up: symlink(b"link", out) + member(b"link/secret", b"bad"),
    "through a relative link": lambda out, up: symlink(b"link", up) + member(b"link/secret", b"bad"),
    "through links to links": lambda out, up: (
        symlink(b"one", b".") + symlink(b"one/two", up) + member(b"two/secret", b"bad")
    ),
    "directory over a link": lambda out, up: (
        symlink(b"link", out) + directory(b"link/made") + member(b"link/made/x", b"bad")
    ),
    "hard link out": lambda out, up: hard_link(b"stolen", up + b"/secret") + member(b"stolen", b"bad"),
    "hard link to an absolute path": lambda out, up: hard_link(b"stolen", out + b"/secret"),
    "hard link through a symbolic link": lambda out, up: symlink(b"link", out) + hard_link(b"stolen", b"link/secret"),
    "whiteout of the parent": lambda out, up: member(b"a/.wh...", b""),
    "whiteout through a link": lambda out, up: symlink(b"link", out) + member(b"link/.wh.secret", b""),
    "opaque mark through a link": lambda out, up: symlink(b"link", out) + member(b"link/.wh..wh..opq", b""),
    "device of the disk": lambda out, up: member(b"dev/sda", kind=b"4", device=(8, 0)),
    "device of memory": lambda out, up: member(b"dev/mem", kind=b"3", device=(1, 1)),
    "device by way of a whiteout": lambda out, up: (
        member(b"a/.wh.x", b"") + member(b"a/x", kind=b"3", device=(1, 1)) + hard_link(b"y", b"a/x")
    ),
}


@pytest.mark.parametrize("name", ESCAPES)
def test_escapes_are_refused_by_name(store: ImageStore, tmp_path: Path, name: str) -> None:
    depth = len((store.root / "staging" / "x" / "layer").relative_to(tmp_path).parts)
    bad = ESCAPES[name](os.fsencode(tmp_path), b"/".join([b".."] * depth))
    with pytest.raises(InvalidArgumentError, match=r"can't be unpacked: '.+'"):
        unpack(store, directory(b"a") + member(b"a/good", b"1") + bad + END)
    assert_untouched(store)


def test_link_in_place_of_a_file_is_not_written_through(store: ImageStore, tmp_path: Path) -> None:
    secret = os.fsencode(tmp_path / "secret")
    layer = symlink(b"file", secret) + member(b"file", b"bad") + symlink(b"etc", secret) + directory(b"etc") + END
    unpack(store, layer)
    tree = store.tree(sha256(layer))
    assert (tree / "file").read_bytes() == b"bad" and not (tree / "file").is_symlink() and (tree / "etc").is_dir()
    assert (tmp_path / "secret").read_text() == "untouched"


def sparse(size: int) -> bytes:
    return gnu_sparse(b"huge", [(0, b"x")], size) + END


BOMBS: dict[str, tuple[bytes, Callable[[bytes], bytes], str]] = {
    "sparse": (sparse(4 << 30), bytes, MEDIA_TYPE_LAYER_TAR),
    "many sparse": (
        b"".join(gnu_sparse(b"%d" % index, [(0, b"x")], 60 * MIB) for index in range(2)) + END,
        bytes,
        MEDIA_TYPE_LAYER_TAR,
    ),
    "gzip": (member(b"zeros", bytes(128 * MIB)) + END, lambda data: gzip.compress(data, 1), MEDIA_TYPE_LAYER_GZIP),
    "zstd": (member(b"zeros", bytes(128 * MIB)) + END, zstandard.compress, MEDIA_TYPE_LAYER_ZSTD),
    "gzip in many parts": (
        member(b"zeros", bytes(128 * MIB)) + END,
        lambda data: b"".join(gzip.compress(data[at : at + MIB], 1) for at in range(0, len(data), MIB)),
        MEDIA_TYPE_LAYER_GZIP,
    ),
    "zeros after the end": (END + bytes(128 * MIB), lambda data: gzip.compress(data, 1), MEDIA_TYPE_LAYER_GZIP),
    "header that promises": (header(b"huge", size=8**11 - 1), bytes, MEDIA_TYPE_LAYER_TAR),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_stopped_at_the_limit(store: ImageStore, name: str) -> None:
    layer, pack, media_type = BOMBS[name]
    with pytest.raises(InvalidArgumentError, match="more than is allowed"):
        unpack(store, layer, blob=pack(layer), media_type=media_type)
    assert_untouched(store)


def test_disk_that_gets_full_stops_the_layer(store: ImageStore) -> None:
    """By what the disk has left, whatever the archive says: a thousand directories are half a MiB of archive."""
    seen = []

    def check(done_bytes: int) -> None:
        seen.append(done_bytes)
        if len(seen) == 2:
            raise NoSpaceError("full")

    layer = b"".join(directory(b"d%d" % index) for index in range(10_000)) + END
    digest = sha256(layer)
    store.partial(digest).write_bytes(layer)
    store.blobs.adopt(store.partial(digest), digest)
    with pytest.raises(NoSpaceError, match="full"):
        store.unpack(digest, digest, MEDIA_TYPE_LAYER_TAR, max_bytes=64 * MIB, progress=check)
    # Looked at before 2048 more members can be made.
    assert seen[0] <= MIB + 512 and seen[1] - seen[0] <= MIB + 512
    assert_untouched(store)


def test_too_many_members_are_refused(store: ImageStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "MAX_LAYER_MEMBERS", 1000)
    monkeypatch.setattr(store._layers, "_spare_files", lambda: 1000)
    layer = b"".join(member(b"f%d" % index) for index in range(1001)) + END
    with pytest.raises(InvalidArgumentError, match="'f1000': has more members than are allowed"):
        unpack(store, layer)
    assert_untouched(store)
    # The same when so few are left on the disk, but then that is the reason.
    monkeypatch.setattr(layers, "MAX_LAYER_MEMBERS", MAX_LAYER_MEMBERS)
    with pytest.raises(NoSpaceError, match="more than 1000 files"):
        unpack(store, layer)
    # Directories that no member describes count too.
    deep = b"".join(member(b"%d/%d/%d/f" % (index, index, index)) for index in range(400)) + END
    with pytest.raises(NoSpaceError):
        unpack(store, deep)
    assert_untouched(store)


ODD_NAMES = (
    b"\xff\xfe",
    b"caf\xe9",
    b"caf\xc3\xa9",
    b"tab\there",
    b"\x01\x7f",
    b" ",
    b"-rf",
    b"$(id)",
    b"a\\b",
    b"*?[",
)


def test_names_with_odd_bytes_stay_what_they_are(store: ImageStore) -> None:
    layer = b"".join(member(b"odd/" + name, name) for name in ODD_NAMES) + END
    unpack(store, layer)
    made = [os.fsencode(path.name) for path in (store.tree(sha256(layer)) / "odd").iterdir()]
    assert sorted(made) == sorted(ODD_NAMES)
    store.verify_layer(sha256(layer), sha256(layer), again=True)


def test_owners_are_those_of_the_archive_only_when_asked_for(store: ImageStore, tmp_path: Path) -> None:
    layer = member(b"f", b"1", uid=1234, gid=5678) + END
    unpack(store, layer)
    assert (store.tree(sha256(layer)) / "f").stat().st_uid == 0
    keeping = ImageStore(tmp_path / "other", Owners.ARCHIVE)
    unpack(keeping, layer)
    found = (keeping.tree(sha256(layer)) / "f").stat()
    assert (found.st_uid, found.st_gid) == (1234, 5678)


@pytest.mark.parametrize(
    "name", [b"line\nbreak", b"x" * 256, b"/".join([b"d"] * 257), b"", b".wh..wh.x", b"a/.wh."], ids=repr
)
def test_names_that_no_tree_should_have(store: ImageStore, name: bytes) -> None:
    layer = (pax({b"path": name}) if len(name) > 100 else b"") + member(name, b"1") + END
    with pytest.raises(AosError):
        unpack(store, layer)
    assert_untouched(store)


def test_a_gzip_trailer_that_lies_does_not_cost_the_cache(store: ImageStore) -> None:
    blob = gzip.compress(member(b"a", b"1") + END)
    for told, wanted in ((0, len(blob)), (2**32 - 1, 1032 * (len(blob)))):
        lying = blob[:-4] + told.to_bytes(4, "little")
        digest = sha256(lying)
        store.partial(digest).write_bytes(lying)
        store.blobs.adopt(store.partial(digest), digest)
        assert store.unpacked_bytes(digest, MEDIA_TYPE_LAYER_GZIP) == wanted
