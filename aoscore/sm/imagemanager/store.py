"""Files of the image store (sm.md §3.2), readable for AosCore 9.1.

    blobs/sha256/<hex>            manifests, configs, component payloads; for a service layer, once unpacked, only a
                                  short text with its diff digest (the "link")
    layers/sha256/<hex>/layer/    the unpacked tree of a diff digest, with `digest` (of the tree) and `size` beside it
    staging/, downloads/          work in progress (own): what is in the two trees above is always complete

Everything here blocks: call it in a worker.
"""

import contextlib
import errno
import hashlib
import os
import re
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from aoscore._speedups.chunker import hash_file
from aoscore._speedups.unpack import Code, Compression, Owners, UnpackError, UnpackResult, unpack_layer
from aoscore.common import linux
from aoscore.common.blobstore import BlobStore, check_digest
from aoscore.common.errors import ChecksumError, InvalidArgumentError, NoSpaceError, NotFoundError, RuntimeFailure
from aoscore.common.files import fsync_dir, remove_tree, write_atomic

_LINK = re.compile(r"sha256:[0-9a-f]{64}")
_LINK_BYTES = 71
_GZIP_TAIL_BYTES = 4
_GZIP_BEST_RATIO = 1032
"""Nothing packs better than that with deflate (RFC 1951), so who says so lies."""
_GUESSED_GROWTH = 3
_TRASH = "trash-"

MAX_LAYER_BYTES = 8 << 30
"""Longest layer, packed or not."""
MAX_LAYER_MEMBERS = 250_000
"""Most members of one: a multiple of what is met in real images. Each costs an inode, and memory while unpacking."""


class ImageStore:
    """See the module text."""

    def __init__(self, root: Path, owners: Owners = Owners.ROOT) -> None:
        """Creates the directories; work that an earlier process left half done is removed, downloads are kept.

        `owners`: of what is unpacked.
        """
        self.root = root
        self._owners = owners
        self.blobs = BlobStore(root)
        self._layers = root / "layers" / "sha256"
        self._staging = root / "staging"
        self.downloads = root / "downloads"
        remove_tree(self._staging)
        for directory in (self._layers, self._staging, self.downloads):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Trees found right by this process: hashing them at every install of a sharing item would be waste.
        self._verified: set[str] = set()

    # Layers

    def tree(self, diff_id: str) -> Path:
        """Where the unpacked layer is or would be."""
        return self._layer(diff_id) / "layer"

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
        try:
            stored = (self._layer(diff_id) / "digest").read_text().strip()
        except FileNotFoundError:
            raise NotFoundError(f"layer {diff_id} has no digest") from None
        # AosCore 9.1 follows links while hashing (sm.md §3.6); layers it unpacked must stay usable.
        if all(stored != tree_digest(self.tree(diff_id), follow_links=follow) for follow in (False, True)):
            raise ChecksumError(f"layer {diff_id} is damaged: its files changed since it was unpacked")
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

        The tree shows up only when it is complete, durable and hashes to `diff_id`. `max_bytes`: more is refused.
        Raises InvalidArgumentError naming the member for a bad archive (one that leaves its root, is cut, is of an
        unknown kind), ChecksumError for another diff digest, NoSpaceError.
        """
        blob = self.blobs.existing(digest)
        staging = self._staging / uuid.uuid4().hex
        tree = staging / "layer"
        tree.mkdir(mode=0o755, parents=True)
        try:
            result = _unpack(blob, tree, media_type, self._owners, max_bytes, self._spare_files(), progress)
            if result.blob_digest != digest:
                raise ChecksumError(f"layer blob {digest} is damaged: its content is {result.blob_digest}")
            if result.diff_id != diff_id:
                raise ChecksumError(f"layer {digest} unpacks to {result.diff_id}, its image says {diff_id}")
            with _file_errors(digest):
                write_atomic(staging / "digest", _synced_digest(tree).encode(), durable=False)
                write_atomic(staging / "size", str(result.size_bytes).encode(), durable=False)
                linux.syncfs(staging)
            self._publish(staging, diff_id)
        finally:
            remove_tree(staging)
        self._verified.add(diff_id)
        write_atomic(self.blobs.path(digest), diff_id.encode())
        return result.size_bytes

    def forget_layer(self, digest: str, diff_id: str) -> None:
        """Make the layer be fetched again at the next install; its files stay, an instance may be using them."""
        self._verified.discard(diff_id)
        if self.link(digest) == diff_id:
            self.blobs.remove(digest)

    # The whole store

    def digests(self) -> Iterator[str]:
        """Digests of all blobs, unpacked layers and downloads."""
        yield from self.blobs.digests()
        yield from self._diff_ids()
        for path in self.downloads.iterdir():
            yield path.name.replace("-", ":", 1)

    def discard(self, digest: str) -> None:
        """Take a blob, layer or download out of the store; short enough for the event loop.

        Trees are only moved, `empty_trash` deletes them.
        """
        self.blobs.remove(digest)
        self.partial(digest).unlink(missing_ok=True)
        self._verified.discard(digest)
        with contextlib.suppress(FileNotFoundError):
            self._layer(digest).rename(self._staging / f"{_TRASH}{uuid.uuid4().hex}")

    def empty_trash(self) -> None:
        """Delete what was discarded."""
        for path in list(self._staging.glob(f"{_TRASH}*")):
            remove_tree(path)

    def used_bytes(self) -> int:
        """What blobs, layers and downloads take, by the sizes noted for layers."""
        used = sum(path.stat().st_size for path in self.downloads.iterdir())
        used += sum(self.blobs.path(digest).stat().st_size for digest in self.blobs.digests())
        return used + sum(self._size_bytes(diff_id) for diff_id in self._diff_ids())

    def partial(self, digest: str) -> Path:
        """The file a download of this blob grows in; it survives restarts."""
        return self.downloads / check_digest(digest).replace(":", "-")

    def unpacked_bytes(self, digest: str, media_type: str) -> int:
        """What the packed layer says it unpacks to, or a guess; only for reserving space."""
        path = self.blobs.existing(digest)
        packed_bytes = path.stat().st_size
        with path.open("rb") as file:
            if media_type.endswith("+gzip") and packed_bytes > _GZIP_TAIL_BYTES:
                # The gzip trailer holds the size modulo 2^32.
                file.seek(-_GZIP_TAIL_BYTES, os.SEEK_END)
                told_bytes = int.from_bytes(file.read(_GZIP_TAIL_BYTES), "little")
                return max(packed_bytes, min(told_bytes, packed_bytes * _GZIP_BEST_RATIO))
        return packed_bytes * _GUESSED_GROWTH if media_type.endswith("+zstd") else packed_bytes

    def _spare_files(self) -> int:
        """How many files one layer may bring: half of what the file system has left at most."""
        status = os.statvfs(self.root)
        # 0 in all: made as needed.
        return min(MAX_LAYER_MEMBERS, status.f_favail // 2) if status.f_files else MAX_LAYER_MEMBERS

    def _diff_ids(self) -> Iterator[str]:
        for path in self._layers.iterdir():
            digest = f"sha256:{path.name}"
            if _LINK.fullmatch(digest):
                yield digest

    def _layer(self, diff_id: str) -> Path:
        return self._layers / check_digest(diff_id).removeprefix("sha256:")

    def _size_bytes(self, diff_id: str) -> int:
        try:
            return int((self._layer(diff_id) / "size").read_text())
        except (FileNotFoundError, ValueError):
            return 0

    def _publish(self, staging: Path, diff_id: str) -> None:
        target = self._layer(diff_id)
        if target.exists():
            # A damaged or unlinked tree; a running instance keeps the files it has open until it is restarted.
            target.rename(staging / "old")
        staging.rename(target)
        fsync_dir(self._layers)
        remove_tree(target / "old")


def _unpack(
    blob: Path,
    tree: Path,
    media_type: str,
    owners: Owners,
    max_bytes: int,
    max_members: int,
    progress: Callable[[int], None] | None,
) -> UnpackResult:
    """Unpack with errors in our terms."""
    try:
        compression = Compression.of_media_type(media_type)
        with _file_errors(blob.name):
            return unpack_layer(
                blob,
                tree,
                compression=compression,
                max_unpacked_bytes=max_bytes,
                max_members=max_members,
                owners=owners,
                progress=progress,
            )
    except UnpackError as error:
        if error.code is Code.MEMBER_LIMIT and max_members < MAX_LAYER_MEMBERS:
            raise NoSpaceError(f"layer {blob.name} has more than {max_members} files, half of what fit") from error
        raise InvalidArgumentError(f"layer {blob.name} can't be unpacked: {error}") from error


@contextlib.contextmanager
def _file_errors(layer: str) -> Iterator[None]:
    """What the file system refuses, in our terms."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpaceError(f"no space left to unpack layer {layer}") from error
        raise RuntimeFailure(f"can't unpack layer {layer}: {error}", error.errno or 0) from error


