"""Plain twin of ``_chunker.pyx``: hashing, copying and sending of files."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from aoscore._speedups.chunker_types import DIGEST_DIGITS, READ_BYTES, UnknownDigestError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


class Digest:
    """Running digest of bytes, which it also reads or writes on the way. Not for use by two threads at once.

    algorithm: a name of DIGEST_DIGITS; UnknownDigestError for any other.
    """

    def __init__(self, algorithm: str = "sha256") -> None:
        if algorithm not in DIGEST_DIGITS:
            raise UnknownDigestError(algorithm)
        self._algorithm = algorithm
        self._hash = hashlib.new(algorithm)
        self._size = 0

    @property
    def algorithm(self) -> str:
        """Name of the algorithm."""
        return self._algorithm

    @property
    def size_bytes(self) -> int:
        """How many bytes went in so far."""
        return self._size

    def update(self, data: "ReadableBuffer", /) -> None:
        """Adds ``data``."""
        view = memoryview(data).cast("B")
        self._hash.update(view)
        self._size += len(view)

    def update_from_file(self, fd: int, offset_bytes: int = 0, size_bytes: int | None = None) -> int:
        """Adds a part of a file (to its end when no size is given), for example what an earlier run downloaded.

        The file's position stays. Returns how many bytes went in: fewer than asked for when the file ends earlier.
        """
        start = self._size
        for piece in _pieces(fd, offset_bytes, size_bytes):
            self.update(piece)
        return self._size - start

    def write(self, fd: int, data: "ReadableBuffer", /) -> int:
        """Writes all of ``data`` and adds it; after an OSError the digest holds what was written."""
        view = memoryview(data).cast("B")
        _write_all(fd, view, self)
        return len(view)

    def hexdigest(self) -> str:
        """Digest so far, as lower-case hexadecimal digits."""
        return self._hash.hexdigest()

    def text(self) -> str:
        """Digest so far as OCI writes it: "sha256:<hex>"."""
        return f"{self._algorithm}:{self._hash.hexdigest()}"

    def copy(self) -> "Digest":
        """An independent digest of the same bytes."""
        twin = Digest(self._algorithm)
        twin._hash = self._hash.copy()
        twin._size = self._size
        return twin


def hash_file(file: int | str | bytes | os.PathLike[str], algorithm: str = "sha256") -> str:
    """Digest ("sha256:<hex>") of a whole file, given by path or descriptor (whose position stays)."""
    return hash_file_all(file, (algorithm,))[0]


def hash_file_all(file: int | str | bytes | os.PathLike[str], algorithms: Sequence[str]) -> tuple[str, ...]:
    """Several digests of a file, read once."""
    digests = [Digest(algorithm) for algorithm in algorithms]
    fd = file if isinstance(file, int) else os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for piece in _pieces(fd, 0, None):
            for digest in digests:
                digest.update(piece)
    finally:
        if not isinstance(file, int):
            os.close(fd)
    return tuple(digest.text() for digest in digests)


def read_chunks(fd: int, chunk_bytes: int, digest: Digest | None = None, offset_bytes: int = 0) -> Iterator[bytes]:
    """A file from an offset to its end as chunks, all of the same size but the last; each is added to ``digest``.

    An empty rest gives no chunk at all. The file's position is neither used nor changed.
    """
    if chunk_bytes <= 0 or offset_bytes < 0:
        raise ValueError(f"chunk size {chunk_bytes} and offset {offset_bytes} do not make sense")
    return _chunks(fd, chunk_bytes, digest, offset_bytes)


def _chunks(fd: int, chunk_bytes: int, digest: Digest | None, offset_bytes: int) -> Iterator[bytes]:
    while chunk := b"".join(_pieces(fd, offset_bytes, chunk_bytes)):
        if digest is not None:
            digest.update(chunk)
        yield chunk
        if len(chunk) < chunk_bytes:
            return
        offset_bytes += chunk_bytes


def copy_file(
    source_fd: int,
    target_fd: int,
    digest: Digest | None = None,
    offset_bytes: int = 0,
    size_bytes: int | None = None,
) -> int:
    """Copies a part of a file (to its end when no size is given) to the target's position; adds it to ``digest``.

    Returns how many bytes were copied: fewer than asked for when the source ends earlier.
    """
    copied = 0
    for piece in _pieces(source_fd, offset_bytes, size_bytes):
        _write_all(target_fd, memoryview(piece), digest)
        copied += len(piece)
    return copied


def send_file(socket_fd: int, file_fd: int, offset_bytes: int, size_bytes: int) -> int:
    """Sends a part of a file to a socket without copying it through the process.

    Returns how many bytes were sent: all, or less when the file ends earlier or a non-blocking socket takes no
    more. Raises BlockingIOError when such a socket takes nothing: wait until it is writable, then go on at the
    offset that was reached.
    """
    if offset_bytes < 0 or size_bytes < 0:
        raise ValueError(f"offset {offset_bytes} and size {size_bytes} do not make sense")
    sent = 0
    while sent < size_bytes:
        try:
            count = os.sendfile(socket_fd, file_fd, offset_bytes + sent, min(size_bytes - sent, 1 << 30))
        except BlockingIOError:
            if sent == 0:
                raise
            break
        if count == 0:
            break
        sent += count
    return sent


def _pieces(fd: int, offset_bytes: int, size_bytes: int | None) -> Iterator[bytes]:
    if offset_bytes < 0 or (size_bytes is not None and size_bytes < 0):
        raise ValueError(f"offset {offset_bytes} and size {size_bytes} do not make sense")
    end = None if size_bytes is None else offset_bytes + size_bytes
    while end is None or offset_bytes < end:
        want = READ_BYTES if end is None else min(READ_BYTES, end - offset_bytes)
        piece = os.pread(fd, want, offset_bytes)
        if not piece:
            return
        yield piece
        offset_bytes += len(piece)


def _write_all(fd: int, view: memoryview, digest: Digest | None) -> None:
    while view:
        written = os.write(fd, view[:READ_BYTES])
        if digest is not None:
            digest.update(view[:written])
        view = view[written:]
