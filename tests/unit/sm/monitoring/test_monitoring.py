"""Averages, alert rules, figures, and the service over the machine's own counters."""

import asyncio
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest

from aoscore._speedups.sampler_types import InstanceSample, NodeSample
from aoscore.common.aio import Broadcast
from aoscore.common.types import (
    AlertRulePercents,
    AlertRulePoints,
    AlertRules,
    AlertStatus,
    Duration,
    InstanceIdent,
    InstanceInfo,
    InstanceMonitoring,
    InstanceQuotaAlert,
    MonitoringData,
    MonitoringParameters,
    NodeInfo,
    NodeMonitoring,
    PartitionAlertRule,
    PartitionInfo,
    PartitionUsage,
    SystemQuotaAlert,
)
from aoscore.sm.launcher.runtimes.base import SampleTarget
from aoscore.sm.monitoring.averages import Averages
from aoscore.sm.monitoring.figures import CpuMark, cpu_mark, instance_cpu, node_cpu, normalised
from aoscore.sm.monitoring.monitor import Monitoring, tree_bytes
from aoscore.sm.monitoring.quotas import Capacity, QuotaWatch, Thresholds, thresholds
from aoscore.sm.networkmanager.traffic import Totals
from aoscore.sm.resourcemanager.nodeconfig import Codename, NodeConfig
from aoscore.sm.resourcemanager.quotas import DiskQuotas
from tests.support.running import running

IDENT = InstanceIdent("item", "subject", 0)
CAPACITY = Capacity(10000, 1000, {"disk": 200})


def node_only(**figures: int) -> NodeMonitoring:
    return NodeMonitoring(MonitoringData(**figures))  # type: ignore[arg-type]


def test_average_begins_with_the_first_value_and_follows() -> None:
    averages = Averages(window_s=100, period_s=20)
    averages.add(node_only(ram=100))
    assert averages.average().node.ram == 100
    means = []
    for _ in range(30):
        averages.add(node_only(ram=200))
        means.append(averages.average().node.ram)
    assert means[:3] == [120, 136, 149] and means[-1] >= 198


def test_window_shorter_than_a_period_is_the_last_value() -> None:
    averages = Averages(window_s=10, period_s=35)
    for ram in (5, 9, 7):
        averages.add(node_only(ram=ram))
    assert averages.average().node.ram == 7


def test_averages_of_partitions_and_instances_come_and_go() -> None:
    averages = Averages(window_s=2, period_s=1)
    data = MonitoringData(cpu=10, partitions=(PartitionUsage("disk", 4),))
    averages.add(NodeMonitoring(MonitoringData(), (InstanceMonitoring(IDENT, data, "rt"),)))
    averages.add(NodeMonitoring(data, (InstanceMonitoring(IDENT, data, "rt"),)))
    result = averages.average()
    assert result.instances == (InstanceMonitoring(IDENT, data, "rt"),)
    assert result.node.partitions == data.partitions
    averages.keep_only([])
    assert averages.average().instances == ()


def test_percents_become_points() -> None:
    rules = AlertRules(
        cpu=AlertRulePercents(40, 50.5, Duration(10)),
        ram=AlertRulePercents(1, 2),
        partitions=(PartitionAlertRule("disk", 10, 20), PartitionAlertRule("unknown", 10, 20)),
        download=AlertRulePoints(5, 6, Duration(7)),
    )
    assert thresholds(rules, CAPACITY, owner="node") == {
        "cpu": Thresholds(4000, 5050, 10),
        "ram": Thresholds(10, 20, 0),
        "disk": Thresholds(20, 40, 0),
        "download": Thresholds(5, 6, 7),
    }
    assert thresholds(None, CAPACITY, owner="node") == {}


def test_rule_without_known_size_is_left_out_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    rules = AlertRules(cpu=AlertRulePercents(1, 2))
    assert thresholds(rules, Capacity(0, 0, {}), owner="node n1") == {}
    assert "parameter=cpu, owner=node n1" in caplog.text


