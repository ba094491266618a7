"""What of the SM's messages passes, and how logs that come as text go."""

import gzip

import pytest

from aoscore._pb.common.v2 import common_pb2 as common
from aoscore._pb.servicemanager.v5 import servicemanager_pb2 as pb
from aoscore.common.errors import InvalidArgumentError
from aoscore.mp.logprovider.archive import IDLE_S, LogArchiver
from aoscore.mp.nodeserver.link import NodeLink
from aoscore.mp.nodeserver.smmessages import SmMessages


class Bed:
    def __init__(self) -> None:
        self.link = NodeLink()
        self.now_s = 0.0
        self.messages = SmMessages(self.link, lambda: LogArchiver(10, 3), now=lambda: self.now_s)

    def take(self, **member: object) -> list[pb.SMOutgoingMessages]:
        return [
            pb.SMOutgoingMessages.FromString(one)
            for one in self.messages.take(pb.SMOutgoingMessages(**member).SerializeToString())
        ]

    def log(self, data: bytes, **more: object) -> list[pb.SMOutgoingMessages]:
        return self.take(log=pb.LogData(correlation_id="1", data=data, **more))


def test_what_is_no_log_passes_as_it_is() -> None:
    bed = Bed()
    info = {"sm_info": pb.SMInfo(node_id="second")}
    assert bed.take(**info) == [pb.SMOutgoingMessages(**info)]
    assert bed.link.node_id == "second"
    with pytest.raises(InvalidArgumentError, match="message of SM is malformed"):
        bed.messages.take(b"\xff")


def test_packed_logs_pass_as_they_are() -> None:
    bed = Bed()
    for data in (gzip.compress(b"text"), b""):
        (message,) = bed.log(data, status="ok", part=1, part_count=2)
        assert (message.log.data, message.log.part_count) == (data, 2)


def test_text_is_packed() -> None:
    bed = Bed()
    assert bed.log(b"0123456789", status="ok", part=1, part_count=2) == []
    first, second = (message.log for message in bed.log(b"abc", status="ok", part=2, part_count=2))
    assert [gzip.decompress(one.data) for one in (first, second)] == [b"0123456789", b"abc"]
    assert [(one.part, one.part_count, one.status) for one in (first, second)] == [(1, 2, "ok"), (2, 2, "ok")]


def test_error_of_the_sm_is_kept() -> None:
    bed = Bed()
    assert bed.log(b"abc", status="ok") == []
    (message,) = bed.log(b"", status="error", error=common.ErrorInfo(aos_code=1, message="disk"))
    assert (message.log.status, message.log.error.message) == ("error", "disk")


def test_silent_log_is_closed_with_the_next_message() -> None:
    bed = Bed()
    assert bed.log(b"abc", status="ok") == []
    bed.now_s = IDLE_S
    alert = pb.Alert(core_alert=pb.CoreAlert(core_component="SM"))
    log, passed = bed.take(alert=alert)
    assert log.log.status == "error" and gzip.decompress(log.log.data) == b"abc"
    assert passed.alert == alert


def test_new_stream_forgets_logs_of_before() -> None:
    bed = Bed()
    assert bed.log(b"abc", status="ok") == []
    bed.take(sm_info=pb.SMInfo(node_id="second"))
    (message,) = bed.log(b"xyz", status="empty")
    assert gzip.decompress(message.log.data) == b"xyz"
