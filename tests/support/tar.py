"""Tar archives made by hand, so that they can be wrong in every way; and a look at unpacked trees."""

import contextlib
import hashlib
import os
import stat
import struct
from pathlib import Path
from typing import Any

BLOCK = 512
END = bytes(2 * BLOCK)


def octal(value: int, width: int) -> bytes:
    """A numeric field as POSIX has it."""
    return b"%0*o\0" % (width - 1, value)


def base256(value: int, width: int) -> bytes:
    """A numeric field as GNU tar writes large and negative numbers."""
    data = value.to_bytes(width, "big", signed=True)
    return bytes([data[0] | 0x80, *data[1:]])


def pad(data: bytes) -> bytes:
    """Data filled up to whole blocks."""
    return data + bytes(-len(data) % BLOCK)


def header(
    name: bytes,
    kind: bytes = b"0",
    size: int | bytes = 0,
    *,
    mode: int | bytes = 0o644,
    uid: int | bytes = 0,
    gid: int | bytes = 0,
    mtime: int | bytes = 1_600_000_000,
    link: bytes = b"",
    magic: bytes = b"ustar\x0000",
    device: tuple[int | bytes, int | bytes] = (0, 0),
    prefix: bytes = b"",
    checksum: bytes | None = None,
    signed: bool = False,
) -> bytes:
    """One header block. Numbers given as bytes go in as they are."""

    def field(value: int | bytes, width: int) -> bytes:
        return value.ljust(width, b"\0") if isinstance(value, bytes) else octal(value, width)

    block = b"".join(
        (
            name[:100].ljust(100, b"\0"),
            field(mode, 8),
            field(uid, 8),
            field(gid, 8),
            field(size, 12),
            field(mtime, 12),
            b" " * 8,
            kind,
            link[:100].ljust(100, b"\0"),
            magic.ljust(8, b"\0"),
            b"root".ljust(32, b"\0"),
            b"root".ljust(32, b"\0"),
            field(device[0], 8),
            field(device[1], 8),
            prefix.ljust(155, b"\0"),
            bytes(12),
        )
    )
    assert len(block) == BLOCK
    return with_checksum(block, checksum=checksum, signed=signed)


def with_checksum(block: bytes, *, checksum: bytes | None = None, signed: bool = False) -> bytes:
    """The block with the right checksum, or with the given one."""
    block = block[:148] + b" " * 8 + block[156:]
    total = sum(struct.unpack("512b" if signed else "512B", block))
    return block[:148] + (checksum or b"%06o\0 " % (total & 0o777777)) + block[156:]


def member(name: bytes, data: bytes = b"", kind: bytes = b"0", **fields: Any) -> bytes:
    """A header and its data."""
    fields.setdefault("size", len(data))
    return header(name, kind, **fields) + pad(data)


def directory(name: bytes, **fields: Any) -> bytes:
    return member(name, kind=b"5", **{"mode": 0o755, **fields})


def symlink(name: bytes, target: bytes, **fields: Any) -> bytes:
    return member(name, kind=b"2", link=target, **{"mode": 0o777, **fields})


def hard_link(name: bytes, target: bytes, **fields: Any) -> bytes:
    return member(name, kind=b"1", link=target, **fields)


def record(key: bytes, value: bytes) -> bytes:
    """A pax record: its length counts its own digits."""
    rest = len(key) + len(value) + 3
    length = rest + len(str(rest))
    while len(str(length)) + rest != length:
        length += 1
    return b"%d %s=%s\n" % (length, key, value)


def pax(records: dict[bytes, bytes] | list[tuple[bytes, bytes]], kind: bytes = b"x") -> bytes:
    """A pax header for the next member, or a global one."""
    pairs = records.items() if isinstance(records, dict) else records
    return member(b"PaxHeaders/x", b"".join(record(key, value) for key, value in pairs), kind)


def gnu_long(kind: bytes, name: bytes) -> bytes:
    """GNU long name (L) or link target (K)."""
    return member(b"././@LongLink", name + b"\0", kind, magic=b"ustar  \0")


def gnu_sparse(
    name: bytes, extents: list[tuple[int, bytes]], real_size: int, *, sizes: list[int] | None = None
) -> bytes:
    """Old GNU sparse file; `sizes` overrides what the map says of the lengths."""
    entries = [
        octal(offset, 12) + octal(len(data) if sizes is None else sizes[index], 12)
        for index, (offset, data) in enumerate(extents)
    ]
    data = b"".join(part for _offset, part in extents)
    block = bytearray(header(name, b"S", len(data), magic=b"ustar  \0"))
    first, rest = entries[:4], entries[4:]
    block[386 : 386 + 24 * len(first)] = b"".join(first)
    block[482] = 1 if rest else 0
    block[483:495] = octal(real_size, 12)
    blocks = [with_checksum(bytes(block))]
    while rest:
        part, rest = rest[:21], rest[21:]
        extension = bytearray(BLOCK)
        extension[: 24 * len(part)] = b"".join(part)
        extension[504] = 1 if rest else 0
        blocks.append(bytes(extension))
    return b"".join(blocks) + pad(data)


def tree(root: Path) -> dict[str, tuple[Any, ...]]:
    """Everything that can be seen of a tree, path by path; "." is the root itself."""
    seen: dict[str, tuple[Any, ...]] = {}
    links: dict[tuple[int, int], str] = {}

    def look(path: Path, name: str) -> None:
        status = path.lstat()
        kind = stat.S_IFMT(status.st_mode)
        content: object = None
        if kind == stat.S_IFREG:
            content = (status.st_size, hashlib.sha256(path.read_bytes()).hexdigest())
        elif kind == stat.S_IFLNK:
            content = os.fsencode(path.readlink())
        elif kind in (stat.S_IFCHR, stat.S_IFBLK):
            content = status.st_rdev
        first = links.setdefault((status.st_dev, status.st_ino), name)
        attributes = {}
        with contextlib.suppress(OSError):  # not on every file system, not on every kind of file
            for key in os.listxattr(path, follow_symlinks=False):
                attributes[key] = os.getxattr(path, key, follow_symlinks=False)
        seen[name] = (oct(status.st_mode), status.st_uid, status.st_gid, status.st_mtime_ns, content, first, attributes)

    look(root, ".")
    for folder, directories, files in os.walk(root):
        for name in sorted(directories + files):
            path = Path(folder) / name
            look(path, str(path.relative_to(root)))
    return seen
