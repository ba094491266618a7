"""Frames and pieces of downloads, native and plain: the same on anything, and what protobuf and the contract say."""

import hashlib
import itertools
import os
import struct
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aoscore._pb.servicemanager.v5 import servicemanager_pb2 as pb
from aoscore._speedups import _frames
from aoscore._speedups._plain import frames as plain_frames
from aoscore._speedups.frames import MAX_PAYLOAD_BYTES

IMPLEMENTATIONS = {"native": _frames, "plain": plain_frames}
NUMBERS = st.one_of(st.integers(0, 300), st.integers(0, 2**64 - 1), st.integers(2**64 - 300, 2**64 - 1))
MOST = st.one_of(st.integers(0, 100), st.integers(0, 100_000))


@pytest.fixture(params=IMPLEMENTATIONS)
def module(request: pytest.FixtureRequest) -> ModuleType:
    return IMPLEMENTATIONS[request.param]


def frame(port: int, payload: bytes, *, damage: int = 0) -> bytes:
    checksum = bytearray(hashlib.sha256(payload).digest())
    checksum[0] ^= damage
    return struct.pack("<II", port, len(payload)) + checksum + payload


def record(body: bytes) -> bytes:
    return struct.pack(">BHH", 23, 0x303, len(body)) + body


def split(data: bytes, cuts: Sequence[int]) -> list[bytes]:
    places = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[begin:end] for begin, end in itertools.pairwise(places)]


def cut(cutter: Any, pieces: Sequence[bytes]) -> list[tuple[int, list[bytes]]]:
    """What a cutter makes of the pieces; views are copied before they go."""
    found = []
    for piece in pieces:
        buffer = bytearray(piece)
        runs = cutter.feed(buffer)
        found += [(port, [bytes(payload) for payload in payloads]) for port, payloads in runs]
        del runs
        buffer[:] = bytes(len(buffer))
    return found


# Frames

FRAMES = st.lists(
    st.tuples(st.sampled_from([0, 1, 1, 17, 2**32 - 1]), st.binary(max_size=300), st.sampled_from([0, 0, 0, 0x80])),
    max_size=10,
)


@given(FRAMES, st.lists(st.integers(0, 4000), max_size=12), st.binary(max_size=60))
def test_both_cut_the_same(frames: list[tuple[int, bytes, int]], cuts: list[int], tail: bytes) -> None:
    pieces = split(b"".join(frame(port, payload, damage=damage) for port, payload, damage in frames) + tail, cuts)
    native, plain = _frames.FrameCutter(), plain_frames.FrameCutter()
    found = cut(native, pieces)
    assert found == cut(plain, pieces)
    assert (native.refused, native.begun_bytes) == (plain.refused, plain.begun_bytes)
    flat = [(port, payload) for port, payloads in found for payload in payloads or (None,)]
    wanted = [(port, None if damage else payload) for port, payload, damage in frames]
    assert flat[: len(wanted)] == wanted


@given(st.lists(st.binary(max_size=500), max_size=8))
def test_both_cut_any_bytes_the_same(pieces: list[bytes]) -> None:
    native, plain = _frames.FrameCutter(), plain_frames.FrameCutter()
    assert cut(native, pieces) == cut(plain, pieces)
    assert (native.refused, native.begun_bytes) == (plain.refused, plain.begun_bytes)


def test_runs_are_of_one_channel(module: ModuleType) -> None:
    wire = frame(4, b"a") + frame(4, b"b") + frame(1, b"c") + frame(4, b"d") + frame(4, b"e", damage=1) + frame(4, b"f")
    assert module.FrameCutter().feed(wire) == [(4, [b"a", b"b"]), (1, [b"c"]), (4, [b"d"]), (4, []), (4, [b"f"])]


def test_more_frames_than_are_looked_at_together(module: ModuleType) -> None:
    ((port, payloads),) = module.FrameCutter().feed(frame(3, b"x") * 1000)
    assert (port, payloads) == (3, [b"x"] * 1000)


@pytest.mark.parametrize("size", [MAX_PAYLOAD_BYTES + 1, 2**31 - 1, 2**31, 2**32 - 40, 2**32 - 1])
@pytest.mark.parametrize("cuts", [[], [3], [39], [40], [41, 50]])
def test_hostile_size_is_refused_and_nothing_kept(module: ModuleType, size: int, cuts: list[int]) -> None:
    cutter = module.FrameCutter()
    before = frame(1, b"before")
    assert cut(cutter, [before]) == [(1, [b"before"])]
    cut(cutter, split(struct.pack("<II", 9, size) + bytes(100), cuts))
    assert cutter.refused == (9, size)
    assert cutter.begun_bytes <= 40
    assert cutter.feed(before) == []


def test_largest_frame(module: ModuleType) -> None:
    payload = bytes(range(256)) * 256
    cutter = module.FrameCutter()
    assert cut(cutter, [frame(5, payload)]) == [(5, [payload])]
    wire = frame(5, payload)
    assert cut(cutter, [wire[:-1]]) == []
    assert cutter.begun_bytes == 40 + MAX_PAYLOAD_BYTES - 1
    assert cut(cutter, [wire[-1:]]) == [(5, [payload])]


