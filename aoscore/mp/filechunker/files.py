"""Cuts the files of an image into pieces for a peer of the older kind (mp.md §7). Files block: call it in a worker."""

import hashlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec

from aoscore.common.aio import raise_if_abandoned
from aoscore.common.blobstore import file_digest
from aoscore.common.errors import InvalidArgumentError
from aoscore.common.log import kv

_log = logging.getLogger(__name__)

CHUNK_BYTES = 1024
MAX_FILES = 32
"""What a node takes (mp-wire §7)."""
_MAX_PATH_BYTES = 256


class ImageFile(msgspec.Struct, frozen=True):
    """A regular file: its path below the root of the image, with "/"; digest of its content; size in bytes."""

    path: str
    sha256: bytes
    size: int

    @property
    def parts_count(self) -> int:
        """Number of pieces; an empty file is one empty piece."""
        return max(1, -(-self.size // CHUNK_BYTES))


def files_of(root: Path, *, follow_links: bool = False) -> list[ImageFile]:
    """All regular files below `root`, sorted by the bytes of their paths; links and devices are passed over.

    With `follow_links` a link to a file below `root` counts, with the path that it leads to. Raises
    InvalidArgumentError for a name that can't be told.
    """
    found = []
    root = root.resolve()
    for directory, _, names in os.walk(root):
        for name in names:
            path = Path(directory, name)
            if follow_links and path.is_symlink() and path.resolve().is_relative_to(root):
                path = path.resolve()
            relative = path.relative_to(root).as_posix()
            if path.is_symlink() or not path.is_file():
                _log.debug(kv("Neither sent nor counted: no regular file", path=relative))
                continue
            if "\n" in relative or not relative.isprintable() or len(os.fsencode(relative)) > _MAX_PATH_BYTES:
                raise InvalidArgumentError(f"file {relative!r} has a name that can't be sent")
            digest = bytes.fromhex(file_digest(path).partition(":")[2])
            found.append(ImageFile(relative, digest, path.stat().st_size))
    return sorted(found, key=lambda file: os.fsencode(file.path))


def tree_digest(files: list[ImageFile]) -> str:
    """Digest of a directory, by what `files_of` found in it (mp.md §7)."""
    total = hashlib.sha256()
    for file in files:
        total.update(f"{file.sha256.hex()}  {file.path}\n".encode())
    return f"sha256:{total.hexdigest()}"


def pieces_of(root: Path, file: ImageFile) -> Iterator[tuple[int, bytes]]:
    """Number, from 1, and content of every piece. Raises InvalidArgumentError when the file changed meanwhile."""
    with (root / file.path).open("rb") as content:
        for part in range(1, file.parts_count + 1):
            data = content.read(CHUNK_BYTES)
            if len(data) != min(CHUNK_BYTES, file.size - (part - 1) * CHUNK_BYTES):
                raise InvalidArgumentError(f"{file.path!r} changed while it was read")
            raise_if_abandoned()
            yield part, data
