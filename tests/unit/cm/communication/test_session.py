"""Delivery rules of cloud-protocol §3 and §10.1, with a fake clock."""

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest

from aoscore.cm.communication.envelope import EnvelopeError, Received
from aoscore.cm.communication.messages import (
    Alerts,
    DesiredStatus,
    Identity,
    IssueUnitCertificates,
    Message,
    MonitoringData,
    NewState,
    OverrideEnvVarsStatus,
    PushLog,
    RequestBlobUrls,
    StateRequest,
    UnitStatus,
)
from aoscore.cm.communication.session import MAX_ROUNDS, Session

CREATED = datetime(2026, 3, 1, tzinfo=UTC)
SYSTEM = "unit-0042"


class Bench:
    """A session, a clock, and the cloud's side."""

    def __init__(self, *, connected: bool = True) -> None:
        self.now = 1000.0
        txns: Iterator[str] = (f"t{number}" for number in range(1, 10_000))
        self.session = Session(SYSTEM, response_timeout_s=10, new_txn=lambda: next(txns))
        if connected:
            self.session.connected()

    def send(self, message: Message) -> str:
        return self.session.send(message, now=self.now, created_at=CREATED)

    def out(self, after_s: float = 0.0) -> list[str]:
        """What goes out: `messageType:txn` of each frame."""
        self.now += after_s
        frames = [json.loads(frame) for frame in self.session.transmit(now=self.now)]
        return [f"{frame['data']['messageType']}:{frame['header']['txn']}" for frame in frames]

    def get(self, data: dict[str, Any], txn: str = "c1", **header: Any) -> Received | None:
        """Take in a frame, and acknowledge its message."""
        document = {"header": {"version": 7, "systemId": SYSTEM, "txn": txn, **header}, "data": data}
        frame = json.dumps(document).encode()
        received = self.session.receive(frame, now=self.now, created_at=CREATED)
        if received is not None:
            self.session.acknowledge(received.txn, frame, created_at=CREATED)
        return received


VARS = OverrideEnvVarsStatus(statuses=())
STATE = StateRequest(item=Identity(id="i"), subject=Identity(id="s"), instance=0, default=False)
NEW_STATE = NewState(item=Identity(id="i"), subject=Identity(id="s"), instance=0, state_checksum="", state="")
CSR = IssueUnitCertificates(requests=())


def test_defect_3_nothing_leaves_without_a_connection_and_all_of_it_in_order_afterwards() -> None:
    """And nobody looks meanwhile: AosCore 9.1 burns a core (observed.md, defect 3)."""
    bench = Bench(connected=False)
    bench.send(VARS)
    bench.send(CSR)
    assert bench.out(1000) == [] and bench.session.next_time() is None
    bench.session.connected()
    assert bench.out() == ["overrideEnvVarsStatus:t1", "issueUnitCertificates:t2"]
    assert bench.out() == []


def test_four_transmissions_with_the_same_txn_then_silence() -> None:
    bench = Bench()
    bench.send(VARS)
    sent = [bench.out()]
    for _ in range(6):
        assert bench.out(9.9) == []
        sent.append(bench.out(0.1))
    assert sent == [["overrideEnvVarsStatus:t1"]] * 4 + [[]] * 3
    assert bench.session.waiting == 0 and bench.session.dropped == 1
    assert bench.session.next_time() is None


def test_an_ack_ends_it_and_an_unknown_one_does_no_harm() -> None:
    bench = Bench()
    bench.send(VARS)
    bench.out()
    bench.get({"messageType": "ack"}, txn="other")
    assert bench.session.waiting == 1
    assert bench.get({"messageType": "ack"}, txn="t1") is None
    assert bench.session.waiting == 0 and bench.out(60) == []


