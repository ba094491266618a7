"""Installing items from real layer archives, with files as the source of blobs."""

import asyncio
import contextlib
import gzip
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from aoscore._speedups.unpack import Owners
from aoscore.common.aio import Worker
from aoscore.common.download import Downloader
from aoscore.common.errors import (
    AosError,
    ChecksumError,
    InvalidArgumentError,
    NoSpaceError,
    NotFoundError,
    OutOfRangeError,
)
from aoscore.common.fileserver import FileServer
from aoscore.common.oci import MEDIA_TYPE_LAYER_GZIP, MEDIA_TYPE_LAYER_TAR
from aoscore.common.types import CoreAlert, ItemType
from aoscore.mp.nodeserver.store import NodeStore
from aoscore.sm.database import open_database
from aoscore.sm.imagemanager import imagemanager
from aoscore.sm.imagemanager.imagemanager import ImageManager
from aoscore.sm.imagemanager.items import ItemTable
from aoscore.sm.imagemanager.model import ItemKey
from aoscore.sm.imagemanager.space import Usage
from aoscore.sm.imagemanager.store import ImageStore
from tests.support.items import Blobs, packed, sha256, tar
from tests.support.running import running

MIGRATION = Path(__file__).resolve().parents[4] / "aoscore" / "sm" / "migration"
DAY_NS = 86400 * 1_000_000_000
BASE, APP = tar({"lib/base": b"base"}), tar({"bin/app": b"application"})


