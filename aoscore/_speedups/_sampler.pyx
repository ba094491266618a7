# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Counters of the node and of the instances' cgroups, read without the interpreter lock and without an object per line.

Documented in the plain twin, ``_plain/sampler.py``.
"""

from libc.errno cimport EBADMSG, ENODEV, ENOMEM, errno
from libc.stdint cimport INT64_MAX, int32_t, int64_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memchr, memcmp, memcpy, strdup, strlen
from posix.types cimport dev_t, ino_t, off_t
from posix.unistd cimport close, pread

import os
import time

from aoscore._speedups.sampler_types import (
    MAX_INSTANCES,
    Filesystem,
    InstanceSample,
    NodeSample,
    Sample,
    SampleError,
)

cdef extern from "<fcntl.h>" nogil:
    int O_RDONLY
    int O_CLOEXEC
    int open(const char *path, int flags, ...)

cdef extern from "<sys/stat.h>" nogil:
    struct c_stat "stat":
        dev_t st_dev
        ino_t st_ino
    int c_stat_path "stat"(const char *path, c_stat *found)

cdef extern from "<sys/statvfs.h>" nogil:
    struct c_statvfs "statvfs":
        unsigned long f_frsize
        uint64_t f_blocks
        uint64_t f_bfree
        uint64_t f_bavail
    int c_statvfs_path "statvfs"(const char *path, c_statvfs *found)

cdef extern from "<stdio.h>" nogil:
    int snprintf(char *target, size_t size, const char *form, ...)

cdef enum:
    PATH_BYTES = 4096
    FIRST_BUFFER_BYTES = 1 << 16
    ABSENT = -1  # value of a counter that the kernel does not offer
    NO_FILE = -1  # descriptor of a file that is not kept
    COUNTERS = 6
    SOURCES = 5

# Positions in Instance.counters, in the order of InstanceSample
cdef enum:
    CPU_NS
    MEMORY
    INACTIVE_FILE
    PIDS
    IO_READ
    IO_WRITE

# Positions in Sampler.node_fds
cdef enum:
    STAT
    MEMINFO
    NET_DEV
    NODE_FILES

# How a file is understood
cdef enum:
    SINGLE  # one number
    KEYED  # number after a key at the start of a line
    TAGGED  # sums of the numbers after two tags

cdef struct Source:
    const char *group  # directory of the controller, with a slash; empty for cgroup v2
    const char *name
    int form
    const char *key
    const char *second_key
    int64_t scale
    int counter
    int second_counter

cdef struct Instance:
    char *cgroup
    bint found
    dev_t device
    ino_t inode
    int64_t generation
    bint gone
    int kept[SOURCES]
    int64_t counters[COUNTERS]

cdef struct Buffer:
    char *data
    size_t size  # allocated
    size_t used

cdef Source V2_SOURCES[SOURCES]
V2_SOURCES[0] = Source(b"", b"cpu.stat", KEYED, b"usage_usec", NULL, 1000, CPU_NS, ABSENT)
V2_SOURCES[1] = Source(b"", b"memory.current", SINGLE, NULL, NULL, 1, MEMORY, ABSENT)
V2_SOURCES[2] = Source(b"", b"memory.stat", KEYED, b"inactive_file", NULL, 1, INACTIVE_FILE, ABSENT)
V2_SOURCES[3] = Source(b"", b"pids.current", SINGLE, NULL, NULL, 1, PIDS, ABSENT)
V2_SOURCES[4] = Source(b"", b"io.stat", TAGGED, b" rbytes=", b" wbytes=", 1, IO_READ, IO_WRITE)

cdef Source V1_SOURCES[SOURCES]
V1_SOURCES[0] = Source(b"cpuacct/", b"cpuacct.usage", SINGLE, NULL, NULL, 1, CPU_NS, ABSENT)
V1_SOURCES[1] = Source(b"memory/", b"memory.usage_in_bytes", SINGLE, NULL, NULL, 1, MEMORY, ABSENT)
V1_SOURCES[2] = Source(b"memory/", b"memory.stat", KEYED, b"total_inactive_file", NULL, 1, INACTIVE_FILE, ABSENT)
V1_SOURCES[3] = Source(b"pids/", b"pids.current", SINGLE, NULL, NULL, 1, PIDS, ABSENT)
V1_SOURCES[4] = Source(
    b"blkio/", b"blkio.throttle.io_service_bytes", TAGGED, b" Read ", b" Write ", 1, IO_READ, IO_WRITE
)


NODE_NAMES = ("stat", "meminfo", "net/dev")


cdef int read_all(int fd, Buffer *buffer, bint at_once) noexcept nogil:
    """Whole file into the buffer, NUL-terminated; errno on failure, else 0.

    at_once: the kernel makes the whole text for one read, as for every file of a cgroup, so a short one is the end.
    """
    cdef ssize_t got
    cdef size_t room
    cdef char *larger
    buffer.used = 0
    while True:
        if buffer.size - buffer.used < FIRST_BUFFER_BYTES:
            larger = <char *>realloc(buffer.data, buffer.size * 2 + FIRST_BUFFER_BYTES)
            if larger == NULL:
                return ENOMEM
            buffer.data = larger
            buffer.size = buffer.size * 2 + FIRST_BUFFER_BYTES
        room = buffer.size - buffer.used - 1
        got = pread(fd, buffer.data + buffer.used, room, <off_t>buffer.used)
        if got < 0:
            return errno
        buffer.used += <size_t>got
        if got == 0 or (at_once and <size_t>got < room):
            buffer.data[buffer.used] = 0
            return 0


cdef int64_t leading_number(const char *text) noexcept nogil:
    """Up to 19 digits at the start; ABSENT when there are none, more, or the number does not fit."""
    cdef uint64_t value = 0
    cdef int digits = 0
    while c"0" <= text[digits] <= c"9":
        if digits == 19:
            return ABSENT
        value = value * 10 + <uint64_t>(text[digits] - c"0")
        digits += 1
    if digits == 0 or value > <uint64_t>INT64_MAX:
        return ABSENT
    return <int64_t>value


cdef int64_t keyed_number(const char *text, const char *key) noexcept nogil:
    """Number after ``key`` and blanks at the start of a line."""
    cdef size_t size = strlen(key)
    cdef const char *line = text
    while line != NULL:
        if memcmp_line(line, key, size) and line[size] == c" ":
            line += size
            while line[0] == c" ":
                line += 1
            return leading_number(line)
        line = next_line(line)
    return ABSENT


cdef bint memcmp_line(const char *line, const char *key, size_t size) noexcept nogil:
    """Whether the text starts with ``key``; stops at the end of the text."""
    cdef size_t index
    for index in range(size):
        if line[index] != key[index]:
            return False
    return True


cdef const char *next_line(const char *text) noexcept nogil:
    cdef const char *found = <const char *>memchr(text, c"\n", strlen(text))
    if found == NULL:
        return NULL
    return found + 1


cdef int64_t tagged_sum(const Buffer *buffer, const char *tag) noexcept nogil:
    cdef size_t size = strlen(tag)
    cdef int64_t total = 0, value
    cdef const char *at = buffer.data
    cdef const char *end = buffer.data + buffer.used
    while True:
        at = <const char *>memchr(at, tag[0], <size_t>(end - at))
        if at == NULL:
            return total
        if <size_t>(end - at) >= size and memcmp(at, tag, size) == 0:
            value = leading_number(at + size)
            if value > 0 and total <= INT64_MAX - value:
                total += value
        at += 1


cdef object counter(int64_t value):
    return None if value == ABSENT else value


cdef class Sampler:
    """Reads the counters of the node and of up to MAX_INSTANCES cgroups, keeping files open between samples."""

    cdef dict names  # name -> position in `instances`
    cdef Instance **instances
    cdef Py_ssize_t capacity
    cdef Source *sources
    cdef bint v2
    cdef bint memory_details
    cdef bytes cgroup_root
    cdef const char *root  # its characters
    cdef str proc_root
    cdef int max_kept
    cdef int kept_files
    cdef Buffer buffer
    cdef int node_fds[NODE_FILES]
    cdef list spaces

    def __cinit__(
        self,
        *,
        filesystems=None,
        bint memory_details=False,
        str proc_root not None="/proc",
        str cgroup_root not None="/sys/fs/cgroup",
        int max_kept_files=768,
    ):
        cdef int index
        for index in range(NODE_FILES):
            self.node_fds[index] = NO_FILE
        self.capacity = MAX_INSTANCES
        self.instances = <Instance **>calloc(<size_t>self.capacity, sizeof(Instance *))
        self.buffer.data = <char *>malloc(2 * FIRST_BUFFER_BYTES)
        self.buffer.size = 2 * FIRST_BUFFER_BYTES
        if self.instances == NULL or self.buffer.data == NULL:
            raise MemoryError()
        self.names = {}
        self.spaces = [(name, os.fsencode(path)) for name, path in (filesystems or {}).items()]
        self.memory_details = memory_details
        self.proc_root = proc_root
        self.cgroup_root = os.fsencode(cgroup_root)
        self.root = self.cgroup_root
        self.max_kept = max_kept_files
        self.v2 = os.path.exists(f"{cgroup_root}/cgroup.controllers")
        if self.v2:
            self.sources = &V2_SOURCES[0]
        else:
            self.sources = &V1_SOURCES[0]

    def __dealloc__(self):
        cdef Py_ssize_t index
        if self.instances != NULL:
            for index in range(self.capacity):
                self.drop(index)
        free(self.instances)
        free(self.buffer.data)
        self.close_node_files()

    def add(self, str name not None, str cgroup not None):
        """Watches a cgroup, given by its path below the root of every controller; it need not exist yet.

        ValueError for a path that leaves the root, a name that is watched already, or one instance too many.
        """
        cdef Py_ssize_t index = 0
        cdef int source
        cdef Instance *one
        if not cgroup or "\0" in cgroup or any([part in ("", ".", "..") for part in cgroup.split("/")]):
            raise ValueError(f"cgroup {cgroup!r} is not a plain path below the root")
        if name in self.names:
            raise ValueError(f"instance {name!r} is watched already")
        if len(self.names) >= self.capacity:
            raise ValueError(f"instance {name!r}: {self.capacity} instances are watched already")
        path = os.fsencode(cgroup)
        while self.instances[index] != NULL:
            index += 1
        one = <Instance *>calloc(1, sizeof(Instance))
        if one == NULL:
            raise MemoryError()
        one.cgroup = strdup(path)
        if one.cgroup == NULL:
            free(one)
            raise MemoryError()
        for source in range(SOURCES):
            one.kept[source] = NO_FILE
        self.instances[index] = one
        self.names[name] = index

    def remove(self, str name not None):
        """Stops watching an instance; KeyError when it is not watched."""
        self.drop(self.names.pop(name))

    def sample(self):
        """Reads everything once. SampleError when a file that every node has cannot be read or understood."""
        cdef Py_ssize_t index
        cdef Instance *one
        time_ns = time.monotonic_ns()
        total, idle = self.cpu()
        memory_total, memory_used = self.memory()
        node = NodeSample(total, idle, memory_total, memory_used, self.network(), self.filesystems())
        with nogil:
            for index in range(self.capacity):
                if self.instances[index] != NULL:
                    self.look(self.instances[index])
        found = {}
        for name, place in self.names.items():
            index = place
            one = self.instances[index]
            found[name] = InstanceSample(
                bool(one.gone),
                one.generation,
                counter(one.counters[CPU_NS]),
                counter(one.counters[MEMORY]),
                counter(one.counters[INACTIVE_FILE]),
                counter(one.counters[PIDS]),
                counter(one.counters[IO_READ]),
                counter(one.counters[IO_WRITE]),
            )
        return Sample(time_ns, node, found)

    def close(self):
        """Closes all kept files; the sampler can still be used and opens them again."""
        cdef Py_ssize_t index
        for index in range(self.capacity):
            if self.instances[index] != NULL:
                self.close_files(self.instances[index])
        self.close_node_files()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace, /):
        self.close()

    # -- node

    cdef void close_node_files(self) noexcept:
        cdef int index
        for index in range(NODE_FILES):
            if self.node_fds[index] != NO_FILE:
                close(self.node_fds[index])
                self.node_fds[index] = NO_FILE

    cdef str node_path(self, int index):
        return f"{self.proc_root}/{NODE_NAMES[index]}"

    cdef const char *node_text(self, int index) except NULL:
        cdef int failure
        if self.node_fds[index] == NO_FILE:
            path = os.fsencode(self.node_path(index))
            self.node_fds[index] = open(<const char *>path, O_RDONLY | O_CLOEXEC)
            if self.node_fds[index] < 0:
                failure = errno
                raise SampleError(failure, os.strerror(failure), self.node_path(index))
        with nogil:
            failure = read_all(self.node_fds[index], &self.buffer, False)
        if failure:
            raise SampleError(failure, os.strerror(failure), self.node_path(index))
        return self.buffer.data

    cdef object odd(self, int index):
        return SampleError(EBADMSG, "content not understood", self.node_path(index))

    cdef tuple cpu(self):
        cdef const char *at = self.node_text(STAT)
        cdef int64_t value
        cdef int64_t total = 0, idle = 0
        cdef int count = 0
        if not memcmp_line(at, b"cpu ", 4):
            raise self.odd(STAT)
        at += 4
        while True:
            while at[0] == c" ":
                at += 1
            if at[0] == c"\n" or at[0] == 0:
                break
            value = leading_number(at)
            if value == ABSENT:
                raise self.odd(STAT)
            total += value
            if count == 3:
                idle = value
            count += 1
            while c"0" <= at[0] <= c"9":
                at += 1
            if at[0] != c" " and at[0] != c"\n" and at[0] != 0:
                raise self.odd(STAT)
        if count < 4:
            raise self.odd(STAT)
        return total, idle

    cdef tuple memory(self):
        cdef const char *text = self.node_text(MEMINFO)
        cdef int64_t total = keyed_number(text, b"MemTotal:")
        cdef int64_t unused
        if total == ABSENT:
            raise self.odd(MEMINFO)
        unused = (
            max(keyed_number(text, b"MemFree:"), 0)
            + max(keyed_number(text, b"Buffers:"), 0)
            + max(keyed_number(text, b"Cached:"), 0)
            + max(keyed_number(text, b"SReclaimable:"), 0)
        )
        return total * 1024, max(total - unused, 0) * 1024

    cdef dict network(self):
        cdef const char *line = self.node_text(NET_DEV)
        cdef const char *end
        cdef const char *colon
        cdef const char *at
        cdef int64_t received, sent
        cdef int skipped
        traffic = {}
        for skipped in range(2):
            line = next_line(line)
            if line == NULL:
                return traffic
        while line != NULL:
            end = next_line(line)
            at = end - 1 if end != NULL else line + strlen(line)
            colon = at  # the last one: alias names hold colons themselves
            while colon > line and colon[0] != c":":
                colon -= 1
            if colon[0] == c":":
                received = column(colon + 1, 0)
                sent = column(colon + 1, 8)
                if received == ABSENT or sent == ABSENT:
                    raise self.odd(NET_DEV)
                while line[0] == c" ":
                    line += 1
                traffic[os.fsdecode(line[: colon - line])] = (received, sent)
            line = end
        return traffic

    cdef dict filesystems(self):
        cdef c_statvfs space
        cdef const char *path
        cdef int failed
        found = {}
        for name, encoded in self.spaces:
            path = encoded
            with nogil:
                failed = c_statvfs_path(path, &space)
            if failed:  # not mounted now: the caller sees None
                found[name] = None
            else:
                found[name] = Filesystem(
                    space.f_blocks * space.f_frsize,
                    (space.f_blocks - space.f_bfree) * space.f_frsize,
                    space.f_bavail * space.f_frsize,
                )
        return found

    # -- instances

    cdef void look(self, Instance *one) noexcept nogil:
        cdef int attempt, index
        # Twice: the first look may meet the files of a cgroup that was removed and made anew since the last sample.
        for attempt in range(2):
            if not self.find(one):
                break
            if self.read_counters(one):
                one.gone = False
                return
            self.close_files(one)
            one.found = False
        self.close_files(one)
        one.found = False
        one.gone = True
        for index in range(COUNTERS):
            one.counters[index] = ABSENT

    cdef bint find(self, Instance *one) noexcept nogil:
        """Whether there is the cgroup, and whether it is still the same."""
        cdef c_stat status
        cdef int index
        # The kept files of a removed cgroup say so when they are read.
        for index in range(SOURCES):
            if one.kept[index] != NO_FILE:
                return True
        if not self.identify(one, &status):
            return False
        if not one.found or status.st_dev != one.device or status.st_ino != one.inode:
            one.found = True
            one.device = status.st_dev
            one.inode = status.st_ino
            one.generation += 1
        return True

    cdef bint identify(self, Instance *one, c_stat *status) noexcept nogil:
        cdef char path[PATH_BYTES]
        cdef int index
        for index in range(SOURCES):
            if index > 0 and self.v2:
                return False
            if self.place(path, self.sources[index].group, one.cgroup, NULL) and c_stat_path(path, status) == 0:
                return True
        return False

    cdef bint place(self, char *path, const char *group, const char *cgroup, const char *name) noexcept nogil:
        """Path of a cgroup or of a file in it; false when it is too long."""
        cdef int size
        if name == NULL:
            size = snprintf(path, PATH_BYTES, b"%s/%s%s", self.root, group, cgroup)
        else:
            size = snprintf(path, PATH_BYTES, b"%s/%s%s/%s", self.root, group, cgroup, name)
        return 0 < size < PATH_BYTES

    cdef bint read_counters(self, Instance *one) noexcept nogil:
        """Reads all counters; false when the cgroup turned out to be removed."""
        cdef int index, failure
        cdef Source *source
        for index in range(COUNTERS):
            one.counters[index] = ABSENT
        for index in range(SOURCES):
            source = &self.sources[index]
            if source.counter == INACTIVE_FILE and not self.memory_details:
                continue
            failure = self.read_source(one, index)
            if failure == ENODEV:
                return False
            if failure:  # the controller is off here, or not readable for us: the caller sees None
                continue
            if source.form == TAGGED:
                one.counters[source.counter] = tagged_sum(&self.buffer, source.key)
                one.counters[source.second_counter] = tagged_sum(&self.buffer, source.second_key)
            elif source.form == KEYED:
                one.counters[source.counter] = keyed_number(self.buffer.data, source.key)
            else:
                one.counters[source.counter] = leading_number(self.buffer.data)
            if source.scale != 1 and one.counters[source.counter] != ABSENT:
                if one.counters[source.counter] > INT64_MAX // source.scale:
                    one.counters[source.counter] = ABSENT
                else:
                    one.counters[source.counter] *= source.scale
        return True

    cdef int read_source(self, Instance *one, int index) noexcept nogil:
        """File into the buffer; errno on failure, else 0."""
        cdef char path[PATH_BYTES]
        cdef int fd = one.kept[index]
        cdef int failure
        cdef Source *source = &self.sources[index]
        if fd != NO_FILE:
            return read_all(fd, &self.buffer, True)
        if not self.place(path, source.group, one.cgroup, source.name):
            return ENOMEM
        fd = open(path, O_RDONLY | O_CLOEXEC)
        if fd < 0:
            return errno
        failure = read_all(fd, &self.buffer, True)
        if self.kept_files < self.max_kept:
            one.kept[index] = fd
            self.kept_files += 1
        else:
            close(fd)
        return failure

    cdef void close_files(self, Instance *one) noexcept nogil:
        cdef int index
        for index in range(SOURCES):
            if one.kept[index] != NO_FILE:
                close(one.kept[index])
                one.kept[index] = NO_FILE
                self.kept_files -= 1

    cdef void drop(self, Py_ssize_t index) noexcept nogil:
        cdef Instance *one = self.instances[index]
        if one != NULL:
            self.close_files(one)
            free(one.cgroup)
            free(one)
            self.instances[index] = NULL


cdef int64_t column(const char *text, int wanted) noexcept nogil:
    """Number in the given column of a line."""
    cdef int index
    for index in range(wanted + 1):
        while text[0] == c" ":
            text += 1
        if index == wanted:
            return leading_number(text)
        while text[0] != c" " and text[0] != c"\n" and text[0] != 0:
            text += 1
    return ABSENT


# Traffic: the kernel's named counters, as it lists them (netlink(7), linux/netfilter/nf_tables.h)

cdef enum:
    NLMSG_HEADER_BYTES = 16
    NFGENMSG_BYTES = 4
    ATTRIBUTE_HEADER_BYTES = 4
    NLMSG_ERROR = 2
    NLMSG_DONE = 3
    NEW_OBJECT = 10 << 8 | 18  # NFNL_SUBSYS_NFTABLES, NFT_MSG_NEWOBJ
    DUMP_INTERRUPTED = 0x10  # NLM_F_DUMP_INTR
    KIND_MASK = 0x3FFF  # without NLA_F_NESTED and NLA_F_NET_BYTEORDER
    OBJECT_NAME = 2
    OBJECT_DATA = 4
    COUNTER_BYTES = 1

cdef struct Attribute:
    int kind
    const unsigned char *value
    Py_ssize_t size


cdef Py_ssize_t attribute_at(const unsigned char *data, Py_ssize_t at, Py_ssize_t end, Attribute *found) except -1:
    """Where the next one begins."""
    cdef uint16_t size, kind
    memcpy(&size, data + at, 2)
    memcpy(&kind, data + at + 2, 2)
    if size < ATTRIBUTE_HEADER_BYTES or size > end - at:
        raise ValueError(f"attribute of {size} bytes in a list of counters")
    found.kind = kind & KIND_MASK
    found.value = data + at + ATTRIBUTE_HEADER_BYTES
    found.size = size - ATTRIBUTE_HEADER_BYTES
    return at + ((size + 3) & ~3)


cdef int take_counter(const unsigned char *data, Py_ssize_t at, Py_ssize_t end, dict found) except -1:
    cdef Attribute attribute, inner
    cdef Py_ssize_t inside
    cdef uint64_t value = 0
    cdef int which, has_value = 0
    name = None
    while end - at >= ATTRIBUTE_HEADER_BYTES:
        at = attribute_at(data, at, end, &attribute)
        if attribute.kind == OBJECT_NAME:
            name = attribute.value[: attribute.size].rstrip(b"\0")
        elif attribute.kind == OBJECT_DATA:
            inside = 0
            while attribute.size - inside >= ATTRIBUTE_HEADER_BYTES:
                inside = attribute_at(attribute.value, inside, attribute.size, &inner)
                if inner.kind == COUNTER_BYTES and inner.size == 8:
                    value = 0
                    for which in range(8):
                        value = value << 8 | inner.value[which]
                    has_value = 1
    if name is not None and has_value:
        found[name.decode("utf-8", "replace")] = value
    return 0


def take_counters(bytes data not None, dict found not None):
    """See the plain twin."""
    cdef const unsigned char *message = <const unsigned char *><const char *>data
    cdef Py_ssize_t left = len(data)
    cdef uint32_t length
    cdef uint16_t kind, flags
    cdef int32_t code
    while left >= NLMSG_HEADER_BYTES:
        memcpy(&length, message, 4)
        memcpy(&kind, message + 4, 2)
        memcpy(&flags, message + 6, 2)
        if length < NLMSG_HEADER_BYTES or length > left:
            raise ValueError(f"message of {length} bytes in a list of counters")
        if flags & DUMP_INTERRUPTED:
            raise InterruptedError("counters changed while they were listed")
        if kind == NLMSG_DONE:
            return True
        if kind == NLMSG_ERROR:
            if length < NLMSG_HEADER_BYTES + 4:
                raise ValueError("an error without a number in a list of counters")
            memcpy(&code, message + NLMSG_HEADER_BYTES, 4)
            raise OSError(-code, os.strerror(-code))
        if kind == NEW_OBJECT:
            take_counter(message, NLMSG_HEADER_BYTES + NFGENMSG_BYTES, length, found)
        length = (length + 3) & ~3
        message += length
        left -= length
    return False