def test_what_was_not_acknowledged_before_a_break_is_sent_again_in_order() -> None:
    bench = Bench()
    bench.send(VARS)
    bench.send(CSR)
    bench.out()
    bench.session.disconnected(now=bench.now)
    bench.send(VARS)
    bench.session.connected()
    assert bench.out() == ["overrideEnvVarsStatus:t1", "issueUnitCertificates:t2", "overrideEnvVarsStatus:t3"]
    bench.get({"messageType": "ack"}, txn="t1")
    assert bench.out(10) == ["issueUnitCertificates:t2", "overrideEnvVarsStatus:t3"]


def test_the_time_out_counts_from_the_transmission() -> None:
    bench = Bench(connected=False)
    bench.send(VARS)
    bench.now += 3600
    bench.session.connected()
    assert bench.out() == ["overrideEnvVarsStatus:t1"]
    assert bench.session.next_time() == bench.now + 10
    assert bench.out(9.9) == []


def test_nacks_delay_without_end_and_do_not_count() -> None:
    bench = Bench()
    bench.send(VARS)
    assert bench.out() == ["overrideEnvVarsStatus:t1"]
    for _ in range(20):
        bench.get({"messageType": "nack", "retryAfter": 2500}, txn="t1")
        assert bench.session.next_time() == bench.now + 2.5
        assert bench.out(2.4) == []
        assert bench.out(0.1) == ["overrideEnvVarsStatus:t1"]
    assert [bench.out(10) for _ in range(4)] == [["overrideEnvVarsStatus:t1"]] * 3 + [[]]


def test_a_delayed_message_does_not_hold_up_the_others() -> None:
    bench = Bench()
    bench.send(VARS)
    bench.out()
    bench.get({"messageType": "nack"}, txn="t1")
    bench.send(CSR)
    assert bench.out() == ["issueUnitCertificates:t2"]
    assert bench.out(0.5) == ["overrideEnvVarsStatus:t1"]


@pytest.mark.parametrize("delay_ms", [-5, 10**15])
def test_absurd_nack_delays_are_bounded(delay_ms: int) -> None:
    bench = Bench()
    bench.send(VARS)
    bench.out()
    bench.get({"messageType": "nack", "retryAfter": delay_ms}, txn="t1")
    assert bench.out(600) == ["overrideEnvVarsStatus:t1"]


def test_defect_4_nacks_for_unknown_messages_are_ignored() -> None:
    """Four of these stop AosCore 9.1 (observed.md, defect 4)."""
    bench = Bench()
    for number in range(10):
        bench.get({"messageType": "nack"}, txn=f"x{number}")
    assert bench.get({"messageType": "desiredStatus"}) is not None


def test_a_broken_link_uses_up_no_try_until_it_is_suspicious() -> None:
    bench = Bench()
    bench.send(VARS)
    for _ in range(10):
        assert bench.out() == ["overrideEnvVarsStatus:t1"]
        bench.session.disconnected(now=bench.now)
        bench.session.connected()
    assert bench.out() == [] and bench.session.dropped == 1


def test_defect_3_a_unit_status_does_not_survive_its_connection() -> None:
    """A stale delta must not follow the full status (observed.md, defect 3)."""
    bench = Bench()
    bench.send(UnitStatus(is_delta_info=True, items=()))
    bench.out()
    bench.send(UnitStatus(is_delta_info=True, items=()))
    bench.send(VARS)
    bench.session.disconnected(now=bench.now)
    bench.session.connected()
    assert bench.out() == ["overrideEnvVarsStatus:t3"]


def test_every_message_is_acknowledged_once_with_its_txn() -> None:
    bench = Bench()
    received = bench.get({"messageType": "desiredStatus", "correlationId": "x"}, txn="cloud-1")
    assert received is not None and isinstance(received.message, DesiredStatus)
    (frame,) = bench.session.transmit(now=bench.now)
    document = json.loads(frame)
    assert document["data"] == {"messageType": "ack"}
    assert document["header"]["txn"] == "cloud-1"
    assert bench.out(60) == []


