"""What a node keeps for its SM: verified blobs, unpacked layers, parts of other blobs, within limits (mp.md §7, §10).

The index is the file system. Access times are times of use; a blob that SM has fetched has time 0 and goes first.
SM may move whole blobs and layers into its own store (its `imageManager.stagingDir`): it holds a shared lock on `.lock`
meanwhile, and we an exclusive one while we remove anything.

All methods block: call them in a worker.
"""

import contextlib
import fcntl
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from aoscore._speedups.unpack import Owners
from aoscore.common.blobstore import BlobStore, check_digest
from aoscore.common.errors import ChecksumError, InvalidArgumentError, NoSpaceError, NotFoundError
from aoscore.common.files import available_bytes
from aoscore.common.layers import MAX_LAYER_BYTES, LayerStore, unpacked_bytes
from aoscore.common.log import kv
from aoscore.common.oci import (
    MEDIA_TYPE_LAYER_GZIP,
    MEDIA_TYPE_LAYER_TAR,
    MEDIA_TYPE_LAYER_ZSTD,
    Descriptor,
    ImageManifest,
    parse_image_config,
    parse_manifest,
)

_log = logging.getLogger(__name__)

_DOCUMENT_LIMIT_BYTES = 1024 * 1024
_LAYERS = (MEDIA_TYPE_LAYER_TAR, MEDIA_TYPE_LAYER_GZIP, MEDIA_TYPE_LAYER_ZSTD)


