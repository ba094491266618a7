# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""One pass over a layer blob, from compressed bytes to files, without the interpreter lock.

What it does and why is documented in the plain twin, ``_plain/unpack.py``: both make the same checks in the same order. Three
threads share the work (see ``_unpack_feed.pxi``); headers are parsed in ``_unpack_header.pxi``; this file makes the tree.

Methods without the lock return 0 (or a descriptor, or a pointer) when all is well; otherwise -1 (NULL) with `fault` set to a
reason of unpack_types.Code, `error` set to an errno, or `raised` set to an exception of the caller's progress function.
"""

from libc.errno cimport EEXIST, EINTR, ELOOP, ENOENT, ENOMEM, ENOSYS, ENOTDIR, EPERM, errno
from libc.limits cimport LLONG_MAX
from libc.stdlib cimport free, malloc, qsort, realloc
from libc.string cimport memchr, memcmp, memcpy, memset, strcmp, strlen
from posix.types cimport dev_t, gid_t, mode_t, off_t, uid_t
from posix.unistd cimport close, fchown, ftruncate, pread, pwrite

from aoscore._speedups._crypto cimport (
    EVP_MD_CTX,
    EVP_DigestInit_ex,
    EVP_DigestUpdate,
    EVP_MD_CTX_free,
    EVP_MD_CTX_new,
    EVP_sha256,
    finished_hex,
)

import os
import stat

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

cdef extern from *:
    """
    #include <errno.h>
    #include <fcntl.h>
    #include <linux/openat2.h>
    #include <sys/stat.h>
    #include <sys/syscall.h>
    #include <sys/sysmacros.h>
    #include <sys/xattr.h>
    #include <unistd.h>

    #ifndef SYS_openat2
    #define SYS_openat2 437  /* the same on all architectures */
    #endif

    /* Not in every C library yet. */
    static int open_beneath(int directory, const char *path, int flags)
    {
        struct open_how how = {0};
        how.flags = (__u64)flags;
        how.resolve = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS;
        return (int)syscall(SYS_openat2, directory, path, &how, sizeof how);
    }
    """
    struct timespec:
        long tv_sec
        long tv_nsec
    struct file_status "stat":
        mode_t st_mode
        uid_t st_uid
        gid_t st_gid
        dev_t st_rdev
    int open_beneath(int directory, const char *path, int flags) nogil
    int openat(int directory, const char *path, int flags, ...) nogil
    int mkdirat(int directory, const char *path, mode_t mode) nogil
    int unlinkat(int directory, const char *path, int flags) nogil
    int linkat(int old_directory, const char *old_path, int new_directory, const char *new_path, int flags) nogil
    int symlinkat(const char *target, int directory, const char *path) nogil
    int mknodat(int directory, const char *path, mode_t mode, dev_t device) nogil
    int fstat(int fd, file_status *found) nogil
    int fstatat(int directory, const char *path, file_status *found, int flags) nogil
    int fchmod(int fd, mode_t mode) nogil
    int fchmodat(int directory, const char *path, mode_t mode, int flags) nogil
    int fchownat(int directory, const char *path, uid_t owner, gid_t group, int flags) nogil
    int futimens(int fd, const timespec *times) nogil
    int utimensat(int directory, const char *path, const timespec *times, int flags) nogil
    int fsetxattr(int fd, const char *name, const void *value, size_t size, int flags) nogil
    int syncfs(int fd) nogil
    dev_t makedev(unsigned int major, unsigned int minor) nogil
    bint S_ISDIR(mode_t mode) nogil
    bint S_ISCHR(mode_t mode) nogil
    int O_RDONLY
    int O_WRONLY
    int O_CREAT
    int O_EXCL
    int O_DIRECTORY
    int O_NOFOLLOW
    int O_CLOEXEC
    int AT_SYMLINK_NOFOLLOW
    int S_IFCHR
    int S_IFBLK
    int S_IFIFO

# Reasons to refuse a layer: unpack_types.Code
cdef enum:
    STREAM_CORRUPT = 1
    STREAM_TRUNCATED = 2
    TRUNCATED = 3
    CHECKSUM = 4
    NUMBER = 5
    EXTENDED_HEADER = 6
    SPARSE_MAP = 7
    END_MARKER = 8
    DATA_ON_TYPE = 9
    TYPE = 20
    GLOBAL_HEADER = 21
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

include "_unpack_inflate.pxi"
include "_unpack_feed.pxi"
include "_unpack_header.pxi"

INFLATED_BY = INFLATER.decode()  # name of the library

cdef enum:
    PROGRESS_BYTES = 1 << 20
    # What is left of 32 MiB for directories when all else is at its limit: less beside a window of zstd.
    MAX_DIRECTORY_BYTES = 20 << 20
    MAX_DIRECTORY_BYTES_ZSTD = 5 << 20
    DIRECTORY_BYTES = 64  # with all that comes to its path
    OWNERS_ARCHIVE = 0
    OWNERS_ROOT = 1
    OWNERS_PROCESS = 2

cdef long long MAX_ID = 0xFFFFFFFE  # the number after it means "no owner"
cdef int DIRECTORY_FLAGS = O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC

# One member, with everything its headers said
cdef struct Member:
    char kind
    Text name
    Text link
    unsigned long long size  # bytes in the archive
    unsigned long long real_size  # of a sparse file
    bint sparse
    mode_t mode
    long long uid
    long long gid
    uid_t owner  # what becomes of uid and gid
    gid_t group
    dev_t device
    timespec times[2]
    size_t base  # where the last part of the path starts

# Modes and times of directories wait until nothing is written into them any more. The path follows in memory.
cdef struct Directory:
    Directory *earlier
    timespec time
    unsigned int index
    mode_t mode

cdef struct Counts:
    unsigned long long size_bytes
    unsigned long long members
    unsigned long long files
    unsigned long long directories
    unsigned long long symlinks
    unsigned long long hard_links
    unsigned long long devices
    unsigned long long whiteouts
    unsigned long long opaque_directories
    unsigned long long skipped_xattrs

# How make_entry creates what takes the place of a name
cdef enum Kind:
    MAKE_FILE
    MAKE_SYMLINK
    MAKE_HARD_LINK
    MAKE_NODE


cdef inline char *directory_path(Directory *one) noexcept nogil:
    return <char *>(one + 1)


cdef int deeper_first(const void *left, const void *right) noexcept nogil:
    """Order of directories: below before above, and of several entries for one path the last one first."""
    cdef Directory *a = (<Directory **>left)[0]
    cdef Directory *b = (<Directory **>right)[0]
    cdef int order = strcmp(directory_path(b), directory_path(a))
    if order:
        return order
    return (b.index > a.index) - (b.index < a.index)


cdef class Unpacker:
    cdef Feed feed
    cdef bint feed_opened
    cdef Slot *slot
    cdef size_t at  # in the slot
    cdef unsigned long long position  # of the next tar byte
    cdef unsigned long long next_report

    # What the caller wants
    cdef int root_fd
    cdef unsigned long long max_bytes
    cdef unsigned long long max_members
    cdef int owners
    cdef long long uid_shift
    cdef long long gid_shift
    cdef bint translate
    cdef const char *opaque_name
    cdef bint set_attributes
    cdef bint allow_devices
    cdef object progress

    # What went wrong
    cdef int fault
    cdef int error
    cdef object raised
    cdef bint blob_at_fault  # the error came from reading the blob: no member is to blame
    cdef char member_name[MAX_NAME + 1]
    cdef size_t member_name_size
    cdef bint member_known
    cdef unsigned long long header_offset
    cdef bint header_known

    # The member at hand
    cdef Member member
    cdef Extended extended
    cdef Extents extents
    cdef Attributes attributes
    cdef unsigned char header[BLOCK]
    cdef char header_name[BLOCK]
    cdef char path[MAX_NAME + 1]
    cdef char link_path[MAX_NAME + 1]
    cdef unsigned char *extended_data[3]  # long name, long link, pax
    cdef const unsigned char *map_block
    cdef size_t map_left

    cdef bint no_openat2
    cdef int parent_fd
    cdef char parent_path[MAX_NAME + 1]
    cdef size_t parent_size
    cdef Directory *last_directory
    cdef size_t directory_count
    cdef size_t directory_bytes
    cdef size_t max_directory_bytes
    cdef Counts counts

    def __cinit__(self):
        self.parent_fd = -1

    def __dealloc__(self):
        cdef size_t index
        cdef Directory *one
        if self.feed_opened:
            feed_close(&self.feed)
        if self.parent_fd >= 0:
            close(self.parent_fd)
        for index in range(3):
            free(self.extended_data[index])
        while self.last_directory != NULL:
            one = self.last_directory
            self.last_directory = one.earlier
            free(one)
        free(self.extents.items)
        free(self.attributes.items)

    cdef object run(self, int blob_fd, int packing, unsigned long long blob_bytes):
        cdef int result
        self.next_report = PROGRESS_BYTES
        self.max_directory_bytes = MAX_DIRECTORY_BYTES_ZSTD if packing == PACKED_ZSTD else MAX_DIRECTORY_BYTES
        self.feed_opened = True
        with nogil:
            self.error = feed_open(&self.feed, blob_fd, packing)
            result = -1
            if self.error == 0:
                if blob_bytes >= THREAD_FROM_BYTES:
                    feed_start(&self.feed)
                result = self.unpack()
                feed_stop(&self.feed)
        if result == 0:
            return None
        if self.raised is not None:
            raise self.raised
        member = self.member_name[: self.member_name_size] if self.member_known else None
        if self.fault:
            raise unpack_error(self.fault, member, self.header_offset if self.header_known else None)
        if self.blob_at_fault or member is None:
            raise OSError(self.error, os.strerror(self.error))
        raise OSError(self.error, os.strerror(self.error), os.fsdecode(member))

    cdef int refuse(self, int code) noexcept nogil:
        self.fault = code
        return -1

    cdef int fail(self) noexcept nogil:
        """The system call that was made last failed."""
        self.error = errno
        return -1

    cdef int check(self, int reason) noexcept nogil:
        """Result of a function of _unpack_header.pxi."""
        if reason < 0:
            self.error = -reason
        elif reason:
            self.fault = reason
        return -1 if reason else 0

    # -- the stream

    cdef int next_slot(self) noexcept nogil:
        """1: there is a slot with bytes, 0: the stream ended well, -1: it did not."""
        while True:
            if self.slot != NULL:
                feed_release(&self.feed)
                self.slot = NULL
                if self.progress is not None and self.position >= self.next_report:
                    self.next_report = self.position + PROGRESS_BYTES
                    if self.report() < 0:
                        return -1
            self.slot = feed_take(&self.feed)
            self.at = 0
            if self.slot == NULL:
                if self.feed.fault:
                    return self.refuse(self.feed.fault)
                if self.feed.error:
                    self.error = self.feed.error
                    self.blob_at_fault = True
                    return -1
                return 0
            if self.slot.used:
                return 1

    cdef int report(self) noexcept nogil:
        with gil:
            try:
                self.progress(self.position)
            except BaseException as error:
                self.raised = error
                return -1
        return 0

    cdef int advance(self, size_t size) noexcept nogil:
        if size > self.max_bytes - self.position:
            return self.refuse(UNPACKED_LIMIT)
        self.at += size
        self.position += size
        return 0

    cdef size_t take(self, unsigned long long wanted, const unsigned char **data) noexcept nogil:
        """1 to `wanted` bytes, valid until the next call; 0 on failure."""
        cdef size_t size
        cdef int there
        if self.slot == NULL or self.at == self.slot.used:
            there = self.next_slot()
            if there <= 0:
                if there == 0:
                    self.refuse(TRUNCATED)
                return 0
        size = self.slot.used - self.at
        if wanted < size:
            size = <size_t>wanted
        data[0] = self.slot.data + self.at
        return 0 if self.advance(size) < 0 else size

    cdef const unsigned char *block(self) noexcept nogil:
        """The next block, valid until the next call."""
        cdef const unsigned char *data = NULL
        cdef size_t size = self.take(BLOCK, &data)
        if size == 0:
            return NULL
        if size < BLOCK:  # only the last slot ends within a block
            self.take(BLOCK, &data)
            return NULL
        return data

    cdef int skip(self, unsigned long long size) noexcept nogil:
        cdef const unsigned char *data
        cdef size_t taken
        while size:
            taken = self.take(size, &data)
            if taken == 0:
                return -1
            size -= taken
        return 0

    cdef int skip_padding(self, unsigned long long size) noexcept nogil:
        """What fills a member's last block, unless the stream ends there."""
        if self.skip(padding(size)) < 0:
            if self.fault != TRUNCATED:
                return -1
            self.fault = 0
        return 0

    cdef int drain(self) noexcept nogil:
        """Takes the rest of the stream: it belongs to the digest."""
        cdef int there
        while True:
            if self.slot != NULL and self.at < self.slot.used:
                if self.advance(self.slot.used - self.at) < 0:
                    return -1
            there = self.next_slot()
            if there <= 0:
                return there

    # -- members

    cdef int unpack(self) noexcept nogil:
        cdef int there
        while True:
            there = self.next_member()
            if there < 0:
                return -1
            if there == 0:
                break
            if self.make() < 0:
                return -1
            self.member_known = False
        self.header_known = False
        if self.drain() < 0:
            return -1
        return self.finish_directories()

    cdef int next_member(self) noexcept nogil:
        """1: `member` is filled, 0: the archive ended, -1: failure."""
        cdef const unsigned char *block
        cdef long long size = 0
        cdef unsigned char kind
        self.clear_extended()
        while True:
            self.header_offset = self.position
            self.header_known = True
            block = self.block()
            if block == NULL:
                # Some writers leave the end marker out (umoci insert). The digests tell whether anything is missing.
                if self.fault == TRUNCATED and 0 < self.header_offset == self.position and not self.extended_pending():
                    self.fault = 0
                    return 0
                return -1
            if is_zero(block):
                if self.extended_pending():
                    return self.refuse(EXTENDED_HEADER)
                return self.check_end()
            if not checksum_fits(block):
                return self.refuse(CHECKSUM)
            kind = block[156]
            if kind != c"L" and kind != c"K" and kind != c"x" and kind != c"g":
                memcpy(self.header, block, BLOCK)
                return 1 if self.read_member(kind) == 0 else -1
            if read_number(block + 124, 12, &size) or size < 0:
                return self.refuse(NUMBER)
            if size > MAX_EXTENDED:
                return self.refuse(HEADER_LIMIT)
            if self.read_extended(kind, <size_t>size) < 0:
                return -1

    cdef void clear_extended(self) noexcept nogil:
        memset(&self.extended, 0, sizeof(Extended))
        self.extents.count = 0
        self.attributes.count = 0

    cdef bint extended_pending(self) noexcept nogil:
        return self.extended.pax or self.extended.long_name.data != NULL or self.extended.long_link.data != NULL

    cdef int check_end(self) noexcept nogil:
        """After one zero block: another one, or the end of the stream."""
        cdef const unsigned char *block = self.block()
        if block == NULL:
            if self.fault == TRUNCATED:
                self.fault = 0
                return 0
            return -1
        return 0 if is_zero(block) else self.refuse(END_MARKER)

    cdef int read_extended(self, unsigned char kind, size_t size) noexcept nogil:
        cdef const unsigned char *piece = NULL
        cdef size_t done = 0, taken
        cdef int index = 0 if kind == c"L" else 1 if kind == c"K" else 2
        cdef int result
        cdef unsigned char *data = <unsigned char *>malloc(size + 1)
        if data == NULL:
            self.error = ENOMEM
            return -1
        while done < size:
            taken = self.take(size - done, &piece)
            if taken == 0:
                free(data)
                return -1
            memcpy(data + done, piece, taken)
            done += taken
        data[size] = 0
        if self.skip(padding(size)) < 0:
            free(data)
            return -1
        if kind == c"g":
            result = self.check(EXTENDED_HEADER if self.extended_pending() else read_global(<char *>data, size))
            free(data)
            return result
        if (
            (kind == c"L" and self.extended.long_name.data != NULL)
            or (kind == c"K" and self.extended.long_link.data != NULL)
            or (kind == c"x" and self.extended.pax)
        ):
            free(data)
            return self.refuse(EXTENDED_HEADER)
        free(self.extended_data[index])
        self.extended_data[index] = data
        if kind == c"L":
            self.extended.long_name = text_of(data, size)
        elif kind == c"K":
            self.extended.long_link = text_of(data, size)
        else:
            return self.check(read_pax(&self.extended, &self.extents, &self.attributes, <char *>data, size))
        return 0

    cdef int read_member(self, unsigned char kind) noexcept nogil:
        cdef Member *member = &self.member
        cdef Extended *extended = &self.extended
        cdef const unsigned char *header = self.header
        cdef long long size = 0, mode = 0, uid = 0, gid = 0, seconds = 0, major = 0, minor = 0
        if extended.long_name.data != NULL and (extended.path.data != NULL or extended.sparse_name.data != NULL):
            return self.refuse(EXTENDED_HEADER)
        if extended.long_link.data != NULL and extended.linkpath.data != NULL:
            return self.refuse(EXTENDED_HEADER)
        self.choose_names()
        if kind == 0 or kind == c"7":
            kind = c"0"
        if not (c"0" <= kind <= c"6" or kind == c"S"):
            return self.refuse(TYPE)
        if (
            read_number(header + 124, 12, &size)
            or read_number(header + 100, 8, &mode)
            or read_number(header + 108, 8, &uid)
            or read_number(header + 116, 8, &gid)
            or read_number(header + 136, 12, &seconds)
        ):
            return self.refuse(NUMBER)
        if kind == c"3" or kind == c"4":
            if read_number(header + 329, 8, &major) or read_number(header + 337, 8, &minor):
                return self.refuse(NUMBER)
            if not (0 <= major <= 0xFFF and 0 <= minor <= 0xFFFFF):
                return self.refuse(NUMBER)
        if extended.has_size:
            size = extended.size
        member.uid = extended.uid if extended.has_uid else uid
        member.gid = extended.gid if extended.has_gid else gid
        if size < 0 or member.uid < 0 or member.gid < 0:
            return self.refuse(NUMBER)
        member.size = <unsigned long long>size
        member.mode = <mode_t>(mode & 0o7777)
        member.device = makedev(<unsigned int>major, <unsigned int>minor)
        member.times[1].tv_sec = extended.seconds if extended.has_mtime else seconds
        member.times[1].tv_nsec = extended.nanoseconds if extended.has_mtime else 0
        member.times[0] = member.times[1]
        member.sparse = False
        member.kind = <char>kind
        if kind == c"S":
            if extended.sparse:
                return self.refuse(SPARSE_MAP)
            if self.read_old_sparse() < 0:
                return -1
        elif extended.sparse:
            if kind != c"0":
                return self.refuse(SPARSE_MAP)
            if self.start_pax_sparse() < 0:
                return -1
        elif kind == c"0" and member.name.size and member.name.data[member.name.size - 1] == c"/":
            member.kind = c"5"  # as V7 wrote directories
        if member.kind != c"0" and member.size:
            return self.refuse(DATA_ON_TYPE)
        if member.size > self.max_bytes - self.position:
            return self.refuse(UNPACKED_LIMIT)
        return 0

    cdef void choose_names(self) noexcept nogil:
        cdef Member *member = &self.member
        cdef Extended *extended = &self.extended
        cdef Text prefix
        if extended.sparse_name.data != NULL:
            member.name = extended.sparse_name
        elif extended.path.data != NULL:
            member.name = extended.path
        elif extended.long_name.data != NULL:
            member.name = extended.long_name
        else:
            member.name = text_of(self.header, 100)
            if memcmp(self.header + 257, b"ustar", 6) == 0 and self.header[345]:
                prefix = text_of(self.header + 345, 155)
                memcpy(self.header_name, prefix.data, prefix.size)
                self.header_name[prefix.size] = c"/"
                memcpy(self.header_name + prefix.size + 1, member.name.data, member.name.size)
                member.name.data = self.header_name
                member.name.size += prefix.size + 1
        if extended.linkpath.data != NULL:
            member.link = extended.linkpath
        elif extended.long_link.data != NULL:
            member.link = extended.long_link
        else:
            member.link = text_of(self.header + 157, 100)
        self.blame(member.name.data, member.name.size)

    cdef void blame(self, const char *name, size_t size) noexcept nogil:
        """Errors from here on name this member."""
        self.member_name_size = min(size, <size_t>MAX_NAME)
        memcpy(self.member_name, name, self.member_name_size)
        self.member_known = True

    cdef int read_old_sparse(self) noexcept nogil:
        cdef Member *member = &self.member
        cdef const unsigned char *block
        cdef long long real_size = 0
        cdef int going
        cdef bint more = self.header[482] != 0
        member.kind = c"0"
        member.sparse = True
        if read_number(self.header + 483, 12, &real_size):
            return self.refuse(NUMBER)
        going = self.old_extents(self.header + 386, 4)
        while more and going >= 0:
            block = self.block()
            if block == NULL:
                return -1
            more = block[504] != 0
            if going:
                going = self.old_extents(block, 21)
        if going < 0:
            return -1
        if real_size < 0:
            return self.refuse(NUMBER)
        member.real_size = <unsigned long long>real_size
        return 0

    cdef int old_extents(self, const unsigned char *entries, int count) noexcept nogil:
        """1: go on with the next block, 0: the map ended, -1: failure."""
        cdef long long offset = 0, size = 0
        cdef int index
        for index in range(count):
            if entries[12] == 0:
                return 0
            if read_number(entries, 12, &offset) or read_number(entries + 12, 12, &size):
                return self.refuse(NUMBER)
            if self.check(add_extent(&self.extents, offset, size)) < 0:
                return -1
            entries += 24
        return 1

    cdef int start_pax_sparse(self) noexcept nogil:
        cdef Extended *extended = &self.extended
        cdef long long count, offset, size
        if not extended.has_sparse_size or extended.has_sparse_offset:
            return self.refuse(SPARSE_MAP)
        self.member.sparse = True
        self.member.real_size = <unsigned long long>extended.sparse_size
        if not extended.sparse_version_1:
            return 0
        if self.extents.count:
            return self.refuse(SPARSE_MAP)
        self.map_left = 0
        count = self.map_number()
        if count < 0:
            return -1
        if count > MAX_EXTENTS:
            return self.refuse(EXTENT_LIMIT)
        while count:
            offset = self.map_number()
            size = self.map_number() if offset >= 0 else -1
            if size < 0 or self.check(add_extent(&self.extents, offset, size)) < 0:
                return -1
            count -= 1
        return 0

    cdef long long map_number(self) noexcept nogil:
        """Next line of a 1.0 map, which fills the first blocks of the member's data; -1 on failure."""
        cdef long long value = 0
        cdef int digits = 0
        cdef unsigned char byte
        while True:
            if self.map_left == 0:
                if self.member.size < BLOCK:
                    return self.refuse(SPARSE_MAP)
                self.map_block = self.block()
                if self.map_block == NULL:
                    return -1
                self.map_left = BLOCK
                self.member.size -= BLOCK
            byte = self.map_block[0]
            self.map_block += 1
            self.map_left -= 1
            if byte == c"\n" and digits:
                return value
            if byte < c"0" or byte > c"9" or digits >= 18:
                return self.refuse(SPARSE_MAP)
            value = value * 10 + (byte - c"0")
            digits += 1

    # -- making

    cdef int make(self) noexcept nogil:
        cdef Member *member = &self.member
        cdef size_t size = 0
        if self.check(check_name(&member.name, self.translate, self.path, &size, &member.base)) < 0:
            return -1
        if self.count_member() < 0:
            return -1
        if size == 0 and member.kind != c"5":
            return self.refuse(NAME_EMPTY)
        if self.translate and has_prefix(self.path + member.base, size - member.base, b".wh."):
            return self.make_whiteout()
        if self.map_owner() < 0:
            return -1
        if member.sparse and self.check_sparse() < 0:
            return -1
        self.counts.skipped_xattrs += self.extended.skipped_attributes
        if member.kind == c"0":
            return self.make_file()
        if member.kind == c"5":
            return self.make_directory(size)
        if member.kind == c"1":
            return self.make_hard_link()
        if member.kind == c"2":
            return self.make_symlink()
        return self.make_node()

    cdef int count_member(self) noexcept nogil:
        if self.counts.members >= self.max_members:
            return self.refuse(MEMBER_LIMIT)
        self.counts.members += 1
        return 0

    cdef int map_owner(self) noexcept nogil:
        cdef Member *member = &self.member
        cdef long long uid, gid
        if self.owners == OWNERS_PROCESS:
            return 0
        if member.uid > MAX_ID * 2 or member.gid > MAX_ID * 2:  # too far for any shift
            if self.owners == OWNERS_ARCHIVE:
                return self.refuse(OWNER)
        uid = (member.uid if self.owners == OWNERS_ARCHIVE else 0) + self.uid_shift
        gid = (member.gid if self.owners == OWNERS_ARCHIVE else 0) + self.gid_shift
        if not (0 <= uid <= MAX_ID and 0 <= gid <= MAX_ID):
            return self.refuse(OWNER)
        member.owner = <uid_t>uid
        member.group = <gid_t>gid
        return 0

    cdef int check_sparse(self) noexcept nogil:
        cdef size_t index
        cdef Extent *extent
        cdef unsigned long long end = 0, stored = 0
        for index in range(self.extents.count):
            extent = &self.extents.items[index]
            if extent.size < 0 or extent.offset < 0 or <unsigned long long>extent.offset < end:
                return self.refuse(SPARSE_MAP)
            if extent.offset > LLONG_MAX - extent.size:
                return self.refuse(SPARSE_MAP)
            end = <unsigned long long>(extent.offset + extent.size)
            stored += <unsigned long long>extent.size  # cannot overflow: the extents do not overlap
        if end > self.member.real_size or stored != self.member.size:
            return self.refuse(SPARSE_MAP)
        return 0

    cdef int make_file(self) noexcept nogil:
        cdef Member *member = &self.member
        cdef unsigned long long real_size = member.real_size if member.sparse else member.size
        cdef int parent, fd, result
        if real_size > self.max_bytes - self.counts.size_bytes:
            return self.refuse(UNPACKED_LIMIT)
        parent = self.open_parent()
        if parent < 0:
            return -1
        fd = self.make_entry(MAKE_FILE, parent, self.path + member.base, -1, NULL, member.mode & 0o777)
        if fd < 0:
            return -1
        result = self.fill_file(fd)
        # The last chance to hear of a failed write on some file systems.
        if close(fd) != 0 and result == 0:
            result = self.fail()
        if result < 0 or self.skip_padding(member.size) < 0:
            return -1
        self.counts.files += 1
        self.counts.size_bytes += real_size
        return 0

    cdef int fill_file(self, int fd) noexcept nogil:
        cdef Member *member = &self.member
        cdef file_status found
        cdef size_t index
        if not member.sparse:
            if self.write_data(fd, 0, member.size) < 0:
                return -1
        else:
            for index in range(self.extents.count):
                if self.write_data(
                    fd, self.extents.items[index].offset, <unsigned long long>self.extents.items[index].size
                ) < 0:
                    return -1
            if ftruncate(fd, <off_t>member.real_size) != 0:
                return self.fail()
        # A look costs a tenth of a change that the file system keeps a journal of, and most files are right as they were made.
        if fstat(fd, &found) != 0:
            return self.fail()
        if self.owners != OWNERS_PROCESS and (found.st_uid != member.owner or found.st_gid != member.group):
            if fchown(fd, member.owner, member.group) != 0:
                return self.fail()
        if (found.st_mode & 0o7777) != member.mode and fchmod(fd, member.mode) != 0:
            return self.fail()
        if self.apply_attributes(fd, True) < 0:
            return -1
        return 0 if futimens(fd, member.times) == 0 else self.fail()

    cdef int write_data(self, int fd, long long offset, unsigned long long size) noexcept nogil:
        cdef const unsigned char *data = NULL
        cdef size_t taken
        cdef ssize_t written
        while size:
            taken = self.take(size, &data)
            if taken == 0:
                return -1
            size -= taken
            while taken:
                written = pwrite(fd, data, taken, <off_t>offset)
                if written < 0:
                    if errno == EINTR:
                        continue
                    return self.fail()
                data += written
                offset += written
                taken -= <size_t>written
        return 0

    cdef int make_directory(self, size_t size) noexcept nogil:
        cdef Member *member = &self.member
        cdef int parent, fd, result = 0
        if size:
            parent = self.open_parent()
            if parent < 0:
                return -1
            fd = self.open_or_make(parent, self.path + member.base, 0o700)
        else:
            fd = openat(self.root_fd, b".", DIRECTORY_FLAGS)
            if fd < 0:
                self.fail()
        if fd < 0:
            return -1
        if self.owners != OWNERS_PROCESS and fchown(fd, member.owner, member.group) != 0:
            result = self.fail()
        if result < 0 or self.apply_attributes(fd, False) < 0 or self.remember_directory(size) < 0:
            close(fd)
            return -1
        self.counts.directories += 1
        # What comes next mostly lies in it.
        self.set_parent(fd, self.path, size)
        return 0

    cdef int remember_directory(self, size_t size) noexcept nogil:
        cdef Directory *one
        self.directory_bytes += DIRECTORY_BYTES + size
        if self.directory_bytes > self.max_directory_bytes:
            return self.refuse(DIRECTORY_LIMIT)
        one = <Directory *>malloc(sizeof(Directory) + size + 1)
        if one == NULL:
            self.error = ENOMEM
            return -1
        memcpy(directory_path(one), self.path, size + 1)
        one.earlier = self.last_directory
        one.index = self.directory_count
        one.mode = self.member.mode
        one.time = self.member.times[1]
        self.last_directory = one
        self.directory_count += 1
        return 0

    cdef int make_hard_link(self) noexcept nogil:
        cdef Member *member = &self.member
        cdef size_t size = 0, base = 0
        cdef int target_parent, result
        cdef char root[1]
        cdef char *directory = root
        root[0] = 0
        if check_name(&member.link, self.translate, self.link_path, &size, &base) or size == 0:
            return self.refuse(LINK_TARGET)
        if strcmp(self.link_path, self.path) == 0:
            return self.refuse(LINK_TARGET)
        if self.translate and has_prefix(self.link_path + base, size - base, b".wh."):
            return self.refuse(LINK_TARGET)
        if base:
            self.link_path[base - 1] = 0
            directory = self.link_path
        target_parent = self.open_existing(directory)
        if target_parent < 0:
            return -1
        result = self.link_to(target_parent, self.link_path + base)
        close(target_parent)
        if result < 0:
            return -1
        self.counts.hard_links += 1
        return 0

    cdef int link_to(self, int target_parent, const char *target) noexcept nogil:
        cdef file_status found
        cdef int parent
        if fstatat(target_parent, target, &found, AT_SYMLINK_NOFOLLOW) != 0:
            return self.refuse(LINK_MISSING) if errno == ENOENT else self.fail()
        if S_ISDIR(found.st_mode):
            return self.refuse(LINK_TARGET)
        parent = self.open_parent()
        if parent < 0:
            return -1
        return self.make_entry(MAKE_HARD_LINK, parent, self.path + self.member.base, target_parent, target, 0)

    cdef int make_symlink(self) noexcept nogil:
        cdef Member *member = &self.member
        cdef Text *link = &member.link
        cdef int parent
        cdef const char *base = self.path + member.base
        if link.size == 0 or link.size > MAX_NAME or memchr(link.data, 0, link.size) != NULL:
            return self.refuse(LINK_TARGET)
        memcpy(self.link_path, link.data, link.size)
        self.link_path[link.size] = 0
        parent = self.open_parent()
        if parent < 0:
            return -1
        if self.make_entry(MAKE_SYMLINK, parent, base, -1, self.link_path, 0) < 0:
            return -1
        if self.own_entry(parent, base) < 0:
            return -1
        if utimensat(parent, base, member.times, AT_SYMLINK_NOFOLLOW) != 0:
            return self.fail()
        self.counts.skipped_xattrs += self.attributes.count
        self.counts.symlinks += 1
        return 0

    cdef int make_node(self) noexcept nogil:
        cdef Member *member = &self.member
        cdef const char *base = self.path + member.base
        cdef int parent
        cdef mode_t form = S_IFIFO
        cdef bint is_whiteout
        if member.kind == c"3":
            form = S_IFCHR
        elif member.kind == c"4":
            form = S_IFBLK
        is_whiteout = self.translate and member.kind == c"3" and member.device == 0
        if member.kind != c"6" and not is_whiteout and not self.allow_devices:
            return self.refuse(DEVICE)
        parent = self.open_parent()
        if parent < 0:
            return -1
        if self.make_entry(MAKE_NODE, parent, base, -1, NULL, form) < 0:
            return -1
        if self.own_entry(parent, base) < 0:
            return -1
        if fchmodat(parent, base, member.mode, 0) != 0:
            return self.fail()
        if utimensat(parent, base, member.times, AT_SYMLINK_NOFOLLOW) != 0:
            return self.fail()
        self.counts.skipped_xattrs += self.attributes.count
        if is_whiteout:
            self.counts.whiteouts += 1
        else:
            self.counts.devices += 1
        return 0

    cdef int own_entry(self, int parent, const char *base) noexcept nogil:
        if self.owners == OWNERS_PROCESS:
            return 0
        if fchownat(parent, base, self.member.owner, self.member.group, AT_SYMLINK_NOFOLLOW) != 0:
            return self.fail()
        return 0

    cdef int make_whiteout(self) noexcept nogil:
        cdef Member *member = &self.member
        cdef const char *base = self.path + member.base
        cdef const char *hidden = base + 4
        cdef int parent
        if member.kind != c"0" or member.sparse:
            return self.refuse(NAME_RESERVED)
        if strcmp(base, b".wh..wh..opq") == 0:
            parent = self.open_parent()
            if parent < 0 or self.make_opaque(parent) < 0:
                return -1
            self.counts.opaque_directories += 1
        elif (
            hidden[0] == 0
            or strcmp(hidden, b".") == 0
            or strcmp(hidden, b"..") == 0
            or has_prefix(hidden, strlen(hidden), b".wh.")
        ):
            return self.refuse(NAME_RESERVED)
        else:
            parent = self.open_parent()
            if parent < 0 or self.hide(parent, hidden) < 0:
                return -1
            self.counts.whiteouts += 1
        if self.skip(member.size) < 0:
            return -1
        return self.skip_padding(member.size)

    cdef int make_opaque(self, int fd) noexcept nogil:
        return 0 if fsetxattr(fd, self.opaque_name, b"y", 1, 0) == 0 else self.fail()

    cdef int hide(self, int parent, const char *name) noexcept nogil:
        cdef file_status found
        cdef int fd, result
        if mknodat(parent, name, S_IFCHR, 0) == 0:
            return 0
        if errno != EEXIST:
            return self.fail()
        # The layer brings this name itself. A directory must hide the lower one of the same name all the same.
        if fstatat(parent, name, &found, AT_SYMLINK_NOFOLLOW) != 0:
            return self.fail()
        if not S_ISDIR(found.st_mode):
            return 0
        fd = openat(parent, name, DIRECTORY_FLAGS)
        if fd < 0:
            return self.fail()
        result = self.make_opaque(fd)
        close(fd)
        return result

    cdef int apply_attributes(self, int fd, bint capability) noexcept nogil:
        cdef size_t index
        cdef Attribute *one
        for index in range(self.attributes.count):
            one = &self.attributes.items[index]
            if self.set_attributes and (capability or strcmp(one.name, b"security.capability") != 0):
                if fsetxattr(fd, one.name, one.value.data, one.value.size, 0) != 0:
                    return self.fail()
            else:
                self.counts.skipped_xattrs += 1
        return 0

    cdef int make_entry(
        self, Kind kind, int parent, const char *base, int target_parent, const char *target, mode_t form
    ) noexcept nogil:
        """Makes something, in place of what has the name now: never through it. A directory does not give way."""
        cdef file_status found
        cdef int result = self.try_entry(kind, parent, base, target_parent, target, form)
        if result >= 0:
            return result
        if errno != EEXIST:
            return self.fail()
        if fstatat(parent, base, &found, AT_SYMLINK_NOFOLLOW) != 0:
            return self.fail()
        if S_ISDIR(found.st_mode):
            return self.refuse(IN_THE_WAY)
        if unlinkat(parent, base, 0) != 0:
            return self.fail()
        result = self.try_entry(kind, parent, base, target_parent, target, form)
        return result if result >= 0 else self.fail()

    cdef int try_entry(
        self, Kind kind, int parent, const char *base, int target_parent, const char *target, mode_t form
    ) noexcept nogil:
        if kind == MAKE_FILE:
            return openat(
                parent, base, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, form
            )
        if kind == MAKE_SYMLINK:
            return symlinkat(target, parent, base)
        if kind == MAKE_HARD_LINK:
            return linkat(target_parent, target, parent, base, 0)
        return mknodat(parent, base, form | 0o600, self.member.device)

    # -- directories

    cdef void set_parent(self, int fd, const char *path, size_t size) noexcept nogil:
        if self.parent_fd >= 0:
            close(self.parent_fd)
        self.parent_fd = fd
        self.parent_size = size
        memcpy(self.parent_path, path, size)

    cdef int open_parent(self) noexcept nogil:
        """Descriptor of the directory a member lies in, which is made when it is missing. Links are never followed."""
        cdef size_t size = self.member.base - 1 if self.member.base else 0
        cdef char separator = self.path[size]
        cdef int fd
        if self.parent_fd >= 0 and self.parent_size == size and memcmp(self.parent_path, self.path, size) == 0:
            return self.parent_fd
        self.path[size] = 0
        fd = self.open_directory(self.path)
        if fd < 0:
            fd = self.walk(self.path)
        self.path[size] = separator
        if fd >= 0:
            self.set_parent(fd, self.path, size)
        return fd

    cdef int open_directory(self, const char *path) noexcept nogil:
        """Descriptor of an existing directory below the root, -1 when it cannot be had in one step."""
        cdef int fd
        if path[0] == 0:
            return openat(self.root_fd, b".", DIRECTORY_FLAGS)
        if self.no_openat2:
            return -1
        fd = open_beneath(self.root_fd, path, DIRECTORY_FLAGS)
        if fd < 0 and (errno == ENOSYS or errno == EPERM):  # an old kernel, or a filter that does not know it
            self.no_openat2 = True
        return fd

    cdef int walk(self, char *path) noexcept nogil:
        """Opens a directory part by part, making what is missing."""
        cdef int fd = openat(self.root_fd, b".", DIRECTORY_FLAGS)
        cdef int below
        cdef char *slash
        if fd < 0:
            return self.fail()
        while path != NULL and path[0]:
            slash = <char *>memchr(path, c"/", strlen(path))
            if slash != NULL:
                slash[0] = 0
            below = self.enter(fd, path)
            if slash != NULL:
                slash[0] = c"/"
            close(fd)
            if below < 0:
                return -1
            fd = below
            path = next_part(slash)
        return fd

    cdef int enter(self, int fd, const char *name) noexcept nogil:
        cdef int made, reason
        made = openat(fd, name, DIRECTORY_FLAGS)
        if made >= 0:
            return made
        reason = errno
        if reason == ENOTDIR or reason == ELOOP:
            if not self.is_whiteout(fd, name):
                return self.refuse(PARENT)
        elif reason != ENOENT:
            self.error = reason
            return -1
        if self.count_member() < 0:
            return -1
        if self.owners != OWNERS_PROCESS and (self.uid_shift < 0 or self.gid_shift < 0):
            return self.refuse(OWNER)
        made = self.open_or_make(fd, name, 0o755)
        if made < 0:
            return -1
        if (
            self.owners != OWNERS_PROCESS and fchown(made, <uid_t>self.uid_shift, <gid_t>self.gid_shift) != 0
        ) or fchmod(made, 0o755) != 0:
            self.fail()
            close(made)
            return -1
        return made

    cdef int open_or_make(self, int parent, const char *base, mode_t mode) noexcept nogil:
        """Descriptor of a directory, made if need be; anything else of that name gives way."""
        cdef file_status found
        cdef bint opaque = False
        cdef int fd
        if mkdirat(parent, base, mode) != 0:
            if errno != EEXIST or fstatat(parent, base, &found, AT_SYMLINK_NOFOLLOW) != 0:
                return self.fail()
            if not S_ISDIR(found.st_mode):
                opaque = self.translate and S_ISCHR(found.st_mode) and found.st_rdev == 0
                if unlinkat(parent, base, 0) != 0 or mkdirat(parent, base, mode) != 0:
                    return self.fail()
        fd = openat(parent, base, DIRECTORY_FLAGS)
        if fd < 0:
            return self.fail()
        if opaque and self.make_opaque(fd) < 0:
            close(fd)
            return -1
        return fd

    cdef bint is_whiteout(self, int parent, const char *base) noexcept nogil:
        cdef file_status found
        if fstatat(parent, base, &found, AT_SYMLINK_NOFOLLOW) != 0:
            return False
        return self.translate and S_ISCHR(found.st_mode) and found.st_rdev == 0

    cdef int open_existing(self, char *path) noexcept nogil:
        """Descriptor of a directory that a hard link points into."""
        cdef int fd = self.open_directory(path)
        cdef int below, reason
        cdef char *slash
        if fd >= 0:
            return fd
        fd = openat(self.root_fd, b".", DIRECTORY_FLAGS)
        if fd < 0:
            return self.fail()
        while path != NULL and path[0]:
            slash = <char *>memchr(path, c"/", strlen(path))
            if slash != NULL:
                slash[0] = 0
            below = openat(fd, path, DIRECTORY_FLAGS)
            reason = errno
            if slash != NULL:
                slash[0] = c"/"
            close(fd)
            if below < 0:
                if reason == ENOENT:
                    return self.refuse(LINK_MISSING)
                if reason == ENOTDIR or reason == ELOOP:
                    return self.refuse(LINK_TARGET)
                self.error = reason
                return -1
            fd = below
            path = next_part(slash)
        return fd

    cdef int finish_directories(self) noexcept nogil:
        # Deepest first: a directory that gets a mode without rights for us is not passed any more.
        cdef Directory **sorted
        cdef Directory *one = self.last_directory
        cdef size_t index
        cdef int result = 0
        if self.directory_count == 0:
            return 0
        sorted = <Directory **>malloc(self.directory_count * sizeof(Directory *))
        if sorted == NULL:
            self.error = ENOMEM
            return -1
        for index in range(self.directory_count):
            sorted[index] = one
            one = one.earlier
        qsort(sorted, self.directory_count, sizeof(Directory *), deeper_first)
        for index in range(self.directory_count):
            if index and strcmp(directory_path(sorted[index]), directory_path(sorted[index - 1])) == 0:
                continue
            result = self.finish_directory(sorted[index])
            if result < 0:
                break
        free(sorted)
        return result

    cdef int finish_directory(self, Directory *one) noexcept nogil:
        cdef char *path = directory_path(one)
        cdef timespec times[2]
        cdef int fd, result = 0
        if path[0]:
            self.blame(path, strlen(path))
        else:
            self.blame(b".", 1)
        fd = self.open_existing(path)
        if fd < 0:
            return -1
        times[0] = times[1] = one.time
        if fchmod(fd, one.mode) != 0 or futimens(fd, times) != 0:
            result = self.fail()
        close(fd)
        if result == 0:
            self.member_known = False
        return result


