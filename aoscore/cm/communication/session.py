"""Delivery of messages: queueing, acks, nacks, re-sends (cloud-protocol §3). Pure: no I/O, no clock of its own.

The link feeds it with what the WebSocket brought and asks it what to transmit. All times are seconds of one monotonic
clock, given by the caller.

What AosCore 9.1 does and we keep: every message but an ack expects an ack; a message without one is transmitted again
with the same txn and payload, four times in all; a nack delays it and does not count. What we do better (§10.1): the
time-out counts from the transmission; a link that breaks does not use up a try; a nack for an unknown txn is ignored;
queues are bounded; what is told anew at each connection (unit status, states) does not survive its connection; and
what must arrive (`LASTING`) is given up only after many connections: after four transmissions it waits for the next
one. The link keeps those messages on disk until `take_finished` names them.
"""

from __future__ import annotations

import hashlib
import logging
import math
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Final

from aoscore.cm.communication import envelope
from aoscore.cm.communication.envelope import EnvelopeError, Received
from aoscore.cm.communication.messages import (
    Ack,
    Alerts,
    DeprovisioningResponse,
    FinishProvisioningResponse,
    InstallUnitCertificatesConfirmation,
    IssueUnitCertificates,
    Message,
    MonitoringData,
    Nack,
    NewState,
    PushLog,
    StartProvisioningResponse,
    StateRequest,
    UnitStatus,
    message_type,
)

_log = logging.getLogger(__name__)

MAX_TRANSMISSIONS: Final = 4
# A message that breaks the link each time it is sent must not do so for ever. A lasting one goes again after pauses
# that double, so that the others get through.
MAX_CUT_SHORT: Final = 10
MAX_CUT_SHORT_LASTING: Final = 100
LONGEST_PAUSE_S: Final = 600.0
# A lasting message that the cloud never acknowledges is given up after so many connections.
MAX_ROUNDS: Final = 20
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
QUEUE_BYTES: Final[dict[type[Message], int]] = {PushLog: 8 * 1024 * 1024}

LASTING: Final[frozenset[type[Message]]] = frozenset(
    {
        Alerts,
        PushLog,
        IssueUnitCertificates,
        InstallUnitCertificatesConfirmation,
        StartProvisioningResponse,
        FinishProvisioningResponse,
        DeprovisioningResponse,
    }
)
"""Messages that nobody would say again: kept over restarts, until the cloud has acknowledged them."""
KEPT_AT_TIMES: Final[frozenset[type[Message]]] = frozenset({MonitoringData})
"""Messages that are kept only when somebody asks for it: a write for each would be too much."""
_TOLD_ANEW: Final = (UnitStatus, NewState, StateRequest)
"""Their senders begin each connection with what is true then."""


