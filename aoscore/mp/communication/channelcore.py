"""One channel of a link: when it is open, and what comes through it (mp-wire §4-6, mp.md §2). Pure.

    IDLE --connect (node) / first payload (gateway)--> OPENING --TLS is up, at once without TLS--> OPEN
    OPENING, OPEN --close, or an error--> CLOSING: Reset is sent, the rest of what the peer sends is passed over
    CLOSING --the peer answers the Reset--> IDLE
    any --Reset of the peer--> answered, IDLE

An answered Reset is what separates two uses of a channel: what comes before it belongs to the old one. Peers of the
older kind know none: a secure channel ends with what TLS has for that, an open one just ends (mp-wire §6).
"""

import ssl
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from aoscore._speedups.frames import encode_records
from aoscore.common.errors import AosError, InvalidArgumentError, WrongStateError
from aoscore.mp.communication.frames import (
    LENGTH_BYTES,
    MAX_OPEN_MESSAGE_BYTES,
    Bytes,
    MessageDecoder,
    encode_frame,
    encode_message,
)
from aoscore.mp.communication.tlscore import TlsCore, is_client_hello


class State(Enum):
    """See the module text."""

    IDLE = "idle"
    OPENING = "opening"
    OPEN = "open"
    CLOSING = "closing"


@dataclass(frozen=True, slots=True)
class Opened:
    """The channel is open."""


@dataclass(frozen=True, slots=True)
class Received:
    """Messages came, at least one."""

    messages: Sequence[Bytes]


@dataclass(frozen=True, slots=True)
class Closed:
    """The channel is no longer open, or did not become so."""

    reason: str


@dataclass(frozen=True, slots=True)
class Ready:
    """The channel can be opened again."""


Event = Opened | Received | Closed | Ready


class Wire(Protocol):
    """The link below the channels."""

    quantum_bytes: int
    """How much of a channel should be queued in one piece at most: nothing goes between its frames."""

    def push(self, port: int, frames: bytes, count: int) -> None:
        """Queue frames of one channel, `count` of them."""

    def drop(self, port: int) -> None:
        """Forget what is queued of a channel."""

    def reset(self, port: int, reason: str, *, answer: bool) -> None:
        """Send a Reset."""


# A TLS alert for when we have no certificate yet to begin with (RFC 5246 §7.2): the peer tries again later.
_INTERNAL_ERROR = bytes.fromhex("15 0303 0002 02 50")
LEGACY_LIMIT_BYTES = 1024 * 1024
"""Largest message that we take from a peer of the older kind (mp-wire §5)."""
LEGACY_SECURE_SEND_BYTES = 16_380
"""Largest message for one on a secure channel: it reads one record and takes that for all (mp-wire §3, rule 4)."""
# What pieces of a download and TLS add to a quantum of it.
_ADDED_BYTES = 2048


class ChannelCore(ABC):
    """What open and secure channels have in common. `accepts`: the peer opens the channel, not we."""

    def __init__(self, port: int, wire: Wire, *, accepts: bool, limit_bytes: int) -> None:
        self.port = port
        self.accepts = accepts
        self.state = State.IDLE
        self.passed_over = 0
        """Payloads that belonged to no open channel."""
        self.is_legacy = False
        """The peer is of the older kind."""
        self._wire = wire
        self._limit_bytes = limit_bytes
        self._send_limit_bytes = limit_bytes
        self._messages = MessageDecoder(limit_bytes)

    def be_legacy(self) -> None:
        """The peer turned out to be of the older kind; before anything was exchanged."""
        self.is_legacy = True
        self._limit_bytes = LEGACY_LIMIT_BYTES

    def connect(self) -> Iterator[Event]:
        """Open an idle channel."""
        self._messages = MessageDecoder(self._limit_bytes)
        return self._begin()

    def feed(self, *payloads: Bytes) -> Iterator[Event]:
        """Take payloads of the peer, at least one, in their order."""
        if self.state is State.IDLE and self.accepts:
            before = next((index for index, one in enumerate(payloads) if self._is_beginning(one)), None)
            if before is not None:
                self.passed_over += before
                payloads = payloads[before:]
                yield from self.connect()
        if self.state not in (State.OPENING, State.OPEN):
            self.passed_over += len(payloads)
            return
        try:
            yield from self._take(payloads)
        except AosError as error:
            yield from self.close(str(error))

    def send(self, *messages: bytes) -> None:
        """Queue messages. Raises InvalidArgumentError above the limit, WrongStateError on a closed channel."""
        encoded = [encode_message(message) for message in messages]
        largest = max(map(len, encoded)) - LENGTH_BYTES
        if largest > self._send_limit_bytes:
            raise InvalidArgumentError(
                f"message of {largest} bytes for channel {self.port}, {self._send_limit_bytes} is most"
            )
        self.send_encoded(*encoded)

    def send_encoded(self, *encoded: bytes) -> None:
        """Queue messages that have their lengths before them already. Raises WrongStateError on a closed channel."""
        if self.state is not State.OPEN:
            raise WrongStateError(f"channel {self.port} is not open")
        self._write(encoded)

    def close(self, reason: str) -> Iterator[Event]:
        """Give up whatever is open; what is queued is dropped, so that the Reset is the last that the peer gets."""
        if self.state not in (State.OPENING, State.OPEN):
            return
        if self.is_legacy:
            self.state = State.IDLE
            self._say_end()
            yield Closed(reason)
            yield Ready()
        else:
            self.state = State.CLOSING
            self._wire.drop(self.port)
            self._wire.reset(self.port, reason, answer=False)
            yield Closed(reason)

    def on_reset(self, reason: str, *, is_answer: bool) -> Iterator[Event]:
        """The peer has dropped the channel, or confirms that it has."""
        if is_answer:
            yield from self.on_no_more()
            return
        yield from self._end(reason)
        self._wire.reset(self.port, "", answer=True)

    def on_no_more(self) -> Iterator[Event]:
        """Nothing of the closed channel will come any more: the peer has answered, or has not in time."""
        if self.state is State.CLOSING:
            self.state = State.IDLE
            yield Ready()

    def _end(self, reason: str) -> Iterator[Event]:
        if self.state in (State.OPENING, State.OPEN):
            self.state = State.IDLE
            self._wire.drop(self.port)
            yield Closed(reason)
            yield Ready()

    def _deliver(self, pieces: Iterable[Bytes]) -> Iterator[Event]:
        """What is complete with the next pieces of the channel's stream; also what comes before an error in it."""
        messages: list[Bytes] = []
        error = None
        try:
            for data in pieces:
                messages += self._messages.feed(data)
        except AosError as caught:
            error = caught
        if messages:
            yield Received(messages)
        if error is not None:
            raise error

    @abstractmethod
    def _say_end(self) -> None:
        """Tell a peer that knows no Reset, behind what is queued, where there is a way to."""

    @abstractmethod
    def _is_beginning(self, payload: Bytes) -> bool: ...

    @abstractmethod
    def _begin(self) -> Iterator[Event]: ...

    @abstractmethod
    def _take(self, payloads: Sequence[Bytes]) -> Iterator[Event]: ...

    @abstractmethod
    def _write(self, encoded: Iterable[bytes]) -> None: ...


