"""Samples node and instances once per period: averages, alerts, and what is sent to CM (sm.md §7.1)."""

import asyncio
import contextlib
import logging
import os
import stat
import time
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

import msgspec

from aoscore._speedups.sampler import Sample, Sampler
from aoscore.common.aio import Broadcast, Worker, log_and_continue
from aoscore.common.types import (
    AlertRules,
    InstanceIdent,
    InstanceMonitoring,
    InstanceQuotaAlert,
    MonitoringData,
    NodeInfo,
    NodeMonitoring,
    PartitionUsage,
    SystemQuotaAlert,
)
from aoscore.sm.launcher.runtimes.base import SampleTarget
from aoscore.sm.monitoring.averages import Averages
from aoscore.sm.monitoring.figures import CpuMark, cpu_mark, instance_cpu, node_cpu, normalised
from aoscore.sm.monitoring.quotas import Capacity, QuotaWatch
from aoscore.sm.networkmanager.traffic import Totals
from aoscore.sm.resourcemanager.nodeconfig import NodeConfigs
from aoscore.sm.resourcemanager.quotas import DiskQuotas

_log = logging.getLogger(__name__)


class Targets(Protocol):
    """A runtime, as far as monitoring is concerned."""

    def sample_targets(self) -> list[SampleTarget]:
        """Instances that can be measured now."""
        ...


class TrafficSource(Protocol):
    """The network manager, as far as monitoring is concerned."""

    async def refresh_traffic(self) -> None:
        """Read the counters."""
        ...

    def traffic(self, instance_id: str | None = None) -> Totals:
        """Totals of an instance, or of the node."""
        ...


class Measured(msgspec.Struct, frozen=True):
    """What the worker thread brings from one round."""

    sample: Sample
    usages: dict[str, tuple[PartitionUsage, ...]]
    """Partition usage of instances, by instance id."""


