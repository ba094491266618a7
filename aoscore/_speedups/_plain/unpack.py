"""Plain twin of ``_unpack.pyx``: one pass over a layer blob, from compressed bytes to files.

It decides exactly as the native module does (same order of checks, same codes), which the tests rely on. Formats:
POSIX ustar and pax, GNU tar, old V7; gzip with several members, zstd with several frames. Rules of the OCI
image-spec ("layer"): whiteouts apply to lower layers only, so what the layer itself brings wins over its own
whiteouts.
"""

import ctypes
import errno
import hashlib
import os
import stat
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from aoscore._speedups.unpack_types import (
    DEFAULT_MAX_MEMBERS,
    DEFAULT_MAX_UNPACKED_BYTES,
    Code,
    Compression,
    Owners,
    UnpackResult,
    Whiteouts,
    unpack_error,
)

BLOCK = 512
READ_BYTES = 1 << 16
SLICE_BYTES = 1 << 10  # compressed bytes per step of zstd, which cannot bound its output otherwise
OUTPUT_BYTES = 1 << 18
PROGRESS_BYTES = 1 << 20
MAX_NAME = 4095
MAX_COMPONENT = 255
MAX_DEPTH = 256  # deeper trees break programs that recurse, such as those that delete them
MAX_EXTENDED = 1 << 20
MAX_EXTENTS = 1 << 17
MAX_ID = 0xFFFFFFFE
MAX_INT64 = (1 << 63) - 1
ZSTD_WINDOW_LOG = 24  # RFC 8878 asks for 8 MiB; this is twice that, and half of what an unpacking may take
# What is left of 32 MiB for directories when all else is at its limit: less beside a window of zstd.
MAX_DIRECTORY_BYTES = {Compression.NONE: 20 << 20, Compression.GZIP: 20 << 20, Compression.ZSTD: 5 << 20}
DIRECTORY_BYTES = 64  # with all that comes to its path

T = TypeVar("T")

WHITEOUT = b".wh."
OPAQUE = b".wh..wh..opq"
DIRECTORY_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class _Fault(Exception):
    """A reason to refuse the layer; the outer function adds the member."""

    def __init__(self, code: Code) -> None:
        self.code = code
        super().__init__(code)


@dataclass
class _Extended:
    """What GNU long names and a pax header say about the next member."""

    long_name: bytes | None = None
    long_link: bytes | None = None
    pax: bool = False
    path: bytes | None = None
    linkpath: bytes | None = None
    size: int | None = None
    uid: int | None = None
    gid: int | None = None
    mtime: tuple[int, int] | None = None
    xattrs: list[tuple[bytes, bytes]] = field(default_factory=list)
    skipped_xattrs: int = 0
    sparse: bool = False
    sparse_version_1: bool = False
    sparse_size: int | None = None
    sparse_name: bytes | None = None
    sparse_map: list[tuple[int, int]] = field(default_factory=list)
    sparse_offset: int | None = None

    @property
    def pending(self) -> bool:
        return self.pax or self.long_name is not None or self.long_link is not None


@dataclass
class _Member:
    """One member, with everything its headers said."""

    kind: int
    name: bytes
    link: bytes
    size: int  # bytes in the archive
    mode: int
    uid: int
    gid: int
    mtime: tuple[int, int]
    device: int
    extended: _Extended
    sparse: bool = False
    real_size: int = 0
    extents: list[tuple[int, int]] = field(default_factory=list)

    @property
    def mtime_ns(self) -> int:
        return self.mtime[0] * 1_000_000_000 + self.mtime[1]


