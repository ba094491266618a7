"""Programs and waiting, for tools and tests that drive a Unit from outside. Blocking."""

import contextlib
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from aoscore.common.errors import AosError, DeadlineError, FailedError, NotFoundError

_POLL_S = 0.3


def run(
    args: Sequence[str | Path],
    timeout_s: float = 60,
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> str:
    """Run a program; its output. `env` is added to the environment.

    Raises FailedError with all it said when it fails, DeadlineError when it was killed after the time limit,
    NotFoundError when it is not installed.
    """
    command = [str(arg) for arg in args]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
            cwd=cwd,
            env={**os.environ, **(env or {})},
        )
    except subprocess.TimeoutExpired:
        raise DeadlineError(f"{' '.join(command)} did not end within {timeout_s:g} s") from None
    except FileNotFoundError as error:
        raise NotFoundError(f"cannot run {command[0]}: {error.filename} is not there") from None
    if done.returncode != 0:
        said = f"{done.stdout}{done.stderr}"
        raise FailedError(f"{' '.join(command)} failed with code {done.returncode}:\n{said}")
    return done.stdout


def wait(
    done: Callable[[], object],
    timeout_s: float,
    what: str,
    *,
    on_poll: Callable[[], object] | None = None,
    pause_s: float = _POLL_S,
) -> None:
    """Ask until the answer is true, with pauses; an AosError while asking counts as "not yet".

    `on_poll` is called between: what it raises ends the wait. Raises DeadlineError with `what` and the last error.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        last = ""
        try:
            if done():
                return
        except AosError as error:
            last = f"; {error}"
        if on_poll is not None:
            on_poll()
        if time.monotonic() > deadline:
            raise DeadlineError(f"waited {timeout_s:g} s for {what}{last}")
        time.sleep(pause_s)


def which(name: str) -> str | None:
    """Path of a program, also where PATH lacks the folders of the system's own."""
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")


@contextlib.contextmanager
def step(what: str) -> Iterator[None]:
    """Tell the user what is being done, and how long it took."""
    print(f"==> {what} ... ", end="", flush=True)
    began = time.monotonic()
    try:
        yield
    except AosError:
        print("failed")
        raise
    print(f"{time.monotonic() - began:.1f} s", flush=True)


def describe() -> str:
    """This machine in one line, for reports with figures: processors and kernel."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.machine())
    return f"{os.cpu_count()} cores {model}, Linux {platform.release()}"
