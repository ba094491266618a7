import asyncio
import logging
import random
import threading
import time
from collections.abc import Callable

import pytest

from aoscore.common.aio import (
    Backoff,
    Broadcast,
    ChangeFeed,
    Worker,
    comes_within,
    log_and_continue,
    raise_if_abandoned,
    raise_if_cancelled,
    run_services,
    side_by_side,
)
from aoscore.common.errors import FailedError, NotFoundError


class Recorder:
    def __init__(self, name: str, log: list[str], fail: str = "", cleanup_s: float = 0.0) -> None:
        self.name, self.log, self.fail, self.cleanup_s = name, log, fail, cleanup_s

    async def run(self, started: Callable[[], None]) -> None:
        if self.fail == "before":
            raise FailedError(f"{self.name} can't start")
        if self.fail == "returns early":
            return
        self.log.append(f"+{self.name}")
        started()
        try:
            if self.fail == "later":
                await asyncio.sleep(0.01)
                raise FailedError(f"{self.name} broke")
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(self.cleanup_s)
            self.log.append(f"-{self.name}")


async def test_services_start_in_order_and_stop_in_reverse() -> None:
    log: list[str] = []
    ready = asyncio.Event()
    services = [Recorder("a", log), Recorder("b", log, cleanup_s=0.02), Recorder("c", log)]
    task = asyncio.create_task(run_services(services, ready.set))
    await ready.wait()
    assert log == ["+a", "+b", "+c"]
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert log[3:] == ["-c", "-b", "-a"]


async def test_second_cancellation_does_not_cut_clean_up() -> None:
    log: list[str] = []
    ready = asyncio.Event()
    task = asyncio.create_task(run_services([Recorder("a", log, cleanup_s=0.05)], ready.set))
    await ready.wait()
    task.cancel()
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert log == ["+a", "-a"]


@pytest.mark.parametrize(
    ("fail", "message"),
    [("before", "b can't start"), ("returns early", "ended before it had started"), ("later", "b broke")],
)
async def test_failing_service_stops_the_others_and_is_named(fail: str, message: str) -> None:
    log: list[str] = []
    with pytest.raises(FailedError, match=message):
        await run_services([Recorder("a", log), Recorder("b", log, fail)], lambda: None)
    assert log[-1] == "-a"


def test_backoff_grows_to_its_limit_and_resets() -> None:
    backoff = Backoff(1, 10, jitter=0)
    assert [backoff.next() for _ in range(6)] == [1, 2, 4, 8, 10, 10]
    backoff.reset()
    assert backoff.next() == 1
    jittered = Backoff(1, 10, jitter=0.1, rng=random.Random(1))
    assert 0.9 <= jittered.next() <= 1.1


async def test_worker_runs_beside_the_loop_and_is_waited_for() -> None:
    ended: list[float] = []

    def work() -> int:
        time.sleep(0.05)
        ended.append(time.monotonic())
        return 7

    async with Worker("w") as worker:
        assert await worker.run(work) == 7
        task = asyncio.create_task(worker.run(work))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert len(ended) == 2, "a cancelled caller goes on only after the function has ended"


async def test_broadcast_drops_the_oldest_of_a_slow_subscriber(caplog: pytest.LogCaptureFixture) -> None:
    broadcast: Broadcast[int] = Broadcast("numbers", limit=2)
    with broadcast.subscribe() as slow, broadcast.subscribe() as quick:
        for number in range(3):
            broadcast.publish(number)
            if number < 2:
                assert quick.get_nowait() == number
        assert [slow.get_nowait(), slow.get_nowait()] == [1, 2]
    assert "name=numbers, dropped=1" in caplog.text
    broadcast.publish(9)


def test_log_and_continue_names_what_was_tried(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("test")
    with log_and_continue(logger, "Can't do it"):
        raise FailedError("disk is away")
    assert caplog.records[0].getMessage() == "Can't do it: disk is away"
    assert caplog.records[0].exc_info is None
    with log_and_continue(logger, "Can't do that"):
        raise TypeError("bug")
    assert caplog.records[1].exc_info is not None, "a programming error shows where it is"
    with pytest.raises(KeyboardInterrupt), log_and_continue(logger, "x"):
        raise KeyboardInterrupt


async def test_change_feed_tells_past_changes_and_skips_no_key() -> None:
    feed: ChangeFeed[str, int] = ChangeFeed()
    feed.publish("a", 1)
    feed.publish("a", 2)
    values = feed.values()
    assert await anext(values) == 2
    for value in (3, 4):
        feed.publish("a", value)
    feed.publish("b", 5)
    assert [await anext(values), await anext(values)] == [4, 5]
    waiter = asyncio.ensure_future(anext(values))
    await asyncio.sleep(0)
    assert not waiter.done()
    feed.publish("c", 6)
    assert await waiter == 6
    await values.aclose()
    feed.publish("a", 7)
    late = feed.values()
    assert [await anext(late) for _ in range(3)] == [7, 5, 6]
    await late.aclose()
    assert not feed._waiting


async def test_event_that_comes_and_event_that_does_not() -> None:
    event = asyncio.Event()
    assert not await comes_within(event, 0.01)
    assert not await comes_within(event, -1)
    waiting = asyncio.create_task(comes_within(event, None))
    await asyncio.sleep(0)
    event.set()
    assert await waiting
    assert await comes_within(event, 0)


async def test_two_side_by_side() -> None:
    """Both results; or the error of the one that fails, bare, once the other has cleaned up."""
    met, ended = asyncio.Barrier(2), asyncio.Event()

    async def one(value: int) -> int:
        await met.wait()
        return value

    async def fail() -> int:
        raise NotFoundError("no such image")

    async def wait() -> int:
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()
        return 0

    async with asyncio.timeout(10):
        assert await side_by_side(one(1), one(2)) == (1, 2)
        with pytest.raises(NotFoundError, match="no such image"):
            await side_by_side(wait(), fail())
    assert ended.is_set()


async def test_cancellation_that_meets_an_error_is_not_lost() -> None:
    """See raise_if_cancelled: with TaskGroup the loop below would never end before Python 3.13."""
    failing = asyncio.Event()

    async def fail() -> None:
        await failing.wait()
        raise ValueError

    async def work() -> None:
        while True:
            try:
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(fail())
                    await asyncio.Event().wait()
            except* ValueError:
                raise_if_cancelled()

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    failing.set()
    await asyncio.sleep(0)
    task.cancel()
    done, _ = await asyncio.wait({task}, timeout=5)
    assert done and task.cancelled()


async def test_forgotten_key_is_told_to_nobody_new() -> None:
    feed: ChangeFeed[str, int] = ChangeFeed()
    feed.publish("a", 1)
    feed.publish("b", 2)
    early = feed.values()
    assert await anext(early) == 1
    feed.forget("a")
    feed.forget("unknown")
    late = feed.values()
    assert await anext(late) == 2


async def test_long_work_in_a_worker_ends_when_its_caller_is_cancelled() -> None:
    begun = threading.Event()
    ended: list[bool] = []

    def work() -> None:
        begun.set()
        try:
            while True:
                raise_if_abandoned()
                time.sleep(0.001)
        finally:
            ended.append(True)

    async with Worker("test") as worker:
        task = asyncio.create_task(worker.run(work))
        while not begun.is_set():
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ended == [True]
        assert await worker.run(lambda: raise_if_abandoned() or 7) == 7


def test_nobody_is_abandoned_outside_of_a_worker() -> None:
    raise_if_abandoned()
