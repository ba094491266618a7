"""Channels as pure state machines: TLS in frames, Resets, what belongs to which use."""

import ssl
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aoscore._speedups.frames import encode_records
from aoscore.common.errors import InvalidArgumentError, NotFoundError, WrongStateError
from aoscore.common.tls import TlsIdentity
from aoscore.mp.communication.channelcore import (
    ChannelCore,
    Closed,
    Event,
    OpenChannel,
    Opened,
    Ready,
    Received,
    SecureChannel,
    State,
)
from aoscore.mp.communication.frames import MAX_OPEN_MESSAGE_BYTES, Bytes, FrameDecoder, encode_frame, encode_message
from tests.support.pki import TestCa

LIMIT = 1 << 20


class Pipe:
    """The wire of one end; what it pushes reaches the other end with `deliver`."""

    quantum_bytes = 64 * 1024

    def __init__(self) -> None:
        self.queue: list[tuple[str, object]] = []
        self.peer: ChannelCore | None = None
        self.sent: list[bytes] = []

    def push(self, port: int, frames: bytes, count: int) -> None:
        ((found, payloads),) = FrameDecoder().feed(frames)
        assert (found, len(payloads)) == (port, count)
        self.queue += [("data", bytes(payload)) for payload in payloads]

    def take(self) -> list[bytes]:
        """The payloads that wait, instead of delivering them."""
        waiting, self.queue = self.queue, []
        return [content for _, content in waiting if isinstance(content, bytes)]

    def drop(self, port: int) -> None:
        self.queue = [entry for entry in self.queue if entry[0] != "data"]

    def reset(self, port: int, reason: str, *, answer: bool) -> None:
        # More urgent than anything that waits, as on a link.
        self.queue.insert(sum(entry[0] == "reset" for entry in self.queue), ("reset", (reason, answer)))

    def deliver(self) -> list[Event]:
        """Hand all that waits to the other end; its events."""
        assert self.peer is not None
        events: list[Event] = []
        waiting, self.queue = self.queue, []
        for kind, content in waiting:
            if kind == "data":
                assert isinstance(content, bytes)
                self.sent.append(content)
                events += self.peer.feed(content)
            else:
                reason, answer = content  # type: ignore[misc]
                events += self.peer.on_reset(reason, is_answer=answer)
        return events


class Ends:
    """Gateway and node end of one channel."""

    def __init__(self, make: Callable[[Pipe, bool], ChannelCore]) -> None:
        self.up, self.down = Pipe(), Pipe()
        self.node = make(self.up, False)
        self.gateway = make(self.down, True)
        self.up.peer, self.down.peer = self.gateway, self.node

    def settle(self) -> tuple[list[Event], list[Event]]:
        """Deliver until nothing moves; events of node and gateway."""
        node: list[Event] = []
        gateway: list[Event] = []
        while self.up.queue or self.down.queue:
            gateway += self.up.deliver()
            node += self.down.deliver()
        return node, gateway


def open_ends() -> Ends:
    return Ends(lambda pipe, accepts: OpenChannel(1, pipe, accepts=accepts))


@pytest.fixture(scope="module")
def identity(tmp_path_factory: pytest.TempPathFactory) -> TlsIdentity:
    return TestCa().identity(tmp_path_factory.mktemp("pki"), "node")


def secure_ends(
    identity: TlsIdentity, *, node: TlsIdentity | None = None, adjust: Callable[[ssl.SSLContext], None] = lambda _: None
) -> Ends:
    def make(pipe: Pipe, accepts: bool) -> ChannelCore:
        def context() -> ssl.SSLContext:
            own = identity if accepts else (node or identity)
            made = own.ssl_server_context() if accepts else own.ssl_client_context(check_hostname=False)
            adjust(made)
            return made

        return SecureChannel(4, pipe, accepts=accepts, limit_bytes=LIMIT, context=context)

    return Ends(make)


@pytest.fixture(params=["open", "tls1.3", "tls1.2"])
def ends(request: pytest.FixtureRequest, identity: TlsIdentity) -> Ends:
    def only_12(context: ssl.SSLContext) -> None:
        context.maximum_version = ssl.TLSVersion.TLSv1_2

    match request.param:
        case "open":
            return open_ends()
        case "tls1.2":
            return secure_ends(identity, adjust=only_12)
        case _:
            return secure_ends(identity)