def test_what_is_no_buffer_is_refused(module: ModuleType) -> None:
    with pytest.raises(TypeError):
        module.FrameCutter().feed("text")


@pytest.mark.parametrize("size", [0, 1, 100_000])
def test_buffer_can_be_filled(module: ModuleType, size: int) -> None:
    buffer = module.new_buffer(size)
    assert (type(buffer), len(buffer)) == (bytearray, size)
    buffer[:] = bytes(size)
    assert buffer == bytes(size)


# Records

RECORDS = st.lists(st.binary(max_size=400).map(record), max_size=10).map(b"".join)


@given(RECORDS, MOST, st.integers(0, 2**32 - 1))
def test_both_frame_records_the_same(records: bytes, most_bytes: int, port: int) -> None:
    found = _frames.encode_records(port, records, most_bytes)
    assert found == plain_frames.encode_records(port, records, most_bytes)
    cutter = plain_frames.FrameCutter()
    payloads = []
    for frames, count in found:
        ((found_port, some),) = cutter.feed(frames)
        assert (found_port, len(some)) == (port, count)
        assert count == 1 or sum(map(len, some)) <= most_bytes
        assert all(len(one) == 5 + struct.unpack(">H", one[3:5])[0] for one in some)
        payloads += some
    assert b"".join(payloads) == records


@given(st.binary(max_size=200), MOST)
def test_both_refuse_the_same(data: bytes, most_bytes: int) -> None:
    outcomes = []
    for module in IMPLEMENTATIONS.values():
        try:
            outcomes.append(module.encode_records(1, data, most_bytes))
        except ValueError as error:
            outcomes.append(str(error))
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize(
    "data",
    [b"\x17", record(b"whole") + b"\x17\x03\x03\x00", record(b"cut")[:-1], b"\x17\x03\x03\xff\xff" + bytes(65_535)],
)
def test_what_are_no_whole_records_is_refused(module: ModuleType, data: bytes) -> None:
    with pytest.raises(ValueError, match="TLS record"):
        module.encode_records(1, data, 1 << 20)


def test_more_records_than_go_together(module: ModuleType) -> None:
    found = module.encode_records(1, record(b"x") * 150, 1 << 20)
    assert [count for _, count in found] == [64, 64, 22]
    assert b"".join(frames for frames, _ in found) == frame(1, record(b"x")) * 150


@pytest.mark.parametrize("size", [*range(5, 200), 1000, 4096, 16_406, 65_535, 65_536])
def test_neighbours_of_the_same_size(module: ModuleType, size: int) -> None:
    """Every place in a block of SHA-256 where a payload can end; three, so that one has no neighbour."""
    records = [record(os.urandom(size - 5)) for _ in range(3)]
    ((frames, count),) = module.encode_records(2, b"".join(records), 1 << 20)
    assert (frames, count) == (b"".join(frame(2, one) for one in records), 3)
    assert module.FrameCutter().feed(frames) == [(2, records)]
    damaged = bytearray(frames)
    damaged[-1] ^= 1
    assert module.FrameCutter().feed(damaged) == [(2, records[:2]), (2, [])]


def test_largest_record(module: ModuleType) -> None:
    data = record(bytes(MAX_PAYLOAD_BYTES - 5))
    assert module.encode_records(1, data, 0) == [(frame(1, data), 1)]


# Pieces

PIECES = st.lists(
    st.tuples(st.sampled_from([1, 2, 2**64 - 1]), NUMBERS, st.binary(max_size=40), st.integers(0, 60)), max_size=8
)


def messages(encoded: bytes) -> list[bytes]:
    found = []
    while encoded:
        (size,) = struct.unpack_from("<I", encoded)
        found.append(encoded[4 : 4 + size])
        encoded = encoded[4 + size :]
    return found


@given(NUMBERS, NUMBERS, st.binary(max_size=400), st.integers(1, 500))
def test_pieces_are_what_protobuf_reads(request_id: int, offset: int, data: bytes, piece_bytes: int) -> None:
    if offset + len(data) > 2**64 - 1:
        for module in IMPLEMENTATIONS.values():
            with pytest.raises(ValueError, match="can't have"):
                module.encode_pieces(request_id, offset, data, piece_bytes)
        return
    encoded = _frames.encode_pieces(request_id, offset, data, piece_bytes)
    assert encoded == plain_frames.encode_pieces(request_id, offset, memoryview(data), piece_bytes)
    for number, message in enumerate(messages(encoded)):
        begin = number * piece_bytes
        content = pb.DownloadContent(
            request_id=request_id, offset=offset + begin, data=data[begin : begin + piece_bytes], state=pb.IN_PROGRESS
        )
        assert pb.ProxyIncomingMessages.FromString(message) == pb.ProxyIncomingMessages(download_content=content)
    for module in IMPLEMENTATIONS.values():
        assert module.join_pieces(messages(encoded), 1 << 20) == ([(request_id, offset, data)] if data else [])


