"""Plain twin of ``_sampler.pyx``: counters of the node and of the instances' cgroups."""

import errno
import os
import struct
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from aoscore._speedups.sampler_types import MAX_INSTANCES, Filesystem, InstanceSample, NodeSample, Sample, SampleError

_READ_BYTES = 1 << 16
_MAX_COUNTER = (1 << 63) - 1
# netlink(7): length, kind and flags of a message, with its sequence and sender; size and kind of an attribute.
_MESSAGE = struct.Struct("=IHH8x")
_ATTRIBUTE = struct.Struct("=HH")
_GENERIC_BYTES = 4
_ERROR, _DONE = 2, 3
_NEW_OBJECT = 10 << 8 | 18
_DUMP_INTERRUPTED = 0x10
_KIND_MASK = 0x3FFF
_OBJECT_NAME, _OBJECT_DATA = 2, 4
_COUNTER_BYTES = 1


class _Gone(Exception):
    """The cgroup was removed while it was read."""


@dataclass
class _Instance:
    cgroup: str
    identity: tuple[int, int] | None = None
    generation: int = 0
    kept: dict[str, int] = field(default_factory=dict)  # path -> descriptor


class Sampler:
    """Reads the counters of the node and of up to MAX_INSTANCES cgroups, keeping files open between samples.

    filesystems: name -> path of the file systems to report. memory_details: also read memory.stat of instances.
    max_kept_files: beyond it instance files are opened for each sample, so that a Unit with many instances does not
    run out of descriptors. Use by one thread at a time; `sample` may block on a dead network file system.
    """

    def __init__(
        self,
        *,
        filesystems: Mapping[str, str] | None = None,
        memory_details: bool = False,
        proc_root: str = "/proc",
        cgroup_root: str = "/sys/fs/cgroup",
        max_kept_files: int = 768,
    ) -> None:
        self._filesystems = dict(filesystems or {})
        self._memory_details = memory_details
        self._proc_root = proc_root
        self._cgroup_root = cgroup_root
        self._max_kept = max_kept_files
        self._kept_files = 0
        self._instances: dict[str, _Instance] = {}
        self._node_files: dict[str, int] = {}
        self._v2 = Path(cgroup_root, "cgroup.controllers").exists()

    def add(self, name: str, cgroup: str) -> None:
        """Watches a cgroup, given by its path below the root of every controller; it need not exist yet.

        ValueError for a path that leaves the root, a name that is watched already, or one instance too many.
        """
        parts = cgroup.split("/")
        if not cgroup or "\0" in cgroup or any(part in ("", ".", "..") for part in parts):
            raise ValueError(f"cgroup {cgroup!r} is not a plain path below the root")
        if name in self._instances:
            raise ValueError(f"instance {name!r} is watched already")
        if len(self._instances) >= MAX_INSTANCES:
            raise ValueError(f"instance {name!r}: {MAX_INSTANCES} instances are watched already")
        self._instances[name] = _Instance(cgroup)

    def remove(self, name: str) -> None:
        """Stops watching an instance; KeyError when it is not watched."""
        self._close_files(self._instances.pop(name))

    def sample(self) -> Sample:
        """Reads everything once. SampleError when a file that every node has cannot be read or understood."""
        time_ns = time.monotonic_ns()
        total, idle = self._cpu()
        memory_total, memory_used = self._memory()
        node = NodeSample(total, idle, memory_total, memory_used, self._network(), self._spaces())
        return Sample(time_ns, node, {name: self._instance(one) for name, one in self._instances.items()})

    def close(self) -> None:
        """Closes all kept files; the sampler can still be used and opens them again."""
        for instance in self._instances.values():
            self._close_files(instance)
        while self._node_files:
            os.close(self._node_files.popitem()[1])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        self.close()

    # -- node

    def _node_text(self, name: str) -> bytes:
        path = f"{self._proc_root}/{name}"
        try:
            fd = self._node_files.get(name)
            if fd is None:
                fd = self._node_files[name] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            return _read_all(fd)
        except OSError as error:
            raise SampleError(error.errno, error.strerror, path) from None

    def _odd(self, name: str) -> SampleError:
        return SampleError(errno.EBADMSG, "content not understood", f"{self._proc_root}/{name}")

    def _cpu(self) -> tuple[int, int]:
        numbers = []
        line = self._node_text("stat").partition(b"\n")[0].split(b" ")
        if line[0] != b"cpu":
            raise self._odd("stat")
        for word in line[1:]:
            if word:
                number = _leading_number(word)
                if number is None or not word.isdigit():
                    raise self._odd("stat")
                numbers.append(number)
        if len(numbers) < 4:
            raise self._odd("stat")
        return sum(numbers), numbers[3]

    def _memory(self) -> tuple[int, int]:
        text = self._node_text("meminfo")
        values = {name: _value(text, name + b":") for name in _MEMINFO}
        total = values[b"MemTotal"]
        if total is None:
            raise self._odd("meminfo")
        unused = sum(values[name] or 0 for name in _MEMINFO[1:])
        return total * 1024, max(total - unused, 0) * 1024

    def _network(self) -> dict[str, tuple[int, int]]:
        traffic = {}
        for line in self._node_text("net/dev").split(b"\n")[2:]:
            name, colon, rest = line.rpartition(b":")
            if not colon:
                continue
            columns = [word for word in rest.split(b" ") if word]
            received, sent = (_leading_number(b"".join(columns[at : at + 1])) for at in (0, 8))
            if received is None or sent is None:
                raise self._odd("net/dev")
            traffic[os.fsdecode(name.lstrip(b" "))] = (received, sent)
        return traffic

    def _spaces(self) -> dict[str, Filesystem | None]:
        spaces: dict[str, Filesystem | None] = {}
        for name, path in self._filesystems.items():
            try:
                found = os.statvfs(path)
            except OSError:  # not mounted now: the caller sees None
                spaces[name] = None
                continue
            unit = found.f_frsize
            spaces[name] = Filesystem(
                found.f_blocks * unit, (found.f_blocks - found.f_bfree) * unit, found.f_bavail * unit
            )
        return spaces

    # -- instances

    def _instance(self, one: _Instance) -> InstanceSample:
        # Twice: the first look may meet the files of a cgroup that was removed and made anew since the last sample.
        for _attempt in range(2):
            # The kept files of a removed cgroup say so when they are read.
            if not one.kept:
                identity = self._identity(one.cgroup)
                if identity is None:
                    break
                if identity != one.identity:
                    one.identity = identity
                    one.generation += 1
            try:
                return self._counters(one)
            except _Gone:
                self._close_files(one)
                one.identity = None
        self._close_files(one)
        one.identity = None
        return InstanceSample(True, one.generation, None, None, None, None, None, None)

    def _identity(self, cgroup: str) -> tuple[int, int] | None:
        for group in ("",) if self._v2 else ("cpuacct/", "memory/", "pids/"):
            try:
                found = Path(f"{self._cgroup_root}/{group}{cgroup}").stat()
            except OSError:
                continue
            return found.st_dev, found.st_ino
        return None

    def _counters(self, one: _Instance) -> InstanceSample:
        read_bytes = written_bytes = inactive_file = None
        if self._v2:
            usage_us = self._number(one, "", "cpu.stat", lambda text: _value(text, b"usage_usec"))
            cpu_ns = None if usage_us is None or usage_us > _MAX_COUNTER // 1000 else usage_us * 1000
            memory = self._number(one, "", "memory.current", _single)
            if self._memory_details:
                inactive_file = self._number(one, "", "memory.stat", lambda text: _value(text, b"inactive_file"))
            pids = self._number(one, "", "pids.current", _single)
            io = self._text(one, "", "io.stat")
            if io is not None:
                read_bytes, written_bytes = _tagged_sum(io, b"rbytes="), _tagged_sum(io, b"wbytes=")
        else:
            cpu_ns = self._number(one, "cpuacct/", "cpuacct.usage", _single)
            memory = self._number(one, "memory/", "memory.usage_in_bytes", _single)
            if self._memory_details:
                inactive_file = self._number(
                    one, "memory/", "memory.stat", lambda text: _value(text, b"total_inactive_file")
                )
            pids = self._number(one, "pids/", "pids.current", _single)
            io = self._text(one, "blkio/", "blkio.throttle.io_service_bytes")
            if io is not None:
                read_bytes, written_bytes = _tagged_sum(io, b"Read "), _tagged_sum(io, b"Write ")
        return InstanceSample(False, one.generation, cpu_ns, memory, inactive_file, pids, read_bytes, written_bytes)

    def _number(self, one: _Instance, group: str, name: str, parse: Callable[[bytes], int | None]) -> int | None:
        text = self._text(one, group, name)
        return None if text is None else parse(text)

    def _text(self, one: _Instance, group: str, name: str) -> bytes | None:
        path = f"{self._cgroup_root}/{group}{one.cgroup}/{name}"
        fd = one.kept.get(path)
        try:
            if fd is not None:
                return _read_all(fd)
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            if error.errno == errno.ENODEV:
                raise _Gone from None
            return None  # the controller is off here, or not readable for us: the caller sees None
        keep = self._kept_files < self._max_kept
        if keep:
            one.kept[path] = fd
            self._kept_files += 1
        try:
            return _read_all(fd)
        except OSError as error:
            if error.errno == errno.ENODEV:
                raise _Gone from None
            return None
        finally:
            if not keep:
                os.close(fd)

    def _close_files(self, one: _Instance) -> None:
        self._kept_files -= len(one.kept)
        while one.kept:
            os.close(one.kept.popitem()[1])


