"""Cuts a stream of bytes into pieces for the link. Pure."""

from collections.abc import Iterator

from aoscore.mp.communication.frames import Bytes

PIECE_BYTES = 15_360
"""A piece with its message fits one TLS record (mp-wire §9)."""

# Field numbers and wire types of DownloadContent in ProxyIncomingMessages, as its proto file says; data comes last.
_CONTENT, _REQUEST_ID, _OFFSET, _DATA = b"\x0a", b"\x08", b"\x10", b"\x1a"


class Chunker:
    """Pieces of PIECE_BYTES with their absolute positions; only the last may be shorter.

    `offset` is the position of the first byte that is wanted, `skip` how many bytes come before it: a server that
    knows no ranges sends them all the same.
    """

    def __init__(self, offset: int, skip: int = 0) -> None:
        self._offset = offset
        self._skip = skip
        self._rest = bytearray()

    def feed(self, data: bytes) -> Iterator[tuple[int, Bytes]]:
        """Position and content of the pieces that are complete with `data`; take all of them."""
        skipped = min(self._skip, len(data))
        self._skip -= skipped
        view = memoryview(data)[skipped:]
        if self._rest:
            lacks = PIECE_BYTES - len(self._rest)
            self._rest += view[:lacks]
            view = view[lacks:]
            if len(self._rest) < PIECE_BYTES:
                return
            yield self._offset, bytes(self._rest)
            self._offset += PIECE_BYTES
            self._rest.clear()
        whole = len(view) - len(view) % PIECE_BYTES
        for position in range(0, whole, PIECE_BYTES):
            yield self._offset, view[position : position + PIECE_BYTES]
            self._offset += PIECE_BYTES
        self._rest += view[whole:]

    def last(self) -> tuple[int, bytes]:
        """Position and content of what is left, perhaps nothing."""
        return self._offset, bytes(self._rest)


class PieceEncoder:
    """Makes the messages of one download: what protobuf writes for a ProxyIncomingMessages, without copying data."""

    def __init__(self, request_id: int) -> None:
        self._begin = _REQUEST_ID + varint(request_id) + _OFFSET

    def encode(self, offset: int, data: Bytes) -> tuple[bytes, Bytes]:
        """Head and data of a piece that is not the last."""
        head = self._begin + varint(offset) + _DATA + varint(len(data))
        return _CONTENT + varint(len(head) + len(data)) + head, data


def varint(value: int) -> bytes:
    """A number as protobuf writes it."""
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
