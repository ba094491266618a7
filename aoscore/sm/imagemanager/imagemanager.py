"""Image manager: brings items to this node, keeps them whole, gives space back.

Install = fetch the manifest and what it names, verify every byte, unpack the layers of services; an item counts as
installed only when its row is in the database, which is the last step. Each earlier step leaves either nothing or a
verified blob or layer, so an install that was killed goes on where it was.
"""

import asyncio
import contextlib
import logging
import os
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Set
from datetime import UTC, datetime
from typing import Protocol

from aoscore.common.aio import Broadcast, Worker, log_and_continue
from aoscore.common.blobstore import check_digest
from aoscore.common.download import Downloader
from aoscore.common.errors import AosError, ChecksumError, InvalidArgumentError, NotFoundError, OutOfRangeError
from aoscore.common.files import available_bytes
from aoscore.common.layers import MAX_LAYER_BYTES
from aoscore.common.log import kv
from aoscore.common.oci import (
    MAX_DOCUMENT_BYTES,
    Descriptor,
    ImageConfig,
    ImageManifest,
    parse_image_config,
    parse_item_config,
    parse_manifest,
)
from aoscore.common.types import CoreAlert, ItemType
from aoscore.sm.imagemanager.items import ItemRow, ItemTable
from aoscore.sm.imagemanager.model import InstalledImage, ItemKey, Payload
from aoscore.sm.imagemanager.space import Space, Usage, kept_bytes
from aoscore.sm.imagemanager.store import ImageStore

_log = logging.getLogger(__name__)

_PARALLEL_INSTALLS = 4
_MAX_LAYERS = 128
# Integrity checks read the whole store: not while the node boots.
_FIRST_CHECK_S = 600.0
_NS = 1_000_000_000


class BlobSource(Protocol):
    """Who knows where blobs can be fetched: CM."""

    async def blob_urls(self, digests: list[str]) -> list[str]:
        """One URL per digest, in order."""
        ...


class AlertSink(Protocol):
    """Who takes alerts to the cloud."""

    async def send(self, value: CoreAlert) -> None:
        """Queue an alert."""
        ...