def opened(ends: Ends) -> Ends:
    """Both ends open, after a first message of the node."""
    events = [*ends.node.connect()]
    node, _ = ends.settle()
    assert Opened() in events + node
    ends.node.send(b"hello")
    _, gateway = ends.settle()
    assert gateway[-1] == Received([b"hello"])
    assert ends.gateway.state is ends.node.state is State.OPEN
    return ends


def test_messages_both_ways(ends: Ends) -> None:
    opened(ends)
    ends.gateway.send(b"order")
    ends.gateway.send(b"another")
    ends.node.send(b"status")
    node, gateway = ends.settle()
    assert node == [Received([b"order"]), Received([b"another"])]
    assert gateway == [Received([b"status"])]


@pytest.mark.parametrize("size", [10, 5000, 40_000])
def test_messages_outlast_what_they_came_in(ends: Ends, size: int) -> None:
    """A link reads into the same memory again and again."""
    opened(ends)
    ends.node.send(b"m" * size)
    ends.node.send(b"n" * size)
    messages: list[Bytes] = []
    for payload in ends.up.take():
        memory = bytearray(payload)
        for event in ends.gateway.feed(memoryview(memory)):
            assert isinstance(event, Received)
            messages += event.messages
        memory[:] = bytes(len(memory))
    assert messages == [b"m" * size, b"n" * size]


def test_messages_that_come_together_are_told_of_together(ends: Ends) -> None:
    opened(ends)
    ends.node.send(b"one", b"two", b"three" * 10_000)
    payloads = ends.up.take()
    assert len(payloads) >= 3
    found = [*ends.gateway.feed(*payloads)]
    assert found == [Received([b"one", b"two", b"three" * 10_000])]


def test_what_came_before_damage_is_told_of(identity: TlsIdentity) -> None:
    ends = opened(secure_ends(identity))
    ends.node.send(b"whole")
    ends.node.send(b"damaged")
    whole, damaged = ends.up.take()
    found = [*ends.gateway.feed(whole, damaged[:-1] + bytes([damaged[-1] ^ 1]))]
    assert found[0] == Received([b"whole"])
    assert isinstance(found[1], Closed) and "TLS failed" in found[1].reason


def test_rest_of_an_earlier_use_before_a_new_one(identity: TlsIdentity) -> None:
    ends = opened(secure_ends(identity))
    ends.node.send(b"late")
    late = ends.up.take()
    fresh = secure_ends(identity)
    assert [*fresh.node.connect()] == []
    hello = fresh.up.take()
    assert [*fresh.gateway.feed(*late, *hello)] == []
    assert (fresh.gateway.passed_over, fresh.gateway.state) == (1, State.OPENING)


def test_close_reaches_the_other_end_and_both_can_begin_again(ends: Ends) -> None:
    opened(ends)
    assert [*ends.gateway.close("CM is gone")] == [Closed("CM is gone")]
    node, gateway = ends.settle()
    assert node == [Closed("CM is gone"), Ready()]
    assert gateway == [Ready()]
    opened(ends)


def test_both_ends_close_at_once(ends: Ends) -> None:
    opened(ends)
    assert [*ends.gateway.close("a")] == [Closed("a")]
    assert [*ends.node.close("b")] == [Closed("b")]
    node, gateway = ends.settle()
    assert (node, gateway) == ([Ready()], [Ready()])
    opened(ends)


def test_what_was_underway_does_not_reach_the_next_use(ends: Ends) -> None:
    opened(ends)
    ends.gateway.send(b"old order")
    ends.node.send(b"old status")
    assert [*ends.node.close("SM restarts")] == [Closed("SM restarts")]
    # The node's own queue went with its Reset; the gateway's message is underway.
    node, gateway = ends.settle()
    assert node == [Ready()]
    assert gateway == [Closed("SM restarts"), Ready()]
    opened(ends)


