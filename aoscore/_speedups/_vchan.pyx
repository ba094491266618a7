# cython: language_level=3, boundscheck=False
"""Xen vchan by libxenvchan: a pair of byte rings in memory that two guests share (vchan.md §1).

Documented in ``_vchan.pyi``. There is no plain twin: shared rings need the memory barriers of the library. Built only
where its header is.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.errno cimport ENOENT, errno
from libc.stdint cimport uint32_t
from libc.stdlib cimport free
from libc.string cimport strlen

import os

cdef extern from "<libxenvchan.h>" nogil:
    struct libxenvchan:
        int server_persist
        int blocking

    libxenvchan *libxenvchan_server_init(void *logger, int domain, const char *path, size_t read_min, size_t write_min)
    libxenvchan *libxenvchan_client_init(void *logger, int domain, const char *path)
    void libxenvchan_close(libxenvchan *handle)
    int libxenvchan_read(libxenvchan *handle, void *data, size_t size)
    int libxenvchan_write(libxenvchan *handle, const void *data, size_t size)
    int libxenvchan_wait(libxenvchan *handle)
    int libxenvchan_fd_for_select(libxenvchan *handle)
    int libxenvchan_is_open(libxenvchan *handle)
    int libxenvchan_data_ready(libxenvchan *handle)
    int libxenvchan_buffer_space(libxenvchan *handle)

cdef extern from "<xenstore.h>" nogil:
    struct xs_handle:
        pass

    xs_handle *xs_open(unsigned long flags)
    void xs_close(xs_handle *handle)
    void *xs_read(xs_handle *handle, uint32_t transaction, const char *path, unsigned int *length)
    char **xs_directory(xs_handle *handle, uint32_t transaction, const char *path, unsigned int *count)

MAX_PATH_BYTES = 49
MAX_RING_BYTES = 1024 * 1024


cdef class Vchan:
    cdef libxenvchan *_handle

    def __dealloc__(self):
        if self._handle is not NULL:
            libxenvchan_close(self._handle)

    @staticmethod
    def serve(int domain, str path, *, size_t read_bytes, size_t write_bytes):
        cdef bytes name = _checked(path)
        cdef const char *c_name = name
        cdef libxenvchan *handle
        if read_bytes > <size_t>MAX_RING_BYTES or write_bytes > <size_t>MAX_RING_BYTES:
            raise ValueError(f"a ring has at most {MAX_RING_BYTES} bytes")
        with nogil:
            handle = libxenvchan_server_init(NULL, domain, c_name, read_bytes, write_bytes)
        return _made(handle, path)

    @staticmethod
    def connect(int domain, str path):
        cdef bytes name = _checked(path)
        cdef const char *c_name = name
        cdef libxenvchan *handle
        with nogil:
            handle = libxenvchan_client_init(NULL, domain, c_name)
        return _made(handle, path)

    cdef libxenvchan *_open(self) except NULL:
        if self._handle is NULL:
            raise ValueError("the vchan is closed")
        return self._handle

    def fileno(self):
        return libxenvchan_fd_for_select(self._open())

    def wait(self):
        cdef libxenvchan *handle = self._open()
        cdef int result
        with nogil:
            result = libxenvchan_wait(handle)
        if result < 0:
            raise OSError(errno, f"can't wait for an event: {os.strerror(errno)}")

    @property
    def has_peer(self):
        return libxenvchan_is_open(self._open()) == 1

    @property
    def is_over(self):
        return libxenvchan_is_open(self._open()) == 0

    def read(self, int size):
        cdef libxenvchan *handle = self._open()
        cdef int ready = libxenvchan_data_ready(handle)
        if ready == 0:
            if libxenvchan_is_open(handle) == 0:
                # Looked at in this order: what was written before the end is not passed over.
                ready = libxenvchan_data_ready(handle)
                if ready == 0:
                    return None
            else:
                return b""
        if ready < 0:
            raise OSError("the ring of a vchan is damaged")
        cdef int wanted = min(size, ready)
        cdef bytes data = PyBytes_FromStringAndSize(NULL, wanted)
        cdef char *target = PyBytes_AS_STRING(data)
        cdef int count
        with nogil:
            count = libxenvchan_read(handle, target, wanted)
        if count < 0:
            return None
        return data if count == wanted else data[:count]

    def write(self, const unsigned char[::1] data):
        cdef libxenvchan *handle = self._open()
        cdef int count
        cdef size_t size = data.shape[0]
        if size == 0:
            return 0
        with nogil:
            while True:
                count = libxenvchan_write(handle, &data[0], size)
                # Asks the peer to tell of room; it may have made some before it was asked.
                if count != 0 or libxenvchan_buffer_space(handle) <= 0:
                    break
        if count < 0:
            raise BrokenPipeError("the other end of the vchan is gone")
        return count

    def close(self):
        cdef libxenvchan *handle = self._handle
        self._handle = NULL
        if handle is not NULL:
            with nogil:
                libxenvchan_close(handle)


cdef bytes _checked(str path):
    cdef bytes name = path.encode("ascii")
    if not 0 < len(name) <= MAX_PATH_BYTES or b"\0" in name:
        raise ValueError(f"path of a vchan must have 1 to {MAX_PATH_BYTES} characters: {path!r}")
    return name


cdef Vchan _made(libxenvchan *handle, str path):
    if handle is NULL:
        raise OSError(errno or ENOENT, f"can't set up a vchan: {os.strerror(errno or ENOENT)}", path)
    # The library leaves both undefined in a client.
    handle.blocking = 0
    handle.server_persist = 0
    cdef Vchan made = Vchan.__new__(Vchan)
    made._handle = handle
    return made


cdef xs_handle *_store() except NULL:
    cdef xs_handle *store
    with nogil:
        store = xs_open(0)
    if store is NULL:
        raise OSError(errno, f"can't open xenstore: {os.strerror(errno)}")
    return store


def xenstore_read(str path):
    """See the type stub."""
    cdef bytes name = path.encode("ascii")
    cdef const char *c_name = name
    cdef unsigned int length = 0
    cdef void *value
    cdef xs_handle *store = _store()
    try:
        with nogil:
            value = xs_read(store, 0, c_name, &length)
        if value is NULL:
            if errno == ENOENT:
                return None
            raise OSError(errno, f"can't read from xenstore: {os.strerror(errno)}", path)
        try:
            return (<char *>value)[:length].decode("utf-8", "replace")
        finally:
            free(value)
    finally:
        xs_close(store)


def xenstore_list(str path):
    """See the type stub."""
    cdef bytes name = path.encode("ascii")
    cdef const char *c_name = name
    cdef unsigned int count = 0
    cdef char **names
    cdef xs_handle *store = _store()
    try:
        with nogil:
            names = xs_directory(store, 0, c_name, &count)
        if names is NULL:
            if errno == ENOENT:
                return []
            raise OSError(errno, f"can't list a folder of xenstore: {os.strerror(errno)}", path)
        try:
            return [names[index][:strlen(names[index])].decode("utf-8", "replace") for index in range(count)]
        finally:
            free(names)
    finally:
        xs_close(store)
