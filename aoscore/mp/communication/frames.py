"""Frames and the messages inside them, byte by byte (mp-wire §3, §5). Pure.

transport   frame frame frame ...           40 bytes of header, then up to 64 KiB of payload for one channel
channel     payload payload ...             joined: one byte stream per channel
stream      length message length message   u32 little-endian before each message
"""

import hashlib
import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from aoscore.common.errors import InvalidArgumentError, OutOfRangeError

_HEADER = struct.Struct("<II32s")
_LENGTH = struct.Struct("<I")
_RECORD = struct.Struct(">3xH")

HEADER_BYTES = _HEADER.size
MAX_PAYLOAD_BYTES = 65_536
"""Largest payload of a frame, in either direction."""
MAX_OPEN_MESSAGE_BYTES = MAX_PAYLOAD_BYTES - _LENGTH.size
"""Largest message of an open channel: it has to fit one frame together with its length (mp-wire §3, sender rule 2)."""


Bytes = bytes | memoryview
Message = bytes | tuple[bytes, Bytes]
"""A message, perhaps in two parts, so that a large second one need not be copied to be put behind the first."""
LENGTH_BYTES = _LENGTH.size


class Frame(NamedTuple):
    """A frame as it came in. `is_intact` is False when the checksum does not fit the payload."""

    port: int
    payload: bytes
    is_intact: bool


def encode_header(port: int, payload: Bytes) -> bytes:
    """What goes before the payload. Raises InvalidArgumentError for a payload above MAX_PAYLOAD_BYTES."""
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise InvalidArgumentError(f"payload of {len(payload)} bytes for port {port} does not fit a frame")
    return _HEADER.pack(port, len(payload), hashlib.sha256(payload).digest())


def encode_frame(port: int, payload: bytes) -> bytes:
    """Header and payload. Raises like encode_header."""
    return encode_header(port, payload) + payload


class FrameDecoder:
    """Cuts the bytes of a transport into frames. Holds at most one incomplete frame."""

    def __init__(self) -> None:
        self._begun = bytearray()

    @property
    def has_begun(self) -> bool:
        """Part of a frame is there."""
        return bool(self._begun)

    def feed(self, data: bytes) -> Iterator[Frame]:
        """The frames that are complete with `data`; take all of them before the next call.

        Raises OutOfRangeError for a size above MAX_PAYLOAD_BYTES, as soon as the header is there: after that nothing
        on this transport can be trusted.
        """
        begun = self._begun
        position = 0
        if begun:
            # Only what the begun frame lacks is copied to it: most of the data is cut where it lies.
            position = self._fill(HEADER_BYTES, data, 0)
            if len(begun) < HEADER_BYTES:
                return
            port, size, checksum = _parse_header(begun, 0)
            position = self._fill(HEADER_BYTES + size, data, position)
            if len(begun) < HEADER_BYTES + size:
                return
            payload = bytes(begun[HEADER_BYTES:])
            begun.clear()
            yield Frame(port, payload, hashlib.sha256(payload).digest() == checksum)
        while len(data) - position >= HEADER_BYTES:
            port, size, checksum = _parse_header(data, position)
            begin = position + HEADER_BYTES
            if len(data) - begin < size:
                break
            position = begin + size
            payload = data[begin:position]
            yield Frame(port, payload, hashlib.sha256(payload).digest() == checksum)
        begun += data[position:]

    def _fill(self, size: int, data: bytes, position: int) -> int:
        """Let the begun frame grow to `size` bytes, as far as there is data; where the rest of it begins."""
        end = position + max(0, size - len(self._begun))
        self._begun += data[position:end]
        return min(end, len(data))


def _parse_header(data: bytes | bytearray, position: int) -> tuple[int, int, bytes]:
    port, size, checksum = _HEADER.unpack_from(data, position)
    if size > MAX_PAYLOAD_BYTES:
        raise OutOfRangeError(f"frame for port {port} announces {size} bytes, {MAX_PAYLOAD_BYTES} is most")
    return port, size, checksum


def encode_message(message: Message) -> bytes:
    """The message with its length before it."""
    if isinstance(message, bytes):
        return _LENGTH.pack(len(message)) + message
    head, rest = message
    return b"".join((_LENGTH.pack(len(head) + len(rest)), head, rest))


class MessageDecoder:
    """Cuts the byte stream of a channel into messages of at most `limit_bytes`, however the bytes were split."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterable[bytes]:
        """The messages that are complete with `data`; take all of them before the next call.

        Empty messages are passed over: they have no member set and mean nothing. Raises OutOfRangeError for a length
        above the limit, before any of that message is kept.
        """
        size = len(data) - LENGTH_BYTES
        if not self._buffer and 0 < size <= self._limit_bytes and _LENGTH.unpack_from(data)[0] == size:
            return (data[LENGTH_BYTES:],)  # one message as it was sent: the rule
        return self._cut(data)

    def _cut(self, data: bytes) -> Iterator[bytes]:
        buffer = self._buffer
        buffer += data
        position = 0
        try:
            while len(buffer) - position >= _LENGTH.size:
                (length,) = _LENGTH.unpack_from(buffer, position)
                if length > self._limit_bytes:
                    raise OutOfRangeError(f"message of {length} bytes, {self._limit_bytes} is most")
                begin = position + _LENGTH.size
                if len(buffer) - begin < length:
                    return
                with memoryview(buffer) as view, view[begin : begin + length] as part:
                    message = bytes(part)
                position = begin + length
                if message:
                    yield message
        finally:
            del buffer[:position]


def split_records(data: bytes) -> Iterator[Bytes]:
    """The TLS records in what a TLS object wrote (RFC 8446 §5.1): each travels in a frame of its own."""
    position = 0
    view = memoryview(data)
    while position < len(data):
        (length,) = _RECORD.unpack_from(data, position)
        end = position + _RECORD.size + length
        yield view[position:end]
        position = end