class Bed:
    """One working directory, and a CM that names files as blob addresses."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.images = directory / "images"
        self.blobs = Blobs(directory / "source")
        self.asked: list[str] = []
        self.alerts: list[CoreAlert] = []
        self.now_ns = 1000 * DAY_NS
        self.free_bytes = 1 << 30
        self.first_layer_on_top = True
        self.staging: Path | None = None

    async def blob_urls(self, digests: list[str]) -> list[str]:
        self.asked += digests
        return [f"file://{self.blobs.path(digest)}" for digest in digests]

    async def send(self, value: CoreAlert) -> None:
        self.alerts.append(value)

    def item(
        self,
        name: str,
        layers: list[bytes],
        *,
        version: str = "1.0.0",
        diff_ids: list[str] | None = None,
        kind: ItemType = ItemType.SERVICE,
    ) -> ItemKey:
        config = {"hostname": name, "offlineTTL": "PT1H"}
        return ItemKey(name, kind, version, self.blobs.item(layers, diff_ids=diff_ids, item_config=config))

    @contextlib.asynccontextmanager
    async def manager(self) -> AsyncIterator[ImageManager]:
        async with (
            Worker("images", 2) as worker,
            open_database(self.directory / "sm.db", MIGRATION, self.directory / "merged") as database,
        ):
            store = await worker.run(ImageStore, self.images, Owners.ROOT, self.staging)
            manager = ImageManager(
                store,
                ItemTable(database),
                self,
                Downloader(worker, attempts=1),
                worker,
                self,
                ttl_s=30 * 86400,
                period_s=86400,
                first_layer_on_top=self.first_layer_on_top,
                usage=Usage(lambda: self.free_bytes, lambda: 1 << 30, store.used_bytes),
                wall_ns=lambda: self.now_ns,
            )
            async with running(manager):
                yield manager

    def files(self) -> set[str]:
        return {str(path.relative_to(self.images)) for path in self.images.rglob("*") if path.is_file()}


@pytest.fixture
def bed(tmp_path: Path) -> Bed:
    return Bed(tmp_path)


def tops(trees: tuple[Path, ...]) -> list[list[str]]:
    return [sorted(path.name for path in tree.iterdir()) for tree in trees]


async def test_install_and_load(bed: Bed) -> None:
    key = bed.item("a", [APP, BASE])
    async with bed.manager() as manager:
        await manager.install(key)
        assert manager.installed() == {key}
        image = await manager.load(key)
        assert image.item_config is not None
        assert (image.item_config.hostname, image.item_config.offline_ttl) == ("a", 3600.0)
        # Bottom to top, and the first of the manifest covers the others.
        assert tops(image.layers) == [["lib"], ["bin"]]
        asked = len(bed.asked)
        await manager.install(key)
        assert len(bed.asked) == asked
    async with bed.manager() as manager:
        assert manager.installed() == {key}
        assert (await manager.load(key)).layers == image.layers


def staged(bed: Bed, manifest: str, *, unpacked: int) -> NodeStore:
    """What MP has ready of an item: everything, the first layers also unpacked."""
    bed.staging = bed.directory / "mp"
    store = NodeStore(bed.staging, ttl_s=1000.0, min_free_bytes=0, max_size_bytes=0)
    for path in bed.blobs.directory.iterdir():
        digest = f"sha256:{path.name}"
        store.part(digest).write_bytes(path.read_bytes())
        store.adopt(digest)
    image = store.manifest(manifest)
    assert image is not None
    for layer in image.layers[:unpacked]:
        store.unpack_ahead(layer, store.diff_ids(image)[layer.digest])
    return store


async def test_what_mp_has_ready_is_taken(bed: Bed) -> None:
    key = bed.item("a", [APP, BASE])
    store = await asyncio.to_thread(staged, bed, key.manifest_digest, unpacked=1)
    async with bed.manager() as manager:
        await manager.install(key)
        assert bed.asked == []
        assert tops((await manager.load(key)).layers) == [["lib"], ["bin"]]
        await manager.check_integrity()
        assert manager.installed() == {key}
    # Moved, not copied; the blob of the unpacked layer is MP's to clean.
    assert list(store._blobs.digests()) == [sha256(packed(APP))]
    assert not list(store._layers.diff_ids())


async def test_what_mp_has_and_is_not_right_is_fetched(bed: Bed) -> None:
    key = bed.item("a", [APP, BASE])
    store = await asyncio.to_thread(staged, bed, key.manifest_digest, unpacked=1)
    store.path(key.manifest_digest).write_bytes(b"something else")
    store.path(sha256(packed(APP))).unlink()
    (store._layers.tree(sha256(APP)) / "bin/app").write_bytes(b"something else")
    async with bed.manager() as manager:
        await manager.install(key)
        assert bed.asked == [key.manifest_digest, sha256(packed(APP))]
        assert (await manager.load(key)).layers[1].joinpath("bin/app").read_bytes() == b"application"


@pytest.mark.parametrize("what", ["absent", "empty"])
async def test_mp_may_have_nothing(bed: Bed, what: str) -> None:
    bed.staging = bed.directory / "mp"
    if what == "empty":
        bed.staging.mkdir()
    key = bed.item("a", [APP])
    async with bed.manager() as manager:
        await manager.install(key)
        assert manager.installed() == {key}


async def test_oci_layer_order(bed: Bed) -> None:
    bed.first_layer_on_top = False
    key = bed.item("a", [BASE, APP])
    async with bed.manager() as manager:
        await manager.install(key)
        assert tops((await manager.load(key)).layers) == [["lib"], ["bin"]]


async def test_component_payload_stays_packed(bed: Bed) -> None:
    key = bed.item("fw", [APP], kind=ItemType.COMPONENT)
    async with bed.manager() as manager:
        await manager.install(key)
        image = await manager.load(key)
        assert image.layers == ()
        assert gzip.decompress(image.payloads[0].path.read_bytes()) == APP
        assert image.payloads[0].media_type == MEDIA_TYPE_LAYER_GZIP


async def test_plain_tar_layer_without_item_config(bed: Bed) -> None:
    config = bed.blobs.put_json({"rootfs": {"diff_ids": [sha256(APP)]}})
    layer = bed.blobs.describe(bed.blobs.put(APP), MEDIA_TYPE_LAYER_TAR)
    key = ItemKey("a", ItemType.SERVICE, "1.0.0", bed.blobs.put_json({"config": {"digest": config}, "layers": [layer]}))
    async with bed.manager() as manager:
        await manager.install(key)
        image = await manager.load(key)
        assert image.item_config is None
        assert (image.layers[0] / "bin" / "app").read_bytes() == b"application"


async def test_two_items_share_a_layer(bed: Bed) -> None:
    first, second = bed.item("a", [BASE, APP]), bed.item("b", [BASE])
    async with bed.manager() as manager:
        await asyncio.gather(manager.install(first), manager.install(second))
        assert bed.asked.count(sha256(packed(BASE))) == 1
        assert (await manager.load(second)).layers[0] in (await manager.load(first)).layers


async def check_failure(bed: Bed, key: ItemKey, error: type[AosError], text: str) -> None:
    """Installing fails with that error, every time, and what was there before is untouched."""
    async with bed.manager() as manager:
        good = bed.item("good", [BASE])
        await manager.install(good)
        before = bed.files()
        for _ in range(2):
            with pytest.raises(error, match=text):
                await manager.install(key)
        assert manager.installed() == {good}
        assert (await manager.load(good)).layers
        manager.want({good})
        await manager.sweep()
        assert bed.files() == before
        with pytest.raises(NotFoundError):
            await manager.load(key)


async def test_blob_with_another_content(bed: Bed) -> None:
    key = bed.item("a", [APP])
    bed.blobs.path(sha256(packed(APP))).write_bytes(bytes(len(packed(APP))))
    await check_failure(bed, key, ChecksumError, "content of blob")


async def test_manifest_with_another_content(bed: Bed) -> None:
    key = bed.item("a", [APP])
    bed.blobs.path(key.manifest_digest).write_bytes(b"{}")
    await check_failure(bed, key, ChecksumError, key.manifest_digest)


async def test_truncated_blob(bed: Bed) -> None:
    key = bed.item("a", [APP])
    blob = bed.blobs.path(sha256(packed(APP)))
    blob.write_bytes(blob.read_bytes()[:-5])
    await check_failure(bed, key, ChecksumError, "content of blob")


async def test_missing_blob(bed: Bed) -> None:
    key = bed.item("a", [APP])
    bed.blobs.path(sha256(packed(APP))).unlink()
    await check_failure(bed, key, NotFoundError, "does not exist")


async def test_member_that_escapes(bed: Bed) -> None:
    key = bed.item("a", [tar({"../../escape": b"x"})])
    await check_failure(bed, key, InvalidArgumentError, "escape")
    assert not list(bed.directory.rglob("escape"))


async def test_wrong_diff_id(bed: Bed) -> None:
    await check_failure(bed, bed.item("a", [APP], diff_ids=[sha256(b"else")]), ChecksumError, "its image says")


async def test_fewer_diff_ids_than_layers(bed: Bed) -> None:
    key = bed.item("a", [APP, BASE], diff_ids=[sha256(APP)])
    await check_failure(bed, key, InvalidArgumentError, "1 diff ids for 2 layers")


@pytest.mark.parametrize("document", [b"{", b"[]", b'{"layers": []}', b'{"config": {"digest": "sha256:../../x"}}'])
async def test_manifest_that_is_none(bed: Bed, document: bytes) -> None:
    key = ItemKey("a", ItemType.SERVICE, "1.0.0", bed.blobs.put(document))
    await check_failure(bed, key, InvalidArgumentError, "manifest of a|no sha256 digest")


async def test_digest_that_is_none(bed: Bed) -> None:
    key = ItemKey("a", ItemType.SERVICE, "1.0.0", "sha256:../../../etc/passwd")
    async with bed.manager() as manager:
        with pytest.raises(InvalidArgumentError, match="no sha256 digest"):
            await manager.install(key)
        # What can't be a file name must not stop the clean-up either.
        manager.want({key})
        await manager.sweep()


async def test_full_disk_is_a_clear_error_and_heals(bed: Bed) -> None:
    key = bed.item("a", [tar({"big": bytes(100_000)})])
    bed.free_bytes = 2000
    async with bed.manager() as manager:
        with pytest.raises(NoSpaceError, match="bytes of disk"):
            await manager.install(key)
        bed.free_bytes = 1 << 20
        await manager.install(key)
        assert manager.installed() == {key}


async def test_install_goes_on_where_it_was_stopped(bed: Bed) -> None:
    key = bed.item("a", [APP, BASE])
    base = bed.blobs.path(sha256(packed(BASE)))
    base.rename(base.with_suffix(".away"))
    async with bed.manager() as manager:
        with pytest.raises(NotFoundError):
            await manager.install(key)
    base.with_suffix(".away").rename(base)
    bed.asked.clear()
    async with bed.manager() as manager:
        manager.want({key})
        await manager.sweep()
        await manager.install(key)
    assert bed.asked == [sha256(packed(BASE))]


async def test_new_manifest_of_the_same_version_replaces_it(bed: Bed) -> None:
    first, second = bed.item("a", [APP]), bed.item("a", [BASE])
    async with bed.manager() as manager:
        await manager.install(first)
        await manager.install(second)
        assert manager.installed() == {second}


async def test_removed_item_stays_until_its_time_is_over(bed: Bed) -> None:
    key, other = bed.item("a", [APP]), bed.item("b", [BASE])
    async with bed.manager() as manager:
        await manager.install(key)
        await manager.install(other)
        manager.want({other})
        await manager.remove([key])
        assert manager.installed() == {other}
        bed.now_ns += 29 * DAY_NS
        await manager.remove_outdated()
        bed.asked.clear()
        await manager.install(key)
        assert bed.asked == []
        await manager.remove([key])
    bed.now_ns += 31 * DAY_NS
    async with bed.manager() as manager:
        manager.want({other})
        await manager.remove_outdated()
        # Manifest, image config, item config and the link of its layer.
        assert len([name for name in bed.files() if name.startswith("blobs")]) == 4
        assert (await manager.load(other)).layers
        await manager.install(key)
        assert len(bed.asked) == 4


async def test_space_is_taken_from_the_item_unwanted_longest(bed: Bed) -> None:
    old, new = bed.item("old", [tar({"old": b"1"})]), bed.item("new", [tar({"new": b"2"})])
    key = bed.item("a", [APP])
    async with bed.manager() as manager:
        for one in (new, old):
            await manager.install(one)
        manager.want({key})
        await manager.remove([old])
        bed.now_ns += 1
        await manager.remove([new])
        # As much room as one eviction makes.
        tree = bed.images / "layers" / "sha256" / sha256(tar({"old": b"1"})).removeprefix("sha256:")
        bed.free_bytes = 0
        grow = asyncio.create_task(_free_when_gone(bed, tree))
        await manager.install(key)
        await grow
        bed.asked.clear()
        await manager.install(new)
        assert bed.asked == []
        await manager.install(old)
        assert old.manifest_digest in bed.asked


async def test_leftovers_of_broken_installs_are_space_too(bed: Bed) -> None:
    broken, good = bed.item("broken", [APP], diff_ids=[sha256(b"other")]), bed.item("good", [BASE])
    async with bed.manager() as manager:
        manager.want({broken, good})
        with pytest.raises(ChecksumError):
            await manager.install(broken)
        leftover = bed.images / "blobs" / "sha256" / sha256(packed(APP)).removeprefix("sha256:")
        assert leftover.exists()
        bed.free_bytes = 0
        manager.want({good})
        grow = asyncio.create_task(_free_when_gone(bed, leftover))
        await manager.install(good)
        await grow


async def test_blobs_of_unknown_size_have_a_limit(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    key = bed.item("a", [APP])
    server = FileServer("127.0.0.1:0", lambda target: bed.blobs.path(target.lstrip("/")))
    async with running(server):

        async def urls(digests: list[str]) -> list[str]:
            return [f"http://127.0.0.1:{server.port}/{digest.removeprefix('sha256:')}" for digest in digests]

        monkeypatch.setattr(bed, "blob_urls", urls)
        monkeypatch.setattr(imagemanager, "MAX_DOCUMENT_BYTES", 100)
        async with bed.manager() as manager:
            with pytest.raises(OutOfRangeError, match="larger than 100 bytes"):
                await manager.install(key)
            assert not list((bed.images / "downloads").iterdir())


async def _free_when_gone(bed: Bed, path: Path) -> None:
    while path.exists():
        await asyncio.sleep(0)
    bed.free_bytes = 1 << 20


async def test_damage_is_found_reported_and_repaired(bed: Bed) -> None:
    key = bed.item("a", [APP, BASE])
    async with bed.manager() as manager:
        await manager.install(key)
        manager.want({key})
        await manager.check_integrity()
        assert bed.alerts == []
        tree = (await manager.load(key)).layers[1]
        (tree / "bin" / "app").write_bytes(b"changed")
        with manager.broken.subscribe() as broken:
            await manager.check_integrity()
            assert broken.get_nowait() == key
        assert manager.installed() == set()
        assert "damaged" in bed.alerts[0].message
        # A running instance keeps its files until the successor is there.
        await manager.sweep()
        assert (tree / "bin" / "app").exists()
        bed.asked.clear()
        await manager.install(key)
        assert bed.asked == [sha256(packed(APP))]
        assert (tree / "bin" / "app").read_bytes() == b"application"


async def test_damaged_document_is_repaired(bed: Bed) -> None:
    key = bed.item("a", [APP])
    async with bed.manager() as manager:
        await manager.install(key)
        manager.want({key})
        blob = bed.images / "blobs" / "sha256" / key.manifest_digest.removeprefix("sha256:")
        blob.write_bytes(b"{}")
        with pytest.raises(InvalidArgumentError):
            await manager.load(key)
        assert manager.installed() == set()
        await manager.sweep()
        assert any("layers" in name for name in bed.files())
        await manager.install(key)
        assert (await manager.load(key)).layers
