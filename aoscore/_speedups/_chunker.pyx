# cython: language_level=3, boundscheck=False, wraparound=False
"""Hashing, copying and sending of files without the interpreter lock. Documented in the plain twin, ``_plain/chunker.py``."""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.exc cimport PyErr_CheckSignals, PyErr_SetFromErrno
from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdlib cimport free, malloc
from posix.types cimport off_t
from posix.unistd cimport pread, write

from aoscore._speedups._crypto cimport (
    EVP_MD,
    EVP_MD_CTX,
    EVP_DigestInit_ex,
    EVP_DigestUpdate,
    EVP_MD_CTX_copy_ex,
    EVP_MD_CTX_free,
    EVP_MD_CTX_new,
    EVP_sha3_256,
    EVP_sha3_384,
    EVP_sha3_512,
    EVP_sha256,
    EVP_sha384,
    EVP_sha512,
    finished_hex,
)

import os

from aoscore._speedups.chunker_types import READ_BYTES, UnknownDigestError

cdef extern from "sys/sendfile.h" nogil:
    ssize_t sendfile(int out_fd, int in_fd, off_t *offset, size_t count)

cdef enum:
    MAX_DIGESTS = 8
    MAX_SENDFILE = 1 << 30

cdef size_t PIECE = READ_BYTES


cdef const EVP_MD *kind_of(str algorithm) except NULL:
    if algorithm == "sha256":
        return EVP_sha256()
    if algorithm == "sha384":
        return EVP_sha384()
    if algorithm == "sha512":
        return EVP_sha512()
    if algorithm == "sha3-256":
        return EVP_sha3_256()
    if algorithm == "sha3-384":
        return EVP_sha3_384()
    if algorithm == "sha3-512":
        return EVP_sha3_512()
    raise UnknownDigestError(algorithm)


cdef ssize_t read_at(int fd, unsigned char *buffer, size_t size, off_t offset) noexcept nogil:
    """Fills the buffer unless the file ends before; -1 and errno on failure."""
    cdef size_t done = 0
    cdef ssize_t got
    while done < size:
        got = pread(fd, buffer + done, size - done, offset + <off_t>done)
        if got < 0:
            if errno == EINTR:
                continue
            return -1
        if got == 0:
            break
        done += got
    return <ssize_t>done


cdef class Digest:
    """Running digest of bytes, which it also reads or writes on the way. Not for use by two threads at once."""

    cdef EVP_MD_CTX *context
    cdef str name
    cdef unsigned long long size

    def __cinit__(self, str algorithm not None="sha256"):
        cdef const EVP_MD *kind = kind_of(algorithm)
        self.name = algorithm
        self.context = EVP_MD_CTX_new()
        if self.context == NULL or not EVP_DigestInit_ex(self.context, kind, NULL):
            raise MemoryError("libcrypto could not start a digest")

    def __dealloc__(self):
        EVP_MD_CTX_free(self.context)

    @property
    def algorithm(self):
        """Name of the algorithm."""
        return self.name

    @property
    def size_bytes(self):
        """How many bytes went in so far."""
        return self.size

    cdef int add(self, const unsigned char *data, size_t size) noexcept nogil:
        self.size += size
        return EVP_DigestUpdate(self.context, data, size)

    def update(self, data, /):
        """Adds ``data``."""
        cdef Py_buffer view
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            with nogil:
                self.add(<const unsigned char *>view.buf, <size_t>view.len)
        finally:
            PyBuffer_Release(&view)

    def update_from_file(self, int fd, offset_bytes=0, size_bytes=None):
        """Adds a part of a file (to its end when no size is given), for example what an earlier run downloaded.

        The file's position stays. Returns how many bytes went in: fewer than asked for when the file ends earlier.
        """
        return transfer(fd, -1, self, offset_bytes, size_bytes)

    def write(self, int fd, data, /):
        """Writes all of ``data`` and adds it; after an OSError the digest holds what was written."""
        cdef Py_buffer view
        cdef int result
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            with nogil:
                result = write_all(fd, <const unsigned char *>view.buf, <size_t>view.len, self)
            if result < 0:
                PyErr_SetFromErrno(OSError)
            return view.len
        finally:
            PyBuffer_Release(&view)

    def hexdigest(self):
        """Digest so far, as lower-case hexadecimal digits."""
        return finished_hex(self.context)

    def text(self):
        """Digest so far as OCI writes it: "sha256:<hex>"."""
        return f"{self.name}:{finished_hex(self.context)}"

    def copy(self):
        """An independent digest of the same bytes."""
        cdef Digest twin = Digest(self.name)
        if not EVP_MD_CTX_copy_ex(twin.context, self.context):
            raise MemoryError("libcrypto could not copy a digest")
        twin.size = self.size
        return twin


cdef int write_all(int fd, const unsigned char *data, size_t size, Digest digest) noexcept nogil:
    cdef size_t done = 0
    cdef ssize_t count
    while done < size:
        count = write(fd, data + done, min(size - done, PIECE))
        if count < 0:
            if errno == EINTR:
                continue
            return -1
        if digest is not None:
            digest.add(data + done, <size_t>count)
        done += count
    return 0


