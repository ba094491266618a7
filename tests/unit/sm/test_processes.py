"""The end of processes, and signals by name."""

import asyncio
import signal
import subprocess

import pytest

from aoscore.common.errors import InvalidArgumentError
from aoscore.sm.processes import ProcessWatch, parse_signal


async def test_an_end_is_noticed_after_a_wait_that_was_too_short() -> None:
    with subprocess.Popen(["sleep", "1000"]) as child:
        with ProcessWatch(child.pid) as process:
            assert not await process.ended(0.01)
            assert not await process.ended(0.01)
            process.signal(signal.SIGTERM)
            assert await process.ended(10)
            assert await process.ended(0.01)
    # The descriptor may belong to something else by now.
    assert not asyncio.get_running_loop().remove_reader(process._fd)


async def test_who_is_gone_has_ended() -> None:
    with subprocess.Popen(["true"]) as child:
        pass
    with ProcessWatch(child.pid) as process:
        assert await process.ended()
        process.signal(signal.SIGTERM)


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