class ImageManager:
    """See the module text. A Service; `install`, `load` and the others work once it has started."""

    def __init__(
        self,
        store: ImageStore,
        table: ItemTable,
        source: BlobSource,
        downloader: Downloader,
        worker: Worker,
        alerts: AlertSink,
        *,
        ttl_s: float,
        period_s: float,
        limit_percent: float = 0.0,
        first_layer_on_top: bool = True,
        usage: Usage | None = None,
        wall_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        """`ttl_s`: how long removed items stay; `period_s`: time between clean-ups and between integrity checks."""
        self._store = store
        self._table = table
        self._source = source
        self._downloader = downloader
        self._worker = worker
        self._alerts = alerts
        self._ttl_s = ttl_s
        self._period_s = period_s
        self._first_layer_on_top = first_layer_on_top
        self._wall_ns = wall_ns
        self._space = Space(usage or _disk_usage(store), limit_percent, self._evict)
        self.broken: Broadcast[ItemKey] = Broadcast("broken items")
        self._rows: dict[ItemKey, ItemRow] = {}
        self._installed: frozenset[ItemKey] = frozenset()
        self._wanted: frozenset[ItemKey] | None = None
        self._wanted_known = asyncio.Event()
        self._slots = asyncio.Semaphore(_PARALLEL_INSTALLS)
        self._locks: dict[str, tuple[asyncio.Lock, list[None]]] = {}
        # Digests that running installs rely on, and how many do; those touched since the running sweep began.
        self._in_work: dict[str, int] = defaultdict(int)
        self._touched: set[str] = set()
        self._sweeping = asyncio.Lock()
        # Installed once, damaged now: instances may still run from their layers.
        self._damaged: set[ItemKey] = set()

    # The service

    async def run(self, started: Callable[[], None]) -> None:
        """Read the table, then clean up and check until cancelled."""
        self._set_rows(await self._table.load())
        started()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._clean_regularly())
            tasks.create_task(self._check_regularly())

    async def _clean_regularly(self) -> None:
        # Before the launcher has said what it wants, everything might be needed.
        await self._wanted_known.wait()
        while True:
            with log_and_continue(_log, "Can't clean up the image store"):
                await self.remove_outdated()
            await asyncio.sleep(self._period_s)

    async def _check_regularly(self) -> None:
        await asyncio.sleep(min(_FIRST_CHECK_S, self._period_s))
        while True:
            with log_and_continue(_log, "Can't check the image store"):
                await self.check_integrity()
            await asyncio.sleep(self._period_s)

    # For the launcher

    def installed(self) -> Set[ItemKey]:
        """Items ready for use."""
        return self._installed

    def want(self, keys: Set[ItemKey]) -> None:
        """Everything that instances run or shall run: what an unfinished install has fetched for these is kept."""
        self._wanted = frozenset(keys)
        self._wanted_known.set()

    async def install(self, key: ItemKey) -> None:
        """Make an item complete; repeatable, and it goes on where an earlier attempt stopped.

        Raises AosError with the first thing that went wrong; what was fetched and verified until then stays.
        """
        if key in self._installed:
            return
        check_digest(key.manifest_digest)
        async with self._slots:
            _log.info(kv("Install item", item=key, manifest=key.manifest_digest))
            with self._working_on() as keep:
                await self._fetch_all(key, keep)
                now_ns = self._wall_ns()
                await self._table.set_installed(key, now_ns)
                others = [row for row in self._rows.values() if not _same_version(row.key, key)]
                self._set_rows([*others, ItemRow(key)])
                self._damaged.discard(key)
            _log.info(kv("Item installed", item=key))

    async def load(self, key: ItemKey) -> InstalledImage:
        """An installed item. Raises NotFoundError when it is not installed or files are missing, and then reports it
        as broken."""
        if key not in self._installed:
            raise NotFoundError(f"item {key} is not installed")
        try:
            return await self._worker.run(self._read_image, key)
        except (NotFoundError, InvalidArgumentError) as error:
            await self._give_up(key, error)
            raise

    async def remove(self, keys: Iterable[ItemKey]) -> None:
        """Nobody needs these any more; they stay as a cache until they are too old or space is needed."""
        gone = [key for key in keys if key in self._installed]
        now_ns = self._wall_ns()
        await self._table.set_removed(gone, now_ns)
        self._set_rows([ItemRow(row.key, now_ns) if row.key in gone else row for row in self._rows.values()])
        for key in gone:
            _log.info(kv("Item removed", item=key))

    # Clean-up

    async def remove_outdated(self) -> None:
        """Delete items that were removed too long ago, and files that nothing refers to."""
        limit_ns = self._wall_ns() - int(self._ttl_s * _NS)
        for row in list(self._rows.values()):
            if row.removed_ns is not None and row.removed_ns <= limit_ns:
                await self._delete(row.key)
        await self.sweep()

    async def check_integrity(self) -> None:
        """Hash every installed item; broken ones are reported and cease to be installed."""
        for key in sorted(self._installed):
            try:
                await self._worker.run(self._verify, key)
            except (NotFoundError, ChecksumError, InvalidArgumentError) as error:
                await self._give_up(key, error)

    async def sweep(self) -> int:
        """Delete blobs, layers and partial downloads that no item refers to; how many there were."""
        async with self._sweeping:
            self._touched = set(self._in_work)
            complete = {*self._rows, *self._damaged}
            unused = await self._worker.run(self._find_unused, complete, complete | (self._wanted or frozenset()))
            # From the look at `_touched` to the end of a deletion nothing is awaited, so no install comes between.
            unused = {one for one in unused if one not in self._touched and one not in self._in_work}
            for digest in unused:
                self._store.discard(digest)
            await self._worker.run(self._store.empty_trash)
            if unused:
                _log.info(kv("Unused files deleted", count=len(unused)))
            return len(unused)

    async def _evict(self) -> bool:
        """Delete the item that has been unwanted for the longest time, then what broken installs have left."""
        outdated = [row for row in self._rows.values() if row.removed_ns is not None]
        if not outdated:
            return await self.sweep() > 0
        await self._delete(min(outdated, key=lambda row: (row.removed_ns or 0, row.key)).key)
        await self.sweep()
        return True

    async def _delete(self, key: ItemKey) -> None:
        await self._table.delete(key)
        self._set_rows([row for row in self._rows.values() if row.key != key])
        _log.info(kv("Item deleted", item=key))

    async def _give_up(self, key: ItemKey, error: AosError) -> None:
        """An installed item is damaged: it must be fetched again."""
        _log.error(kv("Installed item is damaged, fetching it again", item=key, error=error))
        await self._table.delete(key)
        self._set_rows([row for row in self._rows.values() if row.key != key])
        self._damaged.add(key)
        self.broken.publish(key)
        with log_and_continue(_log, "Can't send alert"):
            await self._alerts.send(CoreAlert(datetime.now(UTC), "SM", f"item {key} is damaged: {error}"))

    def _set_rows(self, rows: Iterable[ItemRow]) -> None:
        self._rows = {row.key: row for row in rows}
        self._installed = frozenset(row.key for row in self._rows.values() if row.removed_ns is None)

    # Install

    async def _fetch_all(self, key: ItemKey, keep: Callable[[str], None]) -> None:
        manifest_descriptor = Descriptor(digest=key.manifest_digest)
        manifest = parse_manifest(await self._document(manifest_descriptor, keep), what=f"manifest of {key}")
        if len(manifest.layers) > _MAX_LAYERS:
            raise InvalidArgumentError(f"manifest of {key} names {len(manifest.layers)} layers")
        if manifest.aos_item_config is not None:
            what = f"item config of {key}"
            parse_item_config(await self._document(manifest.aos_item_config, keep), what=what)
        config_data = await self._document(manifest.config, keep)
        if key.type is ItemType.COMPONENT:
            for layer in manifest.layers:
                await self._blob(layer, keep)
            return
        config = parse_image_config(config_data, what=f"image config of {key}")
        for layer, diff_id in _layers(key, manifest, config):
            await self._layer(layer, diff_id, keep)

    async def _document(self, descriptor: Descriptor, keep: Callable[[str], None]) -> bytes:
        if descriptor.size > MAX_DOCUMENT_BYTES:
            raise InvalidArgumentError(f"document {descriptor.digest} of {descriptor.size} bytes is too large")
        await self._blob(descriptor, keep, limit_bytes=MAX_DOCUMENT_BYTES)
        return await self._worker.run(self._store.blobs.read, descriptor.digest, MAX_DOCUMENT_BYTES)

    async def _blob(
        self, descriptor: Descriptor, keep: Callable[[str], None], *, limit_bytes: int = MAX_LAYER_BYTES
    ) -> None:
        """Have a verified blob in the store. `limit_bytes` holds for one whose size is not told."""
        digest = check_digest(descriptor.digest)
        keep(digest)
        async with self._locked(digest):
            if await self._is_good_blob(digest) or await self._worker.run(self._store.take_blob, digest):
                return
            await self._download(descriptor, limit_bytes)

    async def _is_good_blob(self, digest: str) -> bool:
        try:
            await self._worker.run(self._store.blobs.verify, digest)
        except NotFoundError:
            return False
        except ChecksumError as error:
            _log.warning(kv("Stored blob is damaged, fetching it again", error=error))
            await self._worker.run(self._store.blobs.remove, digest)
            return False
        return True

    async def _download(self, descriptor: Descriptor, limit_bytes: int) -> None:
        digest, size_bytes = descriptor.digest, descriptor.size
        if size_bytes < 0:
            raise InvalidArgumentError(f"blob {digest} can't have {size_bytes} bytes")
        urls = await self._source.blob_urls([digest])
        if len(urls) != 1 or not urls[0]:
            raise NotFoundError(f"CM knows no address of blob {digest}")
        partial = self._store.partial(digest)
        have_bytes = partial.stat().st_size if partial.exists() else 0
        async with self._space.reserve(max(0, size_bytes - have_bytes), f"blob {digest}") as reservation:

            def progress(done_bytes: int, total_bytes: int | None) -> None:
                if not size_bytes and max(done_bytes, total_bytes or 0) > limit_bytes:
                    raise OutOfRangeError(f"blob {digest} is larger than {limit_bytes} bytes")
                self._space.check(f"blob {digest}")
                reservation.written(done_bytes - have_bytes)

            try:
                await self._downloader.download(urls[0], partial, size=size_bytes or None, progress=progress)
                await self._worker.run(self._store.blobs.adopt, partial, digest)
            except (ChecksumError, OutOfRangeError):
                # No beginning of what is wanted.
                partial.unlink(missing_ok=True)
                raise

    async def _layer(self, descriptor: Descriptor, diff_id: str, keep: Callable[[str], None]) -> None:
        """Have an unpacked layer in the store."""
        digest = check_digest(descriptor.digest)
        keep(digest)
        keep(check_digest(diff_id))
        # Not just the digest: that of an unpacked tar layer is also its diff digest.
        async with self._locked(f"layer {diff_id}"):
            try:
                await self._worker.run(self._store.verify_layer, digest, diff_id)
                return
            except NotFoundError:
                pass
            except ChecksumError as error:
                _log.warning(kv("Stored layer is damaged, fetching it again", error=error))
            await self._worker.run(self._store.forget_layer, digest, diff_id)
            if await self._worker.run(self._store.take_layer, digest, diff_id):
                return
            await self._blob(descriptor, keep)
            wanted_bytes = await self._worker.run(self._store.unpacked_bytes, digest, descriptor.media_type)
            if wanted_bytes > MAX_LAYER_BYTES:
                raise InvalidArgumentError(f"layer {digest} of {wanted_bytes} bytes is larger than {MAX_LAYER_BYTES}")
            async with self._space.reserve(wanted_bytes, f"layer {diff_id}") as reservation:

                def progress(done_bytes: int) -> None:
                    # By the disk, not by the archive: a thousand empty files take room too.
                    self._space.check(f"layer {diff_id}")
                    reservation.written(done_bytes)

                await self._worker.run(
                    self._store.unpack,
                    digest,
                    diff_id,
                    descriptor.media_type,
                    # The archive may lie about its size, but never take more than there is.
                    max_bytes=min(wanted_bytes + max(0, self._space.free_bytes()), MAX_LAYER_BYTES),
                    progress=progress,
                )

    @contextlib.asynccontextmanager
    async def _locked(self, name: str) -> AsyncIterator[None]:
        """One task at a time per blob or layer."""
        lock, users = self._locks.setdefault(name, (asyncio.Lock(), []))
        users.append(None)
        try:
            async with lock:
                yield
        finally:
            users.pop()
            if not users:
                del self._locks[name]

    @contextlib.contextmanager
    def _working_on(self) -> Iterator[Callable[[str], None]]:
        """Protects what an install has fetched from the sweep until its row is written."""
        mine: list[str] = []

        def keep(digest: str) -> None:
            mine.append(digest)
            self._in_work[digest] += 1
            self._touched.add(digest)

        try:
            yield keep
        finally:
            for digest in mine:
                self._in_work[digest] -= 1
                if not self._in_work[digest]:
                    del self._in_work[digest]

    # In the worker

    def _manifest(self, key: ItemKey) -> ImageManifest:
        data = self._store.blobs.read(key.manifest_digest, MAX_DOCUMENT_BYTES)
        return parse_manifest(data, what=f"manifest of {key}")

    def _image_config(self, key: ItemKey, manifest: ImageManifest) -> ImageConfig:
        data = self._store.blobs.read(manifest.config.digest, MAX_DOCUMENT_BYTES)
        return parse_image_config(data, what=f"image config of {key}")

    def _read_image(self, key: ItemKey) -> InstalledImage:
        manifest = self._manifest(key)
        item_config = None
        if manifest.aos_item_config is not None:
            data = self._store.blobs.read(manifest.aos_item_config.digest, MAX_DOCUMENT_BYTES)
            item_config = parse_item_config(data, what=f"item config of {key}")
        if key.type is ItemType.COMPONENT:
            payloads = tuple(
                Payload(
                    path := self._store.blobs.existing(layer.digest),
                    layer.media_type,
                    layer.digest,
                    path.stat().st_size,
                )
                for layer in manifest.layers
            )
            return InstalledImage(key, ImageConfig(), item_config, payloads=payloads)
        config = self._image_config(key, manifest)
        trees = []
        for layer, diff_id in _layers(key, manifest, config):
            if not self._store.has_layer(layer.digest, diff_id):
                raise NotFoundError(f"layer {diff_id} of {key} is not unpacked")
            trees.append(self._store.tree(diff_id))
        if self._first_layer_on_top:
            trees.reverse()
        return InstalledImage(key, config, item_config, layers=tuple(trees))

    def _verify(self, key: ItemKey) -> None:
        manifest = self._manifest(key)
        documents = [key.manifest_digest, manifest.config.digest]
        if manifest.aos_item_config is not None:
            documents.append(manifest.aos_item_config.digest)
        if key.type is ItemType.COMPONENT:
            documents += [layer.digest for layer in manifest.layers]
        for digest in documents:
            self._store.blobs.verify(digest, again=True)
        if key.type is not ItemType.COMPONENT:
            for layer, diff_id in _layers(key, manifest, self._image_config(key, manifest)):
                self._store.verify_layer(layer.digest, diff_id, again=True)

    def _references(self, key: ItemKey) -> set[str]:
        """Digests of all blobs and layers of an item, as far as its documents are here."""
        found = {key.manifest_digest}
        manifest = self._manifest(key)
        found |= {manifest.config.digest, *(layer.digest for layer in manifest.layers)}
        if manifest.aos_item_config is not None:
            found.add(manifest.aos_item_config.digest)
        if key.type is not ItemType.COMPONENT:
            found |= set(self._image_config(key, manifest).rootfs.diff_ids)
        return found

    def _find_unused(self, complete: Set[ItemKey], keys: Set[ItemKey]) -> set[str]:
        """Digests of everything in the store that none of the items refers to.

        `complete` are those of `keys` that were installed once.
        """
        used: set[str] = set()
        for key in keys:
            try:
                used |= self._references(key)
            except (NotFoundError, InvalidArgumentError):
                if key in complete:
                    # An instance may run from layers that can't be named now: delete nothing.
                    return set()
                used.add(key.manifest_digest)
        return set(self._store.digests()) - used


def _layers(key: ItemKey, manifest: ImageManifest, config: ImageConfig) -> list[tuple[Descriptor, str]]:
    """Layers with their diff digests, in the order of the manifest."""
    diff_ids = config.rootfs.diff_ids
    if len(diff_ids) < len(manifest.layers):
        raise InvalidArgumentError(
            f"image config of {key} has {len(diff_ids)} diff ids for {len(manifest.layers)} layers"
        )
    return list(zip(manifest.layers, diff_ids, strict=False))


def _same_version(left: ItemKey, right: ItemKey) -> bool:
    return (left.item_id, left.type, left.version) == (right.item_id, right.type, right.version)


def _disk_usage(store: ImageStore) -> Usage:
    def total() -> int:
        stat = os.statvfs(store.root)
        return stat.f_blocks * stat.f_frsize

    kept = kept_bytes(total())
    return Usage(lambda: available_bytes(store.root) - kept, total, store.used_bytes)
