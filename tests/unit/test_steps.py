"""The summary of all checks: what it counts, and what it calls a success."""

from tests.steps import Result, Step, count, table


def test_tests_of_all_pytest_runs_are_counted() -> None:
    output = [
        "2 failed attempts are no tests\n",
        "===== 3 failed, 40 passed, 2 skipped in 12.30s =====\n",
        "5 passed, 1 error in 3.10s\n",
        "200 passed in 61.00s (0:01:01)\n",
    ]
    assert count(output) == {"failed": 4, "passed": 245, "skipped": 2}


def test_one_step_that_fails_is_a_failure_of_all() -> None:
    good = Result(Step("lint", 5), "ok", 61.0, {})
    bad = Result(Step("unit", 10), "FAILED (2)", 3.0, {"passed": 7, "failed": 1})
    lines = table([good, bad], 70.0).splitlines()
    assert "1:01" in lines[1] and "FAILED (2)" in lines[2]
    assert lines[-2].split()[:2] == ["all", "FAILED"]
    assert lines[-1] == "7 passed, 1 failed, 0 skipped"
    assert table([good], 61.0).splitlines()[-2].split()[:2] == ["all", "ok"]
