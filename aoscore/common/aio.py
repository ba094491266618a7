"""Structured concurrency: services that start in order and stop in reverse, workers, back-off, broadcasts."""

import asyncio
import contextlib
import logging
import random
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, ParamSpec, Protocol, Self, TypeVar

from aoscore.common.errors import FailedError, first_cause

_log = logging.getLogger(__name__)

T = TypeVar("T")
S = TypeVar("S")
K = TypeVar("K")
P = ParamSpec("P")


class Service(Protocol):
    """A long-running object."""

    async def run(self, started: Callable[[], None]) -> None:
        """Set up, call `started` once, work until cancelled, clean up.

        Tasks it needs belong to a TaskGroup inside. Returning before being cancelled counts as a failure.
        """


@contextlib.contextmanager
def log_and_continue(logger: logging.Logger, what: str) -> Iterator[None]:
    """The one place that logs an error and goes on. `what` says what was tried, e.g. "Can't send unit status"."""
    try:
        yield
    except Exception as error:
        cause = first_cause(error)
        # A stack helps only where the error was not raised on purpose.
        expected = not isinstance(cause, (TypeError, AttributeError, KeyError, IndexError, AssertionError, NameError))
        logger.error("%s: %s", what, cause or type(cause).__name__, exc_info=None if expected else cause)


async def _end_of(future: asyncio.Future[Any]) -> BaseException | None:
    """Wait for the end however often we are cancelled meanwhile: clean-up must not be cut short. Its error, if any."""
    while not future.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait({future})
    return None if future.cancelled() else future.exception()


@contextlib.asynccontextmanager
async def _running(service: Service) -> AsyncIterator[asyncio.Task[None]]:
    """Start one service; on leaving, cancel it and wait for its clean-up."""
    started = asyncio.Event()
    task = asyncio.create_task(service.run(started.set), name=type(service).__name__)
    waiter = asyncio.create_task(started.wait())
    try:
        await asyncio.wait({task, waiter}, return_when=asyncio.FIRST_COMPLETED)
        if task.done() and not started.is_set():
            await task
            raise FailedError(f"{type(service).__name__} ended before it had started")
        yield task
    finally:
        waiter.cancel()
        task.cancel()
        if error := await _end_of(task):
            _log.debug("%s ended with: %s", type(service).__name__, first_cause(error))


async def run_services(services: Sequence[Service], ready: Callable[[], None]) -> None:
    """Start services in order, call `ready`, then run until cancelled or until one ends.

    Stops in reverse order, each fully before the next. Raises the error of the service that ended first.
    """
    async with contextlib.AsyncExitStack() as stack:
        tasks = [await stack.enter_async_context(_running(service)) for service in services]
        ready()
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        task = done.pop()
        await task
        raise FailedError(f"{task.get_name()} ended by itself")


async def unbroken(work: Coroutine[Any, Any, T]) -> T:
    """Await `work` to its end even when the caller is cancelled meanwhile; the cancellation then goes on."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await _end_of(task)
        raise


async def together(jobs: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Run jobs side by side; they begin in their order. Raises what failed, as a TaskGroup does."""
    async with asyncio.TaskGroup() as tasks:
        for job in jobs:
            tasks.create_task(job)


async def side_by_side(first: Coroutine[Any, Any, T], second: Coroutine[Any, Any, S]) -> tuple[T, S]:
    """The results of both. When one fails, the other is cancelled and awaited, then that error goes on alone."""
    try:
        async with asyncio.TaskGroup() as tasks:
            one, other = tasks.create_task(first), tasks.create_task(second)
    except BaseExceptionGroup as group:
        raise first_cause(group) from None
    return one.result(), other.result()