class _Entry:
    """A message of ours until the cloud has acknowledged it."""

    __slots__ = ("cut_short", "due", "frame", "is_lasting", "kind", "name", "rounds", "transmissions", "txn")

    def __init__(self, kind: type[Message], txn: str, frame: bytes, due: float, *, is_lasting: bool) -> None:
        self.kind = kind
        self.name = message_type(kind)
        self.txn = txn
        self.frame = frame
        self.due = due  # queued: not to be sent before; sent: when the ack is overdue
        self.transmissions = 0
        self.cut_short = 0
        self.rounds = 0  # connections that brought no ack
        self.is_lasting = is_lasting


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
        self._finished: list[str] = []
        self.dropped = 0

    @property
    def waiting(self) -> int:
        """Messages that are not acknowledged yet."""
        return len(self._queue) + len(self._sent)

    def send(self, message: Message, *, now: float, created_at: datetime) -> str:
        """Queues a message and returns its txn."""
        txn, frame = self.frame(message, created_at=created_at)
        self.enqueue(type(message), txn, frame, now=now)
        return txn

    def frame(self, message: Message, *, created_at: datetime) -> tuple[str, bytes]:
        """A message ready for `enqueue`: its txn and its frame, which stay the same however often it is sent."""
        txn = self._new_txn()
        return txn, envelope.encode(message, system_id=self._system_id, txn=txn, created_at=created_at)

    def enqueue(self, kind: type[Message], txn: str, frame: bytes, *, now: float, is_lasting: bool = False) -> None:
        """Queues what `frame` made. `is_lasting`: it must arrive although others of its type need not."""
        self._queue.append(_Entry(kind, txn, frame, now, is_lasting=is_lasting or kind in LASTING))
        self._enforce_limit(kind)

    def passing(self, kind: type[Message]) -> list[tuple[str, bytes]]:
        """Txn and frame of those of a type that wait and need not arrive."""
        entries = (*self._sent.values(), *self._queue)
        return [(entry.txn, entry.frame) for entry in entries if entry.kind is kind and not entry.is_lasting]

    def set_lasting(self, txn: str, is_lasting: bool) -> None:
        """From now on a message must arrive, or need not; none when it is not waiting any more."""
        for entry in (*self._sent.values(), *self._queue):
            if entry.txn == txn:
                entry.is_lasting = is_lasting

    def restore(self, entries: Iterable[tuple[type[Message], str, bytes]], *, now: float) -> None:
        """Queues what an earlier process left, in its order, before everything else: type, txn and frame of each."""
        known = {entry.txn for entry in (*self._queue, *self._sent.values())}
        left = [_Entry(kind, txn, frame, now, is_lasting=True) for kind, txn, frame in entries if txn not in known]
        self._queue[:0] = left
        for kind in {entry.kind for entry in left}:
            self._enforce_limit(kind)

    def take_finished(self) -> list[str]:
        """Txns of lasting messages that were acknowledged or given up since the last call."""
        finished, self._finished = self._finished, []
        return finished

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
            if entry.is_lasting and entry.cut_short >= MAX_CUT_SHORT:
                entry.due += min(2.0 ** (entry.cut_short - MAX_CUT_SHORT), LONGEST_PAUSE_S)
        kept = []
        for entry in [*interrupted, *self._queue]:
            if entry.due == math.inf:
                entry.due = now
                entry.transmissions = 0
            if entry.kind in _TOLD_ANEW:
                continue
            if entry.cut_short >= (MAX_CUT_SHORT_LASTING if entry.is_lasting else MAX_CUT_SHORT):
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
        due = min((entry.due for entry in (*self._queue, *self._sent.values())), default=math.inf)
        return None if due == math.inf else due

    def receive(self, frame: bytes | str, *, now: float, created_at: datetime) -> Received | None:
        """Reads a frame of the cloud.

        Returns the message to act on, for which `acknowledge` is to be called; None for acks, nacks, and a message that
        was acknowledged before. Raises EnvelopeError when the frame is not for us; it gets no ack.
        """
        received = envelope.decode(frame, system_id=self._system_id)
        match received.message:
            case Ack():
                self._acknowledged(received.txn)
                return None
            case Nack(retry_after=delay_ms):
                self._delay(received.txn, now + min(max(delay_ms / 1000, 0.0), MAX_NACK_DELAY_S))
                return None
        # The cloud repeats a message with the same txn when our ack got lost. Only the same content counts as a
        # repetition: 9.1 accepts clouds that use a txn twice.
        if _seen_key(received.txn, frame) not in self._seen:
            return received
        self.acknowledge(received.txn, frame, created_at=created_at)
        return None

    def acknowledge(self, txn: str, frame: bytes | str, *, created_at: datetime) -> None:
        """Queues the ack of a message of the cloud, which is in safe hands now: the cloud says it no second time."""
        key = _seen_key(txn, frame)
        self._seen[key] = None
        self._seen.move_to_end(key)
        if len(self._seen) > _REMEMBERED_TXNS:
            self._seen.popitem(last=False)
        self._acks.append(envelope.encode(Ack(), system_id=self._system_id, txn=txn, created_at=created_at))

    def _acknowledged(self, txn: str) -> None:
        entry = self._sent.pop(txn, None)
        if entry is None:
            # Perhaps the ack came too late, and it waits to be sent again.
            entry = next((one for one in self._queue if one.txn == txn), None)
            if entry is None:
                _log.debug("Ack for an unknown message: txn=%s", txn)
                return
            self._queue.remove(entry)
        if entry.is_lasting:
            self._finished.append(txn)

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
        # First in, first out: what was sent before goes again before what is new.
        self._queue[:0] = [entry for entry in overdue if self._goes_again(entry)]

    def _goes_again(self, entry: _Entry) -> bool:
        """Whether a message without an ack stays, perhaps until the next connection."""
        if entry.transmissions < MAX_TRANSMISSIONS:
            return True
        entry.rounds += 1
        if not entry.is_lasting or entry.rounds >= MAX_ROUNDS:
            self._drop(entry, f"no ack after {entry.transmissions} transmissions on {entry.rounds} connections")
            return False
        entry.due = math.inf
        _log.warning("The cloud does not acknowledge a message, it waits: type=%s, txn=%s", entry.name, entry.txn)
        return True

    def _enforce_limit(self, kind: type[Message]) -> None:
        limit = self._limits.get(kind)
        if limit is None:
            return
        waiting = [entry for entry in self._queue if entry.kind is kind]
        room_bytes = QUEUE_BYTES.get(kind, math.inf)
        for count, entry in enumerate(reversed(waiting), start=1):
            room_bytes -= len(entry.frame)
            if count > limit or (room_bytes < 0 and count > 1):
                self._queue.remove(entry)
                self._drop(entry, f"more than {limit if count > limit else count - 1} are waiting")

    def _drop(self, entry: _Entry, reason: str) -> None:
        self.dropped += 1
        if entry.is_lasting:
            self._finished.append(entry.txn)
        _log.error(
            "Message to the cloud is dropped: type=%s, txn=%s, reason=%s, dropped=%d",
            entry.name,
            entry.txn,
            reason,
            self.dropped,
        )


def _seen_key(txn: str, frame: bytes | str) -> tuple[str, bytes]:
    return txn, hashlib.sha256(frame.encode() if isinstance(frame, str) else frame).digest()


__all__ = ["EnvelopeError", "Session"]