def alerts(timeout_s: float, samples: list[tuple[float, int]]) -> list[tuple[float, str]]:
    rule = AlertRulePoints(80, 100, Duration(timeout_s))
    watch = QuotaWatch(AlertRules(download=rule), CAPACITY, owner="x")
    found = []
    for now_s, value in samples:
        found += [(now_s, str(hit.status)) for hit in watch.check(MonitoringData(download=value), now_s)]
    return found


@pytest.mark.parametrize(
    ("timeout_s", "samples", "expected"),
    [
        (0, [(0, 99), (1, 100), (2, 90), (3, 79), (4, 79), (5, 79)], [(1, "raise"), (2, "continue"), (4, "fall")]),
        (10, [(0, 100), (5, 100), (9, 100), (10, 100)], [(10, "raise")]),
        (10, [(0, 100), (5, 99), (9, 100), (18, 100), (19, 100)], [(19, "raise")]),
        (10, [(0, 100), (10, 100), (15, 90), (20, 90), (25, 90)], [(10, "raise"), (20, "continue")]),
        (10, [(0, 100), (10, 100), (12, 79), (15, 80), (17, 79), (26, 79), (27, 79)], [(10, "raise"), (27, "fall")]),
        (
            10,
            [(0, 100), (10, 100), (11, 0), (21, 0), (22, 100), (32, 100)],
            [(10, "raise"), (21, "fall"), (32, "raise")],
        ),
    ],
)
def test_alert_phases(timeout_s: float, samples: list[tuple[float, int]], expected: list[tuple[float, str]]) -> None:
    assert alerts(timeout_s, samples) == expected


def node_sample(total: int, idle: int) -> NodeSample:
    return NodeSample(total, idle, 0, 0, {}, {})


def test_node_cpu_is_what_was_not_idle() -> None:
    assert node_cpu(node_sample(1000, 900), node_sample(1100, 975), 10000) == 2500
    assert node_cpu(node_sample(1000, 900), node_sample(1000, 900), 10000) == 0
    assert node_cpu(node_sample(1000, 900), node_sample(1100, 890), 10000) == 10000


def test_instance_cpu() -> None:
    """One core of four is a quarter (sm.md §14, 9)."""
    second = 1_000_000_000
    before = CpuMark(0, 5 * second, 1)
    assert instance_cpu(before, CpuMark(2 * second, 7 * second, 1), 10000, 4) == 2500
    assert instance_cpu(before, CpuMark(2 * second, 2 * second, 2), 10000, 4) == 2500, "a new run began at zero"
    assert instance_cpu(before, CpuMark(2 * second, 2 * second, 1), 10000, 4) == 2500, "so did one that went back"
    assert instance_cpu(None, before, 10000, 4) == 0 and instance_cpu(before, None, 10000, 4) == 0
    assert cpu_mark(InstanceSample(True, 1, None, None, None, None, None, None), 5) is None


def test_node_is_never_below_its_instances() -> None:
    when = datetime(2026, 1, 1, tzinfo=UTC)
    instance = InstanceMonitoring(
        IDENT, MonitoringData(ram=5, cpu=9, partitions=(PartitionUsage("states", 3), PartitionUsage("disk", 1))), "rt"
    )
    node = MonitoringData(ram=7, cpu=10, partitions=(PartitionUsage("disk", 2),), upload=1)
    result = normalised(node, [instance, instance], when)
    assert (result.node.ram, result.node.cpu, result.node.upload) == (10, 18, 1)
    assert result.node.partitions == (PartitionUsage("disk", 2), PartitionUsage("states", 3))
    assert {entry.data.timestamp for entry in result.instances} == {when}


def test_tree_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").write_bytes(bytes(100_000))
    (tmp_path / "link").symlink_to("/usr")
    size = tree_bytes(tmp_path)
    assert 100_000 <= size < 200_000
    assert 0 < tree_bytes(tmp_path / "a" / "file") <= size
    assert tree_bytes(tmp_path / "absent") == 0


class Configs:
    """A node configuration with a rule that every sample breaks."""

    def __init__(self) -> None:
        self.current: NodeConfig | None = None
        self.changed: Broadcast[NodeConfig] = Broadcast("node configuration")


