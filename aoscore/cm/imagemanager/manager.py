"""The image manager: versions of update items from "wanted" to "installed" and away again (cm-cloud.md §5).

States of a version: downloading -> pending (all blobs here and checked) -> installed, and failed, removed. Unlike
AosCore 9.1 a version that is installed stays so until its successor has proved to work: `install` is called only then.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Collection, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

import msgspec

from aoscore.cm.communication.messages import (
    CertificateChain,
    DesiredItem,
    ItemState,
    SigningCertificate,
)
from aoscore.cm.imagemanager.fetcher import Fetch, Fetcher
from aoscore.cm.imagemanager.platforms import RuntimePlatform, select_manifests
from aoscore.cm.imagemanager.store import Item, ItemStore
from aoscore.common import oci
from aoscore.common.aio import Broadcast, Worker, log_and_continue, unbroken
from aoscore.common.blobstore import BlobStore
from aoscore.common.errors import (
    AlreadyExistsError,
    AosError,
    ChecksumError,
    FailedError,
    InvalidArgumentError,
    NotFoundError,
    NotSupportedError,
    to_error_info,
)
from aoscore.common.log import kv

if TYPE_CHECKING:
    from cryptography import x509

    from aoscore.cm.imagemanager.crypto import Signers

_log = logging.getLogger(__name__)

T = TypeVar("T")

_FINAL_ERRORS: Final = (ChecksumError, InvalidArgumentError, NotSupportedError)
_USABLE: Final = (ItemState.PENDING, ItemState.INSTALLED)


def is_final(error: AosError) -> bool:
    """Whether trying the same again can only fail the same way."""
    return isinstance(error, _FINAL_ERRORS)


class ImageManagerSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Times in seconds."""

    item_ttl_s: float
    check_period_s: float


