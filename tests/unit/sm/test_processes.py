"""Signals by name."""

import signal

import pytest

from aoscore.common.errors import InvalidArgumentError
from aoscore.sm.processes import parse_signal


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("SIGTERM", signal.SIGTERM),
        ("sigquit", signal.SIGQUIT),
        ("USR1", signal.SIGUSR1),
        ("9", signal.SIGKILL),
        ("SIGRTMIN+3", signal.SIGRTMIN + 3),
        ("RTMAX-1", signal.SIGRTMAX - 1),
    ],
)
def test_signals_as_images_name_them(text: str, number: int) -> None:
    assert parse_signal(text) == number


@pytest.mark.parametrize("text", ["", "SIG", "SIGNOTHING", "0", "65", "-1", "SIGRTMAX+1", "\u0663"])
def test_what_is_no_signal(text: str) -> None:
    with pytest.raises(InvalidArgumentError, match="is no signal"):
        parse_signal(text)
