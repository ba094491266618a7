"""The conversation on channel 16."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aoscore._pb.transport.v1 import transport_pb2 as pb
from aoscore.common.errors import AosError, DeadlineError, FailedError, InvalidArgumentError, NotSupportedError
from aoscore.mp.communication.control import HELLO_TIMEOUT_S, PING_AFTER_S, SILENCE_LIMIT_S, Control, Role


class End:
    """A Control with what it sends."""

    def __init__(self, role: Role) -> None:
        self.sent: list[pb.Control] = []
        self.resets: list[tuple[int, str, bool]] = []
        self.control = Control(
            role,
            software="test",
            ports=(1, 16),
            max_message_bytes=1000,
            now_s=100.0,
            send=self.sent.append,
            on_reset=lambda *args: self.resets.append(args),
        )

    def take(self, message: pb.Control) -> None:
        self.control.receive(message.SerializeToString())


def hello(role: str = "node", protocol: int = 1) -> pb.Control:
    return pb.Control(hello=pb.Hello(protocol=protocol, role=role, ports=[1, 16]))


def introduced(role: Role = "gateway") -> End:
    end = End(role)
    end.take(hello("node" if role == "gateway" else "gateway"))
    end.sent.clear()
    return end


def test_node_speaks_first_and_the_gateway_answers() -> None:
    node, gateway = End("node"), End("gateway")
    node.control.begin()
    gateway.control.begin()
    assert gateway.sent == []
    gateway.take(node.sent[0])
    node.take(gateway.sent[0])
    assert node.control.peer is not None and gateway.control.peer is not None
    assert (node.control.peer.role, gateway.control.peer.role) == ("gateway", "node")
    assert list(gateway.control.peer.ports) == [1, 16]


@pytest.mark.parametrize(
    ("message", "error", "text"),
    [
        (hello("gateway"), InvalidArgumentError, "calls itself 'gateway'"),
        (hello("other"), InvalidArgumentError, "calls itself 'other'"),
        (hello(protocol=2), NotSupportedError, "version 2 of the link protocol"),
        (pb.Control(ping=pb.Ping(seq=1)), InvalidArgumentError, "did not introduce itself, it sent ping"),
    ],
)
def test_wrong_introduction(message: pb.Control, error: type[AosError], text: str) -> None:
    end = End("gateway")
    with pytest.raises(error, match=text):
        end.take(message)
    assert end.sent == []


def test_second_introduction_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="twice"):
        introduced().take(hello())


def test_ping_is_answered() -> None:
    end = introduced()
    end.take(pb.Control(ping=pb.Ping(seq=7)))
    assert end.sent == [pb.Control(pong=pb.Pong(seq=7))]


def test_reset_is_handed_on() -> None:
    end = introduced()
    end.take(pb.Control(reset=pb.Reset(port=4, reason="r", answer=True)))
    assert end.resets == [(4, "r", True)]


def test_silence_is_noticed() -> None:
    end = introduced()
    end.control.tick(100 + PING_AFTER_S - 0.1)
    assert end.sent == []
    end.control.tick(100 + PING_AFTER_S)
    end.control.tick(101 + PING_AFTER_S)
    assert end.sent == [pb.Control(ping=pb.Ping(seq=1))]
    end.control.tick(100 + 2 * PING_AFTER_S)
    assert len(end.sent) == 2
    with pytest.raises(DeadlineError, match="nothing came from the peer for 25 s"):
        end.control.tick(100 + SILENCE_LIMIT_S)


def test_any_byte_is_a_sign_of_life() -> None:
    end = introduced()
    end.control.on_bytes(125)
    end.control.tick(130)
    assert end.sent == []


def test_who_does_not_introduce_itself_is_left() -> None:
    end = End("gateway")
    end.control.on_bytes(104)
    end.control.tick(104.9)
    with pytest.raises(DeadlineError, match="did not introduce itself"):
        end.control.tick(100 + HELLO_TIMEOUT_S)


def test_good_bye_ends_the_link() -> None:
    end = introduced()
    end.take(pb.Control(bye=pb.Bye(reason="restart")))
    with pytest.raises(FailedError, match="the peer closes the link"):
        end.control.tick(101)


@given(st.binary(max_size=100))
def test_any_message_is_taken_or_refused(message: bytes) -> None:
    for end in (End("gateway"), introduced()):
        try:
            end.control.receive(message)
        except AosError:
            pass
