import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from aoscore._pb.iamanager.v6 import iamanager_pb2 as pb
from aoscore.iam.iamserver.admission import Port
from aoscore.iam.iamserver.nodelink import CallerTimeError, Exchange, NodeLink, UnreachableError
from tests.support.running import until

PAUSE = pb.IAMIncomingMessages(pause_node_request=pb.PauseNodeRequest(node_id="n2"))
TYPES = pb.IAMIncomingMessages(get_cert_types_request=pb.GetCertTypesRequest(node_id="n2"))
PAUSED = pb.PauseNodeResponse()


def test_exchange_takes_what_was_asked_for_and_nothing_else() -> None:
    exchange = Exchange()
    assert not exchange.take("pause_node_response")
    exchange.ask("pause_node_response")
    assert not exchange.take("resume_node_response")
    assert exchange.take("pause_node_response")
    assert not exchange.take("pause_node_response"), "a second answer is surplus"
    exchange.ask("create_key_response", "iam")
    assert not exchange.take("create_key_response", "sm")
    assert exchange.take("create_key_response", "iam")
    exchange.ask("create_key_response", "iam")
    assert exchange.take("create_key_response"), "an answer with an error may name no type"


class Bench:
    """A link whose Node is `on_write`."""

    def __init__(self) -> None:
        self.link = NodeLink(Port.PROTECTED)
        self.link.node_id = "n2"
        self.written: list[str] = []
        self.on_write: Callable[[str], None] = lambda kind: None
        self.task: asyncio.Task[None] | None = None

    async def write(self, message: pb.IAMIncomingMessages) -> None:
        kind = message.WhichOneof("IAMIncomingMessage") or ""
        self.written.append(kind)
        self.on_write(kind)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator["Bench"]:
        self.task = asyncio.create_task(self.link.work(self.write))
        try:
            yield self
        finally:
            self.task.cancel()
            await asyncio.gather(self.task, return_exceptions=True)

    def pause(self, *, limit_s: float = 10, remaining_s: float | None = None) -> "asyncio.Task[Any]":
        return asyncio.create_task(
            self.link.request(PAUSE, "pause_node_response", limit_s=limit_s, remaining_s=remaining_s)
        )


async def test_defect_2_an_answer_that_comes_during_the_write_is_not_lost() -> None:
    """The waiter must be there before the request is written (observed.md, defect 2)."""
    bench = Bench()
    bench.on_write = lambda kind: _take(bench.link.on_reply("pause_node_response", PAUSED))
    async with bench.running():
        assert await asyncio.wait_for(bench.pause(), 5) == PAUSED


def _take(taken: bool) -> None:
    assert taken


async def test_one_request_at_a_time_and_surplus_answers_are_ignored() -> None:
    async with Bench().running() as bench:
        first, second = bench.pause(), bench.pause()
        await until(lambda: bench.written)
        await asyncio.sleep(0)
        assert len(bench.written) == 1
        assert not bench.link.on_reply("resume_node_response", pb.ResumeNodeResponse())
        assert bench.link.on_reply("pause_node_response", PAUSED)
        assert not bench.link.on_reply("pause_node_response", PAUSED)
        await first
        await until(lambda: len(bench.written) == 2)
        assert not second.done()
        assert bench.link.on_reply("pause_node_response", PAUSED)
        await second


async def test_caller_s_time_ends_and_its_late_answer_is_nobody_else_s() -> None:
    async with Bench().running() as bench:
        early = bench.pause(remaining_s=0.05)
        later = bench.pause()
        unwritten = bench.pause(remaining_s=0.05)
        for task in (early, unwritten):
            with pytest.raises(CallerTimeError, match="time of the caller"):
                await task
        assert bench.written == ["pause_node_request"] and not later.done()
        assert bench.link.on_reply("pause_node_response", pb.PauseNodeResponse())
        await until(lambda: len(bench.written) == 2)
        assert not later.done(), "the late answer belongs to the first request"
        bench.link.on_reply("pause_node_response", PAUSED)
        await later
        assert len(bench.written) == 2, "what nobody waits for any more is not written"


async def test_silent_node_loses_its_stream() -> None:
    bench = Bench()
    async with bench.running():
        waiting = [bench.pause(limit_s=0.05), bench.pause()]
        for task, text in zip(
            waiting, ("did not answer pause_node_request within 0.05 s", "disconnected"), strict=True
        ):
            with pytest.raises(UnreachableError, match=text):
                await task
        assert bench.task is not None
        with pytest.raises(UnreachableError, match="did not answer"):
            await bench.task
        with pytest.raises(UnreachableError, match="not connected"):
            await bench.pause()


async def test_end_of_the_stream_ends_all_requests_at_once() -> None:
    bench = Bench()
    async with bench.running():
        tasks = [bench.pause() for _ in range(3)]
        await until(lambda: bench.written)
    for task in tasks:
        with pytest.raises(UnreachableError, match="'n2' was disconnected"):
            await task
    assert len(bench.written) == 1


async def test_node_that_connects_anew_leaves_nobody_waiting() -> None:
    async with Bench().running() as bench:
        tasks = [bench.pause() for _ in range(2)]
        await until(lambda: bench.written)
        bench.link.give_up()
        for task in tasks:
            with pytest.raises(UnreachableError, match=r"anew|disconnected"):
                await task


async def test_write_that_fails_is_an_error_and_never_repeated() -> None:
    bench = Bench()

    def fail(kind: str) -> None:
        raise ConnectionError("gone")

    bench.on_write = fail
    async with bench.running():
        with pytest.raises(UnreachableError, match="before it answered pause_node_request"):
            await bench.pause()
    assert len(bench.written) == 1


async def test_queue_has_an_end() -> None:
    bench = Bench()
    tasks = [bench.pause() for _ in range(65)]
    done, waiting = await asyncio.wait(tasks, timeout=0.05)
    assert len(done) == 1 and "is busy" in str(done.pop().exception())
    for task in waiting:
        task.cancel()


async def test_answers_with_types_are_told_apart() -> None:
    async with Bench().running() as bench:
        create = pb.IAMIncomingMessages(create_key_request=pb.CreateKeyRequest(type="iam"))
        task = asyncio.create_task(
            bench.link.request(create, "create_key_response", cert_type="iam", limit_s=5, remaining_s=None)
        )
        await until(lambda: bench.written)
        assert not bench.link.on_reply("create_key_response", pb.CreateKeyResponse(type="sm", csr="other"))
        assert bench.link.on_reply("create_key_response", pb.CreateKeyResponse(type="iam", csr="mine"))
        assert (await task).csr == "mine"
        apply = pb.IAMIncomingMessages(apply_cert_request=pb.ApplyCertRequest(type="iam"))
        task = asyncio.create_task(
            bench.link.request(apply, "apply_cert_response", cert_type="iam", limit_s=5, remaining_s=None)
        )
        await until(lambda: len(bench.written) == 2)
        wrong = pb.ApplyCertResponse(cert_info=pb.CertInfo(type="sm"))
        assert not bench.link.on_reply("apply_cert_response", wrong)
        assert bench.link.on_reply("apply_cert_response", pb.ApplyCertResponse(cert_info=pb.CertInfo(type="iam")))
        await task