_MEMINFO = (b"MemTotal", b"MemFree", b"Buffers", b"Cached", b"SReclaimable")


def _read_all(fd: int) -> bytes:
    text = b""
    while piece := os.pread(fd, _READ_BYTES, len(text)):
        text += piece
    return text


def _leading_number(text: bytes) -> int | None:
    digits = 0
    while digits < len(text) and 0x30 <= text[digits] <= 0x39:
        digits += 1
    value = int(text[:digits]) if 0 < digits <= 19 else None
    return None if value is None or value > _MAX_COUNTER else value


def _single(text: bytes) -> int | None:
    return _leading_number(text)


def _value(text: bytes, key: bytes) -> int | None:
    """Number after ``key`` and blanks at the start of a line."""
    for line in text.split(b"\n"):
        if line.startswith(key) and line[len(key) : len(key) + 1] == b" ":
            return _leading_number(line[len(key) :].lstrip(b" "))
    return None


def _tagged_sum(text: bytes, tag: bytes) -> int:
    """Sum of the numbers after each ``tag`` that follows a blank."""
    total = 0
    at = text.find(b" " + tag)
    while at >= 0:
        start = at + 1 + len(tag)
        total += _leading_number(text[start : start + 20]) or 0
        at = text.find(b" " + tag, start)
    return total


