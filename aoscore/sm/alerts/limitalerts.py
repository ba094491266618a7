"""Tells CM when an instance is held back by a limit that does not end it: processes it could not start, children that
were killed because its memory is full. Otherwise only the service would know.

The kernel counts such events per control group and tells that a file has changed, so nothing is done and nothing read
while all is well; with the first version of control groups it only counts, and the files are read now and then. An
instance that goes on is told about once per period, with the number of times.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

import msgspec

from aoscore.common.aio import Broadcast, log_and_continue
from aoscore.common.types import InstanceAlert, InstanceStatus
from aoscore.sm.cgroups import CgroupLayout
from aoscore.sm.inotify import Inotify
from aoscore.sm.launcher.runtimes.base import SampleTarget

_log = logging.getLogger(__name__)

_PERIOD_S = 60.0
# Many instances start at once; each look goes over all of them.
_SETTLE_S = 1.0
_POLL_S = 5.0


class Kind(msgspec.Struct, frozen=True):
    """A limit: where its events are counted, and what to say of `count` of them."""

    controller: str
    file: str
    counter: str
    text: str


PIDS = Kind("pids", "pids.events", "max", "the limit of processes was reached: {count} could not be started")
MEMORY = Kind("memory", "memory.events", "oom_kill", "the limit of memory was reached: {count} processes were killed")


class Runtime(Protocol):
    """A runtime, as far as limits are concerned."""

    @property
    def changed(self) -> Broadcast[InstanceStatus]:
        """Every state change."""
        ...

    def sample_targets(self) -> list[SampleTarget]:
        """Instances that run now."""
        ...


class _Watched(msgspec.Struct):
    """One limit of one run of an instance."""

    target: SampleTarget
    kind: Kind
    path: Path
    seen: int
    """Events that were told, or were there before we were."""

    @property
    def run(self) -> tuple[str, int]:
        """Instance id and first process."""
        return self.target.instance_id, self.target.pid


class LimitAlerts:
    """See the module text. A Service."""

    def __init__(
        self,
        runtimes: Sequence[Runtime],
        layout: CgroupLayout,
        send: Callable[[InstanceAlert], Awaitable[None]],
        *,
        period_s: float = _PERIOD_S,
        settle_s: float = _SETTLE_S,
    ) -> None:
        """`period_s`: between alerts about a limit of an instance; `settle_s`: before a new instance is looked at."""
        self._runtimes = runtimes
        self._layout = layout
        self._send = send
        self._period_s = period_s
        self._settle_s = settle_s
        self._runs: dict[tuple[str, int], SampleTarget] = {}
        self._watched: dict[int, _Watched] = {}
        self._due: asyncio.Queue[_Watched] = asyncio.Queue()
        self._tasks: asyncio.TaskGroup | None = None

    async def run(self, started: Callable[[], None]) -> None:
        """Watch until cancelled."""
        loop = asyncio.get_running_loop()
        with Inotify() as inotify, contextlib.ExitStack() as stack:
            queues = [stack.enter_context(runtime.changed.subscribe()) for runtime in self._runtimes]
            loop.add_reader(inotify.fileno(), self._on_change, inotify)
            stack.callback(loop.remove_reader, inotify.fileno())
            async with asyncio.TaskGroup() as tasks:
                self._tasks = tasks
                # Adopted instances: what happened before is no news.
                self._refresh(inotify, adopted=True)
                for queue in queues:
                    tasks.create_task(self._follow(queue, inotify))
                started()
                while True:
                    watched = await self._due.get()
                    with log_and_continue(_log, "Can't tell that a limit was reached"):
                        await self._tell(watched)
                    # Only then again: a service that forks without end must not keep us busy.
                    tasks.create_task(self._watch_later(watched, inotify, self._period_s))

    async def _follow(self, queue: asyncio.Queue[InstanceStatus], inotify: Inotify) -> None:
        while True:
            await queue.get()
            await asyncio.sleep(self._settle_s)
            while not queue.empty():
                queue.get_nowait()
            with log_and_continue(_log, "Can't watch limits of instances"):
                self._refresh(inotify)

    def _refresh(self, inotify: Inotify, *, adopted: bool = False) -> None:
        """Watch the runs that are new, forget those that are over."""
        targets = [target for runtime in self._runtimes for target in runtime.sample_targets()]
        runs = {(target.instance_id, target.pid): target for target in targets}
        new = runs.keys() - self._runs.keys()
        self._runs = runs
        self._watched = {number: watched for number, watched in self._watched.items() if watched.run in runs}
        for run in new:
            for watched in self._limits(runs[run]):
                watched.seen = _count(watched) if adopted else 0
                self._watch(watched, inotify)

    def _limits(self, target: SampleTarget) -> Iterable[_Watched]:
        for kind in (PIDS, MEMORY):
            # The first version's memory controller has another file, which tells nobody of its changes.
            tree = self._layout.unified if self._layout.version == 2 else self._layout.controllers.get(kind.controller)
            if tree is not None and (path := Path(f"{tree}{target.cgroup}", kind.file)).exists():
                yield _Watched(target, kind, path, 0)

    def _watch(self, watched: _Watched, inotify: Inotify) -> None:
        assert self._tasks is not None  # noqa: S101 - set by run
        if watched.run not in self._runs:
            return
        number = None
        if self._layout.version == 2:
            # The run may end at any moment, and its control group with it.
            with contextlib.suppress(FileNotFoundError):
                number = inotify.watch(watched.path)
                self._watched[number] = watched
        # After the watch began: nothing falls between.
        if _count(watched) > watched.seen:
            self._watched.pop(number or 0, None)
            self._due.put_nowait(watched)
        elif self._layout.version == 1:
            self._tasks.create_task(self._watch_later(watched, inotify, min(_POLL_S, self._period_s)))

    def _on_change(self, inotify: Inotify) -> None:
        for number in inotify.changed():
            if (watched := self._watched.pop(number, None)) is not None:
                self._due.put_nowait(watched)

    async def _tell(self, watched: _Watched) -> None:
        count = _count(watched)
        new, watched.seen = count - watched.seen, max(count, watched.seen)
        if new > 0:
            info = watched.target.info
            text = watched.kind.text.format(count=new)
            await self._send(InstanceAlert(datetime.now(UTC), info.ident, info.version, text))

    async def _watch_later(self, watched: _Watched, inotify: Inotify, pause_s: float) -> None:
        await asyncio.sleep(pause_s)
        self._watch(watched, inotify)


def _count(watched: _Watched) -> int:
    """Events so far; 0 when the control group is gone."""
    try:
        lines = watched.path.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{watched.kind.counter} ")), 0)