class Monitoring:
    """See the module text. A Service; `samples` has one value per period."""

    def __init__(
        self,
        node: NodeInfo,
        runtimes: Sequence[Targets],
        traffic: TrafficSource,
        node_configs: NodeConfigs,
        send_alert: Callable[[SystemQuotaAlert | InstanceQuotaAlert], Awaitable[None]],
        *,
        disk_quotas: DiskQuotas,
        period_s: float,
        window_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._node = node
        self._runtimes = runtimes
        self._traffic = traffic
        self._node_configs = node_configs
        self._send_alert = send_alert
        self._disk_quotas = disk_quotas
        self._period_s = period_s
        self._clock = clock
        self._cpus = os.cpu_count() or 1
        self._capacity = Capacity(
            node.max_dmips,
            node.total_ram,
            {partition.name: partition.total_size for partition in node.partitions},
        )
        self._averages = Averages(window_s, period_s)
        self._watched: dict[str, SampleTarget] = {}
        self._marks: dict[str, CpuMark | None] = {}
        self._instance_watches: dict[InstanceIdent, QuotaWatch] = {}
        self._node_watch = self._new_node_watch()
        self._last: Sample | None = None
        self._sampler: Sampler | None = None
        self.samples: Broadcast[NodeMonitoring] = Broadcast("monitoring samples")

    def average(self) -> NodeMonitoring:
        """Averages of the present window."""
        return self._averages.average()

    async def run(self, started: Callable[[], None]) -> None:
        """Sample until cancelled. A round that fails is logged, the next one comes."""
        paths = {partition.name: partition.path for partition in self._node.partitions if partition.path}
        async with Worker("monitoring") as worker:
            with Sampler(filesystems=paths) as self._sampler:
                # The first figures are differences to this one.
                self._last = await worker.run(self._sampler.sample)
                started()
                due_s = self._clock()
                while True:
                    due_s = max(due_s + self._period_s, self._clock())
                    await asyncio.sleep(due_s - self._clock())
                    with log_and_continue(_log, "Can't sample node and instances"):
                        await self._round(worker)

    async def _round(self, worker: Worker) -> None:
        targets = {
            target.instance_id: target
            for runtime in self._runtimes
            for target in runtime.sample_targets()
            if target.info.monitoring_parameters is not None
        }
        with log_and_continue(_log, "Can't read traffic counters"):
            await self._traffic.refresh_traffic()
        measured = await worker.run(self._measure, targets)
        now, now_s = datetime.now(UTC), self._clock()
        targets = {name: target for name, target in targets.items() if name in measured.usages}
        instances = [self._instance(target, measured) for target in targets.values()]
        node = self._node_data(measured.sample)
        self._last = measured.sample
        self._averages.keep_only(target.ident for target in targets.values())
        self._averages.add(NodeMonitoring(node, tuple(instances)))
        await self._check(node, instances, targets, now, now_s)
        self.samples.publish(normalised(node, instances, now))

    def _measure(self, targets: dict[str, SampleTarget]) -> Measured:
        """In the worker thread, which alone uses the sampler."""
        assert self._sampler is not None  # noqa: S101 - set by run
        for name in self._watched.keys() - targets.keys():
            self._sampler.remove(name)
            self._marks.pop(name, None)
        for name in targets.keys() - self._watched.keys():
            self._sampler.add(name, targets[name].cgroup.lstrip("/"))
        self._watched = targets
        usages = {}
        for name, target in targets.items():
            # One that can't be measured is left out, and no other with it (sm.md §12, D22).
            with log_and_continue(_log, f"Can't measure what instance {target.ident} has stored"):
                usages[name] = tuple(
                    PartitionUsage(label, self._stored_bytes(target.info.uid, label, path))
                    for label, path in target.partitions
                )
        return Measured(self._sampler.sample(), usages)

    def _stored_bytes(self, uid: int, label: str, path: Path) -> int:
        known = self._disk_quotas.used_bytes(uid, label, path)
        return tree_bytes(path) if known is None else known

    def _instance(self, target: SampleTarget, measured: Measured) -> InstanceMonitoring:
        sample = measured.sample.instances[target.instance_id]
        mark = cpu_mark(sample, measured.sample.time_ns)
        totals = self._traffic.traffic(target.instance_id)
        data = MonitoringData(
            ram=sample.memory_bytes or 0,
            cpu=instance_cpu(self._marks.get(target.instance_id), mark, self._node.max_dmips, self._cpus),
            partitions=measured.usages[target.instance_id],
            download=totals.download,
            upload=totals.upload,
        )
        self._marks[target.instance_id] = mark
        return InstanceMonitoring(target.ident, data, target.info.runtime_id)

    def _node_data(self, sample: Sample) -> MonitoringData:
        totals = self._traffic.traffic()
        spaces = sample.node.filesystems
        return MonitoringData(
            ram=sample.node.memory_used_bytes,
            cpu=node_cpu(self._last.node, sample.node, self._node.max_dmips) if self._last else 0,
            partitions=tuple(
                PartitionUsage(name, space.used_bytes) for name, space in spaces.items() if space is not None
            ),
            download=totals.download,
            upload=totals.upload,
        )

    async def _check(
        self,
        node: MonitoringData,
        instances: Sequence[InstanceMonitoring],
        targets: dict[str, SampleTarget],
        now: datetime,
        now_s: float,
    ) -> None:
        """Rules look at the figures as measured, not as normalised."""
        if self._node_watch.rules != self._node_rules():
            self._node_watch = self._new_node_watch()
        for crossing in self._node_watch.check(node, now_s):
            await self._send_alert(SystemQuotaAlert(now, crossing.parameter, crossing.value, crossing.status))
        infos = {target.ident: target.info for target in targets.values()}
        self._instance_watches = {ident: watch for ident, watch in self._instance_watches.items() if ident in infos}
        for instance in instances:
            parameters = infos[instance.ident].monitoring_parameters
            rules = parameters.alert_rules if parameters else None
            watch = self._instance_watches.get(instance.ident)
            if watch is None or watch.rules != rules:
                watch = QuotaWatch(rules, self._capacity, owner=str(instance.ident))
                self._instance_watches[instance.ident] = watch
            for crossing in watch.check(instance.data, now_s):
                await self._send_alert(
                    InstanceQuotaAlert(now, instance.ident, crossing.parameter, crossing.value, crossing.status)
                )

    def _node_rules(self) -> AlertRules | None:
        config = self._node_configs.current
        return config.alert_rules if config else None

    def _new_node_watch(self) -> QuotaWatch:
        return QuotaWatch(self._node_rules(), self._capacity, owner=f"node {self._node.node_id}")


def tree_bytes(path: Path) -> int:
    """Disk space that a file or a directory with all below it takes; what vanishes meanwhile counts nothing."""
    total = 0
    waiting = [os.fspath(path)]
    while waiting:
        current = waiting.pop()
        with contextlib.suppress(FileNotFoundError):
            status = os.lstat(current)
            total += status.st_blocks * 512
            if stat.S_ISDIR(status.st_mode):
                waiting += [entry.path for entry in os.scandir(current)]
    return total