class OpenChannel(ChannelCore):
    """A channel without TLS: one message per frame from us, any split from the peer."""

    def __init__(self, port: int, wire: Wire, *, accepts: bool) -> None:
        super().__init__(port, wire, accepts=accepts, limit_bytes=MAX_OPEN_MESSAGE_BYTES)

    def _say_end(self) -> None:
        pass

    def _is_beginning(self, payload: Bytes) -> bool:
        return True

    def _begin(self) -> Iterator[Event]:
        self.state = State.OPEN
        yield Opened()

    def _take(self, payloads: Sequence[Bytes]) -> Iterator[Event]:
        # Messages stay for longer than what the link has read.
        return self._deliver(map(bytes, payloads))

    def _write(self, encoded: Iterable[bytes]) -> None:
        for data in encoded:
            self._wire.push(self.port, encode_frame(self.port, data), 1)


class SecureChannel(ChannelCore):
    """A channel with TLS: one record per frame. The accepting end is the TLS server.

    `context` gives the TLS settings of a connection that begins now; it may raise AosError, for example while there
    is no certificate.
    """

    def __init__(
        self, port: int, wire: Wire, *, accepts: bool, limit_bytes: int, context: Callable[[], ssl.SSLContext]
    ) -> None:
        super().__init__(port, wire, accepts=accepts, limit_bytes=limit_bytes)
        self._context = context
        self._tls: TlsCore | None = None

    def be_legacy(self) -> None:
        super().be_legacy()
        self._send_limit_bytes = LEGACY_SECURE_SEND_BYTES
        make = self._context

        def context() -> ssl.SSLContext:
            made = make()
            # Python's own choice leaves out plain RSA and CCM, which may be all that such a node has (mp-wire §6).
            made.set_ciphers("ALL:!aNULL:!eNULL:!PSK:!SRP")
            return made

        self._context = context

    @property
    def peer_der(self) -> bytes:
        """The peer's certificate (DER) on an open channel."""
        return self._present().peer_der

    def _is_beginning(self, payload: Bytes) -> bool:
        return is_client_hello(payload)

    def _begin(self) -> Iterator[Event]:
        self.state = State.OPENING
        self._tls = None
        try:
            self._tls = TlsCore(self._context(), server_side=self.accepts)
            if not self.accepts:
                self._tls.feed(())
            self._flush(self._tls)
        except AosError as error:
            yield from self.close(str(error))

    def _take(self, payloads: Sequence[Bytes]) -> Iterator[Event]:
        tls = self._present()
        plain = tls.feed(payloads)
        self._flush(tls)
        if tls.is_ready and self.state is State.OPENING:
            self.state = State.OPEN
            yield Opened()
        yield from self._deliver((plain,))
        if tls.failure is not None:
            raise tls.failure
        if tls.is_closed:
            # Peers that know no Reset end a channel like this (mp-wire §6).
            yield from self._end("closed by the peer")
            tls.close()
            self._flush(tls)

    def _write(self, encoded: Iterable[bytes]) -> None:
        tls = self._present()
        # Peers of the older kind read one record and take that for a message; for ours records may be full.
        for data in encoded if self.is_legacy else (b"".join(encoded),):
            tls.write(data)
        self._flush(tls)

    def _say_end(self) -> None:
        if self._tls is None:
            self._wire.push(self.port, encode_frame(self.port, _INTERNAL_ERROR), 1)
        else:
            self._tls.close()
            self._flush(self._tls)

    def _present(self) -> TlsCore:
        if self._tls is None:
            raise WrongStateError(f"channel {self.port} has no TLS connection")
        return self._tls

    def _flush(self, tls: TlsCore) -> None:
        most_bytes = self._wire.quantum_bytes + _ADDED_BYTES
        for frames, count in encode_records(self.port, tls.output(), most_bytes):
            self._wire.push(self.port, frames, count)
