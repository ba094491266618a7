"""Pieces of a download: positions, sizes, what a server without ranges sends first."""

from hypothesis import given
from hypothesis import strategies as st

from aoscore._pb.servicemanager.v5 import servicemanager_pb2 as pb
from aoscore.mp.filechunker.chunker import PIECE_BYTES, Chunker, PieceEncoder


@given(st.integers(0, 3 * PIECE_BYTES), st.integers(0, 1 << 40), st.lists(st.integers(0, 9000), max_size=12))
def test_pieces_join_to_the_whole(skip: int, offset: int, sizes: list[int]) -> None:
    data = bytes(index % 251 for index in range(sum(sizes)))
    chunker = Chunker(offset, skip)
    pieces = []
    begin = 0
    for size in sizes:
        pieces += chunker.feed(data[begin : begin + size])
        begin += size
    assert all(len(piece) == PIECE_BYTES for _, piece in pieces)
    pieces.append(chunker.last())
    assert len(pieces[-1][1]) < PIECE_BYTES
    assert b"".join(piece for _, piece in pieces) == data[skip:]
    at = offset
    for position, piece in pieces:
        assert position == at
        at += len(piece)


@given(st.integers(1, 2**64 - 1), st.integers(0, 2**64 - 1), st.binary(min_size=1, max_size=200))
def test_encoded_pieces_are_what_protobuf_reads(request_id: int, offset: int, data: bytes) -> None:
    head, rest = PieceEncoder(request_id).encode(offset, memoryview(data))
    content = pb.DownloadContent(request_id=request_id, offset=offset, data=data, state=pb.IN_PROGRESS)
    assert pb.ProxyIncomingMessages.FromString(head + rest) == pb.ProxyIncomingMessages(download_content=content)


def test_a_piece_fits_a_tls_record() -> None:
    content = pb.DownloadContent(request_id=2**64 - 1, offset=2**64 - 1, data=bytes(PIECE_BYTES), state=pb.COMPLETED)
    assert len(pb.ProxyIncomingMessages(download_content=content).SerializeToString()) <= 16_380
