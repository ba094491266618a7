"""Frames that a C++ SM of AosCore 9.1 was recorded to send reach the right receiver (data/sm/*.txt)."""

import re
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import text_format

from aoscore._pb.servicemanager.v5 import servicemanager_pb2 as pb
from aoscore.cm.smcontroller.controller import Receivers, SmController
from aoscore.cm.smcontroller.link import SmLink
from aoscore.common import convert
from aoscore.common.types import ConfigState, InstanceState, LogStatus
from tests.unit.cm.fakes import FakeLink

DATA = Path(__file__).parents[1] / "data" / "sm"
LINE = re.compile(r"\s*[\d.]+ SM->CM (\w+) (\w+ \{.*\})\s*$")


def frames(name: str) -> list[pb.SMOutgoingMessages]:
    """What the SM of a recording sent; a line cut short by the recorder is left out."""
    found = []
    for line in (DATA / name).read_text().splitlines():
        if match := LINE.match(line):
            frame = text_format.Parse(match[2], pb.SMOutgoingMessages())
            assert frame.WhichOneof("SMOutgoingMessage") == match[1]
            found.append(frame)
    return found


async def receive(recorded: list[pb.SMOutgoingMessages], link: SmLink) -> list[tuple[str, Any]]:
    """Hand frames to the controller as if they came on one stream; what it told its receivers."""
    heard: list[tuple[str, Any]] = []

    def keep(kind: str) -> Any:
        return lambda *values: heard.append((kind, values[-1]))

    async def keep_log(node_id: str, log: Any) -> None:
        heard.append(("log", log))

    controller = SmController(
        "127.0.0.1:0",
        None,
        cloud=FakeLink(),
        networks=None,  # type: ignore[arg-type]
        blob_url=str,
        receivers=Receivers(
            sm_info=keep("info"),
            sm_lost=keep("lost"),
            node_statuses=keep("all"),
            statuses=keep("some"),
            monitoring=keep("monitoring"),
            alert=keep("alert"),
            log=keep_log,
        ),
        admit=None,
    )
    for frame in recorded:
        await controller._receive(link, frame.WhichOneof("SMOutgoingMessage"), frame)
    return heard


async def test_sm_of_9_1() -> None:
    recorded = frames("sm-against-test-cm.txt")
    replies = {"node_config_status", "average_monitoring"}
    heard = await receive([one for one in recorded if one.WhichOneof("SMOutgoingMessage") not in replies], SmLink())
    assert [kind for kind, _ in heard] == ["info", "all", "all", "log", "log", "log", "all", "all", *["monitoring"] * 2]
    info = heard[0][1]
    assert (info.node_id, info.runtimes[0].type, info.runtimes[0].max_instances) == ("node-main-0001", "crun", 256)
    assert [log.status for kind, log in heard if kind == "log"] == [LogStatus.EMPTY, LogStatus.ABSENT, LogStatus.ABSENT]
    assert all(log.error is None for kind, log in heard if kind == "log")
    (failed,) = heard[6][1]
    assert (failed.state, failed.error.aos_code) == (InstanceState.FAILED, 5)


@pytest.mark.parametrize("reply", ["node_config_status", "average_monitoring"])
async def test_replies_of_9_1_are_understood(reply: str) -> None:
    recorded = [one for one in frames("sm-against-test-cm.txt") if one.WhichOneof("SMOutgoingMessage") == reply]
    assert recorded
    for frame in recorded:
        if reply == "average_monitoring":
            assert convert.monitoring_from_pb(frame.average_monitoring).node.timestamp is None
        else:
            status = convert.node_config_status_from_pb(frame.node_config_status)
            assert status.error is None
            assert status.state in (ConfigState.ABSENT, ConfigState.INSTALLED)


async def test_what_cm_of_9_1_was_sent() -> None:
    heard = await receive(frames("cm-against-test-sm.txt"), SmLink())
    assert [kind for kind, _ in heard] == ["info", "all", *["alert"] * 20, "monitoring"]
    assert [alert.message for kind, alert in heard if kind == "alert"] == [f"test alert {n}" for n in range(20)]
    assert heard[-1][1].node.partitions[0].used_size == 123
