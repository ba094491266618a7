"""Overridden environment variables."""

from datetime import UTC, datetime, timedelta

from aoscore.cm.communication.messages import EnvVar, EnvVarInstanceStatus, EnvVarOverride, ErrorInfo, Identity
from aoscore.cm.launcher.envvars import (
    EnvVarResults,
    Override,
    next_expiry,
    split_acceptable,
    variables_for,
    without_expired,
)
from aoscore.common import types
from aoscore.common.types import EnvVarStatus, InstanceFilter, InstanceIdent, InstanceState, InstanceStatus

NOW = datetime(2026, 3, 1, tzinfo=UTC)
IDENT = InstanceIdent("item", "subject", 1)


def override(name: str, value: str, *, ttl: datetime | None = None, **filter: object) -> Override:
    return Override(InstanceFilter(**filter), (EnvVar(name=name, value=value, ttl=ttl),))  # type: ignore[arg-type]


def test_of_the_cloud() -> None:
    message = EnvVarOverride(item=Identity(id="i"), instance=0, variables=(EnvVar(name="A", value="1"),))
    assert Override.of(message) == override("A", "1", item_id="i", instance=0)
    assert Override.of(EnvVarOverride()) == Override(InstanceFilter(), ())


def test_later_values_win_and_filters_count() -> None:
    overrides = [
        override("A", "1"),
        override("B", "1", item_id="item"),
        override("A", "2", subject_id="subject", instance=1),
        override("C", "1", instance=0),
    ]
    assert variables_for(IDENT, overrides) == {"A": "2", "B": "1"}


def test_expiry() -> None:
    overrides = [override("A", "1", ttl=NOW - timedelta(seconds=1)), override("B", "1", ttl=NOW), override("C", "1")]
    assert without_expired(overrides, NOW) == overrides[1:]
    assert next_expiry(overrides) == NOW - timedelta(seconds=1)
    assert next_expiry([override("C", "1")]) is None


def test_what_no_sm_would_take_is_refused() -> None:
    variables = {"": "x", "N" * 65: "x", "LONG": "x" * 257} | {f"V{number}": "x" for number in range(17)}
    accepted, refused = split_acceptable(variables)
    assert [one.name for one in accepted] == [f"V{number}" for number in range(16)]
    assert [one.name for one in refused] == ["", "N" * 65, "LONG", "V16"]
    assert all(one.error is not None and one.error.aos_code == 4 for one in refused)


def test_results_are_reported_when_they_change() -> None:
    results = EnvVarResults()
    assert results.take_report([IDENT]) is None
    error = types.ErrorInfo(1, 1, "bad")
    status = InstanceStatus(IDENT, "1", InstanceState.ACTIVE, env_vars=(EnvVarStatus("A"), EnvVarStatus("B", error)))
    results.add([status])
    results.set_refused(IDENT, (EnvVarStatus("C", error),))
    report = results.take_report([IDENT])
    assert report is not None
    wire = ErrorInfo(aos_code=1, exit_code=1, message="bad")
    names = {"item": Identity(id="item"), "subject": Identity(id="subject"), "instance": 1}
    assert report.statuses == (
        EnvVarInstanceStatus(**names, name="A"),
        EnvVarInstanceStatus(**names, name="B", error_info=wire),
        EnvVarInstanceStatus(**names, name="C", error_info=wire),
    )
    results.add([status])
    assert results.take_report([IDENT]) is None
    assert results.take_report([]) is None