def raise_if_cancelled() -> None:
    """Go on with a cancellation that came together with an error that was caught.

    Before Python 3.13 a TaskGroup that fails while it is cancelled raises the failure alone, and who then goes on
    would never end.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


async def comes_within(event: asyncio.Event, timeout_s: float | None) -> bool:
    """Wait for an event, at most `timeout_s` (None: however long it takes); whether it came."""
    try:
        async with asyncio.timeout(timeout_s):
            await event.wait()
    except TimeoutError:
        return False
    return True


# Spreads load, guards nothing. One for all: making one costs as much as a thousand numbers.
_rng = random.Random()  # noqa: S311


class Backoff:
    """Growing pauses between attempts. Pure: give `rng` for repeatable tests."""

    def __init__(
        self,
        first_s: float,
        limit_s: float,
        *,
        factor: float = 2.0,
        jitter: float = 0.1,
        rng: random.Random | None = None,
    ) -> None:
        self._first_s = first_s
        self._limit_s = limit_s
        self._factor = factor
        self._jitter = jitter
        self._rng = rng or _rng
        self._pause_s = first_s

    def next(self) -> float:
        """The pause before the next attempt, seconds; grows until `limit_s`."""
        pause_s = self._pause_s
        self._pause_s = min(self._pause_s * self._factor, self._limit_s)
        return pause_s * (1 + self._jitter * (2 * self._rng.random() - 1))

    def reset(self) -> None:
        """Begin with the first pause again, after a success."""
        self._pause_s = self._first_s


class _AbandonedError(BaseException):
    """Ends a function in a worker whose caller was cancelled."""


_job = threading.local()


def raise_if_abandoned() -> None:
    """To be called between the pieces of long work in a Worker: ends it there when its caller was cancelled.

    Elsewhere it does nothing.
    """
    abandoned = getattr(_job, "abandoned", None)
    if abandoned is not None and abandoned.is_set():
        raise _AbandonedError


class Worker:
    """Bounded threads for blocking or CPU-heavy work, so that nothing blocks the loop."""

    def __init__(self, name: str, threads: int = 1) -> None:
        self._pool = ThreadPoolExecutor(max_workers=threads, thread_name_prefix=name)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run the function in a thread.

        On cancellation the caller goes on only after the function has ended, so that files and handles it uses are
        never pulled away under it. Long functions end early by `raise_if_abandoned`.
        """
        abandoned = threading.Event()

        def work() -> T:
            _job.abandoned = abandoned
            return function(*args, **kwargs)

        job = self._pool.submit(work)
        future = asyncio.wrap_future(job)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            abandoned.set()
            if not job.cancel():
                await _end_of(future)
            raise

    def close(self) -> None:
        """End the threads; what is queued and not begun is dropped."""
        self._pool.shutdown(wait=True, cancel_futures=True)


async def run_abandonable(function: Callable[[], T], limit_s: float) -> T:
    """Run a function that may never return, such as foreign code at a token, in a thread of its own.

    Raises TimeoutError after `limit_s`; the thread is then left to itself and does not keep the process from ending.
    What it returns later is dropped, so it must hold nothing that has to be closed.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]  # without an error it is a T

    def work() -> None:
        result, error = None, None
        try:
            result = function()
        except BaseException as caught:
            error = caught
        # The loop may have been closed meanwhile.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=work, name="abandonable", daemon=True).start()
    async with asyncio.timeout(limit_s):
        return await future


class Broadcast(Generic[T]):
    """Tells every subscriber each value. A slow subscriber loses its oldest values, which is logged with a count."""

    def __init__(self, name: str, limit: int = 1024) -> None:
        self._name = name
        self._limit = limit
        self._queues: set[asyncio.Queue[T]] = set()
        self._dropped = 0

    def publish(self, value: T) -> None:
        """Hand value to all subscribers; never waits."""
        for queue in self._queues:
            if queue.full():
                queue.get_nowait()
                self._dropped += 1
                _log.warning(
                    "Subscriber is too slow, oldest value dropped: name=%s, dropped=%d", self._name, self._dropped
                )
            queue.put_nowait(value)

    @contextlib.contextmanager
    def subscribe(self) -> Iterator[asyncio.Queue[T]]:
        """A queue that gets every value published from now on, until the block ends."""
        queue: asyncio.Queue[T] = asyncio.Queue(self._limit)
        self._queues.add(queue)
        try:
            yield queue
        finally:
            self._queues.discard(queue)


class ChangeFeed(Generic[K, T]):
    """Tells every subscriber the newest value of each key that has ever changed.

    A new subscriber first gets what changed before it came; a slow one skips intermediate values of a key, but never
    a key. Memory is bounded by the number of keys.
    """

    def __init__(self) -> None:
        self._newest: dict[K, T] = {}
        self._waiting: dict[asyncio.Event, dict[K, T]] = {}

    def publish(self, key: K, value: T) -> None:
        """Hand value to all subscribers; never waits."""
        self._newest[key] = value
        for event, values in self._waiting.items():
            values[key] = value
            event.set()

    def forget(self, key: K) -> None:
        """The key is no more: who subscribes from now on does not get its last value."""
        self._newest.pop(key, None)

    async def values(self) -> AsyncIterator[T]:
        """All values as described above, until the caller ends."""
        event = asyncio.Event()
        waiting = dict(self._newest)
        self._waiting[event] = waiting
        try:
            while True:
                while waiting:
                    yield waiting.pop(next(iter(waiting)))
                event.clear()
                await event.wait()
        finally:
            del self._waiting[event]
