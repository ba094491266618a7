"""The conversation on channel 16: who is there, are you alive, start a channel anew, good-bye (mp-wire §9). Pure."""

from collections.abc import Callable, Sequence
from typing import Literal

from google.protobuf.message import DecodeError

from aoscore._pb.transport.v1 import transport_pb2 as pb
from aoscore._speedups.frames import MAX_PAYLOAD_BYTES
from aoscore.common.errors import DeadlineError, FailedError, InvalidArgumentError, NotSupportedError

Role = Literal["gateway", "node"]

PROTOCOL = 1
HELLO_TIMEOUT_S = 5.0
PING_AFTER_S = 10.0
# Within mp-wire's 30 s the cloud is to know, too: a peer that is there has answered two pings by now.
SILENCE_LIMIT_S = 25.0


class Control:
    """Our half of the conversation, over one link.

    `send` takes messages for the peer, `on_reset(port, reason, is_answer)` is told of Resets. Times are seconds of one
    clock; `now_s` is when the link came up.
    """

    def __init__(
        self,
        role: Role,
        *,
        software: str,
        ports: Sequence[int],
        max_message_bytes: int,
        now_s: float,
        send: Callable[[pb.Control], None],
        on_reset: Callable[[int, str, bool], None],
    ) -> None:
        self._role = role
        self._hello = pb.Control(
            hello=pb.Hello(
                protocol=PROTOCOL,
                role=role,
                software=software,
                max_frame=MAX_PAYLOAD_BYTES,
                max_message=max_message_bytes,
                ports=ports,
            )
        )
        self._send = send
        self._on_reset = on_reset
        self._began_s = now_s
        self._heard_s = now_s
        self._pinged_s = now_s
        self._seq = 0
        self.peer: pb.Hello | None = None
        """What the peer said of itself; None until then."""
        self.is_over = False
        """The peer said good-bye."""

    def begin(self) -> None:
        """The node speaks first: a gateway that did would confuse peers of the older kind."""
        if self._role == "node":
            self._send(self._hello)

    def on_bytes(self, now_s: float) -> None:
        """Anything came from the peer."""
        self._heard_s = now_s

    def receive(self, message: bytes) -> None:
        """Take a message. Raises InvalidArgumentError or NotSupportedError for a peer we can't work with."""
        try:
            control = pb.Control.FromString(message)
        except DecodeError as error:
            raise InvalidArgumentError(f"control message is malformed: {error}") from error
        kind = control.WhichOneof("message")
        if self.peer is None and kind != "hello":
            raise InvalidArgumentError(f"the peer did not introduce itself, it sent {kind}")
        match kind:
            case "hello":
                self._introduce(control.hello)
            case "ping":
                self._send(pb.Control(pong=pb.Pong(seq=control.ping.seq)))
            case "reset":
                self._on_reset(control.reset.port, control.reset.reason, control.reset.answer)
            case "bye":
                self.is_over = True
            case _:
                pass  # a pong has already counted as a sign of life; unknown members are of newer peers

    def _introduce(self, hello: pb.Hello) -> None:
        if self.peer is not None:
            raise InvalidArgumentError("the peer introduced itself twice")
        if hello.protocol != PROTOCOL:
            raise NotSupportedError(f"the peer speaks version {hello.protocol} of the link protocol, we {PROTOCOL}")
        if hello.role == self._role or hello.role not in ("gateway", "node"):
            raise InvalidArgumentError(f"the peer calls itself {hello.role!r}, and we are the {self._role}")
        self.peer = hello
        if self._role == "gateway":
            self._send(self._hello)

    def tick(self, now_s: float) -> None:
        """Look at the clock, about once a second.

        Sends a ping in silence. Raises DeadlineError when the peer is not there, FailedError after its good-bye.
        """
        if self.is_over:
            raise FailedError("the peer closes the link")
        if self.peer is None and now_s - self._began_s >= HELLO_TIMEOUT_S:
            raise DeadlineError(f"the peer did not introduce itself within {HELLO_TIMEOUT_S:g} s")
        silence_s = now_s - self._heard_s
        if silence_s >= SILENCE_LIMIT_S:
            raise DeadlineError(f"nothing came from the peer for {SILENCE_LIMIT_S:g} s")
        if silence_s >= PING_AFTER_S and now_s - self._pinged_s >= PING_AFTER_S:
            self._seq += 1
            self._pinged_s = now_s
            self._send(pb.Control(ping=pb.Ping(seq=self._seq)))

    def reset(self, port: int, reason: str, *, answer: bool) -> None:
        """Tell the peer to drop a channel, or that we have."""
        self._send(pb.Control(reset=pb.Reset(port=port, reason=reason, answer=answer)))

    def bye(self, reason: str) -> None:
        """Tell the peer that we go."""
        self._send(pb.Control(bye=pb.Bye(reason=reason)))