def unpack_layer(
    blob: int | str | os.PathLike[str],
    destination: int | str | os.PathLike[str],
    *,
    compression: Compression,
    blob_size_bytes: int | None = None,
    max_unpacked_bytes: int = DEFAULT_MAX_UNPACKED_BYTES,
    max_members: int = DEFAULT_MAX_MEMBERS,
    owners: Owners = Owners.ARCHIVE,
    uid_shift: int = 0,
    gid_shift: int = 0,
    whiteouts: Whiteouts = Whiteouts.OVERLAY,
    xattrs: bool = True,
    allow_devices: bool = False,
    sync: bool = False,
    progress: Callable[[int], None] | None = None,
) -> UnpackResult:
    """Unpacks a layer blob into an existing directory and computes both digests on the way.

    blob: path or descriptor of a regular file, read from its start. destination: path or descriptor of a directory,
    best an empty staging directory that is renamed afterwards and that nobody else may enter: after an error a
    partial tree stays in it. blob_size_bytes: what the descriptor says. max_unpacked_bytes: limit for the tar
    stream and for the sum of file sizes, holes included; stops decompression bombs. max_members: limit for members
    and for directories made for them. uid_shift, gid_shift: added to each owner (user namespaces). xattrs: set
    ``user.*`` (on files and directories) and ``security.capability`` (on files); all others are counted and left
    out. allow_devices: device nodes other than 0:0 are made, not refused. sync: all of it is on the disk before
    this returns. progress: called with the number of unpacked bytes every MiB; what it raises ends the work and
    is passed on.

    The digests are returned, not compared: the caller knows what it expects, and must look before it uses the tree.

    Raises UnpackError (see unpack_types) when the layer is at fault and OSError when the file system is; both name
    the member.
    """
    if not 0 <= max_unpacked_bytes <= 1 << 62 or not 0 <= max_members <= 1 << 62:
        raise ValueError("the limits are out of range")
    compression, owners, whiteouts = Compression(compression), Owners(owners), Whiteouts(whiteouts)
    if not (-MAX_ID <= uid_shift <= MAX_ID and -MAX_ID <= gid_shift <= MAX_ID):
        raise ValueError("the shift of owners is out of range")
    blob_fd = os.dup(blob) if isinstance(blob, int) else os.open(blob, os.O_RDONLY | os.O_CLOEXEC)
    try:
        status = os.fstat(blob_fd)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("a layer blob must be a regular file")
        if blob_size_bytes is not None and status.st_size != blob_size_bytes:
            raise unpack_error(Code.BLOB_SIZE, None, None)
        if isinstance(destination, int):
            root_fd = os.open(".", DIRECTORY_FLAGS, dir_fd=destination)
        else:
            root_fd = os.open(destination, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            stream = _Stream(blob_fd, compression, max_unpacked_bytes, progress)
            unpacker = _Unpacker(
                stream,
                root_fd,
                max_unpacked_bytes=max_unpacked_bytes,
                max_members=max_members,
                max_directory_bytes=MAX_DIRECTORY_BYTES[compression],
                owners=owners,
                shifts=(uid_shift, gid_shift),
                whiteouts=whiteouts,
                xattrs=xattrs,
                allow_devices=allow_devices,
            )
            unpacker.run()
            if blob_size_bytes is not None and stream.blob_bytes != blob_size_bytes:
                raise unpack_error(Code.BLOB_SIZE, None, None)
            if sync:
                _sync(root_fd)
        finally:
            os.close(root_fd)
    finally:
        os.close(blob_fd)
    return UnpackResult(
        blob_digest=f"sha256:{stream.blob_hash.hexdigest()}",
        diff_id=f"sha256:{stream.tar_hash.hexdigest()}",
        blob_bytes=stream.blob_bytes,
        tar_bytes=stream.position,
        **unpacker.counts,
    )


def _sync(fd: int) -> None:
    # One wait for the file system in place of one for each file and directory: until here nothing of the tree counts,
    # and nothing has waited for the disk. The price is to wait for what others have not written back either. It tells
    # of all that could not be written since the descriptor was opened, before the first file (Linux 5.8). The caller
    # then renames the tree to where it counts: after a loss of power it is there whole, or as a staging directory.
    if ctypes.CDLL(None, use_errno=True).syncfs(fd) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


# -- the stream: blob -> tar bytes


class _Unzip(Protocol):
    """What zlib and zstd objects have in common."""

    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, /) -> bytes: ...


def _zstd_object() -> tuple[Callable[[], _Unzip], type[Exception]]:
    try:
        from compression import zstd  # type: ignore[import-not-found,unused-ignore]  # Python 3.14

        options = {zstd.DecompressionParameter.window_log_max: ZSTD_WINDOW_LOG}
        return lambda: zstd.ZstdDecompressor(options=options), zstd.ZstdError
    except ModuleNotFoundError:
        import zstandard

        return zstandard.ZstdDecompressor(max_window_size=1 << ZSTD_WINDOW_LOG).decompressobj, zstandard.ZstdError


