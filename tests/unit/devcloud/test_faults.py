"""Fault rules: matching and counting."""

import pytest

from aoscore.common.errors import InvalidArgumentError
from aoscore.devcloud.faults import Fault, Faults


def test_a_rule_acts_as_often_as_it_says() -> None:
    faults = Faults([Fault("silence", on="unitStatus", times=2)])
    assert [bool(faults.take("silence", on="unitStatus")) for _ in range(3)] == [True, True, False]


def test_a_rule_without_limit_acts_until_it_is_removed() -> None:
    faults = Faults([Fault("silence", times=0)])
    assert all(faults.take("silence", on="alerts") for _ in range(5))
    faults.clear()
    assert faults.take("silence", on="alerts") is None
    assert faults.active() == []


@pytest.mark.parametrize(
    ("rule", "matches"),
    [
        (Fault("delay", on="alerts"), False),
        (Fault("silence", on="unitStatus"), False),
        (Fault("delay", on="unitStatus", unit="other"), False),
        (Fault("delay", on="unitStatus", digest="sha256:2"), False),
        (Fault("delay", on="unitStatus", unit="unit", digest="sha256:1"), True),
        (Fault("delay"), True),
    ],
)
def test_a_rule_acts_only_where_it_says(rule: Fault, matches: bool) -> None:
    assert bool(Faults([rule]).take("delay", on="unitStatus", unit="unit", digest="sha256:1")) is matches


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="meltdown"):
        Faults([Fault("meltdown")])
