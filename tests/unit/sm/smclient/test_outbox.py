"""The queue towards CM: what survives a broken link, and what is dropped and counted."""

from datetime import UTC, datetime

from aoscore.common.types import (
    ConfigState,
    CoreAlert,
    InstanceIdent,
    InstanceState,
    InstanceStatus,
    LogData,
    LogStatus,
    MonitoringData,
    NodeConfigStatus,
    NodeMonitoring,
    SystemAlert,
)
from aoscore.sm.launcher.model import NodeStatuses
from aoscore.sm.smclient.messages import Outgoing, StatusChanges
from aoscore.sm.smclient.outbox import ALERTS, LOG_BYTES, SAMPLES, Outbox

NOW = datetime(2026, 5, 1, tzinfo=UTC)
NONE = NodeStatuses(())


def status(item: str, state: InstanceState = InstanceState.ACTIVE) -> InstanceStatus:
    return InstanceStatus(InstanceIdent(item, "s", 0), "1.0.0", state)


def alert(text: str) -> SystemAlert:
    return SystemAlert(NOW, text)


def part(number: int, count: int, size: int = 10, correlation: str = "log") -> LogData:
    return LogData(correlation, LogStatus.OK, count, number, bytes(size))


def drain(outbox: Outbox, limit: int = 10_000) -> list[Outgoing]:
    sent: list[Outgoing] = []
    while len(sent) < limit and (value := outbox.next()) is not None:
        outbox.written(value)
        sent.append(value)
    return sent


def test_last_status_of_each_instance() -> None:
    outbox = Outbox()
    for value in (status("a", InstanceState.ACTIVATING), status("b"), status("a")):
        outbox.put(value)
    assert drain(outbox) == [StatusChanges((status("b"), status("a")))]


def test_newer_status_during_a_write_is_sent_too() -> None:
    outbox = Outbox()
    outbox.put(status("a", InstanceState.ACTIVATING))
    first = outbox.next()
    assert first is not None
    outbox.put(status("a", InstanceState.FAILED))
    outbox.put(status("b"))
    outbox.written(first)
    assert drain(outbox) == [StatusChanges((status("a", InstanceState.FAILED), status("b")))]


def test_complete_list_replaces_single_statuses() -> None:
    outbox = Outbox()
    outbox.put(status("a", InstanceState.FAILED))
    complete = NodeStatuses((status("a"),))
    outbox.put(complete)
    outbox.put(status("b"))
    assert drain(outbox) == [complete, StatusChanges((status("b"),))]


def test_connection_begins_with_the_list_and_without_old_answers() -> None:
    outbox = Outbox()
    outbox.put(NodeConfigStatus(ConfigState.ABSENT))
    outbox.put(alert("x"))
    outbox.connected(NONE)
    assert drain(outbox) == [NONE, alert("x")]


def test_alerts_are_a_ring_that_counts_its_losses() -> None:
    outbox = Outbox()
    for number in range(ALERTS + 3):
        outbox.put(alert(str(number)))
    sent = drain(outbox)
    assert isinstance(sent[0], CoreAlert)
    assert "3 alerts were lost" in sent[0].message
    assert sent[1:] == [alert(str(number)) for number in range(3, ALERTS + 3)]
    assert outbox.next() is None


def test_only_newest_samples() -> None:
    outbox = Outbox()
    samples = [NodeMonitoring(MonitoringData(ram=number)) for number in range(SAMPLES + 5)]
    for sample in samples:
        outbox.put(sample)
    assert drain(outbox) == samples[5:]


def test_cut_log_reply_begins_anew() -> None:
    outbox = Outbox()
    parts = [part(number, 3) for number in (1, 2, 3)]
    for one in parts[:2]:
        outbox.put(one)
    assert drain(outbox) == parts[:2]
    outbox.connected(NONE)
    outbox.put(parts[2])
    assert drain(outbox) == [NONE, *parts]
    outbox.connected(NONE)
    assert drain(outbox) == [NONE]


def test_single_part_replies_are_not_kept() -> None:
    outbox = Outbox()
    outbox.put(LogData("a", LogStatus.ERROR))
    outbox.put(LogData("b", LogStatus.EMPTY, 1, 1))
    assert len(drain(outbox)) == 2
    outbox.connected(NONE)
    assert drain(outbox) == [NONE]


def test_reply_too_large_to_keep_ends_with_an_error() -> None:
    outbox = Outbox()
    half = LOG_BYTES // 2 + 1
    outbox.put(part(1, 4, half))
    outbox.put(part(2, 4, half))
    assert len(drain(outbox)) == 2
    outbox.put(part(3, 4, half))
    outbox.put(part(1, 2, correlation="other"))
    outbox.connected(NONE)
    outbox.put(part(4, 4, half))
    sent = drain(outbox)
    assert [value.correlation_id for value in sent if isinstance(value, LogData)] == ["log", "other"]
    assert isinstance(sent[1], LogData)
    assert sent[1].status is LogStatus.ERROR
    assert sent[1].error is not None


def test_room_for_logs() -> None:
    outbox = Outbox()
    assert outbox.has_room_for_logs
    outbox.put(part(1, 2, LOG_BYTES))
    assert not outbox.has_room_for_logs
    drain(outbox)
    assert outbox.has_room_for_logs
