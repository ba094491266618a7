"""Cuts a stream of bytes into pieces for the link. Pure."""

from aoscore._speedups.frames import encode_pieces

PIECE_BYTES = 15_360
"""Most data of one message (mp-wire §9)."""


class Chunker:
    """Makes the messages of one download.

    `offset` is the position of the next byte that is wanted, `skip` how many bytes come before it: a server that knows
    no ranges sends them all the same.
    """

    def __init__(self, request_id: int, offset: int, skip: int = 0) -> None:
        self.request_id = request_id
        self.offset = offset
        self._skip = skip

    def wanted(self, data: bytes) -> memoryview:
        """What of the stream's next bytes is to be sent."""
        skipped = min(self._skip, len(data))
        self._skip -= skipped
        return memoryview(data)[skipped:]

    def encode(self, data: memoryview) -> bytes:
        """The messages for the next wanted bytes, each with its length before it."""
        encoded = encode_pieces(self.request_id, self.offset, data, PIECE_BYTES)
        self.offset += len(data)
        return encoded
