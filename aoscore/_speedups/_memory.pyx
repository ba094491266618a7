# cython: language_level=3
"""Gives back the pages of code and constants; documented in the plain twin, ``_plain/memory.py``."""

from libc.stdint cimport uintptr_t
from posix.unistd cimport _SC_PAGESIZE, sysconf

cdef extern from *:
    """
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    #include <link.h>
    #include <sys/mman.h>
    """
    int PT_LOAD
    int PF_W
    int MADV_DONTNEED
    int madvise(void *address, size_t size, int advice) nogil
    # ElfW(Phdr) and ElfW(Addr) are macros; only the fields that are read are named.
    ctypedef struct Segment "ElfW(Phdr)":
        unsigned int p_type
        unsigned int p_flags
        uintptr_t p_vaddr
        uintptr_t p_memsz
    struct dl_phdr_info:
        uintptr_t dlpi_addr
        const char *dlpi_name
        const Segment *dlpi_phdr
        unsigned int dlpi_phnum
    int dl_iterate_phdr(int (*)(dl_phdr_info *, size_t, void *) noexcept nogil, void *) nogil


cdef int give_back(dl_phdr_info *library, size_t size, void *total) noexcept nogil:
    cdef uintptr_t page = sysconf(_SC_PAGESIZE)
    cdef uintptr_t begin
    cdef uintptr_t end
    cdef unsigned int number
    # The program itself has an empty name; what has no path is no file (vdso).
    if library.dlpi_name[0] not in (b"\0", b"/"):
        return 0
    for number in range(library.dlpi_phnum):
        segment = &library.dlpi_phdr[number]
        if segment.p_type != PT_LOAD or segment.p_flags & PF_W:
            continue
        begin = (library.dlpi_addr + segment.p_vaddr + page - 1) & ~(page - 1)
        end = (library.dlpi_addr + segment.p_vaddr + segment.p_memsz) & ~(page - 1)
        if begin < end and madvise(<void *>begin, end - begin, MADV_DONTNEED) == 0:
            (<size_t *>total)[0] += end - begin
    return 0


def release_code() -> int:
    """Unmap the code and constants of all loaded libraries; the bytes of those segments."""
    cdef size_t total = 0
    # Not a line of Python in between: the loader's lock is held, and nobody can unload what is being looked at.
    with nogil:
        dl_iterate_phdr(give_back, &total)
    return total
