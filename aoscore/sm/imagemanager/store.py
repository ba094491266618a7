"""Files of the image store (sm.md §3.2), readable for AosCore 9.1.

    blobs/sha256/<hex>            manifests, configs, component payloads; for a service layer, once unpacked, only a
                                  short text with its diff digest (the "link")
    layers/sha256/<hex>/layer/    the unpacked tree of a diff digest, with `digest` (of the tree) and `size` beside it
    staging/, downloads/          work in progress (own): what is in the two trees above is always complete

Everything here blocks: call it in a worker.
"""

import contextlib
import fcntl
import logging
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from aoscore._speedups.unpack import Owners
from aoscore.common.blobstore import BlobStore, check_digest
from aoscore.common.errors import ChecksumError, NotFoundError
from aoscore.common.files import move, write_atomic
from aoscore.common.layers import LayerStore, unpacked_bytes
from aoscore.common.log import kv

_log = logging.getLogger(__name__)

_LINK = re.compile(r"sha256:[0-9a-f]{64}")
_LINK_BYTES = 71


class ImageStore:
    """See the module text."""

    def __init__(self, root: Path, owners: Owners = Owners.ROOT, staging: Path | None = None) -> None:
        """Creates the directories; work that an earlier process left half done is removed, downloads are kept.

        `owners`: of what is unpacked. `staging`: where the MP of this node puts what it fetches and unpacks ahead.
        """
        self.root = root
        self.blobs = BlobStore(root)
        self._layers = LayerStore(root, root / "staging", owners)
        self._staging = staging
        self.downloads = root / "downloads"
        self.downloads.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Trees found right by this process: hashing them at every install of a sharing item would be waste.
        self._verified: set[str] = set()

    # Layers

    def tree(self, diff_id: str) -> Path:
        """Where the unpacked layer is or would be."""
        return self._layers.tree(diff_id)

    def link(self, digest: str) -> str | None:
        """The diff digest when the blob of a layer was replaced by its link."""
        path = self.blobs.path(digest)
        try:
            if path.stat().st_size != _LINK_BYTES:
                return None
            text = path.read_text("ascii")
        except (FileNotFoundError, UnicodeDecodeError):
            return None
        return text if _LINK.fullmatch(text) else None

    def has_layer(self, digest: str, diff_id: str) -> bool:
        """Whether the layer is unpacked, as far as a look at names tells."""
        return self.link(digest) == diff_id and self.tree(diff_id).is_dir()

    def verify_layer(self, digest: str, diff_id: str, *, again: bool = False) -> None:
        """Check an unpacked layer against the digest taken when it was unpacked.

        `again` ignores earlier checks of this process. Raises NotFoundError or ChecksumError.
        """
        if not self.has_layer(digest, diff_id):
            raise NotFoundError(f"layer {diff_id} is not unpacked")
        if diff_id in self._verified and not again:
            return
        self._verified.discard(diff_id)
        self._layers.verify(diff_id)
        self._verified.add(diff_id)

    def unpack(
        self,
        digest: str,
        diff_id: str,
        media_type: str,
        *,
        max_bytes: int,
        progress: Callable[[int], None] | None = None,
    ) -> int:
        """Unpack the layer blob `digest` and replace the blob by its link; the size of the tree in bytes.

        See LayerStore.unpack for what is raised.
        """
        blob = self.blobs.existing(digest)
        size_bytes = self._layers.unpack(blob, digest, diff_id, media_type, max_bytes=max_bytes, progress=progress)
        self._verified.add(diff_id)
        write_atomic(self.blobs.path(digest), diff_id.encode())
        return size_bytes

    def forget_layer(self, digest: str, diff_id: str) -> None:
        """Make the layer be fetched again at the next install; its files stay, an instance may be using them."""
        self._verified.discard(diff_id)
        if self.link(digest) == diff_id:
            self.blobs.remove(digest)

    # What MP has ready (mp.md §7)

    def take_blob(self, digest: str) -> bool:
        """Whether the blob was there for us. It is checked on the way in; one that is not right counts as absent."""
        partial = self.partial(digest)
        with self._staged() as staging:
            if staging is None or not move(staging / self.blobs.path(digest).relative_to(self.root), partial):
                return False
        try:
            self.blobs.adopt(partial, digest)
        except ChecksumError as error:
            _log.warning(kv("Blob of MP is not taken", error=error))
            partial.unlink(missing_ok=True)
            return False
        return True

    def take_layer(self, digest: str, diff_id: str) -> bool:
        """Whether the layer was there for us, unpacked; then it is in place of its blob `digest` as after `unpack`."""
        with self._staged() as staging:
            try:
                if staging is None or not self._layers.take(diff_id, staging):
                    return False
            except (NotFoundError, ChecksumError) as error:
                _log.warning(kv("Layer of MP is not taken", error=error))
                return False
        self._verified.add(diff_id)
        write_atomic(self.blobs.path(digest), diff_id.encode())
        return True

    @contextlib.contextmanager
    def _staged(self) -> Iterator[Path | None]:
        """MP's store, in which nothing is removed during the block; None when there is none."""
        try:
            lock = os.open(self._staging / ".lock", os.O_RDONLY | os.O_CLOEXEC) if self._staging else None
        except FileNotFoundError:
            lock = None
        if lock is None:
            yield None
            return
        try:
            fcntl.flock(lock, fcntl.LOCK_SH)
            yield self._staging
        finally:
            os.close(lock)

    # The whole store

    def digests(self) -> Iterator[str]:
        """Digests of all blobs, unpacked layers and downloads."""
        yield from self.blobs.digests()
        yield from self._layers.diff_ids()
        for path in self.downloads.iterdir():
            yield path.name.replace("-", ":", 1)

    def discard(self, digest: str) -> None:
        """Take a blob, layer or download out of the store; short enough for the event loop.

        Trees are only moved, `empty_trash` deletes them.
        """
        self.blobs.remove(digest)
        self.partial(digest).unlink(missing_ok=True)
        self._verified.discard(digest)
        self._layers.discard(digest)

    def empty_trash(self) -> None:
        """Delete what was discarded."""
        self._layers.empty_trash()

    def used_bytes(self) -> int:
        """What blobs, layers and downloads take, by the sizes noted for layers."""
        used = sum(path.stat().st_size for path in self.downloads.iterdir())
        used += sum(self.blobs.path(digest).stat().st_size for digest in self.blobs.digests())
        return used + sum(self._layers.size_bytes(diff_id) for diff_id in self._layers.diff_ids())

    def partial(self, digest: str) -> Path:
        """The file a download of this blob grows in; it survives restarts."""
        return self.downloads / check_digest(digest).replace(":", "-")

    def unpacked_bytes(self, digest: str, media_type: str) -> int:
        """What the packed layer says it unpacks to, or a guess; only for reserving space."""
        return unpacked_bytes(self.blobs.existing(digest), media_type)
