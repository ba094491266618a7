"""Which journal entries are worth an alert, and how many of them (sm.md §8, §12 D19 and D20). Pure."""

import re
from collections.abc import Callable, Iterable, Sequence

import msgspec

from aoscore.common.errors import ConfigError
from aoscore.common.types import CoreAlert, InstanceAlert, InstanceIdent, SystemAlert
from aoscore.sm.journal import JournalEntry, Match

Alert = SystemAlert | CoreAlert | InstanceAlert

_INIT_SCOPE = "init.scope"
_CORE_UNITS = {"aos-cm.service": "CM", "aos-sm.service": "SM", "aos-iam.service": "IAM", "aos-mp.service": "MP"}
_MAX_MESSAGE_BYTES = 255
_UNITS_REMEMBERED = 1000


class AlertRules:
    """The configured rules."""

    def __init__(self, filters: Sequence[str], *, service_priority: int, system_priority: int) -> None:
        """`filters`: messages that match one of them raise no alert. Raises ConfigError for a bad expression."""
        self._filters = [_compile(text) for text in filters if text]
        self._service_priority = service_priority
        self._system_priority = system_priority

    def matches(self) -> list[Match]:
        """What is asked of the journal; `alert` looks closer."""
        highest = max(self._service_priority, self._system_priority)
        return [[f"PRIORITY={number}" for number in range(highest + 1)], [f"_SYSTEMD_UNIT={_INIT_SCOPE}"]]

    def alert(
        self, entry: JournalEntry, find_instance: Callable[[str], tuple[InstanceIdent, str] | None]
    ) -> Alert | None:
        """The alert for an entry; `find_instance` gives identity and version for an instance id."""
        if not entry.message or any(expression.search(entry.message) for expression in self._filters):
            return None
        message = cut(entry.message, _MAX_MESSAGE_BYTES)
        for name in (entry.cgroup.rpartition("/")[2], entry.identifier):
            if name and (known := find_instance(name)) is not None:
                if entry.priority > self._service_priority:
                    return None
                return InstanceAlert(entry.time, known[0], known[1], message)
        from_init = entry.unit == _INIT_SCOPE
        if entry.priority > (self._service_priority if from_init else self._system_priority):
            return None
        unit = entry.about_unit if from_init else entry.unit or entry.cgroup
        for core_unit, component in _CORE_UNITS.items():
            if core_unit in unit:
                return CoreAlert(entry.time, component, message)
        return SystemAlert(entry.time, message)


def source_of(entry: JournalEntry) -> str:
    """Who is responsible for an entry: what the flood limit counts."""
    return entry.about_unit or entry.unit or entry.cgroup or entry.identifier or "unknown"


def cut(text: str, limit_bytes: int) -> str:
    """The text's beginning that fits, without half a character."""
    return text.encode()[:limit_bytes].decode(errors="ignore")


class FloodLimit:
    """Lets at most `burst` alerts of one source pass at once, and one more each `period_s`; counts the others."""

    def __init__(self, burst: int, period_s: float) -> None:
        self._burst = burst
        self._period_s = period_s
        self._buckets: dict[str, _Bucket] = {}

    def passes(self, source: str, now_s: float) -> bool:
        """Whether an alert of this source may go."""
        bucket = self._buckets.get(source)
        if bucket is None:
            if len(self._buckets) >= _UNITS_REMEMBERED:
                self._buckets.pop(next(iter(self._buckets)))
            bucket = self._buckets[source] = _Bucket(float(self._burst), now_s)
        bucket.tokens = min(float(self._burst), bucket.tokens + (now_s - bucket.filled_s) / self._period_s)
        bucket.filled_s = now_s
        if bucket.tokens < 1:
            bucket.suppressed += 1
            return False
        bucket.tokens -= 1
        return True

    def suppressed(self, now_s: float) -> Iterable[tuple[str, int]]:
        """Sources whose flood is over, with the number of alerts that were held back; each is told once."""
        for source, bucket in self._buckets.items():
            if bucket.suppressed and now_s - bucket.filled_s >= self._period_s:
                count, bucket.suppressed = bucket.suppressed, 0
                yield source, count


class _Bucket(msgspec.Struct):
    tokens: float
    filled_s: float
    suppressed: int = 0


def _compile(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise ConfigError(f"journalAlerts.filter {text!r} is no regular expression: {error}") from error
