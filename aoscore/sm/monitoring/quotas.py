"""Alert rules: when a figure that crossed a threshold is worth an alert (sm.md §7.6). Pure."""

import logging
from collections.abc import Mapping

import msgspec

from aoscore.common.log import kv
from aoscore.common.types import AlertRulePercents, AlertRules, AlertStatus, MonitoringData, PartitionAlertRule

_log = logging.getLogger(__name__)


class Capacity(msgspec.Struct, frozen=True):
    """What 100 % are: DMIPS, bytes, bytes by partition name."""

    cpu: int
    ram: int
    partitions: Mapping[str, int]


class Thresholds(msgspec.Struct, frozen=True):
    """A rule in the figure's own unit."""

    minimum: float
    maximum: float
    min_timeout_s: float


class Crossing(msgspec.Struct, frozen=True):
    """An alert that is due."""

    parameter: str
    value: int
    status: AlertStatus


class _Watch:
    """One figure under one rule.

    normal: at or above `maximum` for the minimum time -> raise. alarm: still at or above `minimum` -> continue, once
    per minimum time; below it for the minimum time -> fall.
    """

    def __init__(self, rule: Thresholds) -> None:
        self._rule = rule
        self._alarm = False
        self._high_since_s: float | None = None
        self._low_since_s: float | None = None

    def check(self, value: float, now_s: float) -> AlertStatus | None:
        return self._check_alarm(value, now_s) if self._alarm else self._check_normal(value, now_s)

    def _check_normal(self, value: float, now_s: float) -> AlertStatus | None:
        if value < self._rule.maximum:
            self._high_since_s = None
            return None
        if self._high_since_s is None:
            self._high_since_s = now_s
        if now_s - self._high_since_s < self._rule.min_timeout_s:
            return None
        self._alarm, self._high_since_s, self._low_since_s = True, now_s, None
        return AlertStatus.RAISE

    def _check_alarm(self, value: float, now_s: float) -> AlertStatus | None:
        if value >= self._rule.minimum:
            self._low_since_s = None
            if self._high_since_s is None or now_s - self._high_since_s >= self._rule.min_timeout_s:
                self._high_since_s = now_s
                return AlertStatus.CONTINUE
            return None
        if self._low_since_s is None:
            # A single low sample never ends an alarm.
            self._low_since_s = now_s
            return None
        if now_s - self._low_since_s < self._rule.min_timeout_s:
            return None
        self._alarm, self._high_since_s, self._low_since_s = False, None, None
        return AlertStatus.FALL


class QuotaWatch:
    """All rules of the node or of one instance."""

    def __init__(self, rules: AlertRules | None, capacity: Capacity, *, owner: str) -> None:
        """`owner` names the node or instance in the log."""
        self.rules = rules
        self._watches = {name: _Watch(rule) for name, rule in thresholds(rules, capacity, owner=owner).items()}

    def check(self, data: MonitoringData, now_s: float) -> list[Crossing]:
        """The alerts that a sample brings; `now_s` is a monotonic time."""
        figures = {"cpu": data.cpu, "ram": data.ram, "download": data.download, "upload": data.upload}
        figures |= {usage.name: usage.used_size for usage in data.partitions}
        crossings = []
        for name, watch in self._watches.items():
            if name in figures and (status := watch.check(figures[name], now_s)) is not None:
                crossings.append(Crossing(name, figures[name], status))
        return crossings


def thresholds(rules: AlertRules | None, capacity: Capacity, *, owner: str) -> dict[str, Thresholds]:
    """Rules by parameter, percents turned into the figure's unit; what has no capacity is left out with a warning."""
    if rules is None:
        return {}
    result: dict[str, Thresholds] = {}
    percents: list[tuple[str, AlertRulePercents | PartitionAlertRule | None, int]] = [
        ("cpu", rules.cpu, capacity.cpu),
        ("ram", rules.ram, capacity.ram),
        *((rule.name, rule, capacity.partitions.get(rule.name, 0)) for rule in rules.partitions),
    ]
    for name, rule, whole in percents:
        if rule is None:
            continue
        if whole <= 0:
            _log.warning(kv("Alert rule can't be used, the size of it is not known", parameter=name, owner=owner))
            continue
        result[name] = Thresholds(
            rule.min_threshold * whole / 100, rule.max_threshold * whole / 100, rule.min_timeout_s
        )
    for name, points in (("download", rules.download), ("upload", rules.upload)):
        if points is not None:
            result[name] = Thresholds(points.min_threshold, points.max_threshold, points.min_timeout_s)
    return result
