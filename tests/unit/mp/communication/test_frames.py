"""Frames and messages: any split, damage, hostile sizes."""

import itertools
import struct
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aoscore._speedups.frames import HEADER_BYTES, MAX_PAYLOAD_BYTES
from aoscore.common.errors import InvalidArgumentError, OutOfRangeError
from aoscore.mp.communication.frames import (
    FrameDecoder,
    MessageDecoder,
    encode_frame,
    encode_message,
)

PORTS = st.integers(0, 2**32 - 1)
FRAMES = st.lists(st.tuples(PORTS, st.binary(max_size=300)), max_size=8)


def pieces(data: bytes, cuts: Sequence[int]) -> list[bytes]:
    """The data cut at some places."""
    places = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[begin:end] for begin, end in itertools.pairwise(places)]


@given(FRAMES, st.lists(st.integers(0, 4000), max_size=12))
def test_frames_survive_any_split(frames: list[tuple[int, bytes]], cuts: list[int]) -> None:
    wire = b"".join(encode_frame(port, payload) for port, payload in frames)
    decoder = FrameDecoder()
    found = [(port, payload) for piece in pieces(wire, cuts) for port, run in decoder.feed(piece) for payload in run]
    assert found == frames


@given(PORTS, st.binary(min_size=1, max_size=200), st.data())
def test_a_flipped_bit_is_seen(port: int, payload: bytes, data: st.DataObject) -> None:
    wire = bytearray(encode_frame(port, payload))
    # The checksum covers payload and checksum field; port and size are for the layer above to doubt.
    bit = data.draw(st.integers(8 * 8, len(wire) * 8 - 1))
    wire[bit // 8] ^= 1 << bit % 8
    assert list(FrameDecoder().feed(bytes(wire))) == [(port, [])]


@given(PORTS, st.integers(MAX_PAYLOAD_BYTES + 1, 2**32 - 1))
def test_size_above_the_limit_ends_it_with_the_header(port: int, size: int) -> None:
    decoder = FrameDecoder()
    header = struct.pack("<II", port, size) + bytes(32)
    assert list(decoder.feed(encode_frame(1, b"x") + header[:-1])) == [(1, [b"x"])]
    with pytest.raises(OutOfRangeError, match=f"port {port} announces {size} bytes"):
        list(decoder.feed(header[-1:]))


@given(st.binary(max_size=4000))
def test_any_bytes_are_frames_or_refused(data: bytes) -> None:
    decoder = FrameDecoder()
    try:
        for _, payloads in decoder.feed(data):
            assert all(len(payload) <= MAX_PAYLOAD_BYTES for payload in payloads)
    except OutOfRangeError:
        pass


def test_half_a_frame_gives_nothing() -> None:
    decoder = FrameDecoder()
    wire = encode_frame(4, b"abcdef")
    for cut in range(len(wire)):
        assert list(FrameDecoder().feed(wire[:cut])) == []
    assert list(decoder.feed(wire[: HEADER_BYTES + 3])) == []
    assert list(decoder.feed(wire[HEADER_BYTES + 3 :])) == [(4, [b"abcdef"])]


def test_largest_payload() -> None:
    payload = bytes(MAX_PAYLOAD_BYTES)
    assert list(FrameDecoder().feed(encode_frame(1, payload))) == [(1, [payload])]
    with pytest.raises(InvalidArgumentError, match="port 1 does not fit"):
        encode_frame(1, payload + b"x")


@given(st.lists(st.binary(min_size=1, max_size=200), max_size=8), st.lists(st.integers(0, 2000), max_size=12))
def test_messages_survive_any_split(messages: list[bytes], cuts: list[int]) -> None:
    wire = b"".join(map(encode_message, messages))
    decoder = MessageDecoder(200)
    assert [message for piece in pieces(wire, cuts) for message in decoder.feed(piece)] == messages


@given(st.integers(101, 2**32 - 1))
def test_message_above_the_limit_is_refused_before_it_is_there(length: int) -> None:
    decoder = MessageDecoder(100)
    assert list(decoder.feed(encode_message(bytes(100)))) == [bytes(100)]
    with pytest.raises(OutOfRangeError, match=f"{length} bytes, 100 is most"):
        list(decoder.feed(struct.pack("<I", length)))


def test_empty_message_is_passed_over() -> None:
    assert list(MessageDecoder(10).feed(bytes(8) + encode_message(b"a"))) == [b"a"]
