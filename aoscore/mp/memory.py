"""How an MP process keeps memory: it moves much of it through few objects, and is small all the same."""

import ctypes
import gc

# mallopt(3). Above these, memory of a buffer goes back to the kernel with the buffer, and comes back page by page.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_KEEP_BYTES = 1024 * 1024
# Pieces of blobs are many and have no cycles: looking for those after every 700 costs a tenth of the time.
_OBJECTS_BETWEEN_LOOKS = 20_000


def settle() -> None:
    """Once at the start. Does nothing where the C library has no mallopt."""
    gc.set_threshold(_OBJECTS_BETWEEN_LOOKS)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_TRIM_THRESHOLD, _KEEP_BYTES)
        mallopt(_MMAP_THRESHOLD, _KEEP_BYTES)
