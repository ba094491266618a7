"""Cuts a stream of bytes into pieces for the link. Pure."""

from collections.abc import Iterator

PIECE_BYTES = 15_360
"""A piece with its message fits one TLS record (mp-wire §9)."""


class Chunker:
    """Pieces of PIECE_BYTES with their absolute positions; only the last may be shorter.

    `offset` is the position of the first byte that is wanted, `skip` how many bytes come before it: a server that
    knows no ranges sends them all the same.
    """

    def __init__(self, offset: int, skip: int = 0) -> None:
        self._offset = offset
        self._skip = skip
        self._rest = bytearray()

    def feed(self, data: bytes) -> Iterator[tuple[int, bytes]]:
        """Position and content of the pieces that are complete with `data`; take all of them."""
        skipped = min(self._skip, len(data))
        self._skip -= skipped
        self._rest += memoryview(data)[skipped:]
        position = 0
        while len(self._rest) - position >= PIECE_BYTES:
            with memoryview(self._rest) as view, view[position : position + PIECE_BYTES] as part:
                piece = bytes(part)
            yield self._offset, piece
            position += PIECE_BYTES
            self._offset += PIECE_BYTES
        del self._rest[:position]

    def last(self) -> tuple[int, bytes]:
        """Position and content of what is left, perhaps nothing."""
        return self._offset, bytes(self._rest)
