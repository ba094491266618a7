"""Unpacked layers: `<root>/layers/sha256/<hex of the diff digest>/` (sm.md §3.2, mp.md §7).

    layer/   the tree
    digest   `tree_digest` of it
    size     bytes of its regular files

A layer shows up complete, durable and checked, or not at all. Everything here blocks: call it in a worker.
"""

import contextlib
import errno
import hashlib
import os
import re
import stat
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from aoscore._speedups.chunker import hash_file
from aoscore._speedups.unpack import Code, Compression, Owners, UnpackError, UnpackResult, unpack_layer
from aoscore.common import linux
from aoscore.common.blobstore import check_digest
from aoscore.common.errors import ChecksumError, InvalidArgumentError, NoSpaceError, NotFoundError, RuntimeFailure
from aoscore.common.files import fsync_dir, move, remove_tree, write_atomic

_NAME = re.compile(r"[0-9a-f]{64}")
_GZIP_TAIL_BYTES = 4
_GZIP_BEST_RATIO = 1032
"""Nothing packs better than that with deflate (RFC 1951), so who says so lies."""
_GUESSED_GROWTH = 3
_TRASH = "trash-"
_CAPABILITY = "security.capability"

MAX_LAYER_BYTES = 8 << 30
"""Longest layer, packed or not."""
MAX_LAYER_MEMBERS = 250_000
"""Most members of one: a multiple of what is met in real images. Each costs an inode, and memory while unpacking."""