class _Stream:
    """The tar bytes of a blob; counts and hashes both sides. A fault comes after all bytes before it were taken."""

    def __init__(
        self, fd: int, compression: Compression, max_bytes: int, progress: Callable[[int], None] | None
    ) -> None:
        self._fd = fd
        self._max_bytes = max_bytes
        self._progress = progress
        self._next_report = PROGRESS_BYTES
        self._buffer = memoryview(b"")
        self.blob_hash = hashlib.sha256()
        self.tar_hash = hashlib.sha256()
        self.blob_bytes = 0
        self.position = 0  # of the next tar byte
        self.failed = False  # reading the blob or the caller's progress function raised: no member is to blame
        self._source = {
            Compression.NONE: self._read_blob,
            Compression.GZIP: self._gunzip,
            Compression.ZSTD: self._unzstd,
        }[compression]()

    def take(self, size: int) -> bytes:
        """Exactly ``size`` bytes."""
        pieces = []
        while size:
            piece = self.take_some(size)
            pieces.append(piece)
            size -= len(piece)
        return b"".join(pieces)

    def take_some(self, size: int) -> bytes:
        """1 to ``size`` bytes; TRUNCATED at the end of the stream."""
        piece = self._next(size)
        if not piece:
            raise _Fault(Code.TRUNCATED)
        return piece

    def skip(self, size: int) -> None:
        while size:
            size -= len(self.take_some(size))

    def skip_padding(self, size: int) -> None:
        """What fills a member's last block, unless the stream ends there."""
        left = -size % BLOCK
        while left and (piece := self._next(left)):
            left -= len(piece)

    def drain(self) -> None:
        """Takes the rest."""
        while self._next(OUTPUT_BYTES):
            pass

    @property
    def remaining_allowance(self) -> int:
        return self._max_bytes - self.position

    def _next(self, size: int) -> bytes:
        while not self._buffer:
            try:
                following = next(self._source, None)
            except OSError:
                self.failed = True
                raise
            if following is None:
                return b""
            self._buffer = memoryview(following)
        piece = bytes(self._buffer[:size])
        self._buffer = self._buffer[len(piece) :]
        if len(piece) > self.remaining_allowance:
            raise _Fault(Code.UNPACKED_LIMIT)
        self.position += len(piece)
        self.tar_hash.update(piece)
        if self._progress is not None and self.position >= self._next_report:
            self._next_report = self.position + PROGRESS_BYTES
            try:
                self._progress(self.position)
            except BaseException:
                self.failed = True
                raise
        return piece

    def _read_blob(self) -> Iterator[bytes]:
        while piece := os.pread(self._fd, READ_BYTES, self.blob_bytes):
            self.blob_hash.update(piece)
            self.blob_bytes += len(piece)
            yield piece

    def _gunzip(self) -> Iterator[bytes]:
        unzip: zlib._Decompress | None = None
        for piece in self._read_blob():
            rest = piece
            while rest or unzip is not None:
                unzip = unzip or zlib.decompressobj(31)
                try:
                    output = unzip.decompress(rest, OUTPUT_BYTES)
                except zlib.error:
                    raise _Fault(Code.STREAM_CORRUPT) from None
                if output:
                    yield output
                if unzip.eof:
                    rest, unzip = unzip.unused_data, None
                elif not rest and not output:
                    break  # wants more input
                else:
                    rest = unzip.unconsumed_tail
        if unzip is not None or self.blob_bytes == 0:
            raise _Fault(Code.STREAM_TRUNCATED)

    def _unzstd(self) -> Iterator[bytes]:
        make, failure = _zstd_object()
        unzip: _Unzip | None = None
        for piece in self._read_blob():
            for start in range(0, len(piece), SLICE_BYTES):
                rest = piece[start : start + SLICE_BYTES]
                while rest:
                    unzip = unzip or make()
                    try:
                        output = unzip.decompress(rest)
                    except failure as error:
                        # The library's words: its bindings have no code for it.
                        too_large = "too much memory" in str(error)
                        raise _Fault(Code.WINDOW_LIMIT if too_large else Code.STREAM_CORRUPT) from None
                    if output:
                        yield output
                    rest = b""
                    if unzip.eof:
                        rest, unzip = unzip.unused_data, None
        if unzip is not None or self.blob_bytes == 0:
            raise _Fault(Code.STREAM_TRUNCATED)


# -- headers


def _number(data: bytes) -> int:
    """A numeric field: octal digits, or base-256 when the first bit is set; NUMBER when neither fits."""
    if data[0] & 0x80:
        bits = 8 * len(data) - 1
        value = int.from_bytes(data, "big") & ((1 << bits) - 1)
        if data[0] & 0x40:
            value -= 1 << bits
        if not -MAX_INT64 - 1 <= value <= MAX_INT64:
            raise _Fault(Code.NUMBER)
        return value
    text = data.lstrip(b" ")
    value = 0
    for byte in text:
        if byte in (0x00, 0x20):
            break
        if not 0x30 <= byte <= 0x37:
            raise _Fault(Code.NUMBER)
        value = value * 8 + byte - 0x30
    return value


def _checksum_fits(block: bytes) -> bool:
    try:
        stated = _number(block[148:156])
    except _Fault:
        return False
    rest = block[:148] + b" " * 8 + block[156:]
    return stated in (sum(rest), sum(struct.unpack("512b", rest)))


def _text(data: bytes) -> bytes:
    return data.partition(b"\0")[0]


def _decimal(data: bytes) -> int:
    if not 0 < len(data) <= 19 or not data.isdigit() or int(data) > MAX_INT64:
        raise _Fault(Code.EXTENDED_HEADER)
    return int(data)


def _time(data: bytes) -> tuple[int, int]:
    """Seconds and nanoseconds of a pax time such as "-1.5"."""
    sign = data[:1] == b"-"
    whole, _dot, fraction = data[sign:].partition(b".")
    if not 0 < len(whole) <= 18 or not whole.isdigit() or (fraction and not fraction.isdigit()):
        raise _Fault(Code.EXTENDED_HEADER)
    seconds, nanoseconds = int(whole), int(fraction[:9].ljust(9, b"0"))
    if not sign:
        return seconds, nanoseconds
    return (-seconds, 0) if nanoseconds == 0 else (-seconds - 1, 1_000_000_000 - nanoseconds)


