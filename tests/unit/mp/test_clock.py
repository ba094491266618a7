"""The node's clock: when it is set, when it counts as right."""

import asyncio
import contextlib
import time

import pytest

from aoscore._pb.servicemanager.v5 import servicemanager_pb2 as pb
from aoscore.common.types import Duration
from aoscore.mp.clock import ClockRule, ClockSync, kernel_is_synchronized, main_time
from aoscore.mp.communication.connection import ChannelClosedError
from aoscore.mp.config import ClockSyncConfig
from aoscore.mp.filechunker.downloads import clock_sync
from aoscore.mp.nodeserver.link import NodeLink
from tests.support.links import PORTS, linked
from tests.support.running import until

AUTO = ClockSyncConfig()
ALWAYS = ClockSyncConfig(enabled=True)


@pytest.mark.parametrize(
    ("config", "difference_s", "is_synchronized", "expected"),
    [
        (AUTO, 11, False, True),
        (AUTO, -11, False, True),
        (AUTO, 9, False, False),
        (AUTO, 11, True, False),
        (ALWAYS, 11, True, True),
        (ALWAYS, 9, True, False),
    ],
)
def test_when_the_clock_is_set(
    config: ClockSyncConfig, difference_s: float, is_synchronized: bool, expected: bool
) -> None:
    wanted = ClockRule(config).on_answer(1e9 + difference_s, 1e9, 5.0, is_synchronized=is_synchronized)
    assert wanted == (1e9 + difference_s if expected else None)


def test_answers_grow_old() -> None:
    rule = ClockRule(AUTO)
    assert not rule.has_lost_it(1e6)
    rule.on_answer(0, 0, 100.0, is_synchronized=True)
    assert not rule.has_lost_it(700.0)
    assert rule.has_lost_it(700.1)


def test_kernel_is_asked() -> None:
    assert kernel_is_synchronized() in (True, False)


async def test_clock_is_right_at_once_where_something_else_keeps_it() -> None:
    link = NodeLink()
    ClockSync(AUTO, link, 3, is_synchronized=lambda: True)
    assert link.has_time.is_set()
    link = NodeLink()
    ClockSync(ALWAYS, link, 3, is_synchronized=lambda: True)
    assert not link.has_time.is_set()


async def test_clock_is_taken_over_the_link() -> None:
    set_to: list[float] = []
    async with linked({}, {}, provisioning=True) as both:
        link = NodeLink((4,))
        clock = ClockSync(
            ClockSyncConfig(enabled=True, send_period_s=Duration(0.05)),
            link,
            PORTS.cm_open,
            is_synchronized=lambda: False,
            set_time=set_to.append,
            now=lambda: 1000.0,
        )
        link.set(both.node)
        with pytest.raises(ChannelClosedError, match="clock of this node is not set"):
            await link.connect(4)
        asked = 0

        async def answer() -> None:
            nonlocal asked
            while True:
                stream = await both.gateway.accept(PORTS.cm_open)
                with contextlib.suppress(ChannelClosedError):
                    async with stream:
                        message = pb.ProxyOutgoingMessages.FromString(await stream.receive())
                        assert message.WhichOneof("ProxyOutgoingMessage") == "clock_sync_request"
                        await stream.send(clock_sync().SerializeToString())
                        asked += 1
                        await stream.receive()

        tasks = [asyncio.create_task(answer()), asyncio.create_task(clock.follow())]
        await link.has_time.wait()
        await until(lambda: asked >= 3)
        for task in tasks:
            task.cancel()
        assert set_to and set_to[0] > 1.7e9


def test_clock_from_before_the_software_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    assert main_time().seconds > 1_700_000_000
    assert not caplog.text
    for _ in range(3):
        main_time(built_s=time.time() + 1000)
    assert caplog.text.count("older than this software") == 1