def test_what_cannot_be_read_is_acknowledged_too() -> None:
    bench = Bench()
    for txn, data in (("a", {"messageType": "brandNew"}), ("b", {"messageType": "requestLog"})):
        received = bench.get(data, txn=txn)
        assert received is not None and received.message is None and received.error is not None
    assert bench.out() == ["ack:a", "ack:b"]


@pytest.mark.parametrize("header", [{"version": 6}, {"systemId": "other"}])
def test_foreign_messages_get_no_answer(header: dict[str, Any]) -> None:
    bench = Bench()
    with pytest.raises(EnvelopeError):
        bench.get({"messageType": "desiredStatus"}, **header)
    assert bench.out() == []


def test_a_repetition_is_acknowledged_and_not_handed_on() -> None:
    bench = Bench()
    log = {"messageType": "requestLog", "logType": "systemLog", "filter": {}}
    assert bench.get(log, txn="r") is not None
    assert bench.get(log, txn="r") is None
    assert bench.get({**log, "correlationId": "2"}, txn="r") is not None
    assert bench.out() == ["ack:r"] * 3


def test_acks_go_first_and_die_with_the_connection() -> None:
    bench = Bench()
    bench.send(VARS)
    bench.get({"messageType": "desiredStatus"})
    assert bench.session.next_time() == 0
    assert bench.out() == ["ack:c1", "overrideEnvVarsStatus:t1"]
    bench.get({"messageType": "desiredStatus"}, txn="c2")
    bench.session.disconnected(now=bench.now)
    bench.session.connected()
    assert bench.out() == ["overrideEnvVarsStatus:t1"]


def test_queues_are_bounded_per_type_oldest_first_and_certificates_are_kept() -> None:
    bench = Bench(connected=False)
    bench.send(CSR)
    for _ in range(20):
        bench.send(MonitoringData(nodes=()))
        bench.send(Alerts(items=()))
        bench.send(CSR)
    bench.session.connected()
    sent = bench.out()
    assert [name.split(":")[0] for name in sent].count("monitoringData") == 16
    assert [name.split(":")[0] for name in sent].count("issueUnitCertificates") == 21
    assert "monitoringData:t2" not in sent and "monitoringData:t59" in sent
    assert bench.session.dropped == 4


def test_a_withdrawn_message_is_gone_wherever_it_was() -> None:
    bench = Bench()
    queued = bench.send(RequestBlobUrls(correlation_id="c", digests=()))
    bench.session.withdraw(queued)
    assert bench.out() == []
    sent = bench.send(RequestBlobUrls(correlation_id="c", digests=()))
    bench.out()
    bench.session.withdraw(sent)
    assert bench.out(60) == [] and bench.session.dropped == 0


# --- what must arrive (cloud-protocol §10.1)

LOG = PushLog(correlation_id="c", node=Identity.of_codename("n"), part=1, parts_count=1, content=b"x", status="ok")


def test_a_lasting_message_without_an_ack_waits_for_the_next_connection() -> None:
    bench = Bench()
    bench.send(CSR)
    for round_number in range(3):
        assert [bench.out(10) for _ in range(6)] == [["issueUnitCertificates:t1"]] * 4 + [[]] * 2, round_number
        assert bench.session.next_time() is None
        bench.session.disconnected(now=bench.now)
        bench.session.connected()
    assert bench.out() == ["issueUnitCertificates:t1"]
    bench.get({"messageType": "ack"}, txn="t1")
    assert bench.session.waiting == bench.session.dropped == 0 and bench.session.take_finished() == ["t1"]
    assert bench.session.take_finished() == []


def test_an_ack_that_comes_too_late_counts() -> None:
    bench = Bench()
    bench.send(CSR)
    assert [bench.out(10) for _ in range(6)][-1] == []
    bench.get({"messageType": "ack"}, txn="t1")
    assert bench.session.waiting == 0 and bench.session.take_finished() == ["t1"]


