"""EFI boot variables: load options, BootOrder, BootNext, BootCurrent (UEFI specification 2.10, §3.1, §3.3, §10.3).

Reading and making their bytes is pure; `EfiVariables` is the directory of efivarfs.
"""

import array
import contextlib
import fcntl
import os
import re
import struct
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from aoscore.common.errors import InvalidArgumentError, NotFoundError

EFIVARS = Path("/sys/firmware/efi/efivars")

_GLOBAL = "8be4df61-93ca-11d2-aa0d-00e098032b8c"
_ENTRY = re.compile(rf"Boot([0-9A-Fa-f]{{4}})-{_GLOBAL}")
# Kept over power cycles, seen by boot loaders and by systems.
_ATTRIBUTES = struct.pack("<I", 0x1 | 0x2 | 0x4)
_LOAD_OPTION_ACTIVE = 1
_NODE = struct.Struct("<BBH")
_HARD_DRIVE = struct.Struct("<IQQ16sBB")
_END = b"\x7f\xff\x04\x00"
_FORMAT_GPT, _SIGNATURE_GUID = 2, 2

_FS_IOC_GETFLAGS = 0x80006601 | struct.calcsize("l") << 16
_FS_IOC_SETFLAGS = 0x40006602 | struct.calcsize("l") << 16
_FS_IMMUTABLE_FL = 0x10


class Partition(msgspec.Struct, frozen=True):
    """A GPT partition as a load option names it; start and size in blocks of the disk."""

    uuid: uuid.UUID
    number: int
    start: int
    size: int


class LoadOption(msgspec.Struct, frozen=True):
    """What of a load option concerns us."""

    description: str
    partition: uuid.UUID | None
    """GUID of the partition it boots from; None for anything else, such as the network or a disk without GPT."""
    path: str = ""
    """The loader, with backslashes."""


def parse_load_option(data: bytes) -> LoadOption:
    """Read a load option, without its attributes as a variable. Raises InvalidArgumentError for a malformed one."""
    if len(data) < 6:
        raise InvalidArgumentError(f"load option of {len(data)} bytes is too short")
    paths_bytes = int.from_bytes(data[4:6], "little")
    end = next((at for at in range(6, len(data) - 1, 2) if data[at : at + 2] == b"\0\0"), None)
    if end is None:
        raise InvalidArgumentError("description of a load option does not end")
    paths = data[end + 2 : end + 2 + paths_bytes]
    if len(paths) != paths_bytes:
        raise InvalidArgumentError(f"load option has {len(paths)} bytes of device path instead of {paths_bytes}")
    partition: uuid.UUID | None = None
    path = ""
    for kind, body in _nodes(paths):
        if kind == (4, 1) and len(body) >= _HARD_DRIVE.size:
            *_, signature, _, signature_type = _HARD_DRIVE.unpack(body[: _HARD_DRIVE.size])
            if signature_type == _SIGNATURE_GUID:
                partition = uuid.UUID(bytes_le=signature)
        elif kind == (4, 4):
            path += body.decode("utf-16-le", "replace").rstrip("\0")
    return LoadOption(data[6:end].decode("utf-16-le", "replace"), partition, path)


def _nodes(paths: bytes) -> Iterator[tuple[tuple[int, int], bytes]]:
    """Nodes of the first device path up to its end: type and subtype, content."""
    at = 0
    while at < len(paths):
        if len(paths) - at < _NODE.size:
            raise InvalidArgumentError("device path node is cut off")
        kind, subkind, size = _NODE.unpack_from(paths, at)
        if size < _NODE.size or at + size > len(paths):
            raise InvalidArgumentError(f"device path node has an impossible length of {size} bytes")
        if kind == 0x7F:
            return
        yield (kind, subkind), paths[at + _NODE.size : at + size]
        at += size


def build_load_option(description: str, partition: Partition, loader: str) -> bytes:
    """A load option for a loader on a GPT partition; `loader` may have slashes."""
    drive = _HARD_DRIVE.pack(
        partition.number, partition.start, partition.size, partition.uuid.bytes_le, _FORMAT_GPT, _SIGNATURE_GUID
    )
    file = _utf16(loader.replace("/", "\\"))
    paths = b"".join(
        (_NODE.pack(4, 1, _NODE.size + len(drive)), drive, _NODE.pack(4, 4, _NODE.size + len(file)), file, _END)
    )
    return struct.pack("<IH", _LOAD_OPTION_ACTIVE, len(paths)) + _utf16(description) + paths


