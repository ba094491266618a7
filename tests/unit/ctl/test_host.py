"""Programs and waiting for tools."""

import time

import pytest

from aoscore.common.errors import DeadlineError, FailedError, NotFoundError
from aoscore.ctl.host import describe, run, wait


def test_output_or_all_that_was_said() -> None:
    assert run(["sh", "-c", "echo $WORD"], env={"WORD": "out"}) == "out\n"
    with pytest.raises(FailedError, match=r"code 3:\nout\nerr\n"):
        run(["sh", "-c", "echo out; echo err >&2; exit 3"])
    with pytest.raises(DeadlineError, match=r"within 0\.1 s"):
        run(["sleep", "60"], 0.1)
    with pytest.raises(NotFoundError, match="/no/such"):
        run(["/no/such"])


def test_errors_while_waiting_are_not_yet() -> None:
    answers = iter([FailedError("later"), False, True])

    def ask() -> bool:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    wait(ask, 30, "the answer")
    assert list(answers) == []


def test_the_last_error_is_told() -> None:
    def ask() -> bool:
        raise FailedError("still no light")

    with pytest.raises(DeadlineError, match="waited 0 s for the sun; still no light"):
        wait(ask, 0, "the sun")


def test_a_look_between_may_end_the_wait() -> None:
    def look() -> None:
        raise FailedError("the machine has ended")

    began = time.monotonic()
    with pytest.raises(FailedError, match="machine has ended"):
        wait(lambda: False, 60, "ever", on_poll=look)
    assert time.monotonic() - began < 30


def test_this_machine_in_one_line() -> None:
    assert "cores" in describe() and "Linux" in describe() and "\n" not in describe()
