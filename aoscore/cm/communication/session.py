"""Delivery of messages: queueing, acks, nacks, re-sends (cloud-protocol §3). Pure: no I/O, no clock of its own.

The link feeds it with what the WebSocket brought and asks it what to transmit. All times are seconds of one monotonic
clock, given by the caller.

What AosCore 9.1 does and we keep: every message but an ack expects an ack; a message without one is transmitted again
with the same txn and payload, four times in all; a nack delays it and does not count. What we do better (§10.1): the
time-out counts from the transmission; a link that breaks does not use up a try; a nack for an unknown txn is ignored;
queues are bounded; a unit status does not survive its connection, because the next one begins with a full status.
"""

from __future__ import annotations

import hashlib
import logging
import uuid
from collections import OrderedDict
from collections.abc import Callable
from datetime import datetime
from typing import Final

from aoscore.cm.communication import envelope
from aoscore.cm.communication.envelope import EnvelopeError, Received
from aoscore.cm.communication.messages import (
    Ack,
    Alerts,
    Message,
    MonitoringData,
    Nack,
    NewState,
    PushLog,
    StateRequest,
    UnitStatus,
    message_type,
)

_log = logging.getLogger(__name__)

MAX_TRANSMISSIONS: Final = 4
# A message that breaks the link each time it is sent must not do so for ever.
MAX_CUT_SHORT: Final = 10
MAX_NACK_DELAY_S: Final = 600.0
_REMEMBERED_TXNS: Final = 128

# How many messages of a type may wait; the oldest goes first. Types that are not named are never dropped: there are
# few of them, and somebody waits for each (certificates, provisioning).
QUEUE_LIMITS: Final[dict[type[Message], int]] = {
    MonitoringData: 16,
    Alerts: 64,
    UnitStatus: 16,
    PushLog: 256,
    NewState: 256,
    StateRequest: 256,
}


class _Entry:
    """A message of ours until the cloud has acknowledged it."""

    __slots__ = ("cut_short", "due", "frame", "kind", "name", "transmissions", "txn")

    def __init__(self, kind: type[Message], txn: str, frame: bytes, due: float) -> None:
        self.kind = kind
        self.name = message_type(kind)
        self.txn = txn
        self.frame = frame
        self.due = due  # queued: not to be sent before; sent: when the ack is overdue
        self.transmissions = 0
        self.cut_short = 0


