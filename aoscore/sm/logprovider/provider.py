"""Serves log requests one after the other and sends the replies (sm.md §9)."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, datetime, timedelta
from itertools import chain

from aoscore.common.aio import Worker, log_and_continue
from aoscore.common.errors import OutOfRangeError, WrongStateError, to_error_info
from aoscore.common.log import kv
from aoscore.common.types import LogData, LogKind, LogRequest, LogStatus
from aoscore.sm.launcher.runtimes.container.history import InstanceHistory, Run, RunHistory
from aoscore.sm.logprovider.parts import Parts, build_parts
from aoscore.sm.logprovider.source import LogLine, LogSource

_log = logging.getLogger(__name__)

_QUEUE_LIMIT = 64
# The last words of a process may reach the log after its end was noticed.
_AFTER_END = timedelta(seconds=1)


class LogProvider:
    """See the module text. A Service; `request` only queues."""

    def __init__(
        self,
        system: LogSource,
        instances: LogSource,
        history: RunHistory,
        send: Callable[[LogData], Awaitable[None]],
        *,
        max_part_size_bytes: int,
        max_part_count: int,
    ) -> None:
        self._system = system
        self._instances = instances
        self._history = history
        self._send = send
        self._max_part_size_bytes = max_part_size_bytes
        self._max_part_count = max_part_count
        self._queue: asyncio.Queue[LogRequest] = asyncio.Queue(_QUEUE_LIMIT)

    async def request(self, request: LogRequest) -> None:
        """Take a request; its reply comes through `send`. With too many waiting, the reply is an error."""
        try:
            self._queue.put_nowait(request)
        except asyncio.QueueFull:
            error = WrongStateError(f"{_QUEUE_LIMIT} log requests are waiting already")
            await self._send(LogData(request.correlation_id, LogStatus.ERROR, error=to_error_info(error)))

    async def run(self, started: Callable[[], None]) -> None:
        """Serve until cancelled."""
        async with Worker("logs") as worker:
            started()
            while True:
                request = await self._queue.get()
                _log.info(kv("Log requested", kind=request.kind, correlation_id=request.correlation_id))
                with log_and_continue(_log, f"Can't answer log request {request.correlation_id}"):
                    await self._answer(request, worker)

    async def _answer(self, request: LogRequest, worker: Worker) -> None:
        try:
            parts = await worker.run(self._collect, request)
        except Exception as error:
            await self._send(LogData(request.correlation_id, LogStatus.ERROR, error=to_error_info(error)))
            raise
        if parts is None or not parts.data:
            status = LogStatus.ABSENT if parts is None else LogStatus.EMPTY
            await self._send(LogData(request.correlation_id, status, part_count=1, part=1))
            return
        error_info = None
        if parts.dropped:
            text = f"the log was too long: {parts.dropped} oldest parts were left out, ask for a shorter time"
            error_info = to_error_info(OutOfRangeError(text))
        for number, data in enumerate(parts.data, start=1):
            await self._send(
                LogData(
                    request.correlation_id,
                    LogStatus.OK,
                    part_count=len(parts.data),
                    part=number,
                    data=data,
                    error=error_info,
                )
            )

    def _collect(self, request: LogRequest) -> Parts | None:
        """In the worker thread; None when no instance matches or none has crashed."""
        lines = self._lines(request)
        if lines is None:
            return None
        return build_parts(lines, max_size_bytes=self._max_part_size_bytes, max_count=self._max_part_count)

    def _lines(self, request: LogRequest) -> Iterator[LogLine] | None:
        if request.kind is LogKind.SYSTEM:
            return self._system.system(request.since, request.till)
        known = self._history.find(request.filter)
        if not known:
            return None
        if request.kind is LogKind.INSTANCE:
            return self._instances.instances(list(known), request.since, request.till)
        crashes = [
            (name, history, run)
            for name, history in known.items()
            if (run := last_crash(history, request.since, request.till)) is not None
        ]
        if not crashes:
            return None
        crashes.sort(key=lambda crash: crash[2].ended)
        return chain.from_iterable(self._crash_lines(*crash) for crash in crashes)

    def _crash_lines(self, name: str, history: InstanceHistory, run: Run) -> Iterator[LogLine]:
        yield LogLine(run.started, f"instance {history.ident} version {history.version} started")
        yield from self._instances.instances([name], run.started, run.ended + _AFTER_END)
        yield LogLine(run.ended, f"instance {history.ident} {run.reason}")


def last_crash(history: InstanceHistory, since: datetime | None, till: datetime | None) -> Run | None:
    """The newest crash in a period. Pure."""
    oldest, newest = since or datetime.min.replace(tzinfo=UTC), till or datetime.max.replace(tzinfo=UTC)
    return next((run for run in reversed(history.runs) if run.crashed and oldest <= run.ended <= newest), None)
