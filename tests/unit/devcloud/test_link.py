"""Delivery rules: acks, nacks, re-sending, repeated and broken frames."""

import json
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import pytest

from aoscore.common.errors import InvalidArgumentError
from aoscore.devcloud.link import ACK_TIMEOUT_S, NACKS_PER_TXN, TRANSMISSIONS, Link, envelope

UNIT = "unit-1"
NOW = datetime(2026, 3, 1, 8, 15, 30, tzinfo=UTC)
REQUEST = {"messageType": "stateRequest", "item": {"id": "i"}, "subject": {"id": "s"}, "instance": 0, "default": False}
DEPROVISION = {"messageType": "deprovisioningRequest", "correlationId": "c", "node": {"codename": "n"}, "password": "p"}
DESIRED: dict[str, Any] = {
    "messageType": "desiredStatus",
    "items": [],
    "instances": [],
    "subjects": [],
    "certificates": [],
    "certificateChains": [],
}


@pytest.fixture
def link() -> Link:
    return Link(UNIT, wall_clock=lambda: NOW)


def frame(data: dict[str, Any], txn: str | None = None, system_id: str = UNIT) -> bytes:
    return envelope(system_id, data, txn or str(uuid4()), NOW)


def read(raw: bytes | None) -> tuple[str, dict[str, Any]]:
    assert raw is not None
    message = json.loads(raw)
    return message["header"]["txn"], message["data"]


def test_a_valid_message_is_acked_with_its_txn(link: Link) -> None:
    txn = str(uuid4())
    received = link.receive(frame(REQUEST, txn), 0.0)
    assert received.data == REQUEST
    assert read(received.reply) == (txn, {"messageType": "ack"})
    assert received.problems == []


def test_a_repetition_is_acked_and_not_handled_again(link: Link) -> None:
    raw = frame(REQUEST)
    link.receive(raw, 0.0)
    again = link.receive(raw, 1.0)
    assert again.data is None
    assert read(again.reply)[1] == {"messageType": "ack"}


def test_a_forgotten_message_is_handled_when_repeated(link: Link) -> None:
    raw = frame(REQUEST)
    link.receive(raw, 0.0)
    link.forget(raw)
    assert link.receive(raw, 1.0).data == REQUEST


def test_a_broken_message_is_nacked_but_not_for_ever(link: Link) -> None:
    raw = frame({**REQUEST, "default": "maybe"})
    replies = [link.receive(raw, 0.0) for _ in range(NACKS_PER_TXN + 2)]
    assert [one.reply is not None for one in replies] == [True] * NACKS_PER_TXN + [False] * 2
    assert read(replies[0].reply)[1]["messageType"] == "nack"
    assert all(one.data is None and "default" in one.problems[0] for one in replies)


@pytest.mark.parametrize(
    "raw",
    [
        b"{",
        b"[]",
        b'{"header": {}}',
        frame(REQUEST, system_id="unit-2"),
        frame(REQUEST, txn="1"),
        frame(REQUEST).replace(b'"version":7', b'"version":6'),
    ],
)
def test_a_frame_with_a_wrong_header_gets_no_answer(link: Link, raw: bytes) -> None:
    received = link.receive(raw, 0.0)
    assert received.reply is None
    assert received.data is None
    assert received.problems


def test_a_message_goes_out_until_it_is_acked(link: Link) -> None:
    link.post(DEPROVISION, 0.0)
    frames, _ = link.due(0.0)
    assert [name for name, _ in frames] == ["deprovisioningRequest"]
    assert link.due(ACK_TIMEOUT_S - 0.1) == ([], [])
    again, _ = link.due(ACK_TIMEOUT_S)
    assert again == frames, "same txn and content"
    txn, _ = read(frames[0][1])
    link.receive(frame({"messageType": "ack"}, txn), 11.0)
    assert link.next_due_s() is None
    assert link.unacked == []


def test_a_message_is_given_up_after_its_tries(link: Link) -> None:
    link.post(DEPROVISION, 0.0)
    sent = 0
    for step in range(TRANSMISSIONS):
        frames, dropped = link.due(step * ACK_TIMEOUT_S)
        sent += len(frames)
        assert dropped == []
    assert sent == TRANSMISSIONS
    assert link.due(TRANSMISSIONS * ACK_TIMEOUT_S) == ([], ["deprovisioningRequest"])
    assert link.next_due_s() is None


def test_a_nack_delays_and_costs_no_try(link: Link) -> None:
    link.post(DEPROVISION, 0.0)
    (first,), _ = link.due(0.0)
    for _ in range(2 * TRANSMISSIONS):
        link.receive(frame({"messageType": "nack", "retryAfter": 3000}, read(first[1])[0]), 1.0)
        assert link.next_due_s() == 4.0
        assert link.due(3.9) == ([], [])
        assert link.due(4.0) == ([first], [])


def test_a_nack_of_something_never_sent_is_a_violation(link: Link) -> None:
    assert link.receive(frame({"messageType": "nack"}), 0.0).problems
    assert link.receive(frame({"messageType": "ack"}), 0.0).problems == []


def test_after_a_reconnect_the_same_txn_goes_out_at_once(link: Link) -> None:
    link.post(DEPROVISION, 0.0)
    frames, _ = link.due(0.0)
    link.connected(2.0)
    assert link.due(2.0) == (frames, [])


def test_a_newer_desired_status_replaces_an_unacked_one(link: Link) -> None:
    link.post(DESIRED, 0.0)
    link.post(DEPROVISION, 0.0)
    link.post({**DESIRED, "nodes": []}, 0.0)
    frames, _ = link.due(0.0)
    assert [name for name, _ in frames] == ["deprovisioningRequest", "desiredStatus"]
    assert read(frames[1][1])[1]["nodes"] == []


def test_a_message_that_breaks_the_contract_is_not_sent(link: Link) -> None:
    with pytest.raises(InvalidArgumentError, match="items"):
        link.post({"messageType": "desiredStatus"}, 0.0)
    assert link.next_due_s() is None