cdef object transfer(int source, int target, Digest digest, offset_bytes, size_bytes):
    """Reads a range piece by piece; hashes it, and writes it unless ``target`` is -1. Returns its length."""
    if offset_bytes < 0 or (size_bytes is not None and size_bytes < 0):
        raise ValueError(f"offset {offset_bytes} and size {size_bytes} do not make sense")
    cdef off_t offset = offset_bytes
    cdef unsigned long long left = 0xFFFFFFFFFFFFFFFF if size_bytes is None else size_bytes
    cdef unsigned long long done = 0
    cdef ssize_t got = 0
    cdef int failed = 0
    cdef size_t want
    cdef unsigned char *buffer = <unsigned char *>malloc(PIECE)
    if buffer == NULL:
        raise MemoryError()
    try:
        with nogil:
            while left:
                want = PIECE if left > PIECE else <size_t>left
                got = read_at(source, buffer, want, offset)
                if got < 0:
                    failed = 1
                elif target >= 0:
                    failed = write_all(target, buffer, <size_t>got, digest) < 0
                elif digest is not None:
                    digest.add(buffer, <size_t>got)
                if failed:
                    break
                offset += got
                done += <size_t>got
                left -= <size_t>got
                if <size_t>got < want:
                    break
        if failed:
            PyErr_SetFromErrno(OSError)
        return done
    finally:
        free(buffer)


def hash_file(file, str algorithm not None="sha256"):
    """Digest ("sha256:<hex>") of a whole file, given by path or descriptor (whose position stays)."""
    return hash_file_all(file, (algorithm,))[0]


def hash_file_all(file, algorithms):
    """Several digests of a file, read once."""
    cdef EVP_MD_CTX *contexts[MAX_DIGESTS]
    cdef size_t count = 0, index
    cdef Digest digest
    cdef unsigned char *buffer
    cdef off_t offset = 0
    cdef ssize_t got = 0
    cdef int fd
    digests = [Digest(algorithm) for algorithm in algorithms]
    if len(digests) > MAX_DIGESTS:
        raise ValueError(f"more than {<int>MAX_DIGESTS} digests at once")
    for digest in digests:
        contexts[count] = digest.context
        count += 1
    opened = not isinstance(file, int)
    fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC) if opened else file
    buffer = <unsigned char *>malloc(PIECE)
    try:
        if buffer == NULL:
            raise MemoryError()
        with nogil:
            while True:
                got = read_at(fd, buffer, PIECE, offset)
                if got <= 0:
                    break
                offset += got
                for index in range(count):
                    EVP_DigestUpdate(contexts[index], buffer, <size_t>got)
                if <size_t>got < PIECE:
                    break
        if got < 0:
            PyErr_SetFromErrno(OSError)
    finally:
        free(buffer)
        if opened:
            os.close(fd)
    return tuple([digest.text() for digest in digests])


def read_chunks(int fd, chunk_bytes, Digest digest=None, offset_bytes=0):
    """A file from an offset to its end as chunks, all of the same size but the last; each is added to ``digest``.

    An empty rest gives no chunk at all. The file's position is neither used nor changed.
    """
    if chunk_bytes <= 0 or offset_bytes < 0:
        raise ValueError(f"chunk size {chunk_bytes} and offset {offset_bytes} do not make sense")
    return iterate_chunks(fd, chunk_bytes, digest, offset_bytes)


def iterate_chunks(int fd, Py_ssize_t chunk_bytes, Digest digest, off_t offset):
    cdef ssize_t got
    cdef unsigned char *data
    while True:
        chunk = PyBytes_FromStringAndSize(NULL, chunk_bytes)
        data = <unsigned char *>PyBytes_AS_STRING(chunk)
        with nogil:
            got = read_at(fd, data, <size_t>chunk_bytes, offset)
            if got > 0 and digest is not None:
                digest.add(data, <size_t>got)
        if got < 0:
            PyErr_SetFromErrno(OSError)
        if got == 0:
            return
        offset += got
        if got < chunk_bytes:
            yield chunk[:got]
            return
        yield chunk


def copy_file(int source_fd, int target_fd, Digest digest=None, offset_bytes=0, size_bytes=None):
    """Copies a part of a file (to its end when no size is given) to the target's position; adds it to ``digest``.

    Returns how many bytes were copied: fewer than asked for when the source ends earlier.
    """
    if target_fd < 0:
        raise ValueError(f"{target_fd} is not a descriptor")
    return transfer(source_fd, target_fd, digest, offset_bytes, size_bytes)


def send_file(int socket_fd, int file_fd, offset_bytes, size_bytes):
    """Sends a part of a file to a socket without copying it through the process.

    Returns how many bytes were sent: all, or less when the file ends earlier or a non-blocking socket takes no more.
    Raises BlockingIOError when such a socket takes nothing: wait until it is writable, then go on at the offset that was
    reached.
    """
    if offset_bytes < 0 or size_bytes < 0:
        raise ValueError(f"offset {offset_bytes} and size {size_bytes} do not make sense")
    cdef off_t offset = offset_bytes
    cdef unsigned long long left = size_bytes
    cdef unsigned long long sent = 0
    cdef ssize_t count
    while left:
        with nogil:
            count = sendfile(socket_fd, file_fd, &offset, MAX_SENDFILE if left > MAX_SENDFILE else <size_t>left)
        if count < 0:
            if errno == EINTR:
                PyErr_CheckSignals()
                continue
            if errno == EAGAIN and sent:
                break
            PyErr_SetFromErrno(OSError)
        if count == 0:
            break
        sent += <size_t>count
        left -= <size_t>count
    return sent
