"""SM as it is, with notes of what it does when: `python -m tests.benchmarks.sm_process NOTES -c CONFIG …`.

Each call of a step is a line of NOTES: its name, begin and end, seconds of the monotonic clock. On SIGUSR1 a round of
monitoring is done at once, and noted with the CPU time that it took of this process and of its children.
"""

import asyncio
import functools
import mmap
import resource
import signal
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from aoscore.common.aio import Worker
from aoscore.common.daemon import run_daemon
from aoscore.common.download import Downloader
from aoscore.sm.app import PROGRAM
from aoscore.sm.imagemanager.imagemanager import ImageManager
from aoscore.sm.imagemanager.store import ImageStore
from aoscore.sm.launcher.runtimes.container.container import Container
from aoscore.sm.launcher.runtimes.container.preparation import Preparation
from aoscore.sm.launcher.runtimes.container.runtime import ContainerRuntime
from aoscore.sm.monitoring.monitor import Monitoring
from aoscore.sm.networkmanager.manager import NetworkManager

_NOTES_BYTES = 4 * 1024 * 1024

STEPS: tuple[tuple[str, type, str], ...] = (
    ("download", Downloader, "download"),
    ("unpack", ImageStore, "unpack"),
    ("install", ImageManager, "install"),
    ("network", NetworkManager, "attach"),
    ("network down", NetworkManager, "detach"),
    ("prepare", Preparation, "fill"),
    ("start", Container, "start"),
    ("start instance", ContainerRuntime, "start_instance"),
    ("stop instance", ContainerRuntime, "stop_instance"),
)


class NoteBook:
    """A file that is mapped: notes are there for its readers at once, and cost what is measured no system call."""

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        self._size = 0
        with path.open("w+b") as file:
            file.truncate(_NOTES_BYTES)
            self._map = mmap.mmap(file.fileno(), _NOTES_BYTES)

    def add(self, name: str, begin: float) -> None:
        """A step that ends now. Raises ValueError when the book is full."""
        line = f"{name}\t{begin}\t{time.monotonic()}\n".encode()
        with self._lock:
            self._map[self._size : self._size + len(line)] = line
            self._size += len(line)


def note_steps(note: Callable[[str, float], None]) -> None:
    """Note every call of the steps."""

    def noted(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        if asyncio.iscoroutinefunction(original):

            @functools.wraps(original)
            async def wait(*args: Any, **kwargs: Any) -> Any:
                begin = time.monotonic()
                try:
                    return await original(*args, **kwargs)
                finally:
                    note(name, begin)

            return wait

        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            begin = time.monotonic()
            try:
                return original(*args, **kwargs)
            finally:
                note(name, begin)

        return call

    for name, owner, method in STEPS:
        setattr(owner, method, noted(name, getattr(owner, method)))


def round_on_signal(note: Callable[[str, float], None]) -> None:
    """See the module text."""
    run: Callable[..., Awaitable[None]] = Monitoring.run
    worker = Worker("round")
    tasks: list[asyncio.Task[None]] = []

    async def measured(self: Monitoring) -> None:
        begin, own, of_children = time.monotonic(), time.process_time(), children_s()
        await self._round(worker)
        own, of_children = time.process_time() - own, children_s() - of_children
        note(f"round {own:.6f} {of_children:.6f}", begin)

    async def listen(self: Monitoring, started: Callable[[], None]) -> None:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGUSR1, lambda: tasks.append(loop.create_task(measured(self))))
        await run(self, started)

    Monitoring.run = listen  # type: ignore[method-assign]


def children_s() -> float:
    """CPU time of programs that ended, seconds."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    book = NoteBook(Path(sys.argv[1]))
    note_steps(book.add)
    round_on_signal(book.add)
    raise SystemExit(run_daemon(PROGRAM, sys.argv[2:]))
