"""`make demo` as a user runs it: to its end, again, interrupted, taken down; nothing of it stays on the machine."""

import os
import random
import re
import signal
import subprocess
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from aoscore.ctl.demo import Demo
from tests.conftest import ROOT
from tests.support.traces import traces

pytestmark = [pytest.mark.timeout(600)]

AOSCTL = Path(sysconfig.get_path("scripts")) / "aosctl"
FINAL = re.compile(r"http://\S+:8080/ answers: .*Hello from a service")


def command(directory: Path, action: str) -> list[str]:
    return [str(AOSCTL), "demo", action, "--dir", str(directory), "--tools", str(ROOT / ".venv-tools")]


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    """Where the demo lives; what is there before and after is the same."""
    path = tmp_path / "demo"
    before = traces(path, Demo(path, ROOT).cgroup)
    yield path
    subprocess.run(command(path, "down"), check=True, capture_output=True)
    assert traces(path, Demo(path, ROOT).cgroup) - before == set()


def up(directory: Path) -> str:
    done = subprocess.run(command(directory, "up"), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert FINAL.search(done.stdout), done.stdout
    return done.stdout


def test_to_the_end_again_and_down(directory: Path) -> None:
    output = up(directory)
    assert "instance demo-web/0 1.0.0: active" in output
    assert '"nodes"' in output or '"ram"' in output, "a monitoring sample is shown"
    assert "web service starts" in output, "the service's log is shown"
    began = time.monotonic()
    up(directory)
    assert time.monotonic() - began < 30
    # And from nothing, as on the second day.
    subprocess.run(command(directory, "down"), check=True, capture_output=True)
    began = time.monotonic()
    up(directory)
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("after_s", [0.0, 2.0, 4.5, 7.0])
def test_interrupt_is_clean_at_any_moment(directory: Path, after_s: float) -> None:
    process = subprocess.Popen(
        command(directory, "up"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    assert process.stdout is not None
    # Before its first word the interpreter itself may still be starting.
    first = process.stdout.readline()
    time.sleep(after_s)
    os.killpg(process.pid, signal.SIGINT)
    output = first + process.communicate(timeout=60)[0]
    assert process.returncode in (0, 130), output
    assert "Traceback" not in output
    if process.returncode == 130:
        assert not directory.exists()


def test_daemons_killed_again_and_again_reach_the_same_end(directory: Path) -> None:
    rng = random.Random(7)
    process = subprocess.Popen(command(directory, "up"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    killed = 0
    while process.poll() is None:
        time.sleep(rng.uniform(0.3, 2.5))
        name = rng.choice(["iam", "cm", "sm"])
        config = f"{directory}/unit/etc/{name}.cfg".encode()
        for entry in Path("/proc").iterdir():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0") if entry.name.isdigit() else []
            except OSError:
                continue
            if config in words and b"--provisioning" not in words:
                os.kill(int(entry.name), signal.SIGKILL)
                killed += 1
        if killed >= 12:
            break
    output, _ = process.communicate(timeout=240)
    assert killed >= 3
    assert process.returncode == 0 and FINAL.search(output), output
