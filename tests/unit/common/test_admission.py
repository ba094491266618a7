"""Whose a key is."""

import pytest

from aoscore.common.admission import speaks_for


@pytest.mark.parametrize(
    ("is_main", "owner", "speaks"),
    [
        (True, None, True),
        (True, "other", True),
        (False, "n", True),
        (False, "other", False),
        (False, None, None),
    ],
)
def test_who_may_speak(is_main: bool, owner: str | None, speaks: bool | None) -> None:
    assert speaks_for("n", is_main=is_main, owner=owner) is speaks