def test_a_lasting_message_that_nobody_acknowledges_is_given_up_at_last() -> None:
    bench = Bench()
    bench.send(CSR)
    for _ in range(MAX_ROUNDS):
        assert bench.session.take_finished() == []
        for _ in range(6):
            bench.out(10)
        bench.session.disconnected(now=bench.now)
        bench.session.connected()
    assert bench.session.dropped == 1 and bench.session.take_finished() == ["t1"]


def test_a_lasting_message_that_breaks_the_link_gives_the_others_room() -> None:
    bench = Bench()
    bench.send(CSR)
    for _ in range(40):
        bench.out(601)
        bench.session.disconnected(now=bench.now)
        bench.session.connected()
    bench.send(VARS)
    assert bench.session.dropped == 0
    assert bench.out() == ["overrideEnvVarsStatus:t2"]
    bench.get({"messageType": "ack"}, txn="t2")
    assert bench.out(601) == ["issueUnitCertificates:t1"]


@pytest.mark.parametrize("told_anew", [NEW_STATE, STATE])
def test_states_do_not_survive_their_connection(told_anew: Message) -> None:
    """Their sender looks at every state when there is a connection again, and would have them sent twice."""
    bench = Bench()
    bench.send(told_anew)
    bench.out()
    bench.send(told_anew)
    bench.session.disconnected(now=bench.now)
    bench.session.connected()
    assert bench.out() == []


def test_what_an_earlier_process_left_goes_first_and_once() -> None:
    bench = Bench(connected=False)
    kept = [(type(message), *bench.session.frame(message, created_at=CREATED)) for message in (CSR, LOG)]
    bench.send(VARS)
    bench.session.enqueue(*kept[1], now=bench.now)
    bench.session.restore(kept, now=bench.now)
    bench.session.connected()
    assert bench.out() == ["issueUnitCertificates:t1", "overrideEnvVarsStatus:t3", "pushLog:t2"]


MONITORING = MonitoringData(nodes=())


def test_what_need_not_arrive_can_be_made_lasting() -> None:
    """Its ack is then told, it outlives connections without an ack, and its place when the oldest are dropped."""
    bench = Bench()
    for _ in range(2):
        bench.send(MONITORING)
    bench.get({"messageType": "ack"}, txn=bench.out()[0].partition(":")[2])
    assert bench.session.take_finished() == []
    bench.session.disconnected(now=bench.now)
    bench.send(CSR)
    bench.send(MONITORING)
    assert [txn for txn, _ in bench.session.passing(MonitoringData)] == ["t2", "t4"]
    for txn in ("t1", "t2", "t4"):
        bench.session.set_lasting(txn, True)
    assert bench.session.passing(MonitoringData) == []
    bench.session.connected()
    assert bench.out() == ["monitoringData:t2", "issueUnitCertificates:t3", "monitoringData:t4"]
    bench.get({"messageType": "ack"}, txn="t2")
    assert bench.session.take_finished() == ["t2"]
    for _ in range(4):
        bench.out(after_s=10)
    assert bench.session.take_finished() == []
    bench.session.disconnected(now=bench.now)
    bench.session.connected()
    assert "monitoringData:t4" in bench.out()
    bench.session.enqueue(MonitoringData, "t5", b"{}", now=bench.now, is_lasting=True)
    for _ in range(16):
        bench.send(MONITORING)
    assert bench.session.take_finished() == ["t5"]


def test_logs_are_bounded_in_bytes_and_the_rows_of_dropped_ones_go() -> None:
    bench = Bench(connected=False)
    for _ in range(5):
        bench.send(msgspec.structs.replace(LOG, content=b"x" * (2 * 1024 * 1024)))
    assert bench.session.take_finished() == ["t1", "t2", "t3"]
    bench.send(msgspec.structs.replace(LOG, content=b"x" * (9 * 1024 * 1024)))
    bench.session.connected()
    assert bench.out() == ["pushLog:t6"]
