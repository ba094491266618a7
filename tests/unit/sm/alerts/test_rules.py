"""Which journal entries become which alerts, and the flood limit."""

from datetime import UTC, datetime
from typing import Any

import pytest

from aoscore.common.errors import ConfigError
from aoscore.common.types import CoreAlert, InstanceAlert, InstanceIdent, SystemAlert
from aoscore.sm.alerts.rules import AlertRules, FloodLimit, cut, source_of
from aoscore.sm.journal import JournalEntry

NOW = datetime(2026, 1, 1, tzinfo=UTC)
IDENT = InstanceIdent("item", "subject", 0)
RULES = AlertRules(["ignore", "", "^drop .* this$"], service_priority=4, system_priority=3)
GROUP = "/system.slice/system-aos.slice/system-aos-service.slice/id0"


def find(name: str) -> tuple[InstanceIdent, str] | None:
    return (IDENT, "1.0.0") if name == "id0" else None


def entry(**fields: Any) -> JournalEntry:
    return JournalEntry(NOW, "cursor", **{"message": "bad", "priority": 3, **fields})


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, SystemAlert(NOW, "bad")),
        ({"unit": "ssh.service"}, SystemAlert(NOW, "bad")),
        ({"unit": "aos-cm.service"}, CoreAlert(NOW, "CM", "bad")),
        ({"unit": "aos-iam.service"}, CoreAlert(NOW, "IAM", "bad")),
        ({"unit": "aos-mp.service"}, CoreAlert(NOW, "MP", "bad")),
        ({"priority": 4}, None),
        ({"unit": "init.scope", "about_unit": "aos-sm.service", "priority": 4}, CoreAlert(NOW, "SM", "bad")),
        ({"unit": "init.scope", "about_unit": "x.service", "priority": 5}, None),
        ({"cgroup": GROUP, "priority": 4}, InstanceAlert(NOW, IDENT, "1.0.0", "bad")),
        ({"identifier": "id0", "priority": 4}, InstanceAlert(NOW, IDENT, "1.0.0", "bad")),
        ({"cgroup": GROUP, "priority": 5}, None),
        ({"cgroup": "/other/group", "priority": 3}, SystemAlert(NOW, "bad")),
        ({"message": "please ignore me"}, None),
        ({"message": "drop all this"}, None),
        ({"message": "do not drop all this"}, SystemAlert(NOW, "do not drop all this")),
        ({"message": ""}, None),
    ],
)
def test_entry_to_alert(fields: dict[str, Any], expected: object) -> None:
    assert RULES.alert(entry(**fields), find) == expected


def test_matches_ask_for_the_higher_of_both_priorities() -> None:
    assert RULES.matches() == [[f"PRIORITY={number}" for number in range(5)], ["_SYSTEMD_UNIT=init.scope"]]


def test_bad_expression_names_itself() -> None:
    with pytest.raises(ConfigError, match=r"'\(' is no regular expression"):
        AlertRules(["("], service_priority=4, system_priority=3)


def test_long_message_is_cut_between_characters() -> None:
    assert cut("ä" * 200, 255) == "ä" * 127
    alert = RULES.alert(entry(message="x" * 300), find)
    assert alert is not None and len(alert.message) == 255


def test_source() -> None:
    assert source_of(entry(unit="a", cgroup="b")) == "a"
    assert source_of(entry(unit="init.scope", about_unit="x")) == "x"
    assert source_of(entry()) == "unknown"


def test_flood_is_limited_per_source_and_its_end_is_told_once() -> None:
    flood = FloodLimit(burst=3, period_s=10)
    assert [flood.passes("a", 0.1 * number) for number in range(6)] == [True] * 3 + [False] * 3
    assert flood.passes("b", 1)
    assert list(flood.suppressed(5)) == []
    assert list(flood.suppressed(20)) == [("a", 3)]
    assert list(flood.suppressed(21)) == []
    assert flood.passes("a", 30) and flood.passes("a", 30)


def test_memory_of_the_flood_limit_is_bounded() -> None:
    flood = FloodLimit(burst=1, period_s=1)
    for number in range(5000):
        flood.passes(str(number), 0)
    assert len(flood._buckets) == 1000
