"""SM as a process of its own that may kill itself: `python -m tests.support.sm_process CONFIG [KILL_AT] [whole]`.

With KILL_AT the process kills itself with SIGKILL right before its KILL_AT-th persistent step, counted from the first
UpdateInstances that stops something. Steps are: begin and end of each database transaction, and every rename, removal
and directory in the working directory or among the notes of the runtime.

It has the test runtime; "whole" is the program as it is, with containers and networks, where files count as steps when
they get their names and the programs that SM starts do not count.
"""

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Sequence, Set
from pathlib import Path
from typing import Any

from aoscore.common.aio import Service
from aoscore.common.daemon import Program, run_daemon
from aoscore.common.db import Database
from aoscore.common.types import InstanceIdent, InstanceInfo, LogRequest
from aoscore.sm import app
from aoscore.sm.config import Config, load
from aoscore.sm.launcher.launcher import Launcher
from tests.support.processes import NoMonitoring, NoNetworks, ProcessRuntime, empty_log

_FILE_EVENTS = frozenset({"os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree", "subprocess.Popen"})
_WHOLE_EVENTS = frozenset({"os.rename"})


def kill_at(step: int, root: Path, events: Set[str]) -> None:
    """See the module text. Writes the number and name of each step to `<root>/steps`."""
    count = 0
    counting = False
    names = os.open(root / "steps", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(name: str) -> None:
        nonlocal count
        if not counting:
            return
        count += 1
        os.write(names, f"{count} {name}\n".encode())
        if count == step:
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event in events and (event == "subprocess.Popen" or str(arguments[0]).startswith(str(root))):
            # A new name says more than that of a temporary file.
            note(f"{event} {Path(str(arguments[event == 'os.rename'])).name}")

    original: Callable[..., Any] = Database.write

    async def write(self: Database, function: Callable[..., Any]) -> Any:
        note(f"before {function.__qualname__}")
        result = await original(self, function)
        note(f"after {function.__qualname__}")
        return result

    update: Callable[..., Any] = Launcher.update

    async def begin(self: Launcher, start: Sequence[InstanceInfo], stop: Sequence[InstanceIdent]) -> None:
        nonlocal counting
        counting = counting or bool(stop)
        await update(self, start, stop)

    Database.write = write  # type: ignore[method-assign]
    Launcher.update = begin  # type: ignore[method-assign]
    sys.addaudithook(audit)


async def build(config: Config, options: argparse.Namespace, stack: contextlib.AsyncExitStack) -> list[Service]:
    """The product's own composition around the test runtime."""
    core = await app.build_core(config, stack)

    async def request_log(request: LogRequest) -> None:
        await core.client.send(empty_log(request))

    return app.assemble(
        core,
        runtimes=[ProcessRuntime(config.working_dir.parent / "notes", core.node.node_id)],
        networks=NoNetworks(),
        monitoring=NoMonitoring(),
        request_log=request_log,
    )


if __name__ == "__main__":
    whole = "whole" in sys.argv[2:]
    if len(sys.argv) > 2 and sys.argv[2].isdigit():
        kill_at(int(sys.argv[2]), Path(sys.argv[1]).parent, _WHOLE_EVENTS if whole else _FILE_EVENTS)
    options = ["-c", sys.argv[1], "-v", "debug"]
    if whole:
        raise SystemExit(run_daemon(app.PROGRAM, options))
    program = Program(
        name="aos_servicemanager", title="SM", default_config="aos_servicemanager.cfg", load=load, build=build
    )
    raise SystemExit(run_daemon(program, options))