cdef char *next_part(char *slash) noexcept nogil:
    if slash == NULL:
        return NULL
    return slash + 1


cdef unsigned long long padding(unsigned long long size) noexcept nogil:
    """Bytes from the end of a member's data to the next block."""
    return (BLOCK - size % BLOCK) % BLOCK


def unpack_layer(
    blob,
    destination,
    *,
    compression,
    blob_size_bytes=None,
    max_unpacked_bytes=DEFAULT_MAX_UNPACKED_BYTES,
    max_members=DEFAULT_MAX_MEMBERS,
    owners=Owners.ARCHIVE,
    uid_shift=0,
    gid_shift=0,
    whiteouts=Whiteouts.OVERLAY,
    xattrs=True,
    allow_devices=False,
    sync=False,
    progress=None,
):
    """Unpacks a layer blob into an existing directory and computes both digests on the way; see the plain twin."""
    cdef Unpacker unpacker
    cdef int root_fd, result
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
            root_fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=destination)
        else:
            root_fd = os.open(destination, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            unpacker = Unpacker()
            unpacker.root_fd = root_fd
            unpacker.max_bytes = max_unpacked_bytes
            unpacker.max_members = max_members
            unpacker.owners = (Owners.ARCHIVE, Owners.ROOT, Owners.PROCESS).index(owners)
            unpacker.uid_shift = uid_shift
            unpacker.gid_shift = gid_shift
            unpacker.translate = whiteouts is not Whiteouts.KEEP
            if whiteouts is Whiteouts.OVERLAY_USER:
                unpacker.opaque_name = b"user.overlay.opaque"
            else:
                unpacker.opaque_name = b"trusted.overlay.opaque"
            unpacker.set_attributes = xattrs
            unpacker.allow_devices = allow_devices
            unpacker.progress = progress
            unpacker.run(
                blob_fd,
                (Compression.NONE, Compression.GZIP, Compression.ZSTD).index(compression),
                status.st_size,
            )
            if blob_size_bytes is not None and unpacker.feed.blob_bytes != blob_size_bytes:
                raise unpack_error(Code.BLOB_SIZE, None, None)
            if sync:  # once: see the plain twin
                with nogil:
                    result = syncfs(root_fd)
                    if result != 0:
                        unpacker.fail()
                if result != 0:
                    raise OSError(unpacker.error, os.strerror(unpacker.error))
        finally:
            os.close(root_fd)
    finally:
        os.close(blob_fd)
    blob_digest = f"sha256:{finished_hex(unpacker.feed.digest)}"
    packed = unpacker.feed.packing != PACKED_NONE
    return UnpackResult(
        blob_digest=blob_digest,
        diff_id=f"sha256:{finished_hex(unpacker.feed.tar_digest)}" if packed else blob_digest,
        blob_bytes=unpacker.feed.blob_bytes,
        tar_bytes=unpacker.position,
        size_bytes=unpacker.counts.size_bytes,
        members=unpacker.counts.members,
        files=unpacker.counts.files,
        directories=unpacker.counts.directories,
        symlinks=unpacker.counts.symlinks,
        hard_links=unpacker.counts.hard_links,
        devices=unpacker.counts.devices,
        whiteouts=unpacker.counts.whiteouts,
        opaque_directories=unpacker.counts.opaque_directories,
        skipped_xattrs=unpacker.counts.skipped_xattrs,
    )
