"""Pieces of a download: positions, sizes, what a server without ranges sends first."""

from hypothesis import given
from hypothesis import strategies as st

from aoscore._pb.servicemanager.v5 import servicemanager_pb2 as pb
from aoscore.mp.communication.frames import MessageDecoder
from aoscore.mp.filechunker.chunker import PIECE_BYTES, Chunker


@given(st.integers(0, 30_000), st.integers(0, 1 << 40), st.lists(st.integers(0, 40_000), max_size=6))
def test_pieces_join_to_the_whole(skip: int, offset: int, sizes: list[int]) -> None:
    data = bytes(index % 251 for index in range(sum(sizes)))
    chunker = Chunker(7, offset, skip)
    decoder = MessageDecoder(1 << 20)
    begin = 0
    whole = b""
    for size in sizes:
        for message in decoder.feed(chunker.encode(chunker.wanted(data[begin : begin + size]))):
            content = pb.ProxyIncomingMessages.FromString(message).download_content
            assert (content.request_id, content.offset, content.state) == (7, offset + len(whole), pb.IN_PROGRESS)
            assert 0 < len(content.data) <= PIECE_BYTES
            whole += content.data
        begin += size
    assert whole == data[skip:]
    assert chunker.offset == offset + len(whole)


def test_a_piece_fits_a_tls_record() -> None:
    encoded = Chunker(2**64 - 1, 2**64 - 1 - PIECE_BYTES).encode(memoryview(bytes(PIECE_BYTES)))
    assert len(encoded) <= 16_384