def _utf16(text: str) -> bytes:
    return text.encode("utf-16-le") + b"\0\0"


def parse_numbers(data: bytes) -> list[int]:
    """Content of BootOrder, BootNext or BootCurrent: numbers of load options. An odd last byte is ignored."""
    return [number for (number,) in struct.iter_unpack("<H", data[: len(data) // 2 * 2])]


def build_numbers(numbers: Sequence[int]) -> bytes:
    """The reverse of parse_numbers."""
    return struct.pack(f"<{len(numbers)}H", *numbers)


class EfiVariables:
    """The boot variables of this machine. All methods block; OSError when the firmware refuses."""

    def __init__(self, directory: Path = EFIVARS) -> None:
        """Raises NotFoundError on a machine that did not boot by EFI."""
        if not directory.is_dir():
            raise NotFoundError(f"{directory} does not exist: the node did not boot by EFI, or efivarfs is not mounted")
        self._directory = directory

    @property
    def current(self) -> int | None:
        """The load option that this boot took; None when the firmware does not tell."""
        return self._first("BootCurrent")

    @property
    def next(self) -> int | None:
        """The load option that the next boot takes, once."""
        return self._first("BootNext")

    @next.setter
    def next(self, number: int | None) -> None:
        if number is None:
            path = self._path("BootNext")
            if path.exists():
                _make_mutable(path)
                path.unlink()
        elif number != self.next:
            self._write("BootNext", build_numbers([number]))

    @property
    def order(self) -> list[int]:
        """Load options in the order in which they are tried."""
        return parse_numbers(self._read("BootOrder") or b"")

    def put_first(self, number: int) -> None:
        """Try this load option before all others, from now on."""
        order = self.order
        if order[:1] != [number]:
            self._write("BootOrder", build_numbers([number, *(other for other in order if other != number)]))

    def entries(self) -> dict[int, LoadOption]:
        """All load options by number; malformed ones, which may be anybody's, are left out."""
        found = {}
        for path in sorted(self._directory.iterdir()):
            if match := _ENTRY.fullmatch(path.name):
                with contextlib.suppress(InvalidArgumentError):
                    found[int(match[1], 16)] = parse_load_option(self._read(path.name.split("-")[0]) or b"")
        return found

    def add(self, partition: Partition, loader: str) -> int:
        """Make a load option, last in the order (sm-runtime.md §4.2); its number."""
        names = (_ENTRY.fullmatch(path.name) for path in self._directory.iterdir())
        number = max((int(match[1], 16) for match in names if match), default=-1) + 1
        self._write(f"Boot{number:04X}", build_load_option(f"Boot{number:04x}", partition, loader))
        self._write("BootOrder", build_numbers([*self.order, number]))
        return number

    def _first(self, name: str) -> int | None:
        return next(iter(parse_numbers(self._read(name) or b"")), None)

    def _path(self, name: str) -> Path:
        return self._directory / f"{name}-{_GLOBAL}"

    def _read(self, name: str) -> bytes | None:
        try:
            return self._path(name).read_bytes()[len(_ATTRIBUTES) :]
        except FileNotFoundError:
            return None

    def _write(self, name: str, data: bytes) -> None:
        path = self._path(name)
        if path.exists():
            _make_mutable(path)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            # The firmware gets what one call writes, whole or not at all.
            os.write(fd, _ATTRIBUTES + data)
        finally:
            os.close(fd)


def _make_mutable(path: Path) -> None:
    """efivarfs protects variables against accidents."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        flags = array.array("l", [0])
        fcntl.ioctl(fd, _FS_IOC_GETFLAGS, flags, True)
        if flags[0] & _FS_IMMUTABLE_FL:
            flags[0] &= ~_FS_IMMUTABLE_FL
            fcntl.ioctl(fd, _FS_IOC_SETFLAGS, flags)
    except OSError:
        # A file system without flags protects nothing.
        pass
    finally:
        os.close(fd)
