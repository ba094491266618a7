"""The two boot partitions: who they are, what is on them, writing and copying them. Everything here blocks."""

import gzip
import os
import stat
import uuid
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from aoscore._speedups.chunker import Digest, hash_file
from aoscore.common import linux
from aoscore.common.errors import ChecksumError, InvalidArgumentError, NoSpaceError, NotFoundError
from aoscore.sm.imagemanager.model import Payload
from aoscore.sm.launcher.runtimes.boot.efi import Partition
from aoscore.sm.launcher.runtimes.component import read_version

FILE_SYSTEM = "vfat"
"""What EFI firmware reads."""

_BLOCK_BYTES = 1024 * 1024
_SECTOR_BYTES = 512
_GZIP_MAGIC = b"\x1f\x8b"


def identify(device: Path, disks: Path = Path("/dev/disk"), blocks: Path = Path("/sys/class/block")) -> Partition:
    """What the firmware knows a partition by. Raises NotFoundError for what is no GPT partition of this machine."""
    real = device.resolve()
    links = disks / "by-partuuid"
    names = [link.name for link in links.iterdir() if link.resolve() == real] if links.is_dir() else []
    if not names:
        raise NotFoundError(f"boot partition {device} has no partition UUID")
    try:
        identity = uuid.UUID(names[0])
    except ValueError:
        raise NotFoundError(f"boot partition {device} has {names[0]} and no GUID: its disk has no GPT") from None
    block = blocks / real.name

    def number(name: str) -> int:
        return int((block / name).read_text())

    try:
        # sysfs counts in sectors of 512 bytes whatever the disk has.
        sectors = int((block.resolve().parent / "queue/logical_block_size").read_text()) // _SECTOR_BYTES
        return Partition(identity, number("partition"), number("start") // sectors, number("size") // sectors)
    except FileNotFoundError:
        raise NotFoundError(f"boot partition {device} is no partition of a disk") from None


def read_partition_version(device: Path, version_file: str, mount_point: Path) -> str:
    """Version in a file on a boot partition, which is mounted for that. Raises OSError, or as `read_version`."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        source, target, *_ = line.split(" ")
        if source.startswith("/") and Path(source).resolve() == device.resolve():
            # Mounted writable already, it can't be mounted read-only.
            return read_version(Path(target) / version_file)
    mount_point.mkdir(parents=True, exist_ok=True)
    flags = linux.MS_RDONLY | linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC
    linux.mount(device, mount_point, FILE_SYSTEM, flags)
    try:
        return read_version(mount_point / version_file)
    finally:
        linux.umount(mount_point, linux.MNT_DETACH)


def write_image(payload: Payload, device: Path) -> None:
    """Unpack a gzip image onto a partition and read it back.

    Raises InvalidArgumentError for what is no gzip, ChecksumError for a payload or a partition that is damaged,
    NoSpaceError for an image that is larger than the partition.
    """
    with payload.path.open("rb") as file:
        if file.read(2) != _GZIP_MAGIC:
            raise InvalidArgumentError(f"payload {payload.digest} is no gzip file")
        if hash_file(file.fileno()) != payload.digest:
            raise ChecksumError(f"payload {payload.digest} is damaged in the store")
    try:
        with gzip.open(payload.path) as image:
            _replace(device, _blocks(image), what=f"image {payload.digest}")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InvalidArgumentError(f"payload {payload.digest} can't be unpacked: {error}") from error


def copy_partition(source: Path, target: Path) -> None:
    """Make the target equal to the source; raises as `write_image`."""
    with source.open("rb") as file:
        _replace(target, _blocks(file), what=f"content of {source}")


def _blocks(file: BinaryIO | gzip.GzipFile) -> Iterator[bytes]:
    while block := file.read(_BLOCK_BYTES):
        yield block


def _replace(device: Path, blocks: Iterable[bytes], *, what: str) -> None:
    """Write blocks from the beginning of a device, only those that differ: flash wears."""
    wanted, written = Digest(), Digest()
    is_block_device = stat.S_ISBLK(device.stat().st_mode)
    # O_EXCL of a block device: not while it is mounted.
    fd = os.open(device, os.O_RDWR | os.O_CLOEXEC | (os.O_EXCL if is_block_device else 0))
    try:
        size = os.lseek(fd, 0, os.SEEK_END)
        at = 0
        for block in blocks:
            if at + len(block) > size:
                raise NoSpaceError(f"{what} is larger than partition {device} of {size} bytes")
            wanted.update(block)
            if os.pread(fd, len(block), at) != block:
                _write_all(fd, block, at)
            at += len(block)
        os.fsync(fd)
        # What comes from the cache proves nothing.
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        written.update_from_file(fd, 0, at)
    finally:
        os.close(fd)
    if written.text() != wanted.text():
        raise ChecksumError(f"partition {device} does not hold what was written to it")


def _write_all(fd: int, data: bytes, at: int) -> None:
    while data:
        count = os.pwrite(fd, data, at)
        data, at = data[count:], at + count
