"""When a daemon gives memory back."""

import asyncio
import gc

import pytest

from aoscore.common import memory


class Done(Exception):
    """The scripted time is over."""


def given_back(monkeypatch: pytest.MonkeyPatch, cpu_s: list[float]) -> list[int]:
    """Numbers of the intervals after which something was given back, by the CPU time used at the end of each."""
    interval = -1
    found = []

    async def sleep(_seconds: float) -> None:
        nonlocal interval
        interval += 1
        if interval == len(cpu_s):
            raise Done

    monkeypatch.setattr(memory.asyncio, "sleep", sleep)
    monkeypatch.setattr(memory.time, "process_time", lambda: cpu_s[interval])
    monkeypatch.setattr(memory, "give_back", lambda: found.append(interval))
    with pytest.raises(Done):
        asyncio.run(memory.tidy_after_work())
    return found


@pytest.mark.parametrize(
    ("cpu_s", "intervals"),
    [
        pytest.param([0.4, 0.41, 0.42, 0.43], [1], id="once after the start"),
        pytest.param([0.4, 0.41, 1.4, 2.4, 2.41, 2.42], [1, 4], id="after work, not in the middle"),
        pytest.param([0.4, 0.41, *(0.41 + 0.01 * n for n in range(1, 22))], [1, 21], id="seldom when little is done"),
        pytest.param([1.0 * n for n in range(1, 9)], [], id="never while it works"),
    ],
)
def test_memory_is_given_back_when_work_is_over(
    monkeypatch: pytest.MonkeyPatch, cpu_s: list[float], intervals: list[int]
) -> None:
    assert given_back(monkeypatch, cpu_s) == intervals


def test_what_start_made_is_left_alone_and_the_rest_is_collected() -> None:
    class Cycle:
        def __init__(self) -> None:
            self.me = self

    frozen = gc.get_freeze_count()
    gc.disable()
    try:
        memory.keep_what_start_made()
        assert gc.get_freeze_count() > frozen
        Cycle()
        memory.give_back()
        assert not [one for one in gc.get_objects() if type(one) is Cycle]
    finally:
        gc.unfreeze()
        gc.enable()
