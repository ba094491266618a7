"""The image manager with a real store, database and file server: what becomes of versions and blobs."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest

from aoscore.cm.communication.messages import (
    BlobInfo,
    DesiredItem,
    DownloadProgressAlert,
    DownloadState,
    ItemState,
)
from aoscore.cm.database import IMAGE_MANAGER_TABLES, OWN_TABLES
from aoscore.cm.imagemanager.fetcher import Fetcher, FetchSettings, unpack
from aoscore.cm.imagemanager.manager import ImageManager, ImageManagerSettings
from aoscore.cm.imagemanager.platforms import RuntimePlatform
from aoscore.cm.imagemanager.retries import BlobRetries
from aoscore.cm.imagemanager.space import Space
from aoscore.cm.imagemanager.store import Item, ItemStore
from aoscore.common.aio import Backoff, Worker
from aoscore.common.blobstore import BlobStore
from aoscore.common.db import Database, Schema
from aoscore.common.download import Downloader
from aoscore.common.errors import DeadlineError, FailedError, NotFoundError
from aoscore.common.types import ItemType
from tests.support.images import BlobCloud, Image, Signer, desired
from tests.support.items import sha256
from tests.support.pki import TestCa
from tests.support.running import running

START = datetime(2026, 3, 1, tzinfo=UTC)


class Bench:
    """An image manager that can be stopped, killed and started again on the same files."""

    def __init__(self, tmp_path: Path, cloud: BlobCloud, ca: TestCa, signer: Signer | None) -> None:
        self.tmp_path = tmp_path
        self.cloud = cloud
        self.roots = [ca.root.cert]
        self.signer = signer
        self.now = START
        self.free_bytes = 10**12
        self.give_up_s = 3600.0
        self.require_signature = True
        self.runtimes: set[RuntimePlatform] | None = None
        self.alerts: list[DownloadProgressAlert] = []
        self.hashed: list[str] = []
        self.check_period_s = 3600.0

    @contextlib.asynccontextmanager
    async def started(self) -> AsyncIterator[ImageManager]:
        schema = Schema(create=(*IMAGE_MANAGER_TABLES, *OWN_TABLES))
        async with Database(self.tmp_path / "cm.db", schema) as database, Worker("images", 2) as worker:
            self.store = BlobStore(self.tmp_path / "install")
            verify = self.store.verify

            def counted(digest: str, *, again: bool = False) -> None:
                before = self.store.remembered().get(digest)
                verify(digest, again=again)
                if again or before is None:
                    self.hashed.append(digest)

            self.store.verify = counted  # type: ignore[method-assign]
            manager: ImageManager

            async def evict(directory: Path, needed_bytes: int) -> None:
                await manager.evict(directory, needed_bytes)

            settings = FetchSettings(
                download_dir=self.tmp_path / "download",
                unpack_dir=self.tmp_path / "install" / "tmp",
                require_signature=self.require_signature,
                give_up_s=self.give_up_s,
            )
            fetcher = Fetcher(
                self.store,
                settings,
                urls=self.cloud,
                downloader=Downloader(worker, attempts=1),
                space=Space(evict, available=lambda _: self.free_bytes, spare_bytes=0),
                worker=worker,
                alert=self.alerts.append,
                retries=lambda give_up_s, now: BlobRetries(give_up_s=give_up_s, now=now, backoff=Backoff(0.01, 0.02)),
            )
            manager = ImageManager(
                ImageManagerSettings(item_ttl_s=86400, check_period_s=self.check_period_s),
                ItemStore(database),
                self.store,
                fetcher,
                worker,
                roots=lambda: self.roots,
                runtimes=lambda: self.runtimes,
                now=lambda: self.now,
            )
            async with running(manager):
                yield manager

    @contextlib.asynccontextmanager
    async def with_first_installed(self) -> AsyncIterator[ImageManager]:
        """Version 1.0.0 of item a has the first image; the cloud has both."""
        self.cloud.publish(V1)
        self.cloud.publish(V2)
        async with self.started() as manager:
            await self.download(manager, desired("a", "1.0.0", V1))
            await manager.install({("a", "1.0.0")})
            yield manager

    async def download(self, manager: ImageManager, *items: DesiredItem) -> None:
        certificates = self.signer.certificates if self.signer else ()
        chains = self.signer.chains if self.signer else ()
        async with asyncio.timeout(20):
            await manager.download(items, certificates, chains)


def states(manager: ImageManager) -> dict[str, str]:
    return {f"{item.item_id} {item.version}": item.state.value for item in manager.statuses()}


def the(manager: ImageManager, item_id: str, version: str) -> Item:
    return next(item for item in manager.statuses() if item.key == (item_id, version))


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    ca = TestCa()
    signer = Signer(ca)
    (tmp_path / "cloud").mkdir()
    async with BlobCloud(tmp_path / "cloud", signer).running() as cloud:
        yield Bench(tmp_path, cloud, ca, signer)


def image(text: str, **more: Any) -> Image:
    return Image([text.encode() * 1000, b"shared layer"], **more)


V1, V2 = image("one"), image("two")


async def test_encrypted_and_signed_from_wanted_to_installed(bench: Bench) -> None:
    bench.cloud.publish(V1)
    async with bench.started() as manager:
        with manager.changed.subscribe() as changes:
            await bench.download(manager, desired("a", "1.0.0", V1))
            assert states(manager) == {"a 1.0.0": "pending"}
            await manager.install({("a", "1.0.0")})
            told = [changes.get_nowait().state for _ in range(3)]
        assert told == [ItemState.DOWNLOADING, ItemState.PENDING, ItemState.INSTALLED]
        assert set(bench.store.digests()) == set(V1.blobs)
        for digest, data in V1.blobs.items():
            assert manager.blob_path(digest).read_bytes() == data
        index = manager.load_index("a", "1.0.0")
        manifest = manager.load_manifest(index.manifests[0].digest)
        assert [layer.digest for layer in manifest.layers] == V1.layers
        assert manager.load_image_config(manifest.config.digest).architecture == "amd64"
        assert manifest.aos_item_config is not None
        assert manager.load_item_config(manifest.aos_item_config.digest).runtimes[0].codename == "crun"
        assert not list((bench.tmp_path / "download").iterdir())
        assert not list((bench.tmp_path / "install" / "tmp").iterdir())
    assert [len(batch) for batch in bench.cloud.asked] == [1, 1, 4]
    assert {alert.state for alert in bench.alerts} == {DownloadState.FINISHED}


async def test_more_than_sixteen_blobs_are_asked_for_in_batches(bench: Bench) -> None:
    large = Image([str(number).encode() for number in range(20)])
    bench.cloud.publish(large)
    async with bench.started() as manager:
        await bench.download(manager, desired("a", "1.0.0", large))
        assert states(manager) == {"a 1.0.0": "pending"}
    assert [len(batch) for batch in bench.cloud.asked] == [1, 1, 16, 6]


async def test_shared_blobs_come_once_and_survive_the_removal_of_one_owner(bench: Bench) -> None:
    bench.cloud.publish(V1)
    bench.cloud.publish(V2)
    shared = sha256(b"shared layer")
    async with bench.started() as manager:
        await bench.download(manager, desired("a", "1.0.0", V1), desired("b", "1.0.0", V2))
        assert len([digest for batch in bench.cloud.asked for digest in batch if digest == shared]) == 1
        await manager.install({("a", "1.0.0"), ("b", "1.0.0")})
        bench.now += timedelta(days=1)
        await manager.install({("b", "1.0.0")})
        bench.now += timedelta(days=2)
    async with bench.started() as manager:  # ageing at start
        assert states(manager) == {"b 1.0.0": "installed"}
        assert set(bench.store.digests()) == set(V2.blobs)


async def test_the_old_version_stays_until_the_new_one_is_installed(bench: Bench) -> None:
    async with bench.with_first_installed() as manager:
        await bench.download(manager, desired("a", "2.0.0", V2))
        assert states(manager) == {"a 1.0.0": "installed", "a 2.0.0": "pending"}
        assert set(bench.store.digests()) == set(V1.blobs) | set(V2.blobs)
        await manager.install({("a", "2.0.0")})
        assert states(manager) == {"a 2.0.0": "installed"}
        assert set(bench.store.digests()) == set(V2.blobs)


async def test_a_version_that_was_never_installed_makes_room_for_the_one_that_is_wanted_now(bench: Bench) -> None:
    bench.cloud.publish(V1)
    bench.cloud.publish(V2)
    async with bench.started() as manager:
        await bench.download(manager, desired("a", "1.0.0", V1))
        bench.cloud.change(V2.layers[0], urls=("http://127.0.0.1:1/x",))
        task = asyncio.create_task(bench.download(manager, desired("a", "2.0.0", V2)))
        while V2.index not in bench.store.digests():
            await asyncio.sleep(0.01)
        assert states(manager) == {"a 2.0.0": "downloading"}
        assert not (set(bench.store.digests()) - set(V2.blobs))
        task.cancel()
        await asyncio.wait({task})


async def test_the_time_of_a_version_tells_since_when_it_is_known_or_removed(bench: Bench) -> None:
    """AosCore 9.1 writes 0 at every other change (database.md §6, item 14)."""
    bench.cloud.publish(V1)
    async with bench.started() as manager:
        await bench.download(manager, desired("a", "1.0.0", V1))
        bench.now += timedelta(hours=1)
        await manager.install({("a", "1.0.0")})
        assert the(manager, "a", "1.0.0").timestamp == START
        await manager.install(set())
    async with bench.started() as manager:
        assert the(manager, "a", "1.0.0").timestamp == START + timedelta(hours=1)


async def test_a_version_with_other_images_keeps_the_ones_it_has_until_they_are_here(bench: Bench) -> None:
    async with bench.with_first_installed() as manager:
        bench.cloud.change(V2.layers[0], sign_info=None)
        await bench.download(manager, desired("a", "1.0.0", V2))
        item = the(manager, "a", "1.0.0")
        assert (item.state, item.index_digest) == (ItemState.INSTALLED, V1.index)
        assert item.error is not None and "is not signed" in item.error.message
        await manager.install({("a", "1.0.0")})
        assert set(bench.store.digests()) == set(V1.blobs)
        bench.cloud.publish(V2)
        await bench.download(manager, desired("a", "1.0.0", V2))
        item = the(manager, "a", "1.0.0")
        assert (item.state, item.index_digest, item.error) == (ItemState.PENDING, V2.index, None)


async def test_a_version_that_does_not_work_leaves_its_predecessor(bench: Bench) -> None:
    async with bench.with_first_installed() as manager:
        await bench.download(manager, desired("a", "2.0.0", V2))
        await manager.fail("a", "2.0.0", DeadlineError("did not become active"))
        await manager.install({("a", "2.0.0")})
        assert states(manager) == {"a 1.0.0": "installed", "a 2.0.0": "failed"}
    async with bench.started() as manager:
        failed = the(manager, "a", "2.0.0")
        assert failed.error is not None and failed.final
        assert (failed.error.aos_code, failed.error.message) == (7, "did not become active")
        await bench.download(manager, desired("a", "1.0.0", V1))
        assert states(manager) == {"a 1.0.0": "installed"}


async def test_one_bad_item_does_not_hold_up_another(bench: Bench) -> None:
    bench.cloud.publish(V1)
    bench.cloud.publish(V2)
    bench.cloud.change(V2.layers[0], sign_info=None)
    async with bench.started() as manager:
        await bench.download(manager, desired("a", "1.0.0", V1), desired("b", "2.0.0", V2))
        assert states(manager) == {"a 1.0.0": "pending", "b 2.0.0": "failed"}
        failed = the(manager, "b", "2.0.0")
        assert failed.error is not None and failed.final
        assert failed.error.aos_code == 10 and "is not signed" in failed.error.message


def truncated(cloud: BlobCloud) -> None:
    path = cloud.file(V1.layers[0])
    path.write_bytes(path.read_bytes()[:-16])


def damaged(cloud: BlobCloud) -> None:
    path = cloud.file(V1.layers[0])
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)


def other_content(cloud: BlobCloud) -> None:
    """Encrypted and signed as it should be, only not what was asked for."""
    other = sha256(b"other")
    cloud.publish_blob(other, b"other")
    info = cloud.infos[other]
    cloud.change(
        V1.layers[0],
        urls=info.urls,
        sha256=info.sha256,
        size=info.size,
        decrypt_info=info.decrypt_info,
        sign_info=info.sign_info,
    )


def swapped_digest(cloud: BlobCloud) -> None:
    """The answer names another digest than the one asked for."""
    cloud.infos[V1.layers[0]] = cloud.infos[V1.layers[1]]


def no_manifest(cloud: BlobCloud) -> None:
    cloud.publish_blob(V1.index, V1.blobs[V1.index])


@pytest.mark.parametrize(
    ("spoil", "code", "text", "final"),
    [
        (truncated, 10, "another size than announced", True),
        (damaged, 10, "announced checksum", True),
        (other_content, 10, "signature of blob", True),
        (swapped_digest, 5, "does not know blob", False),
        (lambda cloud: cloud.infos.pop(V1.index), 5, "does not know blob", False),
        (lambda cloud: cloud.change(V1.index, sha256="00" * 32), 10, "announced checksum", True),
        # That of the content in place of the file's.
        (lambda cloud: cloud.change(V1.index, sha256=V1.index[7:]), 10, "announced checksum", True),
        (lambda cloud: cloud.change(V1.index, sha256="junk"), 6, "neither hex nor base64", True),
        (lambda cloud: cloud.change(V1.index, sign_info=None), 10, "not signed", True),
    ],
    ids=["truncated", "damaged", "other", "swapped", "unknown", "checksum", "content", "junk", "unsigned"],
)
async def test_bad_blobs_give_a_clear_error_and_install_nothing(
    bench: Bench, spoil: Callable[[BlobCloud], None], code: int, text: str, final: bool
) -> None:
    bench.cloud.publish(V1)
    bench.give_up_s = 0.3
    spoil(bench.cloud)
    async with bench.started() as manager:
        await bench.download(manager, desired("a", "1.0.0", V1))
        item = the(manager, "a", "1.0.0")
        assert item.state is ItemState.FAILED and item.error is not None
        assert (item.error.aos_code, item.final) == (code, final)
        assert text in item.error.message
        assert V1.layers[0] not in set(bench.store.digests())
    assert len([name for name in bench.cloud.served if name in V1.index]) <= 3


@pytest.mark.parametrize(
    "content", [b"{ not json", b"{}", b'{"manifests": []}', b'{"manifests": [{"digest": "../x"}]}']
)
async def test_a_document_that_is_none(bench: Bench, content: bytes) -> None:
    index = sha256(content)
    bench.cloud.publish_blob(index, content)
    async with bench.started() as manager:
        await bench.download(manager, desired("a", "1.0.0", index))
        item = the(manager, "a", "1.0.0")
        assert item.state is ItemState.FAILED and item.error is not None and item.error.aos_code == 6


async def test_a_digest_that_names_a_path_is_refused(bench: Bench) -> None:
    async with bench.started() as manager:
        await bench.download(manager, desired("a", "1.0.0", "sha256:../../../../etc/passwd"))
        assert states(manager) == {"a 1.0.0": "failed"}
    assert bench.cloud.asked == []


async def test_foreign_signers_are_refused(bench: Bench) -> None:
    bench.cloud.publish(V1)
    bench.roots = [TestCa("Other").root.cert]
    async with bench.started() as manager:
        await bench.download(manager, desired("a", "1.0.0", V1))
        item = the(manager, "a", "1.0.0")
        assert item.state is ItemState.FAILED and item.error is not None and "not trusted" in item.error.message
        assert list(bench.store.digests()) == []


async def test_unsigned_blobs_only_where_configured(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    async with BlobCloud(tmp_path / "plain", encrypted=False).running() as cloud:
        cloud.publish(V1)
        bench.cloud, bench.signer, bench.require_signature = cloud, None, False
        async with bench.started() as manager:
            await bench.download(manager, desired("a", "1.0.0", V1))
            assert states(manager) == {"a 1.0.0": "pending"}


async def test_other_urls_are_used_and_fresh_ones_asked_for(bench: Bench) -> None:
    bench.cloud.publish(V1)
    good = bench.cloud.infos[V1.index].urls[0]
    bench.cloud.change(V1.index, urls=(f"{bench.cloud.base}/gone", "nonsense://x", good))
    bench.cloud.failures = [FailedError("busy"), DeadlineError("late")]
    async with bench.started() as manager:
        await bench.download(manager, desired("a", "1.0.0", V1))
        assert states(manager) == {"a 1.0.0": "pending"}
    assert bench.cloud.served[0] == "gone"
    assert bench.cloud.asked[:3] == [[V1.index]] * 3


async def test_given_up_after_a_time_without_progress(bench: Bench) -> None:
    bench.cloud.publish(V1)
    bench.give_up_s = 0.1
    bench.cloud.change(V1.index, urls=("http://127.0.0.1:1/x",))
    async with bench.started() as manager:
        await bench.download(manager, desired("a", "1.0.0", V1))
        item = the(manager, "a", "1.0.0")
        assert item.state is ItemState.FAILED and not item.final
        bench.cloud.publish(V1)
        await bench.download(manager, desired("a", "1.0.0", V1))
        assert states(manager) == {"a 1.0.0": "pending"}


async def test_an_interrupted_blob_resumes_after_a_restart(bench: Bench) -> None:
    bench.cloud.publish(V1)
    digest = V1.layers[0]
    whole = bench.cloud.file(digest).read_bytes()
    (bench.tmp_path / "download").mkdir()
    partial = bench.tmp_path / "download" / digest.removeprefix("sha256:")
    partial.write_bytes(whole[:1000])
    received: list[int] = []
    async with bench.started() as manager:
        await bench.download(manager, desired("a", "1.0.0", V1))
        received = [alert.downloaded_bytes for alert in bench.alerts if alert.digest == digest]
        assert states(manager) == {"a 1.0.0": "pending"}
    assert received == [len(whole)]
    assert len(whole) > 1000


async def test_a_changed_blob_begins_anew(bench: Bench) -> None:
    bench.cloud.publish(V1)
    (bench.tmp_path / "download").mkdir()
    partial = bench.tmp_path / "download" / V1.layers[0].removeprefix("sha256:")
    partial.write_bytes(b"x" * 1000)
    async with bench.started() as manager:
        await bench.download(manager, desired("a", "1.0.0", V1))
        assert states(manager) == {"a 1.0.0": "pending"}


async def test_a_cancelled_download_keeps_what_it_has(bench: Bench) -> None:
    bench.cloud.publish(V1)
    bench.cloud.change(V1.layers[0], urls=("http://127.0.0.1:1/x",))
    async with bench.started() as manager:
        task = asyncio.create_task(bench.download(manager, desired("a", "1.0.0", V1)))
        while set(V1.blobs) - set(bench.store.digests()) != {V1.layers[0]}:
            await asyncio.sleep(0.01)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        assert states(manager) == {"a 1.0.0": "downloading"}
        asked = len(bench.cloud.asked)
        bench.cloud.publish(V1)
        await bench.download(manager, desired("a", "1.0.0", V1))
        assert bench.cloud.asked[asked:] == [[V1.layers[0]]]


async def test_a_plain_file_moves_to_another_disk_whole_or_not_at_all(tmp_path: Path) -> None:
    """However large it is, who has it moved can break that off at once."""
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(b"content")
    info = BlobInfo(digest=sha256(b"content"), urls=("http://x",))
    async with Worker("images") as worker:
        assert await worker.run(unpack, source, target, info) == sha256(b"content")
        assert target.read_bytes() == b"content"
        with source.open("wb") as file:
            file.truncate(1 << 40)
        moving = asyncio.create_task(worker.run(unpack, source, target, info))
        while target.stat().st_size < 2_000_000:
            await asyncio.sleep(0.01)
        moving.cancel()
        await asyncio.wait({moving}, timeout=10)
        assert moving.cancelled()


async def test_verified_blobs_are_not_hashed_again_unless_the_stop_was_unclean(bench: Bench) -> None:
    bench.cloud.publish(V1)
    async with bench.started() as manager:
        await bench.download(manager, desired("a", "1.0.0", V1))
        await manager.install({("a", "1.0.0")})
        await bench.download(manager, desired("a", "1.0.0", V1))
    assert bench.hashed == []
    async with bench.started() as manager:
        await bench.download(manager, desired("a", "1.0.0", V1))
        assert bench.hashed == []
        crashed = (bench.tmp_path / "cm.db").read_bytes(), (bench.tmp_path / "cm.db-wal").read_bytes()
    (bench.tmp_path / "cm.db").write_bytes(crashed[0])
    (bench.tmp_path / "cm.db-wal").write_bytes(crashed[1])
    async with bench.started() as manager:
        await bench.download(manager, desired("a", "1.0.0", V1))
        assert set(bench.hashed) == set(V1.blobs)


async def test_a_damaged_blob_is_repaired(bench: Bench) -> None:
    bench.cloud.publish(V1)
    async with bench.started() as manager:
        await bench.download(manager, desired("a", "1.0.0", V1))
        await manager.install({("a", "1.0.0")})
        manager.blob_path(V1.layers[0]).write_bytes(b"bit rot")
        await bench.download(manager, desired("a", "1.0.0", V1))
        assert states(manager) == {"a 1.0.0": "installed"}
        assert manager.blob_path(V1.layers[0]).read_bytes() == V1.blobs[V1.layers[0]]


async def test_the_periodic_check_finds_a_damaged_blob(bench: Bench) -> None:
    bench.cloud.publish(V1)
    bench.check_period_s = 0.05
    async with bench.started() as manager:
        await bench.download(manager, desired("a", "1.0.0", V1))
        await manager.install({("a", "1.0.0")})
        path = manager.blob_path(V1.layers[0])
        stat = path.stat()
        path.write_bytes(b"x" * stat.st_size)
        while path.exists():
            await asyncio.sleep(0.01)
        while the(manager, "a", "1.0.0").error is None:
            await asyncio.sleep(0.01)
        item = the(manager, "a", "1.0.0")
        assert item.state is ItemState.INSTALLED and not item.final
        with pytest.raises(NotFoundError):
            manager.blob_path(V1.layers[0])


async def test_a_full_disk_is_a_clear_error_and_heals(bench: Bench) -> None:
    bench.cloud.publish(V1)
    bench.free_bytes = 10
    async with bench.started() as manager:
        await bench.download(manager, desired("a", "1.0.0", V1))
        item = the(manager, "a", "1.0.0")
        assert item.state is ItemState.FAILED and item.error is not None and not item.final
        assert item.error.aos_code == 3 and "are free" in item.error.message
        bench.free_bytes = 10**9
        await bench.download(manager, desired("a", "1.0.0", V1))
        assert states(manager) == {"a 1.0.0": "pending"}


async def test_removed_items_and_stale_partials_give_way_when_space_runs_short(bench: Bench) -> None:
    async with bench.with_first_installed() as manager:
        await manager.install(set())
        assert states(manager) == {"a 1.0.0": "removed"}
        stale = bench.tmp_path / "download" / ("0" * 64)
        stale.write_bytes(b"x" * 100)

        manager._fetcher._space._available = lambda _: 10**9 if states(manager).keys() == {"b 1.0.0"} else 0
        await bench.download(manager, desired("b", "1.0.0", V2))
        assert states(manager) == {"b 1.0.0": "pending"}
        assert not stale.exists()


async def test_what_is_in_use_and_its_successor_never_give_way(bench: Bench) -> None:
    """A third version finds no room: the one that runs and the one that is installed for it stay whole."""
    async with bench.with_first_installed() as manager:
        await bench.download(manager, desired("a", "2.0.0", V2))
        before = sorted(bench.store.digests())
        third = Image([b"third layer"])
        bench.cloud.publish(third)
        bench.free_bytes = 0
        await bench.download(manager, desired("a", "2.0.0", V2), desired("b", "1.0.0", third))
        assert states(manager) == {"a 1.0.0": "installed", "a 2.0.0": "pending", "b 1.0.0": "failed"}
        assert sorted(bench.store.digests()) == before
        for digest in before:
            bench.store.verify(digest, again=True)


async def test_a_removed_item_comes_back_without_a_download(bench: Bench) -> None:
    bench.cloud.publish(V1)
    async with bench.started() as manager:
        await bench.download(manager, desired("a", "1.0.0", V1))
        await manager.install({("a", "1.0.0")})
        await manager.install(set())
        asked = len(bench.cloud.asked)
        await bench.download(manager, desired("a", "1.0.0", V1))
        assert states(manager) == {"a 1.0.0": "pending"}
        assert len(bench.cloud.asked) == asked


async def test_only_the_platforms_of_the_unit_are_downloaded(bench: Bench) -> None:
    multi = image("multi", architectures=("amd64", "arm64"))
    bench.cloud.publish(multi)
    bench.runtimes = {RuntimePlatform("arm64", "linux")}
    async with bench.started() as manager:
        await bench.download(manager, desired("a", "1.0.0", multi))
        await manager.install({("a", "1.0.0")})
        assert states(manager) == {"a 1.0.0": "installed"}
        manager.load_manifest(multi.manifests["arm64"])
        with pytest.raises(NotFoundError):
            manager.load_manifest(multi.manifests["amd64"])
        bench.runtimes = None  # a node is away: what it needs is not known
        await manager.install({("a", "1.0.0")})
        assert states(manager) == {"a 1.0.0": "installed"}
        await bench.download(manager, desired("a", "1.0.0", multi))
        manager.load_manifest(multi.manifests["amd64"])


async def test_an_item_of_another_type_with_the_same_name_is_refused(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.cloud.publish(V1)
    async with bench.started() as manager:
        await bench.download(manager, desired("a", "1.0.0", V1))
        await manager.install({("a", "1.0.0")})
        other = desired("a", "1.0.0", V1)
        component = msgspec.structs.replace(other, item=msgspec.structs.replace(other.item, type=ItemType.COMPONENT))
        await bench.download(manager, component)
        assert the(manager, "a", "1.0.0").type is ItemType.SERVICE
    assert "is known as service" in caplog.text


async def test_what_an_interrupted_unpacking_left_is_removed(bench: Bench) -> None:
    (bench.tmp_path / "install" / "tmp").mkdir(parents=True)
    (bench.tmp_path / "install" / "tmp" / "half").write_bytes(b"x")
    async with bench.started():
        assert not list((bench.tmp_path / "install" / "tmp").iterdir())


async def test_rows_that_make_no_sense_are_passed_over(bench: Bench) -> None:
    async with bench.started():
        pass
    async with Database(bench.tmp_path / "cm.db", Schema(create=IMAGE_MANAGER_TABLES)) as database:
        await database.execute("INSERT INTO imagemanager VALUES ('x', 'gadget', '1', 'd', 'installed', 0)")
        await database.execute("INSERT INTO imagemanager VALUES ('y', 'service', '1', 'd', 'removed', 0)")
    async with bench.started() as manager:
        assert manager.statuses() == []  # x is not understood, y was removed in 1970
    async with Database(bench.tmp_path / "cm.db", Schema(create=IMAGE_MANAGER_TABLES)) as database:
        assert [row[0] for row in await database.select("SELECT itemID FROM imagemanager")] == ["x"]