@pytest.mark.parametrize(
    ("request_id", "offset", "piece_bytes"),
    [(-1, 0, 10), (2**64, 0, 10), (1, -1, 10), (1, 2**64, 10), (1, 0, 0), (1, 0, -1), (1, 0, 65_537), (1, 0, 2**64)],
)
def test_numbers_that_make_no_sense(module: ModuleType, request_id: int, offset: int, piece_bytes: int) -> None:
    with pytest.raises(ValueError, match="can't have"):
        module.encode_pieces(request_id, offset, b"x", piece_bytes)


@given(PIECES, st.lists(st.binary(max_size=30), max_size=3), MOST)
def test_both_join_the_same(pieces: list[tuple[int, int, bytes, int]], others: list[bytes], most_bytes: int) -> None:
    """Runs that follow one another, ones that do not, and what is none."""
    found = list(others)
    for request_id, offset, data, piece_bytes in pieces:
        whole = data * 3
        start = min(offset, 2**64 - 1 - len(whole))
        found += messages(plain_frames.encode_pieces(request_id, start, whole, piece_bytes + 1))
    found += others
    joined = _frames.join_pieces(found, most_bytes)
    assert joined == plain_frames.join_pieces(found, most_bytes)
    assert _contents(joined) == _contents(found)


def _contents(joined: Sequence[bytes | tuple[int, int, bytes]]) -> list[tuple[int, int, int] | bytes]:
    """Byte by byte, so that it does not matter how they are joined."""
    found: list[tuple[int, int, int] | bytes] = []
    for one in joined:
        if isinstance(one, bytes):
            (piece,) = plain_frames.join_pieces([one], 0)
            if isinstance(piece, bytes):
                found.append(piece)
                continue
            one = piece
        found += [(one[0], one[1] + index, byte) for index, byte in enumerate(one[2])]
    return found


@given(st.lists(st.binary(max_size=60), max_size=6), st.lists(st.integers(0, 2000), max_size=4))
def test_both_take_damaged_pieces_the_same(tails: list[bytes], places: list[int]) -> None:
    (whole,) = messages(plain_frames.encode_pieces(300, 70_000, b"some data", 100))
    damaged = [whole, *(whole + tail for tail in tails), *(whole[:place] for place in places)]
    for place in places:
        for bit in range(8):
            one = bytearray(whole)
            one[place % len(one)] ^= 1 << bit
            damaged.append(bytes(one))
    assert _frames.join_pieces(damaged, 1 << 20) == plain_frames.join_pieces(damaged, 1 << 20)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x08\x01",
        b"\x08\x01\x10\x00\x1a\x00",  # no data
        b"\x08\x01\x10\x00\x1a\x02x",  # cut
        b"\x08\x01\x10\x00\x1a\x01x\x20\x01",  # the last one
        b"\x08\x01\x10\x00\x1a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01x",  # 2^64-1 bytes
        b"\x08\x01\x10\x00\x1a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x02x",  # more than 64 bits
        b"\x08\x01\x10\x80\x80\x80\x80\x80\x80\x80\x80\x80\x80\x00\x1a\x01x",  # eleven bytes for a number
        b"\x10\x00\x08\x01\x1a\x01x",  # another order
        b"\x08\x01\x08\x01\x1a\x01x",
    ],
)
def test_other_messages_are_given_as_they_are(module: ModuleType, content: bytes) -> None:
    message = b"\x0a" + bytes([len(content)]) + content
    piece = plain_frames.encode_pieces(1, 0, b"x", 10)[4:]
    assert module.join_pieces([message, piece, message], 100) == [message, (1, 0, b"x"), message]


def test_joined_only_where_they_follow(module: ModuleType) -> None:
    def piece(request_id: int, offset: int, data: bytes) -> bytes:
        return bytes(plain_frames.encode_pieces(request_id, offset, data, 100)[4:])

    some = [piece(1, 0, b"ab"), piece(1, 2, b"cd"), piece(2, 4, b"ef"), piece(1, 4, b"gh"), piece(1, 7, b"ij")]
    assert module.join_pieces(some, 100) == [(1, 0, b"abcd"), (2, 4, b"ef"), (1, 4, b"gh"), (1, 7, b"ij")]
    assert module.join_pieces(some[:2], 3) == [(1, 0, b"ab"), (1, 2, b"cd")]
    assert module.join_pieces([memoryview(one) for one in some[:2]], 4) == [(1, 0, b"abcd")]
    other = memoryview(b"another")
    assert module.join_pieces([other], 4)[0] is other
    with pytest.raises(TypeError):
        module.join_pieces(["text"], 3)


def test_positions_do_not_wrap(module: ModuleType) -> None:
    at_end = b"\x0a\x10\x08\x01\x10" + b"\xff" * 9 + b"\x01\x1a\x01x"
    at_begin = plain_frames.encode_pieces(1, 0, b"y", 10)[4:]
    assert module.join_pieces([at_end, at_begin], 100) == [(1, 2**64 - 1, b"x"), (1, 0, b"y")]