def take_counters(data: bytes, found: dict[str, int]) -> bool:
    """Takes the counters out of a part of the kernel's answer to NFT_MSG_GETOBJ (linux/netfilter/nf_tables.h).

    data: whole netlink messages, as one `recv` gives them. found: gets the bytes of each counter by its name. Returns
    whether the answer ends here. Raises OSError with what the kernel says; InterruptedError when the counters changed
    while they were listed: what was found is of no use then; ValueError for what no kernel sends.
    """
    at = 0
    while len(data) - at >= _MESSAGE.size:
        length, kind, flags = _MESSAGE.unpack_from(data, at)
        if not _MESSAGE.size <= length <= len(data) - at:
            raise ValueError(f"message of {length} bytes in a list of counters")
        if flags & _DUMP_INTERRUPTED:
            raise InterruptedError("counters changed while they were listed")
        if kind == _DONE:
            return True
        if kind == _ERROR:
            if length < _MESSAGE.size + 4:
                raise ValueError("an error without a number in a list of counters")
            code = -int.from_bytes(data[at + _MESSAGE.size : at + _MESSAGE.size + 4], sys.byteorder, signed=True)
            raise OSError(code, os.strerror(code))
        if kind == _NEW_OBJECT:
            _take_counter(data[at + _MESSAGE.size + _GENERIC_BYTES : at + length], found)
        at += length + 3 & ~3
    return False


def _take_counter(data: bytes, found: dict[str, int]) -> None:
    name = value = None
    for kind, content in _attributes(data):
        if kind == _OBJECT_NAME:
            name = bytes(content).rstrip(b"\0").decode("utf-8", "replace")
        elif kind == _OBJECT_DATA:
            for inner, number in _attributes(content):
                if inner == _COUNTER_BYTES and len(number) == 8:
                    value = int.from_bytes(number, "big")
    if name is not None and value is not None:
        found[name] = value


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while len(data) - at >= _ATTRIBUTE.size:
        size, kind = _ATTRIBUTE.unpack_from(data, at)
        if not _ATTRIBUTE.size <= size <= len(data) - at:
            raise ValueError(f"attribute of {size} bytes in a list of counters")
        yield kind & _KIND_MASK, data[at + _ATTRIBUTE.size : at + size]
        at += size + 3 & ~3
