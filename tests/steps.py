"""All that CI checks, step by step: `make test`. Cheap steps first; each has a time limit; one table at the end.

A step is a target of the Makefile. One that fails does not keep the others from running, except for the set-up. A step
in the background is nicer than the others, and waited for where its result is needed.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_COUNTS = re.compile(r"\b(\d+) (passed|failed|errors?|skipped)\b")
_SUMMARY = re.compile(r"^=* ?\d+ (passed|failed|errors?|skipped).* in [\d.]+s")
# From SIGTERM to SIGKILL: tests take their beds down.
_GRACE_S = 60.0


@dataclass(frozen=True)
class Step:
    """A target of the Makefile and how long it may take, in minutes."""

    target: str
    limit_min: float
    background: bool = False
    needs_background: bool = False


STEPS = (
    Step("setup", 12),
    Step("lint", 6),
    Step("guests", 30, background=True),
    Step("unit", 12),
    Step("layer", 8),
    Step("integration", 25),
    Step("system", 40, needs_background=True),
    Step("pins", 14),
    Step("vm", 45),
)


class Running:
    """A step that has been started; its output is shown as it comes, or kept until it is collected."""

    def __init__(self, step: Step, jobs: str) -> None:
        self.step = step
        self.began = time.monotonic()
        self.took_s = 0.0
        self.output: list[str] = []
        self.timed_out = False
        command = ["make", "--no-print-directory", step.target, f"JOBS={jobs}"]
        self._process = subprocess.Popen(
            ["nice", "-n", "10", *command] if step.background else command,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        self._timer = threading.Timer(step.limit_min * 60, self._end)
        self._timer.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.output.append(line)
            if not self.step.background:
                print(line, end="", flush=True)
        self._process.wait()
        self.took_s = time.monotonic() - self.began

    def _end(self) -> None:
        self.timed_out = True
        self.kill()

    def kill(self) -> None:
        """End it with all that it has started."""
        for number, wait_s in ((signal.SIGTERM, _GRACE_S), (signal.SIGKILL, None)):
            if self._process.poll() is None:
                os.killpg(self._process.pid, number)
            try:
                self._process.wait(wait_s)
                return
            except subprocess.TimeoutExpired:
                continue

    def collect(self) -> "Result":
        """Wait for its end."""
        self._reader.join()
        self._timer.cancel()
        if self.step.background:
            print("".join(self.output), end="", flush=True)
        code = self._process.returncode
        result = "time is over" if self.timed_out else "ok" if code == 0 else f"FAILED ({code})"
        return Result(self.step, result, self.took_s, count(self.output))


@dataclass(frozen=True)
class Result:
    """How a step ended; `counts` are its tests by outcome."""

    step: Step
    result: str
    took_s: float
    counts: dict[str, int]


def count(lines: list[str]) -> dict[str, int]:
    """Tests by outcome, from the last lines of all pytest runs in an output."""
    counts: dict[str, int] = {}
    for line in lines:
        if _SUMMARY.match(line):
            for number, outcome in _COUNTS.findall(line):
                name = "failed" if outcome.startswith("error") else outcome
                counts[name] = counts.get(name, 0) + int(number)
    return counts


def table(results: list[Result], took_s: float) -> str:
    """The summary: a line for each step, and one of all tests."""
    lines = [f"{'step':12} {'result':14} {'time':>8} {'limit':>7}  tests"]
    for one in results:
        tests = ", ".join(f"{number} {name}" for name, number in one.counts.items())
        lines.append(
            f"{one.step.target:12} {one.result:14} {_clock(one.took_s):>8} {one.step.limit_min:4g} min  {tests}"
        )
    total = {name: sum(one.counts.get(name, 0) for one in results) for name in ("passed", "failed", "skipped")}
    lines.append(
        f"{'all':12} {'ok' if all(one.result == 'ok' for one in results) else 'FAILED':14} {_clock(took_s):>8}"
    )
    lines.append(", ".join(f"{number} {name}" for name, number in total.items()))
    return "\n".join(lines)


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


def main() -> int:
    """Run the steps, or those named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", nargs="*", help=", ".join(step.target for step in STEPS))
    parser.add_argument("--jobs", default="2", help="tests at a time")
    arguments = parser.parse_args()
    if unknown := set(arguments.step) - {step.target for step in STEPS}:
        parser.error(f"unknown step {', '.join(sorted(unknown))}")
    began = time.monotonic()
    background: list[Running] = []
    results: list[Result] = []
    present: Running | None = None
    try:
        for step in STEPS:
            if arguments.step and step.target not in arguments.step:
                continue
            if step.needs_background:
                results += [running.collect() for running in background]
                background.clear()
            print(f"\n=== {step.target}{' (in the background)' if step.background else ''}", flush=True)
            present = Running(step, arguments.jobs)
            if step.background:
                background.append(present)
                continue
            results.append(present.collect())
            print(f"=== {step.target}: {results[-1].result} after {_clock(results[-1].took_s)}", flush=True)
            if step is STEPS[0] and results[-1].result != "ok":
                break
        results += [running.collect() for running in background]
    except KeyboardInterrupt:
        for running in [*background, *([present] if present else [])]:
            running.kill()
        return 130
    print(f"\n{table(results, time.monotonic() - began)}")
    return 0 if all(one.result == "ok" for one in results) else 1


if __name__ == "__main__":
    sys.exit(main())
