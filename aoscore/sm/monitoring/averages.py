"""Moving averages, with AosCore 9.1's arithmetic (sm.md §7.4). Pure."""

from collections.abc import Iterable

from aoscore.common.types import (
    InstanceIdent,
    InstanceMonitoring,
    MonitoringData,
    NodeMonitoring,
    PartitionUsage,
)


def _round(value: float) -> int:
    # Half away from zero; Python's round goes to even numbers.
    return int(value + 0.5)


class _Window:
    """One figure: a sum that forgets its mean with every new value."""

    def __init__(self, length: int, first: int) -> None:
        self._length = length
        self._sum = float(first * length)

    def add(self, value: int) -> None:
        self._sum += value - _round(self._sum / self._length)

    @property
    def mean(self) -> int:
        return _round(self._sum / self._length)


class _Averager:
    """All figures of the node or of one instance."""

    def __init__(self, length: int) -> None:
        self._length = length
        self._windows: dict[str, _Window] = {}
        self._partitions: dict[str, _Window] = {}

    def add(self, data: MonitoringData) -> None:
        figures = {"ram": data.ram, "cpu": data.cpu, "download": data.download, "upload": data.upload}
        self._add(self._windows, figures)
        self._add(self._partitions, {usage.name: usage.used_size for usage in data.partitions})

    def _add(self, windows: dict[str, _Window], figures: dict[str, int]) -> None:
        for name, value in figures.items():
            if name in windows:
                windows[name].add(value)
            else:
                windows[name] = _Window(self._length, value)

    def data(self) -> MonitoringData:
        def mean(name: str) -> int:
            return self._windows[name].mean if name in self._windows else 0

        return MonitoringData(
            ram=mean("ram"),
            cpu=mean("cpu"),
            partitions=tuple(PartitionUsage(name, window.mean) for name, window in self._partitions.items()),
            download=mean("download"),
            upload=mean("upload"),
        )


class Averages:
    """Averages over the last `window_s / period_s` samples of the node and of every watched instance."""

    def __init__(self, window_s: float, period_s: float) -> None:
        self._length = max(1, int(window_s // period_s))
        self._node = _Averager(self._length)
        self._instances: dict[InstanceIdent, tuple[str, _Averager]] = {}

    def add(self, sample: NodeMonitoring) -> None:
        """Take in a sample."""
        self._node.add(sample.node)
        for instance in sample.instances:
            _, averager = self._instances.setdefault(instance.ident, ("", _Averager(self._length)))
            self._instances[instance.ident] = (instance.runtime_id, averager)
            averager.add(instance.data)

    def keep_only(self, idents: Iterable[InstanceIdent]) -> None:
        """Forget instances that are not watched any more."""
        wanted = set(idents)
        self._instances = {ident: entry for ident, entry in self._instances.items() if ident in wanted}

    def average(self) -> NodeMonitoring:
        """The present averages; without time stamps, as the contract has it."""
        return NodeMonitoring(
            self._node.data(),
            tuple(
                InstanceMonitoring(ident, averager.data(), runtime_id)
                for ident, (runtime_id, averager) in self._instances.items()
            ),
        )
