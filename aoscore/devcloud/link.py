"""Delivery rules of the Unit link for one Unit (cloud-protocol-v7 §3), without any I/O.

Bytes and times go in, bytes to send come out. The object outlives connections: messages that the Unit has not acked
are sent again after a reconnect, with the same txn.
"""

import json
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

from aoscore.common.errors import InvalidArgumentError
from aoscore.devcloud import schema
from aoscore.devcloud.published import PublishedSchema

PROTOCOL_VERSION = 7
ACK_TIMEOUT_S = 10.0
TRANSMISSIONS = 4
NACKS_PER_TXN = 3
NACK_RETRY_MS = 2000
_REMEMBERED_TXNS = 1024

Message = dict[str, Any]


def utc_text(moment: datetime) -> str:
    """Time as the wire writes it (§4.3)."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def envelope(system_id: str, data: Message, txn: str, now: datetime) -> bytes:
    """One frame: header and data."""
    header = {"version": PROTOCOL_VERSION, "systemId": system_id, "createdAt": utc_text(now), "txn": txn}
    return json.dumps({"header": header, "data": data}, separators=(",", ":"), ensure_ascii=False).encode()


@dataclass
class Received:
    """What came of one frame.

    `data` is set when the message is valid and new, and is to be handled. `reply` is an ack or nack to send, None when
    the protocol wants silence. `problems` says what is wrong with it.
    """

    data: Message | None = None
    reply: bytes | None = None
    message_type: str = ""
    problems: list[str] = field(default_factory=list)


@dataclass
class _Outgoing:
    data: Message
    frame: bytes
    due_s: float
    transmissions: int = 0


class Link:
    """One Unit's outgoing queue and incoming checks. Times are seconds of a monotonic clock."""

    def __init__(
        self,
        system_id: str,
        *,
        published: PublishedSchema | None = None,
        ack_timeout_s: float = ACK_TIMEOUT_S,
        wall_clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self.system_id = system_id
        self._published = published
        self._ack_timeout_s = ack_timeout_s
        self._wall_clock = wall_clock
        self._outgoing: dict[str, _Outgoing] = {}
        self._seen: OrderedDict[str, None] = OrderedDict()
        self._nacks: OrderedDict[str, int] = OrderedDict()

    def post(self, data: Message, now_s: float) -> None:
        """Queue a message for the Unit; `due` hands it out. A newer desired status replaces one not acked yet.

        Raises:
            InvalidArgumentError: the message violates the contract or the published schema.
        """
        schema.check_to_unit(data)
        if self._published and (found := self._published.problems(data)):
            raise InvalidArgumentError(f"{data['messageType']} fails the published schema: {'; '.join(found)}")
        if data["messageType"] == "desiredStatus":
            for txn, entry in list(self._outgoing.items()):
                if entry.data["messageType"] == "desiredStatus":
                    del self._outgoing[txn]
        txn = str(uuid4())
        frame = envelope(self.system_id, data, txn, self._wall_clock())
        self._outgoing[txn] = _Outgoing(data, frame, now_s)

    def due(self, now_s: float) -> tuple[list[tuple[str, bytes]], list[str]]:
        """What to send now as (message type, frame), and the types of messages given up after the last try."""
        frames, dropped = [], []
        for txn, entry in list(self._outgoing.items()):
            if entry.due_s > now_s:
                continue
            message_type = str(entry.data["messageType"])
            if entry.transmissions >= TRANSMISSIONS:
                del self._outgoing[txn]
                dropped.append(message_type)
                continue
            entry.transmissions += 1
            entry.due_s = now_s + self._ack_timeout_s
            frames.append((message_type, entry.frame))
        return frames, dropped

    def next_due_s(self) -> float | None:
        """When `due` has something to do, None while nothing is queued."""
        return min((entry.due_s for entry in self._outgoing.values()), default=None)

    def connected(self, now_s: float) -> None:
        """A connection begins: everything not acked goes out again, with all its tries."""
        for entry in self._outgoing.values():
            entry.due_s = now_s
            entry.transmissions = 0

    @property
    def unacked(self) -> list[str]:
        """Types of the messages that the Unit has not acked."""
        return [str(entry.data["messageType"]) for entry in self._outgoing.values()]

    def receive(self, raw: bytes, now_s: float) -> Received:
        """Check one frame of the Unit.

        A frame whose header is wrong is neither acked nor nacked, as the Unit itself does it (§3.1). A message that
        violates the contract is nacked, but only `NACKS_PER_TXN` times: nacks do not count as tries, so the Unit
        would send it for ever. A repeated txn is acked again and not handled again.
        """
        try:
            message = json.loads(raw)
        except ValueError as error:
            return Received(problems=[f"frame is no JSON: {error}"])
        if not isinstance(message, dict) or set(message) != {"header", "data"}:
            return Received(problems=["frame is not an object of header and data"])
        header, data = message["header"], message["data"]
        message_type = str(data.get("messageType", "")) if isinstance(data, dict) else ""
        problems = [f"header.{problem}" for problem in schema.header_problems(header)]
        if not problems and header["systemId"] != self.system_id:
            problems = [f"header.systemId: {header['systemId']!r} on the connection of {self.system_id!r}"]
        if problems:
            return Received(message_type=message_type, problems=problems)
        txn = header["txn"]
        problems = schema.from_unit_problems(data)
        if not problems and self._published:
            problems = [f"published schema: {problem}" for problem in self._published.problems(data)]
        if message_type in ("ack", "nack"):
            return self._answered(txn, data, now_s, problems)
        if problems:
            return Received(reply=self._nack_for(txn), message_type=message_type, problems=problems)
        known = txn in self._seen
        self._seen[txn] = None
        if len(self._seen) > _REMEMBERED_TXNS:
            self._seen.popitem(last=False)
        return Received(None if known else data, self.answer(txn, {"messageType": "ack"}), message_type)

    def forget(self, raw: bytes) -> None:
        """Treat a received message as never seen, so that its repetition is handled (after silence or a nack)."""
        self._seen.pop(json.loads(raw)["header"]["txn"], None)

    def answer(self, txn: str, data: Message) -> bytes:
        """An ack or nack for the received txn."""
        return envelope(self.system_id, data, txn, self._wall_clock())

    def _answered(self, txn: str, data: Message, now_s: float, problems: list[str]) -> Received:
        received = Received(message_type=str(data["messageType"]), problems=problems)
        if problems:
            return received
        if txn not in self._outgoing:
            # A second ack for a message that went out twice is normal, so only a nack is worth a word.
            if received.message_type == "nack":
                received.problems = [f"nack of unknown txn {txn}"]
        elif received.message_type == "ack":
            del self._outgoing[txn]
        else:
            entry = self._outgoing[txn]
            entry.due_s = now_s + int(data.get("retryAfter", 500)) / 1000
            entry.transmissions = 0
        return received

    def _nack_for(self, txn: str) -> bytes | None:
        count = self._nacks.pop(txn, 0) + 1
        self._nacks[txn] = count
        if len(self._nacks) > _REMEMBERED_TXNS:
            self._nacks.popitem(last=False)
        if count > NACKS_PER_TXN:
            return None
        return self.answer(txn, {"messageType": "nack", "retryAfter": NACK_RETRY_MS})