class Runtime:
    """One instance that is watched, one that is not."""

    def __init__(self, path: Path) -> None:
        rules = AlertRules(download=AlertRulePoints(1, 2))
        info = InstanceInfo(IDENT, "1", "d", "o", "rt", monitoring_parameters=MonitoringParameters(rules))
        plain = InstanceInfo(InstanceIdent("item", "subject", 1), "1", "d", "o", "rt")
        self.targets = [
            SampleTarget("id0", info.ident, info, "/no-such-cgroup/id0", 1, None, (("storages", path),)),
            SampleTarget("id1", plain.ident, plain, "/no-such-cgroup/id1", 1, None),
        ]

    def sample_targets(self) -> list[SampleTarget]:
        return self.targets


class Traffic:
    """Fixed totals."""

    async def refresh_traffic(self) -> None:
        pass

    def traffic(self, instance_id: str | None = None) -> Totals:
        return Totals(3, 4) if instance_id else Totals(1, 2)


async def test_service_samples_averages_and_alerts(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(bytes(10_000))
    node = NodeInfo(
        "n1", max_dmips=10000, total_ram=2**30, partitions=(PartitionInfo("root", total_size=2**40, path="/"),)
    )
    sent: list[SystemQuotaAlert | InstanceQuotaAlert] = []
    configs, runtime = Configs(), Runtime(tmp_path)

    async def send(alert: SystemQuotaAlert | InstanceQuotaAlert) -> None:
        sent.append(alert)

    monitoring = Monitoring(
        node, [runtime], Traffic(), configs, send, disk_quotas=DiskQuotas(), period_s=0.05, window_s=0.2
    )
    with monitoring.samples.subscribe() as samples:
        async with running(monitoring):
            sample = await samples.get()
            assert sample.node.timestamp is not None and sample.node.ram > 0
            assert [usage.name for usage in sample.node.partitions] == ["root", "storages"]
            assert all(usage.used_size > 0 for usage in sample.node.partitions)
            [instance] = [entry for entry in sample.instances if entry.ident == IDENT]
            assert len(sample.instances) == 1 and instance.runtime_id == "rt"
            assert (instance.data.download, instance.data.upload) == (3, 4)
            assert instance.data.partitions[0].used_size >= 10_000
            await samples.get()
            assert {type(alert) for alert in sent} == {InstanceQuotaAlert}
            assert monitoring.average().instances[0].data.download == 3
            configs.current = NodeConfig(Codename("main"), alert_rules=AlertRules(upload=AlertRulePoints(1, 2)))
            runtime.targets = []
            async with asyncio.timeout(5):
                while not any(isinstance(alert, SystemQuotaAlert) for alert in sent):
                    await samples.get()
            assert monitoring.average().instances == ()
    assert sent[0].status is AlertStatus.RAISE and sent[0].parameter == "download"


class Stale(DiskQuotas):
    """The storage of one user can't be looked at."""

    def used_bytes(self, uid: int, name: str, path: Path) -> int | None:
        if uid == 1:
            raise OSError(116, "Stale file handle")
        return 5


async def test_an_instance_that_can_not_be_measured_spoils_no_other(tmp_path: Path) -> None:
    async def send(alert: SystemQuotaAlert | InstanceQuotaAlert) -> None:
        pass

    runtime = Runtime(tmp_path)
    good = runtime.targets[0]
    bad_info = msgspec.structs.replace(good.info, ident=InstanceIdent("bad", "subject", 0), uid=1)
    runtime.targets.insert(0, msgspec.structs.replace(good, instance_id="bad", ident=bad_info.ident, info=bad_info))
    node = NodeInfo("n1", max_dmips=10000, total_ram=2**30)
    monitoring = Monitoring(
        node, [runtime], Traffic(), Configs(), send, disk_quotas=Stale(), period_s=0.05, window_s=0.2
    )
    with monitoring.samples.subscribe() as samples:
        async with running(monitoring):
            sample = await samples.get()
            assert [entry.ident for entry in sample.instances] == [IDENT]
            await samples.get()
            assert [entry.ident for entry in monitoring.average().instances] == [IDENT]
