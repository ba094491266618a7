"""Frames and the messages inside them, byte by byte (mp-wire §3, §5). Pure.

transport   frame frame frame ...           40 bytes of header, then up to 64 KiB of payload for one channel
channel     payload payload ...             joined: one byte stream per channel
stream      length message length message   u32 little-endian before each message
"""

import hashlib
import struct
from collections.abc import Iterator, Sequence

from aoscore._speedups.frames import MAX_PAYLOAD_BYTES, FrameCutter
from aoscore.common.errors import InvalidArgumentError, OutOfRangeError

_HEADER = struct.Struct("<II32s")
_LENGTH = struct.Struct("<I")

LENGTH_BYTES = _LENGTH.size
MAX_OPEN_MESSAGE_BYTES = MAX_PAYLOAD_BYTES - LENGTH_BYTES
"""Largest message of an open channel: it has to fit one frame together with its length (mp-wire §3, sender rule 2)."""

# From here on a message is worth a view, which keeps all that came with it.
_LARGE_BYTES = 4096

Bytes = bytes | memoryview
Run = tuple[int, Sequence[Bytes]]
"""Frames of one channel that come one after the other: port and payloads; without payload a frame that is damaged."""


def encode_frame(port: int, payload: bytes) -> bytes:
    """Header and payload. Raises InvalidArgumentError for a payload above MAX_PAYLOAD_BYTES."""
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise InvalidArgumentError(f"payload of {len(payload)} bytes for port {port} does not fit a frame")
    return _HEADER.pack(port, len(payload), hashlib.sha256(payload).digest()) + payload


class FrameDecoder:
    """Cuts the bytes of a transport into frames. Holds at most one incomplete frame."""

    def __init__(self) -> None:
        self._cutter = FrameCutter()

    @property
    def begun_bytes(self) -> int:
        """What is there of an incomplete frame."""
        return self._cutter.begun_bytes

    def feed(self, data: Bytes) -> Iterator[Run]:
        """The frames that are complete with `data`; take all of them before the next call. Payloads last as `data`.

        Raises OutOfRangeError for a size above MAX_PAYLOAD_BYTES, as soon as the header is there: after that nothing
        on this transport can be trusted.
        """
        yield from self._cutter.feed(data)
        if self._cutter.refused is not None:
            port, size = self._cutter.refused
            raise OutOfRangeError(f"frame for port {port} announces {size} bytes, {MAX_PAYLOAD_BYTES} is most")


def encode_message(message: bytes) -> bytes:
    """The message with its length before it."""
    return _LENGTH.pack(len(message)) + message


class MessageDecoder:
    """Cuts the byte stream of a channel into messages of at most `limit_bytes`, however the bytes were split."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._begun = bytearray()

    def feed(self, data: Bytes) -> Iterator[Bytes]:
        """The messages that are complete with `data`; take all of them before the next call. Large ones last as `data`.

        Empty messages are passed over: they have no member set and mean nothing. Raises OutOfRangeError for a length
        above the limit, before any of that message is kept.
        """
        begun = self._begun
        position = 0
        if begun:
            # Only what the begun message lacks is copied to it: most of the data is cut where it lies.
            position = self._fill(LENGTH_BYTES, data, 0)
            if len(begun) < LENGTH_BYTES:
                return
            (length,) = _LENGTH.unpack_from(begun)
            self._check(length)
            position = self._fill(LENGTH_BYTES + length, data, position)
            if len(begun) < LENGTH_BYTES + length:
                return
            begun_message = bytes(memoryview(begun)[LENGTH_BYTES:])
            begun.clear()
            if begun_message:
                yield begun_message
        while len(data) - position >= LENGTH_BYTES:
            (length,) = _LENGTH.unpack_from(data, position)
            self._check(length)
            begin = position + LENGTH_BYTES
            if len(data) - begin < length:
                break
            position = begin + length
            if length >= _LARGE_BYTES:
                yield data[begin:position]
            elif length:
                yield bytes(data[begin:position])
        begun += data[position:]

    def _fill(self, size: int, data: Bytes, position: int) -> int:
        """Let the begun message grow to `size` bytes, as far as there is data; where the rest of it begins."""
        end = min(position + max(0, size - len(self._begun)), len(data))
        self._begun += data[position:end]
        return end

    def _check(self, length: int) -> None:
        if length > self._limit_bytes:
            raise OutOfRangeError(f"message of {length} bytes, {self._limit_bytes} is most")