class ImageManager:
    """Keeps the versions and their blobs, as a service (ageing and the daily check)."""

    def __init__(
        self,
        settings: ImageManagerSettings,
        items: ItemStore,
        blobs: BlobStore,
        fetcher: Fetcher,
        worker: Worker,
        *,
        roots: Callable[[], Sequence[x509.Certificate]],
        runtimes: Callable[[], Collection[RuntimePlatform] | None] = lambda: None,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """`roots` gives the certificates at which chains of signers may end, read when they are needed."""
        self._settings = settings
        self._items = items
        self._blobs = blobs
        self._fetcher = fetcher
        self._worker = worker
        self._roots = roots
        self._runtimes = runtimes
        self._now = now
        self._lock = asyncio.Lock()
        self.changed: Broadcast[Item] = Broadcast("items")

    # ---- look-ups

    def statuses(self) -> list[Item]:
        """All known versions, also the removed ones."""
        return self._items.all()

    def index_digest(self, item_id: str, version: str) -> str:
        """Digest of the image index of a version. Raises NotFoundError when it is not (yet) here."""
        item = self._items.get(item_id, version)
        if item is None or item.state is ItemState.DOWNLOADING:
            raise NotFoundError(f"item {item_id} {version} is not here")
        return item.index_digest

    def blob_path(self, digest: str) -> Path:
        """The file of a blob. Raises NotFoundError."""
        return self._blobs.existing(digest)

    def load_index(self, item_id: str, version: str) -> oci.ImageIndex:
        """The image index of a version. Raises NotFoundError, InvalidArgumentError."""
        return self._parse(self.index_digest(item_id, version), oci.parse_index)

    def load_manifest(self, digest: str) -> oci.ImageManifest:
        """A manifest. Raises NotFoundError, for example when its platform was not downloaded; InvalidArgumentError."""
        return self._parse(digest, oci.parse_manifest)

    def load_image_config(self, digest: str) -> oci.ImageConfig:
        """An image configuration. Raises NotFoundError, InvalidArgumentError."""
        return self._parse(digest, oci.parse_image_config)

    def load_item_config(self, digest: str) -> oci.ItemConfig:
        """An Aos item configuration. Raises NotFoundError, InvalidArgumentError."""
        return self._parse(digest, oci.parse_item_config)

    def _parse(self, digest: str, parse: Callable[..., T]) -> T:
        return parse(self._blobs.read(digest, oci.MAX_DOCUMENT_BYTES), what=f"blob {digest}")

    # ---- service

    async def run(self, started: Callable[[], None]) -> None:
        """Loads what is known, then ages it until cancelled."""
        await self._items.load()
        self._blobs.remember(await self._items.take_verified())
        await self._worker.run(self._fetcher.prepare)
        async with self._lock:
            await self._remove_outdated()
            await self._remove_orphans()
        started()
        try:
            while True:
                await asyncio.sleep(self._settings.check_period_s)
                with log_and_continue(_log, "Can't check the images"):
                    async with self._lock:
                        await self._remove_outdated()
                        await self._remove_orphans()
                        await self._check_again()
        finally:
            with log_and_continue(_log, "Can't note which blobs are verified"):
                await self._items.note_verified(self._blobs.remembered())

    # ---- download

    async def download(
        self,
        items: Sequence[DesiredItem],
        certificates: Sequence[SigningCertificate],
        chains: Sequence[CertificateChain],
    ) -> None:
        """Brings all blobs of the wanted versions into the store.

        Afterwards each of them is pending, installed (it was before) or failed with its error. Versions that were not
        installed and that nobody wants any more are forgotten first, which makes room. A cancelled call can be
        repeated: partial files stay.
        """
        async with self._lock:
            signers = await self._worker.run(self._signers, certificates, chains)
            wanted = {(item.item_id, item.version) for item in items}
            left_over = [
                item
                for item in self._items.all()
                if item.key not in wanted and item.state not in (ItemState.INSTALLED, ItemState.REMOVED)
            ]
            await self._change(forget=left_over)
            if left_over:
                await self._remove_orphans()
            async with asyncio.TaskGroup() as group:
                fetch = Fetch(self._fetcher, signers, group)
                tasks = [group.create_task(self._bring(item, fetch), name=f"item {item.item_id}") for item in items]
                await asyncio.gather(*tasks)
                fetch.close()
            await self._remove_orphans()

    async def _bring(self, wanted: DesiredItem, fetch: Fetch) -> None:
        known = self._items.get(wanted.item_id, wanted.version)
        if known is not None and known.type is not wanted.item_type and known.state in _USABLE:
            # The key of the table has no type (database.md §6, item 17).
            error = AlreadyExistsError(f"item {wanted.item_id} {wanted.version} is known as {known.type}")
            _log.error("Item can't be installed: %s", error)
            return
        item = Item(
            wanted.item_id,
            wanted.item_type,
            wanted.version,
            wanted.index_digest,
            ItemState.DOWNLOADING,
            known.timestamp if known and known.state is not ItemState.REMOVED else self._now(),
        )
        shown = item
        if known is not None and known.state in _USABLE:
            if known.index_digest == wanted.index_digest:
                shown = item = msgspec.structs.replace(item, state=known.state)
            elif known.state is ItemState.INSTALLED:
                # The same version with other images: there is one row for both, and what it has runs until it can go.
                shown = known
        await self._change(shown)
        try:
            await self._load(wanted.index_digest, fetch)
        except AosError as error:
            _log.error(kv("Item can't be downloaded", itemID=item.item_id, version=item.version, error=error))
            await self._change(_with_error(shown, error))
            return
        if item.state is ItemState.DOWNLOADING:
            await self._change(msgspec.structs.replace(item, state=ItemState.PENDING))

    async def _load(self, index_digest: str, fetch: Fetch) -> None:
        """Fetches a version from its index down (§5.3); the platforms that the Unit cannot use are left out."""
        await fetch.blobs([index_digest])
        index = self._parse(index_digest, oci.parse_index)
        manifests = [entry.digest for entry in select_manifests(index, self._runtimes())]
        await fetch.blobs(manifests)
        parts: list[str] = []
        for digest in manifests:
            parts += _parts(self._parse(digest, oci.parse_manifest))
        await fetch.blobs(parts)

    # ---- what becomes of the versions

    async def fail(self, item_id: str, version: str, error: AosError) -> None:
        """A version was tried and does not work; it is kept with its error until another one is wanted."""
        item = self._items.get(item_id, version)
        if item is not None:
            failed = msgspec.structs.replace(item, state=ItemState.FAILED, error=to_error_info(error), final=True)
            await self._change(failed)

    async def install(self, wanted: Collection[tuple[str, str]], keep: Collection[tuple[str, str]] = ()) -> None:
        """Ends an update run; `wanted` are (item id, version) of the desired status, `keep` those that wait for theirs.

        A wanted version that is pending becomes installed and its predecessors go. One that failed leaves its
        predecessor in place. Installed items that are not wanted at all become removed and stay as a cache.
        """
        async with self._lock:
            proven = [item for item in self._items.all() if item.key in wanted and item.state in _USABLE]
            broken = [item for item in proven if not await self._is_sound(item)]
            done = {item.item_id for item in proven if item not in broken}
            wanted_ids = {item_id for item_id, _ in wanted}
            put = [
                *(
                    msgspec.structs.replace(item, state=ItemState.INSTALLED, error=None, final=False)
                    for item in proven
                    if item not in broken
                ),
                *(_with_error(item, FailedError("a blob is missing or damaged")) for item in broken),
            ]
            forget = []
            for item in self._items.all():
                if item.key in wanted or item.key in keep or item.state is ItemState.REMOVED:
                    continue
                if item.item_id in done or item.state is not ItemState.INSTALLED:
                    forget.append(item)
                elif item.item_id not in wanted_ids:
                    put.append(msgspec.structs.replace(item, state=ItemState.REMOVED, timestamp=self._now()))
            await self._change(*put, forget=forget)
            await self._remove_orphans()
            await self._worker.run(self._drop_partials)

    async def _is_sound(self, item: Item) -> bool:
        """Whether every blob of a version is there with the right content."""
        try:
            for digest in self._used(item):
                await self._worker.run(self._blobs.verify, digest)
        except AosError as error:
            _log.error(kv("Item is not sound", itemID=item.item_id, version=item.version, error=error))
            return False
        return True

    def _signers(self, certificates: Sequence[SigningCertificate], chains: Sequence[CertificateChain]) -> Signers:
        # Import on use: between updates nothing is signed or decrypted.
        from aoscore.cm.imagemanager.crypto import Signers

        return Signers(certificates, chains, self._roots())

    async def _change(self, *items: Item, forget: Iterable[Item] = ()) -> None:
        """Stores, then tells, whatever becomes of the caller meanwhile. What is forgotten is told as removed."""
        await unbroken(self._store(items, list(forget)))

    async def _store(self, items: Sequence[Item], forget: Sequence[Item]) -> None:
        changed = [item for item in items if self._items.get(*item.key) != item]
        try:
            await self._items.write(changed, forget)
        except AosError as error:
            for item in changed:
                known = _with_error(self._items.get(*item.key) or item, error)
                self._items.note(known)
                self.changed.publish(known)
            raise
        for item in changed:
            _log.info(kv("Item changed", itemID=item.item_id, version=item.version, state=item.state))
            self.changed.publish(item)
        for item in forget:
            _log.info(kv("Item forgotten", itemID=item.item_id, version=item.version))
            self.changed.publish(msgspec.structs.replace(item, state=ItemState.REMOVED, error=None))

    # ---- keeping order

    def _reachable(self, items: Iterable[Item]) -> set[str]:
        """All blobs that belong to versions, as far as their documents are here."""
        found: set[str] = set()
        for item in items:
            found.add(item.index_digest)
            with contextlib.suppress(AosError):
                for entry in self._parse(item.index_digest, oci.parse_index).manifests:
                    found.add(entry.digest)
                    with contextlib.suppress(AosError):
                        found.update(_parts(self._parse(entry.digest, oci.parse_manifest)))
        return found

    def _used(self, item: Item) -> set[str]:
        """Blobs that must be here for a version to run. Raises AosError when its documents are not.

        A manifest that is absent belongs to a platform that was not downloaded; one of them must be here.
        """
        index = self._parse(item.index_digest, oci.parse_index)
        manifests = [entry.digest for entry in index.manifests if self._blobs.contains(entry.digest)]
        if not manifests:
            raise NotFoundError(f"item {item.item_id} {item.version} has no image here")
        found = {item.index_digest, *manifests}
        for digest in manifests:
            found.update(_parts(self._parse(digest, oci.parse_manifest)))
        return found

    async def _remove_orphans(self) -> int:
        """Deletes blobs that no version needs; the bytes freed."""
        return await self._worker.run(self._delete_orphans, self._items.all())

    def _delete_orphans(self, items: Sequence[Item]) -> int:
        needed = self._reachable(items)
        return sum(self._blobs.remove(digest) for digest in list(self._blobs.digests()) if digest not in needed)

    async def _remove_outdated(self) -> None:
        limit = self._now().timestamp() - self._settings.item_ttl_s
        await self._change(
            forget=[
                item
                for item in self._items.all()
                if item.state is ItemState.REMOVED and item.timestamp.timestamp() < limit
            ]
        )

    async def _check_again(self) -> None:
        """Reads every installed blob anew. A damaged one is deleted, so that the next update run repairs it."""
        for item in self._items.all():
            if item.state is not ItemState.INSTALLED:
                continue
            for digest in self._reachable([item]):
                try:
                    await self._worker.run(self._blobs.verify, digest, again=True)
                except ChecksumError as error:
                    _log.error(kv("Damaged blob is deleted", itemID=item.item_id, version=item.version, error=error))
                    await self._worker.run(self._blobs.remove, digest)
                    await self._change(_with_error(item, error))
                except NotFoundError:
                    continue  # a platform that was not downloaded

    def _drop_partials(self) -> None:
        """Deletes partial files that no version can use, or whose blob is in the store: a crash may leave both."""
        needed = {digest for digest in self._reachable(self._items.all()) if not self._blobs.contains(digest)}
        for path in self._fetcher.idle_partials():
            if f"sha256:{path.name}" not in needed:
                path.unlink(missing_ok=True)

    async def evict(self, directory: Path, needed_bytes: int) -> None:
        """Frees space: partial files nobody works on, then removed items, oldest first."""
        freed = 0
        for path in await self._worker.run(self._fetcher.idle_partials):
            if freed >= needed_bytes:
                return
            freed += path.stat().st_size
            path.unlink(missing_ok=True)
            _log.warning(kv("Partial download is dropped for space", file=path.name))
        removed = [item for item in self._items.all() if item.state is ItemState.REMOVED]
        for item in sorted(removed, key=lambda entry: entry.timestamp):
            if freed >= needed_bytes:
                return
            _log.warning(kv("Removed item is dropped for space", itemID=item.item_id, version=item.version))
            await self._change(forget=[item])
            freed += await self._remove_orphans()


def _with_error(item: Item, error: AosError) -> Item:
    """A version that cannot be had. One that is installed stays so: its nodes have their own copy and go on."""
    installed = item.state is ItemState.INSTALLED
    return msgspec.structs.replace(
        item,
        state=ItemState.INSTALLED if installed else ItemState.FAILED,
        error=to_error_info(error),
        final=is_final(error) and not installed,
    )


def _parts(manifest: oci.ImageManifest) -> list[str]:
    """Digests a manifest names, in the order of loading."""
    item_config = manifest.aos_item_config
    return [
        manifest.config.digest,
        *([item_config.digest] if item_config is not None and item_config.digest else []),
        *(layer.digest for layer in manifest.layers),
    ]
