"""What `unpack_layer` takes, returns and raises, shared by the native module and its plain twin.

Exceptions::

    UnpackError(ValueError)          the layer is at fault; names the member, carries a stable `code`
      LayerFormatError               damaged or cut stream, wrong checksum, malformed header
      UnsupportedLayerError          valid, but of a kind that layers are not made of here
      UnsafeMemberError              a member that would reach out of the tree, or that is not allowed in it
      LayerLimitError                larger than the caller allows

Anything the file system refuses (ENOSPC, EIO, EPERM ...) is an OSError whose ``filename`` is the member.
"""

import os
from dataclasses import dataclass
from enum import IntEnum, StrEnum

DEFAULT_MAX_UNPACKED_BYTES = 8 << 30
DEFAULT_MAX_MEMBERS = 1_000_000


class Compression(StrEnum):
    """How a layer blob is packed."""

    NONE = "none"
    GZIP = "gzip"
    ZSTD = "zstd"

    @classmethod
    def of_media_type(cls, media_type: str) -> "Compression":
        """Compression of an OCI or Docker layer media type; UnsupportedLayerError for any other."""
        kind = _MEDIA_TYPES.get(media_type)
        if kind is None:
            raise UnsupportedLayerError(Code.MEDIA_TYPE, detail=media_type)
        return kind


class Whiteouts(StrEnum):
    """What becomes of ``.wh.NAME`` and ``.wh..wh..opq`` (sm.md §3.7)."""

    OVERLAY = "overlay"  # character device 0:0; trusted.overlay.opaque=y (needs CAP_SYS_ADMIN)
    OVERLAY_USER = "overlay-user"  # character device 0:0; user.overlay.opaque=y (overlay mounted with userxattr)
    KEEP = "keep"  # left as the plain files they are


class Owners(StrEnum):
    """Who owns what is unpacked."""

    ARCHIVE = "archive"  # the numeric owners of the archive, shifted
    ROOT = "root"  # 0:0, shifted
    PROCESS = "process"  # nothing is changed: the user that unpacks


@dataclass(frozen=True, slots=True)
class UnpackResult:
    """What one pass over a layer found and wrote."""

    blob_digest: str  # "sha256:<hex>" of the blob as stored: compare with the descriptor's digest
    diff_id: str  # "sha256:<hex>" of the unpacked tar stream: compare with rootfs.diff_ids
    blob_bytes: int
    tar_bytes: int
    size_bytes: int  # sum of the sizes of all regular files, hard links counted once, holes included
    members: int  # members of the archive and directories that had to be made for them
    files: int
    directories: int
    symlinks: int
    hard_links: int
    devices: int  # device nodes and FIFOs
    whiteouts: int
    opaque_directories: int
    skipped_xattrs: int  # extended attributes that a layer must not set here


class Code(IntEnum):
    """Stable reason of an UnpackError."""

    STREAM_CORRUPT = 1
    STREAM_TRUNCATED = 2
    TRUNCATED = 3
    CHECKSUM = 4
    NUMBER = 5
    EXTENDED_HEADER = 6
    SPARSE_MAP = 7
    END_MARKER = 8
    DATA_ON_TYPE = 9
    BLOB_SIZE = 10
    TYPE = 20
    GLOBAL_HEADER = 21
    MEDIA_TYPE = 22
    NAME_EMPTY = 30
    NAME_ABSOLUTE = 31
    NAME_DOTDOT = 32
    NAME_NUL = 33
    NAME_TOO_LONG = 34
    NAME_RESERVED = 35
    PARENT = 36
    DEVICE = 37
    LINK_TARGET = 38
    LINK_MISSING = 39
    IN_THE_WAY = 40
    OWNER = 41
    UNPACKED_LIMIT = 50
    MEMBER_LIMIT = 51
    HEADER_LIMIT = 52
    EXTENT_LIMIT = 53
    DIRECTORY_LIMIT = 54
    WINDOW_LIMIT = 55


