import asyncio
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from aoscore.common.errors import DeadlineError, FailedError, NotFoundError
from aoscore.common.process import run_program


async def test_collects_output_and_feeds_input() -> None:
    finished = await run_program(["sh", "-c", "cat; echo no >&2"], timeout_s=10, stdin=b"text")
    assert (finished.code, finished.stdout, finished.stderr) == (0, b"text", b"no\n")


async def test_failure_tells_the_last_words() -> None:
    with pytest.raises(FailedError, match=r"sh failed with code 3: last"):
        await run_program(["sh", "-c", "echo first >&2; echo last >&2; exit 3"], timeout_s=10)
    assert (await run_program(["sh", "-c", "exit 3"], timeout_s=10, check=False)).code == 3


async def test_missing_program_is_named() -> None:
    with pytest.raises(NotFoundError, match="/nowhere/at/all"):
        await run_program(["/nowhere/at/all"], timeout_s=10)


async def test_time_limit_kills_children_too(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    with pytest.raises(DeadlineError, match="within 1 s"):
        await run_program(["sh", "-c", f"sleep 60 & echo $! >{pid_file}; wait"], timeout_s=1)
    child = Path(f"/proc/{pid_file.read_text().strip()}/stat")
    for _ in range(100):
        if not child.exists() or child.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return
        await asyncio.sleep(0.01)
    pytest.fail("the child is still running")


async def test_background_child_is_not_waited_for_and_keeps_its_output(tmp_path: Path) -> None:
    marker = tmp_path / "done"
    script = f"(sleep 0.5; echo late; echo later >&2; touch {marker}) & echo now; echo $!; echo said >&2"
    begin = time.monotonic()
    finished = await run_program(["sh", "-c", script], timeout_s=10, background=True)
    assert time.monotonic() - begin < 0.4
    first, pid, last = finished.stdout.decode().split()
    assert (first, last) == ("now", "said")
    while Path(f"/proc/{pid}").exists() and time.monotonic() - begin < 5:
        os.sched_yield()
    assert marker.exists(), "the child could not write its output"


async def test_background_program_that_fails_or_hangs() -> None:
    with pytest.raises(FailedError, match="code 4: broken"):
        await run_program(["sh", "-c", "echo broken; exit 4"], timeout_s=10, background=True)
    with pytest.raises(DeadlineError):
        await run_program([sys.executable, "-c", "import time; time.sleep(60)"], timeout_s=0.3, background=True)
    killed = await run_program(["sh", "-c", "kill -9 $$"], timeout_s=10, check=False, background=True)
    assert killed.code == -signal.SIGKILL