class Session:
    """The delivery state of one Unit towards its cloud; lives as long as the process, over many connections."""

    def __init__(
        self,
        system_id: str,
        *,
        response_timeout_s: float,
        new_txn: Callable[[], str] = lambda: str(uuid.uuid4()),
        limits: dict[type[Message], int] = QUEUE_LIMITS,
    ) -> None:
        self._system_id = system_id
        self._response_timeout_s = response_timeout_s
        self._new_txn = new_txn
        self._limits = limits
        self._connected = False
        self._acks: list[bytes] = []
        self._queue: list[_Entry] = []
        self._sent: OrderedDict[str, _Entry] = OrderedDict()
        self._seen: OrderedDict[tuple[str, bytes], None] = OrderedDict()
        self.dropped = 0

    @property
    def waiting(self) -> int:
        """Messages that are not acknowledged yet."""
        return len(self._queue) + len(self._sent)

    def send(self, message: Message, *, now: float, created_at: datetime) -> str:
        """Queues a message and returns its txn."""
        txn = self._new_txn()
        frame = envelope.encode(message, system_id=self._system_id, txn=txn, created_at=created_at)
        entry = _Entry(type(message), txn, frame, now)
        self._queue.append(entry)
        self._enforce_limit(entry.kind)
        return txn

    def withdraw(self, txn: str) -> None:
        """Forgets a message: whoever sent it does not wait for it any more."""
        self._sent.pop(txn, None)
        self._queue = [entry for entry in self._queue if entry.txn != txn]

    def connected(self) -> None:
        """A connection is up: from now on there is something to transmit to."""
        self._connected = True

    def disconnected(self, *, now: float) -> None:
        """The connection is gone: what was sent and not acknowledged waits, in its old order, for the next one."""
        self._connected = False
        self._acks.clear()
        interrupted = list(self._sent.values())
        self._sent.clear()
        for entry in interrupted:
            entry.transmissions -= 1
            entry.cut_short += 1
            entry.due = now
        kept = []
        for entry in [*interrupted, *self._queue]:
            if entry.kind is UnitStatus:
                continue
            if entry.cut_short >= MAX_CUT_SHORT:
                self._drop(entry, "the connection broke each time it was sent")
            else:
                kept.append(entry)
        self._queue = kept

    def transmit(self, *, now: float) -> list[bytes]:
        """The frames to write to the connection now, in this order; empty while there is no connection."""
        if not self._connected:
            return []
        self._expire(now)
        frames, self._acks = self._acks, []
        later = []
        for entry in self._queue:
            if entry.due > now:
                later.append(entry)
                continue
            entry.transmissions += 1
            entry.due = now + self._response_timeout_s
            self._sent[entry.txn] = entry
            frames.append(entry.frame)
        self._queue = later
        return frames

    def next_time(self) -> float | None:
        """When `transmit` has to be called again if nothing else happens; None when there is nothing to wait for."""
        if not self._connected:
            return None
        if self._acks:
            return 0.0
        return min((entry.due for entry in (*self._queue, *self._sent.values())), default=None)

    def receive(self, frame: bytes | str, *, now: float, created_at: datetime) -> Received | None:
        """Takes in a frame of the cloud.

        Returns the message to act on, with its ack queued; None for acks, nacks, and a message that was received
        before. Raises EnvelopeError when the frame is not for us; it gets no ack.
        """
        received = envelope.decode(frame, system_id=self._system_id)
        match received.message:
            case Ack():
                if self._sent.pop(received.txn, None) is None:
                    _log.debug("Ack for an unknown message: txn=%s", received.txn)
                return None
            case Nack(retry_after=delay_ms):
                self._delay(received.txn, now + min(max(delay_ms / 1000, 0.0), MAX_NACK_DELAY_S))
                return None
        # The cloud repeats a message with the same txn when our ack got lost. Only the same content counts as a
        # repetition: 9.1 accepts clouds that use a txn twice.
        raw = frame.encode() if isinstance(frame, str) else frame
        key = (received.txn, hashlib.sha256(raw).digest())
        again = key in self._seen
        self._seen[key] = None
        self._seen.move_to_end(key)
        if len(self._seen) > _REMEMBERED_TXNS:
            self._seen.popitem(last=False)
        self._acks.append(envelope.encode(Ack(), system_id=self._system_id, txn=received.txn, created_at=created_at))
        return None if again else received

    def _delay(self, txn: str, until: float) -> None:
        entry = self._sent.pop(txn, None)
        if entry is None:
            _log.warning("Nack for an unknown message is ignored: txn=%s", txn)
            return
        entry.transmissions -= 1
        entry.due = until
        self._queue.append(entry)

    def _expire(self, now: float) -> None:
        overdue = [entry for entry in self._sent.values() if entry.due <= now]
        for entry in overdue:
            del self._sent[entry.txn]
            if entry.transmissions >= MAX_TRANSMISSIONS:
                self._drop(entry, f"no ack after {entry.transmissions} transmissions")
        # First in, first out: what was sent before goes again before what is new.
        self._queue[:0] = [entry for entry in overdue if entry.transmissions < MAX_TRANSMISSIONS]

    def _enforce_limit(self, kind: type[Message]) -> None:
        limit = self._limits.get(kind)
        if limit is None:
            return
        waiting = [entry for entry in self._queue if entry.kind is kind]
        for entry in waiting[: max(0, len(waiting) - limit)]:
            self._queue.remove(entry)
            self._drop(entry, f"more than {limit} are waiting")

    def _drop(self, entry: _Entry, reason: str) -> None:
        self.dropped += 1
        _log.error(
            "Message to the cloud is dropped: type=%s, txn=%s, reason=%s, dropped=%d",
            entry.name,
            entry.txn,
            reason,
            self.dropped,
        )


__all__ = ["EnvelopeError", "Session"]