_TEXTS = {
    Code.STREAM_CORRUPT: "the compressed data is damaged",
    Code.STREAM_TRUNCATED: "the compressed data ends too early",
    Code.TRUNCATED: "the archive ends too early",
    Code.CHECKSUM: "the checksum of a header is wrong",
    Code.NUMBER: "a number in the header is not valid",
    Code.EXTENDED_HEADER: "an extended header is malformed",
    Code.SPARSE_MAP: "the map of a sparse file does not fit its data",
    Code.END_MARKER: "a lone zero block is followed by data",
    Code.DATA_ON_TYPE: "carries data, which its type cannot have",
    Code.BLOB_SIZE: "the blob does not have the expected size",
    Code.TYPE: "is of a type that a layer cannot hold",
    Code.GLOBAL_HEADER: "a global header changes all members, which is not supported",
    Code.MEDIA_TYPE: "not the media type of a layer",
    Code.NAME_EMPTY: "has no usable name",
    Code.NAME_ABSOLUTE: "has an absolute name",
    Code.NAME_DOTDOT: "leaves the layer with '..'",
    Code.NAME_NUL: "has a NUL byte in its name",
    Code.NAME_TOO_LONG: "has a name that is too long or too deep",
    Code.NAME_RESERVED: "uses a name that is reserved for whiteouts",
    Code.PARENT: "lies below something that is not a directory, or is a symbolic link",
    Code.DEVICE: "is a device node, which is not allowed here",
    Code.LINK_TARGET: "has a link target that is not allowed",
    Code.LINK_MISSING: "is a hard link to something that is not in the layer",
    Code.IN_THE_WAY: "would replace a directory",
    Code.OWNER: "has an owner out of range",
    Code.UNPACKED_LIMIT: "unpacks to more than is allowed",
    Code.MEMBER_LIMIT: "has more members than are allowed",
    Code.HEADER_LIMIT: "an extended header is too large",
    Code.EXTENT_LIMIT: "a sparse file has too many parts",
    Code.DIRECTORY_LIMIT: "there are more directories than memory for them",
    Code.WINDOW_LIMIT: "a larger window was packed with than there is memory for: pack without --long and --ultra",
}


class UnpackError(ValueError):
    """The layer is at fault.

    code: stable reason. member: name of the member at fault, where one is known. offset_bytes: where in the tar
    stream the member's header starts, where that is known.
    """

    def __init__(
        self, code: Code, *, member: str | None = None, offset_bytes: int | None = None, detail: str | None = None
    ) -> None:
        self.code = code
        self.member = member
        self.offset_bytes = offset_bytes
        text = _TEXTS[code]
        subject = member if member is not None else detail
        if subject is not None:
            text = f"{subject!r}: {text}"
        if offset_bytes is not None:
            text = f"{text} (header at byte {offset_bytes})"
        super().__init__(text)


class LayerFormatError(UnpackError):
    """Damaged or cut stream, wrong checksum, malformed header."""


class UnsupportedLayerError(UnpackError):
    """Valid, but of a kind that layers are not made of here."""


class UnsafeMemberError(UnpackError):
    """A member that would reach out of the tree, or that is not allowed in it."""


class LayerLimitError(UnpackError):
    """Larger than the caller allows."""


def unpack_error(code: int, member: bytes | None, offset_bytes: int | None) -> UnpackError:
    """The exception for a reason found by either implementation."""
    if code < Code.TYPE:
        kind: type[UnpackError] = LayerFormatError
    elif code < Code.NAME_EMPTY:
        kind = UnsupportedLayerError
    elif code < Code.UNPACKED_LIMIT:
        kind = UnsafeMemberError
    else:
        kind = LayerLimitError
    name = None if member is None else os.fsdecode(member)
    return kind(Code(code), member=name, offset_bytes=offset_bytes)


# Layers that were encrypted when their item was built keep these types after CM has decrypted them (cloud-rest).
_DECRYPTED = "application/vnd.aos.image.layer.enc.v1.aes256gcm+tar"
_MEDIA_TYPES = {
    f"application/vnd.oci.image.layer.{kind}v1.tar{suffix}": compression
    for kind in ("", "nondistributable.")
    for suffix, compression in (("", Compression.NONE), ("+gzip", Compression.GZIP), ("+zstd", Compression.ZSTD))
} | {
    "application/vnd.docker.image.rootfs.diff.tar.gzip": Compression.GZIP,
    _DECRYPTED: Compression.NONE,
    f"{_DECRYPTED}+gzip": Compression.GZIP,
    f"{_DECRYPTED}+gz": Compression.GZIP,
}
