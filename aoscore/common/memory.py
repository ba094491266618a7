"""A daemon that holds on to little memory: one arena, and what start and work leave behind is given back."""

import asyncio
import contextlib
import ctypes
import gc
import time

from aoscore._speedups.memory import release_code

# mallopt(3). Above the thresholds, memory of a buffer goes back to the kernel with the buffer.
_M_ARENA_MAX, _M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -8, -1, -3
_KEEP_BYTES = 4 * 1024 * 1024
_OBJECTS_BETWEEN_LOOKS = 20_000

_INTERVAL_S = 10
_WORK_S = 0.2
"""CPU time that leaves something worth to be given back."""
_QUIET_S = 0.1
"""CPU time in an interval in which no work is going on."""


def use_one_arena() -> None:
    """Let glibc keep the memory of all threads in one place: each further one holds on to what it had at its peak.

    Saves SM 3.5 MB; the interpreter's lock leaves little for threads to dispute.
    """
    _set_malloc(_M_ARENA_MAX, 1)


def expect_much_through_few_objects() -> None:
    """For a daemon that passes pieces of blobs on: keep the memory of the last piece for the next one.

    Pieces have no cycles either: looking for those after every 700 objects costs a tenth of the time.
    """
    gc.set_threshold(_OBJECTS_BETWEEN_LOOKS)
    _set_malloc(_M_TRIM_THRESHOLD, _KEEP_BYTES)
    _set_malloc(_M_MMAP_THRESHOLD, _KEEP_BYTES)


def _set_malloc(parameter: int, value: int) -> None:
    with contextlib.suppress(AttributeError):  # only glibc has it
        ctypes.CDLL(None).mallopt(parameter, value)


def keep_what_start_made() -> None:
    """What start-up made never becomes garbage: leave it out of every later collection."""
    gc.collect()
    gc.freeze()


def give_back() -> None:
    """Give the kernel what is free, and the code that only the work done so far has needed."""
    gc.collect()
    with contextlib.suppress(AttributeError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)
    release_code()


async def tidy_after_work() -> None:
    """Give back what a piece of work, such as the start or an update, has left behind, whenever one is over.

    Runs until it is cancelled. Takes a few milliseconds after each 0.2 s of CPU time at the earliest.
    """
    tidied_s = used_s = 0.0
    while True:
        await asyncio.sleep(_INTERVAL_S)
        before_s, used_s = used_s, time.process_time()
        if used_s - tidied_s >= _WORK_S and used_s - before_s <= _QUIET_S:
            give_back()
            tidied_s = used_s = time.process_time()
