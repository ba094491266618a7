"""Blobs that a node keeps for its SM: verified ones, parts of others, within limits (mp.md §7, §10).

The index is the file system. Access times are times of use; a blob that SM has fetched has time 0 and goes first.
All methods block: call them in a worker.
"""

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from aoscore.common.blobstore import BlobStore, check_digest
from aoscore.common.errors import ChecksumError, InvalidArgumentError, NoSpaceError, NotFoundError
from aoscore.common.files import available_bytes
from aoscore.common.log import kv
from aoscore.common.oci import Descriptor, parse_manifest

_log = logging.getLogger(__name__)

_MANIFEST_LIMIT_BYTES = 1024 * 1024


class NodeStore:
    """Everything below `root`. Sizes are bytes; `max_size_bytes` 0 means no limit."""

    def __init__(self, root: Path, *, ttl_s: float, min_free_bytes: int, max_size_bytes: int) -> None:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._blobs = BlobStore(root)
        self._tmp = root / "tmp"
        self._tmp.mkdir(mode=0o700, exist_ok=True)
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

    def named_by(self, digest: str) -> tuple[Descriptor, ...]:
        """What a blob names if it is the manifest of an image (OCI image-spec), in order of use; else nothing."""
        path = self._blobs.path(digest)
        try:
            if path.stat().st_size > _MANIFEST_LIMIT_BYTES:
                return ()
            manifest = parse_manifest(path.read_bytes(), what=f"blob {digest}")
            named = (manifest.config, manifest.aos_item_config, *manifest.layers)
            return tuple(one for one in named if one is not None and check_digest(one.digest) and one.size >= 0)
        except (OSError, InvalidArgumentError):
            return ()  # something else than a manifest: most blobs are

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
            part.unlink(missing_ok=True)
            raise

    def handed_over(self, digest: str) -> None:
        """SM has the blob in its own store now."""
        with contextlib.suppress(FileNotFoundError):
            _set_used(self._blobs.path(digest), 0)

    def make_room(self, size_bytes: int) -> None:
        """See to it that so much can be written. Raises NoSpaceError when it can't, even without all other blobs."""
        if not self._max_size_bytes and not self._is_too_much(size_bytes, 0):
            return  # the usual case, and it comes with every piece of a download
        entries = sorted(self._unused(), key=lambda entry: entry[1])
        total = sum(size for _, _, size in self._all())
        while self._is_too_much(size_bytes, total):
            if not entries:
                raise NoSpaceError(f"no room for {size_bytes} bytes in the image store {self._tmp.parent}")
            path, _, size = entries.pop(0)
            self._remove(path)
            total -= size

    def _is_too_much(self, size_bytes: int, total: int) -> bool:
        if self._max_size_bytes and total + size_bytes > self._max_size_bytes:
            return True
        return available_bytes(self._tmp) - size_bytes < self._min_free_bytes

    def clean(self) -> None:
        """Remove what was not used for the time to live."""
        limit = time.time() - self._ttl_s
        for path, used, _ in list(self._all()):
            if used < limit:
                self._remove(path)

    def _remove(self, path: Path) -> None:
        _log.info(kv("Removed from the image store", name=path.name))
        if path.parent == self._tmp:
            path.unlink(missing_ok=True)
        else:
            self._blobs.remove(f"sha256:{path.name}")

    def _unused(self) -> Iterator[tuple[Path, float, int]]:
        """Whole blobs; parts are what is being made room for."""
        return (entry for entry in self._all() if entry[0].parent != self._tmp)

    def _all(self) -> Iterator[tuple[Path, float, int]]:
        """Path, time of use and size of every file."""
        paths = [self._blobs.path(digest) for digest in self._blobs.digests()]
        for path in [*paths, *self._tmp.iterdir()]:
            with contextlib.suppress(FileNotFoundError):
                stat = path.stat()
                yield path, stat.st_atime, stat.st_size


def _set_used(path: Path, time_ns: int) -> None:
    # The modification time stays: by it a blob that was verified is known again.
    os.utime(path, ns=(time_ns, path.stat().st_mtime_ns))