class LayerStore:
    """Layers below `root`; `work`, on the same file system, for what is not complete. `owners`: of what is unpacked."""

    def __init__(self, root: Path, work: Path, owners: Owners) -> None:
        """Creates the directories; work that an earlier process left half done is removed."""
        self._root = root
        self._layers = root / "layers" / "sha256"
        self._work = work
        self._owners = owners
        remove_tree(work)
        for directory in (self._layers, work):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def path(self, diff_id: str) -> Path:
        """Where the layer is or would be, with what is noted of it."""
        return self._layers / check_digest(diff_id).removeprefix("sha256:")

    def tree(self, diff_id: str) -> Path:
        """Where its tree is or would be."""
        return self.path(diff_id) / "layer"

    def diff_ids(self) -> Iterator[str]:
        """All layers; directories with other names are passed over."""
        for path in self._layers.iterdir():
            if _NAME.fullmatch(path.name):
                yield f"sha256:{path.name}"

    def size_bytes(self, diff_id: str) -> int:
        """What is noted as its size, 0 when nothing is."""
        try:
            return int((self.path(diff_id) / "size").read_text())
        except (FileNotFoundError, ValueError):
            return 0

    def verify(self, diff_id: str) -> None:
        """Check a tree against the digest taken when it was unpacked. Raises NotFoundError or ChecksumError."""
        _verify(self.path(diff_id), diff_id)

    def unpack(
        self,
        blob: Path,
        digest: str,
        diff_id: str,
        media_type: str,
        *,
        max_bytes: int,
        progress: Callable[[int], None] | None = None,
    ) -> int:
        """Unpack the layer blob that should have this digest; the size of the tree in bytes.

        `max_bytes`: more is refused. Raises InvalidArgumentError naming the member for a bad archive (one that leaves
        its root, is cut, is of an unknown kind), ChecksumError for another digest or diff digest, NoSpaceError.
        """
        work = self._work / uuid.uuid4().hex
        tree = work / "layer"
        tree.mkdir(mode=0o755, parents=True)
        try:
            result = _unpack(blob, tree, media_type, self._owners, max_bytes, self._spare_files(), progress)
            if result.blob_digest != digest:
                raise ChecksumError(f"layer blob {digest} is damaged: its content is {result.blob_digest}")
            if result.diff_id != diff_id:
                raise ChecksumError(f"layer {digest} unpacks to {result.diff_id}, its image says {diff_id}")
            with _file_errors(digest):
                write_atomic(work / "digest", _synced_digest(tree).encode(), durable=False)
                write_atomic(work / "size", str(result.size_bytes).encode(), durable=False)
                linux.syncfs(work)
            self._publish(work, diff_id)
        finally:
            remove_tree(work)
        return result.size_bytes

    def take(self, diff_id: str, other: Path) -> bool:
        """Move a layer of the store below `other` to here, if it is there and on the same file system.

        It is checked as `verify` does, and gets our owners. Raises what `verify` raises; it is gone then.
        """
        work = self._work / uuid.uuid4().hex
        if not move(other / self.path(diff_id).relative_to(self._root), work):
            return False
        try:
            tree = work / "layer"
            if tree.is_symlink() or not tree.is_dir():
                raise ChecksumError(f"layer {diff_id} of {other} has no tree")
            _verify(work, diff_id)
            if self._owners is Owners.ROOT:
                _give_to_root(tree)
            linux.syncfs(work)
            self._publish(work, diff_id)
        finally:
            remove_tree(work)
        return True

    def discard(self, diff_id: str) -> None:
        """Take a layer out of the store; short enough for the event loop, since only `empty_trash` deletes it."""
        with contextlib.suppress(FileNotFoundError):
            self.path(diff_id).rename(self._work / f"{_TRASH}{uuid.uuid4().hex}")

    def empty_trash(self) -> None:
        """Delete what was discarded."""
        for path in list(self._work.glob(f"{_TRASH}*")):
            remove_tree(path)

    def _spare_files(self) -> int:
        """How many files one layer may bring: half of what the file system has left at most."""
        status = os.statvfs(self._layers)
        # 0 in all: made as needed.
        return min(MAX_LAYER_MEMBERS, status.f_favail // 2) if status.f_files else MAX_LAYER_MEMBERS

    def _publish(self, work: Path, diff_id: str) -> None:
        target = self.path(diff_id)
        if target.exists():
            # A damaged or unlinked tree; a running instance keeps the files it has open until it is restarted.
            target.rename(work / "old")
        work.rename(target)
        fsync_dir(self._layers)
        remove_tree(target / "old")


def _verify(layer: Path, diff_id: str) -> None:
    try:
        stored = (layer / "digest").read_text().strip()
    except FileNotFoundError:
        raise NotFoundError(f"layer {diff_id} has no digest") from None
    # AosCore 9.1 follows links while hashing (sm.md §3.6); layers it unpacked must stay usable.
    if all(stored != tree_digest(layer / "layer", follow_links=follow) for follow in (False, True)):
        raise ChecksumError(f"layer {diff_id} is damaged: its files changed since it was unpacked")


def _give_to_root(tree: Path) -> None:
    """Change the owner of all that is there, and keep what the kernel takes from files with it (chown(2))."""
    for path in _everything_in(tree):
        status = path.lstat()
        if (status.st_uid, status.st_gid) == (0, 0):
            continue
        is_file = stat.S_ISREG(status.st_mode)
        has_capability = is_file and _CAPABILITY in os.listxattr(path)
        capability = os.getxattr(path, _CAPABILITY) if has_capability else b""
        os.lchown(path, 0, 0)
        if is_file:
            path.chmod(stat.S_IMODE(status.st_mode))
        if capability:
            os.setxattr(path, _CAPABILITY, capability)


def _everything_in(tree: Path) -> Iterator[Path]:
    """The directory and all in it, of whatever kind, without recursion: a tree may be deep."""
    waiting = [tree]
    while waiting:
        path = waiting.pop()
        yield path
        if path.is_dir() and not path.is_symlink():
            waiting += path.iterdir()


def unpacked_bytes(blob: Path, media_type: str) -> int:
    """What a packed layer says it unpacks to, or a guess; only for reserving space."""
    packed_bytes = blob.stat().st_size
    with blob.open("rb") as file:
        if media_type.endswith("+gzip") and packed_bytes > _GZIP_TAIL_BYTES:
            # The gzip trailer holds the size modulo 2^32.
            file.seek(-_GZIP_TAIL_BYTES, os.SEEK_END)
            told_bytes = int.from_bytes(file.read(_GZIP_TAIL_BYTES), "little")
            return max(packed_bytes, min(told_bytes, packed_bytes * _GZIP_BEST_RATIO))
    return packed_bytes * _GUESSED_GROWTH if media_type.endswith("+zstd") else packed_bytes


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