def _synced_digest(tree: Path) -> str:
    """`tree_digest` of files that go to the disk meanwhile and are there in the end."""
    with ThreadPoolExecutor(1) as disk:
        writing = disk.submit(linux.syncfs, tree)
        digest = tree_digest(tree)
        writing.result()
    return digest


def tree_digest(tree: Path, *, follow_links: bool = False) -> str:
    """Digest over names and content of all regular files (sm.md §3.6), sorted by path.

    With `follow_links` as AosCore 9.1 computes it: a link to a file adds a line with the path it resolves to.
    """
    # Bytes: names need not be valid UTF-8.
    root = os.path.realpath(os.fsencode(tree))
    files = _files_by_path(root, follow_links)
    total = hashlib.sha256()
    # A link leads anywhere, also to files that were met already.
    for path in sorted(files) if follow_links else files:
        relative = os.path.relpath(path, root)
        if b"\n" in relative:
            raise InvalidArgumentError(f"{os.fsdecode(relative)!r} has a line break in its name")
        total.update(_file_hash(path).encode() + b"  " + relative + b"\n")
    return f"sha256:{total.hexdigest()}"


def _files_by_path(root: bytes, follow_links: bool) -> Iterator[bytes]:
    """Regular files in the bytewise order of their paths, but for what links lead to.

    Without recursion, since a tree may be deep; a directory is listed when its turn comes, since it may be large.
    """
    waiting = [root + b"/"]
    while waiting:
        path = waiting.pop()
        if not path.endswith(b"/"):
            yield path
            continue
        found = []
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    # So it comes where the paths of its files belong: after "a.txt", before "a0".
                    found.append(entry.path + b"/")
                elif entry.is_file(follow_symlinks=False):
                    found.append(entry.path)
                elif follow_links and entry.is_file():
                    found.append(os.path.realpath(entry.path))
        waiting += sorted(found, reverse=True)


def _file_hash(path: bytes) -> str:
    return hash_file(path).removeprefix("sha256:")
