"""Golden transcripts of the session: every message both ways, byte for byte, and what goes wrong on the way.

In transcripts.txt a transcript begins with `#` and its name. Then, line by line:

    > frame       the Unit sends this, and nothing else
    < frame       the cloud sends this
    = message     it is handed on as this; `null REASON` when it cannot be read, `dropped REASON` when it is not for us
    . seconds     they pass, and nothing is sent
    + seconds     they pass
    ! lost        the connection ends; `! connected`: there is one again
"""

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from aoscore.cm.communication import envelope
from aoscore.cm.communication.envelope import EnvelopeError
from aoscore.cm.communication.messages import FROM_CLOUD, TO_CLOUD
from aoscore.cm.communication.session import Session

SYSTEM = "unit-0042"
CREATED = datetime(2026, 3, 1, 8, 15, 30, 250000, UTC)
PARTS = [part.splitlines() for part in Path(__file__).with_name("transcripts.txt").read_text().split("# ")[1:]]
TRANSCRIPTS = [(name, [line for line in lines if line]) for name, *lines in PARTS]


class Replay:
    """A session between the Unit's other parts, which say what a transcript has them say, and the cloud."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.txn = ""
        self.session = Session(SYSTEM, response_timeout_s=10.0, new_txn=lambda: self.txn)
        self.session.connected()
        self.told: set[str] = set()
        self.handed_on: list[str] = []

    def out(self) -> list[str]:
        return [frame.decode() for frame in self.session.transmit(now=self.now)]

    def step(self, sign: str, text: str) -> None:
        match sign:
            case ">":
                self.tell(text)
                assert self.out() == [text]
            case "<":
                self.hear(text)
            case "=":
                assert self.handed_on.pop(0) == text
            case ".":
                self.now += float(text)
                assert self.out() == []
            case "+":
                self.now += float(text)
            case "!":
                if text == "lost":
                    self.session.disconnected(now=self.now)
                else:
                    self.session.connected()
            case _:
                raise AssertionError(f"unknown line: {sign} {text}")

    def tell(self, frame: str) -> None:
        """A part of the Unit has the message of a frame sent, the first time that it is in the transcript."""
        sent = envelope.decode(frame, system_id=SYSTEM, known=TO_CLOUD)
        assert sent.message is not None and not sent.problems
        if json.loads(frame)["data"]["messageType"] != "ack" and sent.txn not in self.told:
            self.told.add(sent.txn)
            self.txn = sent.txn
            assert self.session.send(sent.message, now=self.now, created_at=CREATED) == sent.txn

    def hear(self, frame: str) -> None:
        assert self.handed_on == []
        try:
            received = self.session.receive(frame.encode(), now=self.now, created_at=CREATED)
        except EnvelopeError as error:
            self.handed_on.append(f"dropped {error}")
            return
        if received is None:
            return
        if received.message is None:
            self.handed_on.append(f"null {received.error}")
        else:
            assert not received.problems
            self.handed_on.append(envelope.encode_document(envelope.to_document(received.message)).decode())
        self.session.acknowledge(received.txn, frame.encode(), created_at=CREATED)


@pytest.mark.parametrize("lines", [lines for _, lines in TRANSCRIPTS], ids=[name for name, _ in TRANSCRIPTS])
def test_transcript(lines: list[str]) -> None:
    replay = Replay()
    for line in lines:
        replay.step(line[0], line[2:])
    assert replay.handed_on == []
    assert replay.out() == []


def test_every_message_has_a_transcript() -> None:
    frames = {sign: {line[2:] for _, lines in TRANSCRIPTS for line in lines if line[0] == sign} for sign in "<>"}
    kinds = {
        sign: {json.loads(frame).get("data", {}).get("messageType") for frame in found}
        for sign, found in frames.items()
    }
    assert kinds[">"] == set(TO_CLOUD)
    assert kinds["<"] >= set(FROM_CLOUD)
