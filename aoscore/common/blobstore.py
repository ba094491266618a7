"""Content-addressed files: `<root>/blobs/<algorithm>/<hex>`, verified on the way in (cm-cloud.md §5.1, sm.md §3.2)."""

import re
from collections.abc import Iterator
from pathlib import Path

from aoscore._speedups.chunker import Digest
from aoscore.common.aio import raise_if_abandoned
from aoscore.common.errors import ChecksumError, InvalidArgumentError, NotFoundError
from aoscore.common.files import fsync_dir, fsync_file

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_STEP_BYTES = 16 << 20  # what is hashed between two looks at whether anybody still wants it


def check_digest(digest: str) -> str:
    """The digest itself when well-formed; only sha256 is used. Raises InvalidArgumentError.

    Every path made of a digest goes through here, so a digest from outside can never name another file.
    """
    if not _DIGEST.fullmatch(digest):
        raise InvalidArgumentError(f"{digest!r} is no sha256 digest")
    return digest


def file_digest(path: Path, algorithm: str = "sha256") -> str:
    """`<algorithm>:<hex>` of a file's content, by an algorithm of chunker. Blocking: call it in a worker."""
    digest = Digest(algorithm)
    with path.open("rb", buffering=0) as file:
        add_file(digest, file.fileno())
    return digest.text()


def add_file(digest: Digest, fd: int) -> None:
    """Add a whole file to a digest that holds nothing yet. Blocking: call it in a worker."""
    while digest.update_from_file(fd, digest.size_bytes, _STEP_BYTES) == _STEP_BYTES:
        raise_if_abandoned()


class BlobStore:
    """Blobs below one root. All methods block: call them in a worker where files are large."""

    def __init__(self, root: Path) -> None:
        """Creates the directories (0700 like everything that may hold items of others)."""
        self.root = root
        self._blobs = root / "blobs" / "sha256"
        self._blobs.mkdir(mode=0o700, parents=True, exist_ok=True)
        # (size, mtime, inode) of blobs whose content was found right: hashing again only what changed.
        self._verified: dict[str, tuple[int, int, int]] = {}

    def path(self, digest: str) -> Path:
        """Where the blob is or would be."""
        return self._blobs / check_digest(digest).removeprefix("sha256:")

    def existing(self, digest: str) -> Path:
        """Path of a blob that is there; NotFoundError otherwise."""
        path = self.path(digest)
        if not path.is_file():
            raise NotFoundError(f"blob {digest} is not in the store")
        return path

    def contains(self, digest: str) -> bool:
        """Whether a file of that name is there, checked or not."""
        return self.path(digest).is_file()

    def read(self, digest: str, limit_bytes: int) -> bytes:
        """Content of a small blob, such as a manifest. Raises InvalidArgumentError above the limit."""
        path = self.existing(digest)
        if path.stat().st_size > limit_bytes:
            raise InvalidArgumentError(f"blob {digest} is larger than {limit_bytes} bytes")
        return path.read_bytes()

    def verify(self, digest: str, *, again: bool = False) -> None:
        """Check the content; `again` ignores what is remembered of earlier checks.

        Raises NotFoundError or ChecksumError. A wrong blob is left for the caller to remove.
        """
        path = self.existing(digest)
        state = _state(path)
        if not again and self._verified.get(digest) == state:
            return
        self._verified.pop(digest, None)
        actual = file_digest(path)
        if actual != digest:
            raise ChecksumError(f"blob {digest} is damaged: its content is {actual}")
        self._verified[digest] = state

    def remembered(self) -> dict[str, tuple[int, int, int]]:
        """What `verify` found right so far: size, modification time in ns and inode by digest."""
        return dict(self._verified)

    def remember(self, states: dict[str, tuple[int, int, int]]) -> None:
        """Take over what an earlier process remembered; whoever passes it vouches that no crash came between."""
        self._verified.update(states)

    def adopt(self, temporary: Path, digest: str, *, actual: str = "") -> Path:
        """Move a finished file of the same file system into the store, durable and checked.

        `actual` is the digest of what was written, for a caller that took it while writing: the file is not read again.
        Raises ChecksumError when its content is something else; the file is then left alone.
        """
        target = self.path(digest)
        actual = actual or file_digest(temporary)
        if actual != digest:
            raise ChecksumError(f"content of blob {digest} is {actual}")
        fsync_file(temporary)
        temporary.rename(target)
        fsync_dir(self._blobs)
        self._verified[digest] = _state(target)
        return target

    def remove(self, digest: str) -> int:
        """Delete a blob; the bytes freed, 0 when it was not there."""
        path = self.path(digest)
        self._verified.pop(digest, None)
        try:
            size = path.stat().st_size
            path.unlink()
        except FileNotFoundError:
            return 0
        return size

    def digests(self) -> Iterator[str]:
        """All blobs in the store; files with other names are passed over."""
        for path in self._blobs.iterdir():
            digest = f"sha256:{path.name}"
            if _DIGEST.fullmatch(digest):
                yield digest


def _state(path: Path) -> tuple[int, int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ino