def test_gateway_waits_for_the_answer_before_a_new_use(ends: Ends) -> None:
    opened(ends)
    ends.node.send(b"late")
    late, ends.up.queue = ends.up.queue, []
    assert [*ends.gateway.close("gone")] == [Closed("gone")]
    ends.up.queue = late
    assert ends.up.deliver() == []
    assert ends.gateway.passed_over == 1
    assert ends.gateway.state is State.CLOSING
    ends.settle()
    assert ends.gateway.state is State.IDLE


def test_without_an_answer_the_channel_is_ready_after_all(ends: Ends) -> None:
    opened(ends)
    assert [*ends.node.close("x")] == [Closed("x")]
    ends.up.queue.clear()
    assert [*ends.node.on_no_more()] == [Ready()]
    assert ends.node.state is State.IDLE


def test_message_above_the_limit(ends: Ends) -> None:
    opened(ends)
    limit = MAX_OPEN_MESSAGE_BYTES if isinstance(ends.node, OpenChannel) else LIMIT
    with pytest.raises(InvalidArgumentError, match=rf"{limit + 1} bytes for channel \d, {limit} is most"):
        ends.node.send(bytes(limit + 1))
    ends.node.send(bytes(limit))
    _, gateway = ends.settle()
    assert gateway == [Received([bytes(limit)])]


def test_nothing_is_sent_on_a_closed_channel(ends: Ends) -> None:
    with pytest.raises(WrongStateError, match="is not open"):
        ends.node.send(b"x")


def test_open_channel_needs_one_frame_per_message() -> None:
    ends = opened(open_ends())
    ends.node.send(b"x" * 1000)
    assert len(ends.up.queue) == 1


def test_one_tls_record_per_frame(identity: TlsIdentity) -> None:
    ends = opened(secure_ends(identity))
    ends.node.send(bytes(100_000))
    ends.gateway.send(b"small")
    ends.settle()
    for payload in ends.up.sent + ends.down.sent:
        assert len(payload) == 5 + int.from_bytes(payload[3:5], "big")


def test_message_of_one_record_is_one_frame(identity: TlsIdentity) -> None:
    ends = opened(secure_ends(identity))
    ends.node.send(bytes(16_380))
    assert len(ends.up.queue) == 1


def test_gateway_refuses_a_node_of_another_unit(identity: TlsIdentity, tmp_path: Path) -> None:
    stranger = TestCa("Other").identity(tmp_path, "stranger")
    # Trusts our root, so that it is the gateway who refuses.
    stranger = TlsIdentity(identity.ca_file, stranger.cert_url, stranger.key_url)
    ends = secure_ends(identity, node=stranger)
    assert [*ends.node.connect()] == []
    node, gateway = ends.settle()
    refused = [event.reason for event in gateway if isinstance(event, Closed)]
    assert refused and "TLS failed" in refused[0]
    assert [event.reason for event in node if isinstance(event, Closed)] == refused
    assert Opened() not in gateway
    assert ends.node.state is ends.gateway.state is State.IDLE


def test_node_refuses_a_gateway_of_another_unit(identity: TlsIdentity, tmp_path: Path) -> None:
    other = TestCa("Other").identity(tmp_path, "node")
    ends = secure_ends(identity, node=other)
    assert [*ends.node.connect()] == []
    node, gateway = ends.settle()
    assert any(isinstance(event, Closed) and "TLS failed" in event.reason for event in node)
    assert Opened() not in node + gateway


def test_without_a_client_certificate_nobody_gets_in(identity: TlsIdentity) -> None:
    ends = secure_ends(identity)

    def bare() -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.load_verify_locations(identity.ca_file)
        return context

    ends.node = SecureChannel(4, ends.up, accepts=False, limit_bytes=LIMIT, context=bare)
    ends.down.peer = ends.node
    assert [*ends.node.connect()] == []
    _, gateway = ends.settle()
    assert Opened() not in gateway
    assert any(isinstance(event, Closed) for event in gateway)


def test_gateway_without_certificate_says_so() -> None:
    ends = open_ends()

    def none() -> ssl.SSLContext:
        raise NotFoundError("certificate sm is not known yet")

    ends.gateway = SecureChannel(4, ends.down, accepts=True, limit_bytes=LIMIT, context=none)
    assert [*ends.gateway.feed(b"\x16\x03\x01\x00\x05\x01\x00\x00\x00\x00")] == [
        Closed("certificate sm is not known yet")
    ]
    assert ends.down.queue == [("reset", ("certificate sm is not known yet", False))]