class NodeStore:
    """Everything below `root`. Sizes are bytes; `max_size_bytes` 0 means no limit."""

    def __init__(self, root: Path, *, ttl_s: float, min_free_bytes: int, max_size_bytes: int) -> None:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._blobs = BlobStore(root)
        self._tmp = root / "tmp"
        self._tmp.mkdir(mode=0o700, exist_ok=True)
        self._layers = LayerStore(root, root / "unpacking", Owners.ARCHIVE)
        self._lock = root / ".lock"
        self._lock.touch(mode=0o600)
        self._ttl_s = ttl_s
        self._min_free_bytes = min_free_bytes
        self._max_size_bytes = max_size_bytes

    def path(self, digest: str) -> Path:
        """Where a blob is or would be."""
        return self._blobs.path(digest)

    def use(self, digest: str) -> bool:
        """Whether the blob is here, whole and right; it is not removed for its age for some time then."""
        try:
            self._blobs.verify(digest)
            _set_used(self._blobs.path(digest), time.time_ns())
        except (NotFoundError, FileNotFoundError):
            return False
        except ChecksumError as error:
            _log.error(kv("Damaged blob is removed", error=error))
            self._blobs.remove(digest)
            return False
        return True

    def manifest(self, digest: str) -> ImageManifest | None:
        """What a blob says if it is the manifest of an image (OCI image-spec)."""
        path = self._blobs.path(digest)
        try:
            if path.stat().st_size > _DOCUMENT_LIMIT_BYTES:
                return None
            manifest = parse_manifest(path.read_bytes(), what=f"blob {digest}")
            is_usable = all(check_digest(one.digest) and one.size >= 0 for one in named_by(manifest))
            return manifest if is_usable else None
        except (OSError, InvalidArgumentError):
            return None  # something else than a manifest: most blobs are

    def open_growing(self, digest: str) -> BinaryIO:
        """The file of a blob that grows, or has just become whole."""
        try:
            return self.part(digest).open("rb")
        except FileNotFoundError:
            return self._blobs.existing(digest).open("rb")

    def part(self, digest: str) -> Path:
        """Where a blob grows."""
        return self._tmp / f"{check_digest(digest).removeprefix('sha256:')}.part"

    def adopt(self, digest: str, actual: str = "") -> Path:
        """Take a grown blob in; `actual` is what came out when it was written, if known.

        Raises ChecksumError when it is something else; it is gone then.
        """
        part = self.part(digest)
        try:
            return self._blobs.adopt(part, digest, actual=actual)
        except ChecksumError:
            self.drop_part(digest)
            raise

    def drop_part(self, digest: str) -> None:
        """What has come of the blob is no beginning of it."""
        self.part(digest).unlink(missing_ok=True)

    def handed_over(self, digest: str) -> None:
        """SM has the blob in its own store now."""
        with contextlib.suppress(FileNotFoundError):
            _set_used(self._blobs.path(digest), 0)

    def diff_ids(self, manifest: ImageManifest) -> dict[str, str]:
        """Diff digests of an image's layers by the digests of their blobs; nothing for what is no service.

        SM would say what is wrong with the documents of the image; here they just give less.
        """
        try:
            data = self._blobs.read(manifest.config.digest, _DOCUMENT_LIMIT_BYTES)
            config = parse_image_config(data, what=f"image config {manifest.config.digest}")
            pairs = zip(manifest.layers, config.rootfs.diff_ids, strict=False)
            return {layer.digest: check_digest(diff_id) for layer, diff_id in pairs if layer.media_type in _LAYERS}
        except (NotFoundError, InvalidArgumentError):
            return {}

    def unpack_ahead(self, layer: Descriptor, diff_id: str) -> None:
        """Unpack a layer for SM, unless it is, or SM has its blob, or there is no room but that of other blobs.

        Raises as LayerStore.unpack.
        """
        blob = self._blobs.path(layer.digest)
        if self._layers.tree(diff_id).exists() or not blob.exists() or blob.stat().st_atime_ns == 0:
            return
        if self._is_too_much(unpacked_bytes(blob, layer.media_type), sum(size for _, _, size in self._all()), 0):
            _log.info(kv("No room to unpack a layer ahead", digest=layer.digest))
            return
        self._layers.unpack(
            blob, layer.digest, diff_id, layer.media_type, max_bytes=MAX_LAYER_BYTES, progress=self._check_space
        )
        _log.info(kv("Layer is unpacked for SM", digest=layer.digest, diffID=diff_id))

    def _check_space(self, _: int) -> None:
        if available_bytes(self._tmp) < self._min_free_bytes:
            raise NoSpaceError(f"the disk of the image store {self._tmp.parent} is full")

    def make_room(self, size_bytes: int) -> None:
        """See to it that so much can be written. Raises NoSpaceError when it can't, even without all other blobs.

        Nothing is removed then: what does not fit in any case must not cost the others their place.
        """
        if not self._max_size_bytes and not self._is_too_much(size_bytes, 0, 0):
            return  # the usual case, and it comes with every piece of a download
        entries = sorted(self._unused(), key=lambda entry: entry[1])
        total = sum(size for _, _, size in self._all())
        removable = sum(size for _, _, size in entries)
        if self._is_too_much(size_bytes, total, 0) and not self._is_too_much(size_bytes, total - removable, removable):
            with self._removing():
                while entries and self._is_too_much(size_bytes, total, 0):
                    path, _, size = entries.pop(0)
                    self._remove(path)
                    total -= size
        if self._is_too_much(size_bytes, total, 0):
            raise NoSpaceError(f"no room for {size_bytes} bytes in the image store {self._tmp.parent}")

    def _is_too_much(self, size_bytes: int, total: int, freed_bytes: int) -> bool:
        """Whether so much does not fit beside a `total`, once `freed_bytes` more are free than now."""
        if self._max_size_bytes and total + size_bytes > self._max_size_bytes:
            return True
        return available_bytes(self._tmp) + freed_bytes - size_bytes < self._min_free_bytes

    def clean(self) -> None:
        """Remove what was not used for the time to live."""
        limit = time.time() - self._ttl_s
        with self._removing():
            for path, used, _ in list(self._all()):
                if used < limit:
                    self._remove(path)

    @contextlib.contextmanager
    def _removing(self) -> Iterator[None]:
        """SM takes nothing meanwhile."""
        with self._lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
        self._layers.empty_trash()

    def _remove(self, path: Path) -> None:
        _log.info(kv("Removed from the image store", name=path.name))
        if path.parent == self._tmp:
            path.unlink(missing_ok=True)
        elif path.is_dir():
            self._layers.discard(f"sha256:{path.name}")
        else:
            self._blobs.remove(f"sha256:{path.name}")

    def _unused(self) -> Iterator[tuple[Path, float, int]]:
        """Whole blobs and layers; parts are what is being made room for."""
        return (entry for entry in self._all() if entry[0].parent != self._tmp)

    def _all(self) -> Iterator[tuple[Path, float, int]]:
        """Path, time of use and size of everything; a layer counts as used when it was unpacked."""
        paths = [self._blobs.path(digest) for digest in self._blobs.digests()]
        for path in [*paths, *self._tmp.iterdir()]:
            with contextlib.suppress(FileNotFoundError):
                stat = path.stat()
                yield path, stat.st_atime, stat.st_size
        for diff_id in self._layers.diff_ids():
            with contextlib.suppress(FileNotFoundError):
                path = self._layers.path(diff_id)
                yield path, path.stat().st_mtime, self._layers.size_bytes(diff_id)


def named_by(manifest: ImageManifest) -> tuple[Descriptor, ...]:
    """The blobs of an image, in order of use."""
    named = (manifest.config, manifest.aos_item_config, *manifest.layers)
    return tuple(one for one in named if one is not None)


def _set_used(path: Path, time_ns: int) -> None:
    # The modification time stays: by it a blob that was verified is known again.
    os.utime(path, ns=(time_ns, path.stat().st_mtime_ns))
