"""Frames to one SM and replies from it."""

import asyncio

import pytest

from aoscore._pb.servicemanager.v5 import servicemanager_pb2 as pb
from aoscore.cm.smcontroller import link
from aoscore.cm.smcontroller.link import SmLink
from aoscore.common.errors import DeadlineError, FailedError

FRAME = pb.SMIncomingMessages(get_average_monitoring=pb.GetAverageMonitoring())


async def test_an_sm_that_takes_nothing_any_more_blocks_nobody_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "WRITE_TIMEOUT_S", 0.05)
    one = SmLink()
    one.node_id = "n1"
    for _ in range(link._OUTBOX_LIMIT):
        await one.send(FRAME)
    with pytest.raises(DeadlineError, match="node n1 takes no messages"):
        await one.send(FRAME)
    await one.next_frame()
    await one.send(FRAME)


async def test_requests_of_a_kind_wait_for_each_other_and_end_with_the_stream() -> None:
    one = SmLink()
    first = asyncio.create_task(one.request(FRAME, "average_monitoring", accept=lambda reply: reply == 1))
    second = asyncio.create_task(one.request(FRAME, "average_monitoring"))
    await one.next_frame()
    assert not one.on_reply("node_config_status", 1), "nobody asked for it"
    assert not one.on_reply("average_monitoring", 0), "of an earlier request"
    assert one.on_reply("average_monitoring", 1)
    assert await first == 1
    await one.next_frame()
    one.close()
    with pytest.raises(FailedError, match="disconnected"):
        await second
    with pytest.raises(FailedError, match="disconnected"):
        await one.send(FRAME)


async def test_a_request_without_a_reply_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "REPLY_TIMEOUT_S", 0.05)
    one = SmLink()
    with pytest.raises(DeadlineError, match="did not answer get_average_monitoring"):
        await one.request(FRAME, "average_monitoring")
    assert not one.on_reply("average_monitoring", 1), "too late"
