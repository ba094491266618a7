"""From raw counters to the figures that CM gets (sm.md §7.2, §7.3, §7.5). Pure."""

from collections.abc import Iterable, Sequence
from datetime import datetime

import msgspec

from aoscore._speedups.sampler_types import InstanceSample, NodeSample
from aoscore.common.types import InstanceMonitoring, MonitoringData, NodeMonitoring, PartitionUsage


class CpuMark(msgspec.Struct, frozen=True):
    """CPU time of an instance at a moment; `generation` changes when its counters began anew."""

    time_ns: int
    usage_ns: int
    generation: int


def node_cpu(before: NodeSample, now: NodeSample, max_dmips: int) -> int:
    """DMIPS in use between two samples; waiting for I/O counts as busy."""
    total = now.cpu_total_ticks - before.cpu_total_ticks
    idle = now.cpu_idle_ticks - before.cpu_idle_ticks
    if total <= 0:
        return 0
    return int(max_dmips * (1 - min(max(idle, 0), total) / total))


def cpu_mark(sample: InstanceSample, time_ns: int) -> CpuMark | None:
    """What to compare the next sample with; None without a CPU counter."""
    return None if sample.cpu_usage_ns is None else CpuMark(time_ns, sample.cpu_usage_ns, sample.generation)


def instance_cpu(before: CpuMark | None, now: CpuMark | None, max_dmips: int, cpus: int) -> int:
    """DMIPS in use between two marks of an instance. A counter that went back began at 0."""
    if before is None or now is None or now.time_ns <= before.time_ns:
        return 0
    fresh = now.generation != before.generation or now.usage_ns < before.usage_ns
    used_ns = now.usage_ns - (0 if fresh else before.usage_ns)
    return int(used_ns * max_dmips / (now.time_ns - before.time_ns) / max(cpus, 1))


def normalised(node: MonitoringData, instances: Sequence[InstanceMonitoring], when: datetime) -> NodeMonitoring:
    """What is sent: the node never below the sum of its instances, one time stamp for all."""

    def at_least(value: int, figures: Iterable[int]) -> int:
        return max(value, sum(figures))

    sizes = {usage.name: usage.used_size for usage in node.partitions}
    for instance in instances:
        for usage in instance.data.partitions:
            sizes[usage.name] = max(sizes.get(usage.name, 0), usage.used_size)
    return NodeMonitoring(
        MonitoringData(
            timestamp=when,
            ram=at_least(node.ram, (instance.data.ram for instance in instances)),
            cpu=at_least(node.cpu, (instance.data.cpu for instance in instances)),
            partitions=tuple(PartitionUsage(name, size) for name, size in sizes.items()),
            download=at_least(node.download, (instance.data.download for instance in instances)),
            upload=at_least(node.upload, (instance.data.upload for instance in instances)),
        ),
        tuple(
            msgspec.structs.replace(instance, data=msgspec.structs.replace(instance.data, timestamp=when))
            for instance in instances
        ),
    )