def _records(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Records "<length> <key>=<value>\\n" of a pax header."""
    while data:
        digits = 0
        while digits < min(len(data), 8) and 0x30 <= data[digits] <= 0x39:
            digits += 1
        if not 0 < digits < 8 or data[digits : digits + 1] != b" ":
            raise _Fault(Code.EXTENDED_HEADER)
        length = int(data[:digits])
        if length > len(data) or length < digits + 2 or data[length - 1] != 0x0A:
            raise _Fault(Code.EXTENDED_HEADER)
        key, equals, value = data[digits + 1 : length - 1].partition(b"=")
        if not equals or not key:
            raise _Fault(Code.EXTENDED_HEADER)
        yield key, value
        data = data[length:]


_XATTR = b"SCHILY.xattr."
_UNDERSTOOD = (b"path", b"linkpath", b"size", b"uid", b"gid", b"mtime")


def _allowed_xattr(name: bytes) -> bool:
    """Attributes of other name spaces steer the host (overlay, labels, signatures) and are not the layer's to set."""
    return name == b"security.capability" or (name.startswith(b"user.") and not name.startswith(b"user.overlay."))


def _apply_pax(extended: _Extended, data: bytes) -> None:
    extended.pax = True
    for key, value in _records(data):
        if key == b"path":
            extended.path = value or None
        elif key == b"linkpath":
            extended.linkpath = value or None
        elif key == b"size":
            extended.size = _decimal(value) if value else None
        elif key == b"uid":
            extended.uid = _decimal(value) if value else None
        elif key == b"gid":
            extended.gid = _decimal(value) if value else None
        elif key == b"mtime":
            extended.mtime = _time(value) if value else None
        elif key.startswith(_XATTR):
            if b"\0" in key:
                raise _Fault(Code.EXTENDED_HEADER)
            name = key[len(_XATTR) :]
            if _allowed_xattr(name):
                extended.xattrs.append((name, value))
            else:
                extended.skipped_xattrs += 1
        elif key.startswith(b"GNU.sparse."):
            _apply_sparse(extended, key[len(b"GNU.sparse.") :], value)


def _apply_sparse(extended: _Extended, key: bytes, value: bytes) -> None:
    """GNU tar describes sparse files in three ways: 0.0 offset/numbytes pairs, 0.1 map, 1.0 map in the data."""
    extended.sparse = True
    if key == b"major":
        extended.sparse_version_1 = _decimal(value) == 1
    elif key in (b"size", b"realsize"):
        extended.sparse_size = _decimal(value)
    elif key == b"name":
        extended.sparse_name = value or None
    elif key == b"offset":
        extended.sparse_offset = _decimal(value)
    elif key == b"numbytes":
        if extended.sparse_offset is None:
            raise _Fault(Code.SPARSE_MAP)
        _add_extent(extended.sparse_map, extended.sparse_offset, _decimal(value))
        extended.sparse_offset = None
    elif key == b"map":
        words = value.split(b",") if value else []
        if len(words) % 2:
            raise _Fault(Code.SPARSE_MAP)
        for offset, length in zip(words[::2], words[1::2], strict=True):
            _add_extent(extended.sparse_map, _decimal(offset), _decimal(length))


def _add_extent(extents: list[tuple[int, int]], offset: int, length: int) -> None:
    if len(extents) >= MAX_EXTENTS:
        raise _Fault(Code.EXTENT_LIMIT)
    extents.append((offset, length))


# -- names


def _components(raw: bytes, translate: bool) -> list[bytes]:
    """Parts of a member's name, or the reason to refuse it. No parts: the root itself."""
    if not raw:
        raise _Fault(Code.NAME_EMPTY)
    if b"\0" in raw:
        raise _Fault(Code.NAME_NUL)
    if len(raw) > MAX_NAME:
        raise _Fault(Code.NAME_TOO_LONG)
    # A lone slash is the root itself to umoci, and leads nowhere else.
    if raw.startswith(b"/") and raw.strip(b"/"):
        raise _Fault(Code.NAME_ABSOLUTE)
    parts: list[bytes] = []
    for part in raw.split(b"/"):
        if part in (b"", b"."):
            continue
        if part == b"..":
            raise _Fault(Code.NAME_DOTDOT)
        if len(part) > MAX_COMPONENT:
            raise _Fault(Code.NAME_TOO_LONG)
        if len(parts) == MAX_DEPTH:
            raise _Fault(Code.NAME_TOO_LONG)
        parts.append(part)
    if translate and any(part.startswith(WHITEOUT) for part in parts[:-1]):
        raise _Fault(Code.NAME_RESERVED)
    return parts


# -- the tree


class _Unpacker:
    """Reads members from the stream and makes them below the root."""

    def __init__(
        self,
        stream: _Stream,
        root_fd: int,
        *,
        max_unpacked_bytes: int,
        max_members: int,
        max_directory_bytes: int,
        owners: Owners,
        shifts: tuple[int, int],
        whiteouts: Whiteouts,
        xattrs: bool,
        allow_devices: bool,
    ) -> None:
        self._stream = stream
        self._root_fd = root_fd
        self._max_unpacked_bytes = max_unpacked_bytes
        self._max_members = max_members
        self._owners = owners
        self._shifts = shifts
        self._translate = whiteouts is not Whiteouts.KEEP
        self._opaque_name = "user.overlay.opaque" if whiteouts is Whiteouts.OVERLAY_USER else "trusted.overlay.opaque"
        self._xattrs = xattrs
        self._allow_devices = allow_devices
        self._member: bytes | None = None
        self._header_offset: int | None = None
        # Modes and times of directories wait until nothing is written into them any more. path -> mode, mtime in ns
        self._directories: dict[tuple[bytes, ...], tuple[int, int]] = {}
        self._directory_bytes = 0
        self._max_directory_bytes = max_directory_bytes
        self._map_block = memoryview(b"")
        self._parent: tuple[tuple[bytes, ...], int] | None = None
        self.counts = {
            "size_bytes": 0,
            "members": 0,
            "files": 0,
            "directories": 0,
            "symlinks": 0,
            "hard_links": 0,
            "devices": 0,
            "whiteouts": 0,
            "opaque_directories": 0,
            "skipped_xattrs": 0,
        }

    def run(self) -> None:
        try:
            while (member := self._next_member()) is not None:
                self._make(member)
                self._member = None
            self._header_offset = None
            self._stream.drain()
            self._finish_directories()
        except _Fault as fault:
            raise unpack_error(fault.code, self._member, self._header_offset) from None
        except OSError as error:
            if self._stream.failed or self._member is None or error.errno is None:
                raise
            raise OSError(error.errno, os.strerror(error.errno), os.fsdecode(self._member)) from None
        finally:
            self._set_parent(None)

    # -- reading

    def _next_member(self) -> _Member | None:
        extended = _Extended()
        while True:
            self._header_offset = self._stream.position
            try:
                block = self._stream.take(BLOCK)
            except _Fault as fault:
                # Some writers leave the end marker out (umoci insert). The digests tell whether anything is missing.
                at_member = 0 < self._header_offset == self._stream.position and not extended.pending
                if fault.code is Code.TRUNCATED and at_member:
                    return None
                raise
            if not any(block):
                if extended.pending:
                    raise _Fault(Code.EXTENDED_HEADER)
                self._check_end()
                return None
            if not _checksum_fits(block):
                raise _Fault(Code.CHECKSUM)
            kind = block[156]
            if kind not in b"LKxg":
                return self._read_member(block, kind, extended)
            size = _number(block[124:136])
            if size < 0:
                raise _Fault(Code.NUMBER)
            if size > MAX_EXTENDED:
                raise _Fault(Code.HEADER_LIMIT)
            data = self._stream.take(size)
            self._stream.skip(-size % BLOCK)
            self._apply_extended(extended, kind, data)

    @staticmethod
    def _apply_extended(extended: _Extended, kind: int, data: bytes) -> None:
        if kind == ord("L"):
            if extended.long_name is not None:
                raise _Fault(Code.EXTENDED_HEADER)
            extended.long_name = _text(data)
        elif kind == ord("K"):
            if extended.long_link is not None:
                raise _Fault(Code.EXTENDED_HEADER)
            extended.long_link = _text(data)
        elif kind == ord("x"):
            if extended.pax:
                raise _Fault(Code.EXTENDED_HEADER)
            _apply_pax(extended, data)
        else:
            if extended.pending:
                raise _Fault(Code.EXTENDED_HEADER)
            for key, _value in _records(data):
                if key in _UNDERSTOOD or key.startswith((_XATTR, b"GNU.sparse.")):
                    raise _Fault(Code.GLOBAL_HEADER)

    def _check_end(self) -> None:
        """After one zero block: another one, or the end of the stream."""
        try:
            block = self._stream.take(BLOCK)
        except _Fault as fault:
            if fault.code is Code.TRUNCATED:
                return
            raise
        if any(block):
            raise _Fault(Code.END_MARKER)

    def _read_member(self, block: bytes, kind: int, extended: _Extended) -> _Member:
        name = _text(block[:100])
        if block[257:263] == b"ustar\0" and block[345]:
            name = _text(block[345:500]) + b"/" + name
        link = _text(block[157:257])
        if extended.long_name is not None and (extended.path is not None or extended.sparse_name is not None):
            raise _Fault(Code.EXTENDED_HEADER)
        if extended.long_link is not None and extended.linkpath is not None:
            raise _Fault(Code.EXTENDED_HEADER)
        name = next((one for one in (extended.sparse_name, extended.path, extended.long_name) if one is not None), name)
        link = next((one for one in (extended.linkpath, extended.long_link) if one is not None), link)
        self._member = name[:MAX_NAME]
        if kind in (0, ord("7")):
            kind = ord("0")
        if kind not in b"0123456S":
            raise _Fault(Code.TYPE)
        size, mode = _number(block[124:136]), _number(block[100:108])
        uid, gid, seconds = _number(block[108:116]), _number(block[116:124]), _number(block[136:148])
        device = (0, 0)
        if kind in b"34":
            device = (_number(block[329:337]), _number(block[337:345]))
            if not (0 <= device[0] <= 0xFFF and 0 <= device[1] <= 0xFFFFF):
                raise _Fault(Code.NUMBER)
        member = _Member(
            kind=kind,
            name=name,
            link=link,
            size=size if extended.size is None else extended.size,
            mode=mode & 0o7777,
            uid=uid if extended.uid is None else extended.uid,
            gid=gid if extended.gid is None else extended.gid,
            mtime=(seconds, 0) if extended.mtime is None else extended.mtime,
            device=os.makedev(*device),
            extended=extended,
        )
        if member.size < 0 or member.uid < 0 or member.gid < 0:
            raise _Fault(Code.NUMBER)
        if kind == ord("S"):
            if extended.sparse:
                raise _Fault(Code.SPARSE_MAP)
            self._read_old_sparse_map(member, block)
        elif extended.sparse:
            if kind != ord("0"):
                raise _Fault(Code.SPARSE_MAP)
            self._start_pax_sparse(member)
        elif kind == ord("0") and name.endswith(b"/"):
            member.kind = ord("5")  # as V7 wrote directories
        if member.kind in b"123456" and member.size:
            raise _Fault(Code.DATA_ON_TYPE)
        if member.size > self._stream.remaining_allowance:
            raise _Fault(Code.UNPACKED_LIMIT)
        return member

    def _read_old_sparse_map(self, member: _Member, block: bytes) -> None:
        member.kind, member.sparse = ord("0"), True
        member.real_size = _number(block[483:495])
        going = self._old_extents(member, block, 386, 4)
        more = block[482]
        while more:
            block = self._stream.take(BLOCK)
            if going:
                going = self._old_extents(member, block, 0, 21)
            more = block[504]
        if member.real_size < 0:
            raise _Fault(Code.NUMBER)

    @staticmethod
    def _old_extents(member: _Member, block: bytes, start: int, count: int) -> bool:
        for at in range(start, start + 24 * count, 24):
            if block[at + 12] == 0:
                return False
            _add_extent(member.extents, _number(block[at : at + 12]), _number(block[at + 12 : at + 24]))
        return True

    def _start_pax_sparse(self, member: _Member) -> None:
        extended = member.extended
        if extended.sparse_size is None or extended.sparse_offset is not None:
            raise _Fault(Code.SPARSE_MAP)
        member.sparse = True
        member.real_size = extended.sparse_size
        if not extended.sparse_version_1:
            member.extents = extended.sparse_map
            return
        if extended.sparse_map:
            raise _Fault(Code.SPARSE_MAP)
        count = self._map_number(member, fresh=True)
        if count > MAX_EXTENTS:
            raise _Fault(Code.EXTENT_LIMIT)
        for _index in range(count):
            offset = self._map_number(member)
            member.extents.append((offset, self._map_number(member)))
        self._map_block = memoryview(b"")

    def _map_number(self, member: _Member, *, fresh: bool = False) -> int:
        """Next line of a 1.0 map, which fills the first blocks of the member's data."""
        if fresh:
            self._map_block = memoryview(b"")
        value = digits = 0
        while True:
            if not self._map_block:
                if member.size < BLOCK:
                    raise _Fault(Code.SPARSE_MAP)
                self._map_block = memoryview(self._stream.take(BLOCK))
                member.size -= BLOCK
            byte = self._map_block[0]
            self._map_block = self._map_block[1:]
            if byte == 0x0A and digits:
                return value
            if not 0x30 <= byte <= 0x39 or digits >= 18:
                raise _Fault(Code.SPARSE_MAP)
            value = value * 10 + byte - 0x30
            digits += 1

    # -- making

    def _make(self, member: _Member) -> None:
        parts = _components(member.name, self._translate)
        self._count_member()
        if not parts and member.kind != ord("5"):
            raise _Fault(Code.NAME_EMPTY)
        base = parts[-1] if parts else b""
        if self._translate and base.startswith(WHITEOUT):
            self._make_whiteout(member, parts)
            return
        owner = self._owner(member)
        if member.sparse:
            self._check_sparse(member)
        kind = member.kind
        self.counts["skipped_xattrs"] += member.extended.skipped_xattrs
        if kind == ord("0"):
            self._make_file(member, parts, owner)
        elif kind == ord("5"):
            self._make_directory(member, parts, owner)
        elif kind == ord("1"):
            self._make_hard_link(member, parts)
        elif kind == ord("2"):
            self._make_symlink(member, parts, owner)
        else:
            self._make_node(member, parts, owner)

    def _count_member(self) -> None:
        if self.counts["members"] >= self._max_members:
            raise _Fault(Code.MEMBER_LIMIT)
        self.counts["members"] += 1

    def _owner(self, member: _Member) -> tuple[int, int] | None:
        if self._owners is Owners.PROCESS:
            return None
        ids = (0, 0) if self._owners is Owners.ROOT else (member.uid, member.gid)
        uid, gid = ids[0] + self._shifts[0], ids[1] + self._shifts[1]
        if not (0 <= uid <= MAX_ID and 0 <= gid <= MAX_ID):
            raise _Fault(Code.OWNER)
        return uid, gid

    def _root_owner(self) -> tuple[int, int] | None:
        if self._owners is Owners.PROCESS:
            return None
        if self._shifts[0] < 0 or self._shifts[1] < 0:
            raise _Fault(Code.OWNER)
        return self._shifts

    @staticmethod
    def _check_sparse(member: _Member) -> None:
        end = stored = 0
        for offset, length in member.extents:
            if offset < end or length < 0 or offset > MAX_INT64 - length:
                raise _Fault(Code.SPARSE_MAP)
            end = offset + length
            stored += length
        if end > member.real_size or stored != member.size:
            raise _Fault(Code.SPARSE_MAP)

    def _make_file(self, member: _Member, parts: list[bytes], owner: tuple[int, int] | None) -> None:
        real_size = member.real_size if member.sparse else member.size
        if real_size > self._max_unpacked_bytes - self.counts["size_bytes"]:
            raise _Fault(Code.UNPACKED_LIMIT)
        parent = self._parent_fd(parts)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = self._replacing(parent, parts[-1], lambda: os.open(parts[-1], flags, member.mode & 0o777, dir_fd=parent))
        try:
            self._write_data(fd, member)
            if owner is not None:
                os.fchown(fd, *owner)
            os.fchmod(fd, member.mode)
            self._set_xattrs(fd, member, capability=True)
            os.utime(fd, ns=(member.mtime_ns, member.mtime_ns))
        finally:
            os.close(fd)
        self._stream.skip_padding(member.size)
        self.counts["files"] += 1
        self.counts["size_bytes"] += real_size

    def _write_data(self, fd: int, member: _Member) -> None:
        for offset, length in member.extents if member.sparse else [(0, member.size)]:
            while length:
                piece = memoryview(self._stream.take_some(length))
                length -= len(piece)
                while piece:
                    written = os.pwrite(fd, piece, offset)
                    offset += written
                    piece = piece[written:]
        if member.sparse:
            os.ftruncate(fd, member.real_size)

    def _make_directory(self, member: _Member, parts: list[bytes], owner: tuple[int, int] | None) -> None:
        if parts:
            fd = self._open_or_make(self._parent_fd(parts), parts[-1], 0o700)
        else:
            fd = os.open(".", DIRECTORY_FLAGS, dir_fd=self._root_fd)
        try:
            if owner is not None:
                os.fchown(fd, *owner)
            self._set_xattrs(fd, member, capability=False)
        finally:
            os.close(fd)
        self._directory_bytes += DIRECTORY_BYTES + len(b"/".join(parts))
        if self._directory_bytes > self._max_directory_bytes:
            raise _Fault(Code.DIRECTORY_LIMIT)
        self._directories[tuple(parts)] = (member.mode, member.mtime_ns)
        self.counts["directories"] += 1

    def _make_hard_link(self, member: _Member, parts: list[bytes]) -> None:
        try:
            target = _components(member.link, self._translate)
        except _Fault:
            raise _Fault(Code.LINK_TARGET) from None
        if not target or target == parts or (self._translate and target[-1].startswith(WHITEOUT)):
            raise _Fault(Code.LINK_TARGET)
        target_parent = self._existing_directory(target[:-1])
        try:
            try:
                found = os.stat(target[-1], dir_fd=target_parent, follow_symlinks=False)
            except FileNotFoundError:
                raise _Fault(Code.LINK_MISSING) from None
            if stat.S_ISDIR(found.st_mode):
                raise _Fault(Code.LINK_TARGET)
            parent = self._parent_fd(parts)
            self._replacing(
                parent,
                parts[-1],
                lambda: os.link(
                    target[-1], parts[-1], src_dir_fd=target_parent, dst_dir_fd=parent, follow_symlinks=False
                ),
            )
        finally:
            os.close(target_parent)
        self.counts["hard_links"] += 1

    def _make_symlink(self, member: _Member, parts: list[bytes], owner: tuple[int, int] | None) -> None:
        if not member.link or b"\0" in member.link or len(member.link) > MAX_NAME:
            raise _Fault(Code.LINK_TARGET)
        parent = self._parent_fd(parts)
        self._replacing(parent, parts[-1], lambda: os.symlink(member.link, parts[-1], dir_fd=parent))
        if owner is not None:
            os.chown(parts[-1], *owner, dir_fd=parent, follow_symlinks=False)
        times = (member.mtime_ns, member.mtime_ns)
        os.utime(parts[-1], ns=times, dir_fd=parent, follow_symlinks=False)
        self.counts["skipped_xattrs"] += len(member.extended.xattrs)
        self.counts["symlinks"] += 1

    def _make_node(self, member: _Member, parts: list[bytes], owner: tuple[int, int] | None) -> None:
        form = {ord("3"): stat.S_IFCHR, ord("4"): stat.S_IFBLK, ord("6"): stat.S_IFIFO}[member.kind]
        is_whiteout = self._translate and form == stat.S_IFCHR and member.device == 0
        if form != stat.S_IFIFO and not is_whiteout and not self._allow_devices:
            raise _Fault(Code.DEVICE)
        parent = self._parent_fd(parts)
        base = parts[-1]
        self._replacing(parent, base, lambda: os.mknod(base, form | 0o600, member.device, dir_fd=parent))
        if owner is not None:
            os.chown(base, *owner, dir_fd=parent, follow_symlinks=False)
        os.chmod(base, member.mode, dir_fd=parent)
        times = (member.mtime_ns, member.mtime_ns)
        os.utime(base, ns=times, dir_fd=parent, follow_symlinks=False)
        self.counts["skipped_xattrs"] += len(member.extended.xattrs)
        self.counts["whiteouts" if is_whiteout else "devices"] += 1

    def _make_whiteout(self, member: _Member, parts: list[bytes]) -> None:
        base = parts[-1]
        hidden = base[len(WHITEOUT) :]
        if member.kind != ord("0") or member.sparse:
            raise _Fault(Code.NAME_RESERVED)
        if base == OPAQUE:
            os.setxattr(self._parent_fd(parts), self._opaque_name, b"y")
            self.counts["opaque_directories"] += 1
        elif hidden in (b"", b".", b"..") or hidden.startswith(WHITEOUT):
            raise _Fault(Code.NAME_RESERVED)
        else:
            parent = self._parent_fd(parts)
            try:
                os.mknod(hidden, stat.S_IFCHR, 0, dir_fd=parent)
            except FileExistsError:
                # The layer brings this name itself. A directory must hide the lower one of the same name all the same.
                found = os.stat(hidden, dir_fd=parent, follow_symlinks=False)
                if stat.S_ISDIR(found.st_mode):
                    fd = os.open(hidden, DIRECTORY_FLAGS, dir_fd=parent)
                    try:
                        os.setxattr(fd, self._opaque_name, b"y")
                    finally:
                        os.close(fd)
            self.counts["whiteouts"] += 1
        self._stream.skip(member.size)
        self._stream.skip_padding(member.size)

    def _set_xattrs(self, fd: int, member: _Member, *, capability: bool) -> None:
        for name, value in member.extended.xattrs:
            if self._xattrs and (capability or name != b"security.capability"):
                os.setxattr(fd, name, value)
            else:
                self.counts["skipped_xattrs"] += 1

    @staticmethod
    def _replacing(parent: int, base: bytes, make: Callable[[], T]) -> T:
        """Makes something, in place of what has the name now: never through it. A directory does not give way."""
        try:
            return make()
        except FileExistsError:
            if stat.S_ISDIR(os.stat(base, dir_fd=parent, follow_symlinks=False).st_mode):
                raise _Fault(Code.IN_THE_WAY) from None
        os.unlink(base, dir_fd=parent)
        return make()

    # -- directories

    def _set_parent(self, parent: tuple[tuple[bytes, ...], int] | None) -> None:
        if self._parent is not None:
            os.close(self._parent[1])
        self._parent = parent

    def _parent_fd(self, parts: list[bytes]) -> int:
        """Descriptor of the directory a member lies in, which is made when it is missing. Links are never followed."""
        path = tuple(parts[:-1])
        if self._parent is not None and self._parent[0] == path:
            return self._parent[1]
        fd = os.open(".", DIRECTORY_FLAGS, dir_fd=self._root_fd)
        try:
            for part in path:
                below = self._enter(fd, part)
                os.close(fd)
                fd = below
        except BaseException:
            os.close(fd)
            raise
        self._set_parent((path, fd))
        return fd

    def _enter(self, fd: int, part: bytes) -> int:
        try:
            return os.open(part, DIRECTORY_FLAGS, dir_fd=fd)
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno not in (errno.ENOTDIR, errno.ELOOP):
                raise
            if not self._is_whiteout(fd, part):
                raise _Fault(Code.PARENT) from None
        self._count_member()
        owner = self._root_owner()
        made = self._open_or_make(fd, part, 0o755)
        try:
            if owner is not None:
                os.fchown(made, *owner)
            os.fchmod(made, 0o755)
        except BaseException:
            os.close(made)
            raise
        return made

    def _open_or_make(self, parent: int, base: bytes, mode: int) -> int:
        """Descriptor of a directory, made if need be; anything else of that name gives way."""
        opaque = False
        try:
            os.mkdir(base, mode, dir_fd=parent)
        except FileExistsError:
            found = os.stat(base, dir_fd=parent, follow_symlinks=False)
            if not stat.S_ISDIR(found.st_mode):
                opaque = self._is_whiteout(parent, base)
                os.unlink(base, dir_fd=parent)
                os.mkdir(base, mode, dir_fd=parent)
        fd = os.open(base, DIRECTORY_FLAGS, dir_fd=parent)
        if opaque:
            try:
                os.setxattr(fd, self._opaque_name, b"y")
            except BaseException:
                os.close(fd)
                raise
        return fd

    def _is_whiteout(self, parent: int, base: bytes) -> bool:
        found = os.stat(base, dir_fd=parent, follow_symlinks=False)
        return self._translate and stat.S_ISCHR(found.st_mode) and found.st_rdev == 0

    def _existing_directory(self, path: list[bytes]) -> int:
        """Descriptor of a directory that a hard link points into."""
        fd = os.open(".", DIRECTORY_FLAGS, dir_fd=self._root_fd)
        for part in path:
            try:
                below = os.open(part, DIRECTORY_FLAGS, dir_fd=fd)
            except OSError as error:
                if error.errno == errno.ENOENT:
                    raise _Fault(Code.LINK_MISSING) from None
                if error.errno in (errno.ENOTDIR, errno.ELOOP):
                    raise _Fault(Code.LINK_TARGET) from None
                raise
            finally:
                os.close(fd)
            fd = below
        return fd

    def _finish_directories(self) -> None:
        # Deepest first: a directory that gets a mode without rights for us is not passed any more.
        for path in sorted(self._directories, reverse=True):
            mode, mtime_ns = self._directories[path]
            self._member = b"/".join(path) or b"."
            fd = self._existing_directory(list(path))
            try:
                os.fchmod(fd, mode)
                os.utime(fd, ns=(mtime_ns, mtime_ns))
            finally:
                os.close(fd)