def test_peer_that_knows_no_reset_ends_with_close_notify(identity: TlsIdentity) -> None:
    ends = opened(secure_ends(identity))
    assert isinstance(ends.node, SecureChannel)
    tls = ends.node._present()
    tls.close()
    for frames, count in encode_records(4, tls.output(), 1 << 20):
        ends.up.push(4, frames, count)
    node, gateway = ends.settle()
    assert gateway == [Closed("closed by the peer"), Ready()]
    assert node == [Closed("closed by the peer"), Ready()]


def test_hostile_length_closes_the_channel() -> None:
    ends = opened(open_ends())
    ends.up.push(1, encode_frame(1, b"\xff\xff\xff\xff"), 1)
    _, gateway = ends.settle()
    assert gateway[0] == Closed(f"message of 4294967295 bytes, {MAX_OPEN_MESSAGE_BYTES} is most")


@given(st.lists(st.binary(max_size=60), max_size=10))
def test_any_payload_is_survived(payloads: list[bytes]) -> None:
    for ends in (open_ends(), secure_ends(_shared_identity())):
        for payload in payloads:
            for event in ends.gateway.feed(payload):
                assert isinstance(event, Opened | Received | Closed | Ready)
            ends.settle()


@given(st.lists(st.sampled_from(["connect", "send", "reply", "close", "drop", "settle"]), max_size=30))
def test_any_order_of_steps_ends_with_both_sides_agreeing(steps: list[str]) -> None:
    ends = open_ends()
    for step in steps:
        if step == "connect" and ends.node.state is State.IDLE:
            [*ends.node.connect()]
        elif step == "send" and ends.node.state is State.OPEN:
            ends.node.send(b"n")
        elif step == "reply" and ends.gateway.state is State.OPEN:
            ends.gateway.send(b"g")
        elif step == "close":
            [*ends.node.close("node")]
        elif step == "drop":
            [*ends.gateway.close("gateway")]
        elif step == "settle":
            ends.settle()
    [*ends.node.close("end")]
    ends.settle()
    assert ends.node.state is ends.gateway.state is State.IDLE
    opened(ends)


_identities: list[TlsIdentity] = []


def _shared_identity() -> TlsIdentity:
    return _identities[0]


@pytest.fixture(scope="module", autouse=True)
def _remember(identity: TlsIdentity) -> Iterator[None]:
    _identities.append(identity)
    yield
    _identities.clear()


def test_message_framing_is_that_of_the_contract() -> None:
    ends = opened(open_ends())
    ends.node.send(b"abc")
    assert ends.up.queue == [("data", encode_message(b"abc"))]


def test_messages_of_an_open_channel_never_share_a_frame() -> None:
    ends = opened(open_ends())
    ends.node.send(b"one", b"two")
    assert ends.up.take() == [encode_message(b"one"), encode_message(b"two")]


def test_peers_of_the_older_kind_get_one_message_per_record(identity: TlsIdentity) -> None:
    ends = secure_ends(identity)
    ends.node.be_legacy()
    ends.gateway.be_legacy()
    opened(ends)
    ends.gateway.send(b"one", b"two", bytes(16_380))
    assert len(ends.down.take()) == 3


def test_what_is_encoded_already_passes_as_it_is(ends: Ends) -> None:
    opened(ends)
    ends.node.send_encoded(encode_message(b"one") + encode_message(b"two"))
    _, gateway = ends.settle()
    assert [message for event in gateway if isinstance(event, Received) for message in event.messages] == [
        b"one",
        b"two",
    ]
    assert [*ends.node.close("x")] == [Closed("x")]
    with pytest.raises(WrongStateError, match="is not open"):
        ends.node.send_encoded(encode_message(b"three"))


def test_what_waits_is_cut_where_others_may_go_between(identity: TlsIdentity) -> None:
    ends = opened(secure_ends(identity))
    pushed = []
    ends.up.push = lambda port, frames, count: pushed.append((len(frames), count))  # type: ignore[method-assign]
    ends.node.send(bytes(1_000_000))
    assert len(pushed) > 10
    assert max(size for size, _ in pushed) < ends.up.quantum_bytes + 4096
