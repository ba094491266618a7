"""What one sample holds, for the native sampler and its twin. Raw counters: rates are for the caller to compute."""

from typing import NamedTuple

MAX_INSTANCES = 256


class Filesystem(NamedTuple):
    """Space of one file system."""

    total_bytes: int
    used_bytes: int  # total minus free, so what is reserved for root counts as free (sm.md §7.2)
    available_bytes: int  # what a user without privileges can still write


class NodeSample(NamedTuple):
    """Counters of the node. Times are in clock ticks since boot."""

    cpu_total_ticks: int  # sum of all numbers of the first line of /proc/stat
    cpu_idle_ticks: int  # its 4th number only: waiting for I/O counts as busy (sm.md §7.2)
    memory_total_bytes: int
    memory_used_bytes: int  # MemTotal - MemFree - Buffers - Cached - SReclaimable
    network: dict[str, tuple[int, int]]  # interface -> bytes received, bytes sent
    filesystems: dict[str, Filesystem | None]  # by the caller's name; None: it could not be asked


class InstanceSample(NamedTuple):
    """Counters of one instance's cgroup; None where the kernel offers no such counter."""

    gone: bool  # there is no such cgroup now: every counter is None
    generation: int  # one higher each time the cgroup was found anew: counters started from zero
    cpu_usage_ns: int | None
    memory_bytes: int | None
    inactive_file_bytes: int | None  # page cache that can be dropped; only with memory_details
    pids: int | None
    io_read_bytes: int | None
    io_write_bytes: int | None


class Sample(NamedTuple):
    """One look at the node and all its instances."""

    time_ns: int  # monotonic clock at the start of the sample
    node: NodeSample
    instances: dict[str, InstanceSample]


class SampleError(OSError):
    """A file that every node has could not be read or understood; `filename` names it."""
