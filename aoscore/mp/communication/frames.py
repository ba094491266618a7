"""Frames and the messages inside them, byte by byte (mp-wire §3, §5). Pure.

transport   frame frame frame ...           40 bytes of header, then up to 64 KiB of payload for one channel
channel     payload payload ...             joined: one byte stream per channel
stream      length message length message   u32 little-endian before each message
"""

import hashlib
import struct
from collections.abc import Iterator
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


class Frame(NamedTuple):
    """A frame as it came in. `is_intact` is False when the checksum does not fit the payload."""

    port: int
    payload: bytes
    is_intact: bool


def encode_header(port: int, payload: bytes) -> bytes:
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
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Frame]:
        """The frames that are complete with `data`; take all of them before the next call.

        Raises OutOfRangeError for a size above MAX_PAYLOAD_BYTES, as soon as the header is there: after that nothing
        on this transport can be trusted.
        """
        buffer = self._buffer
        buffer += data
        position = 0
        try:
            while len(buffer) - position >= HEADER_BYTES:
                port, size, checksum = _HEADER.unpack_from(buffer, position)
                if size > MAX_PAYLOAD_BYTES:
                    raise OutOfRangeError(f"frame for port {port} announces {size} bytes, {MAX_PAYLOAD_BYTES} is most")
                begin = position + HEADER_BYTES
                if len(buffer) - begin < size:
                    return
                with memoryview(buffer) as view, view[begin : begin + size] as part:
                    payload = bytes(part)
                position = begin + size
                yield Frame(port, payload, hashlib.sha256(payload).digest() == checksum)
        finally:
            del buffer[:position]


def encode_message(message: bytes) -> bytes:
    """The message with its length before it."""
    return _LENGTH.pack(len(message)) + message


class MessageDecoder:
    """Cuts the byte stream of a channel into messages of at most `limit_bytes`, however the bytes were split."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The messages that are complete with `data`; take all of them before the next call.

        Empty messages are passed over: they have no member set and mean nothing. Raises OutOfRangeError for a length
        above the limit, before any of that message is kept.
        """
        buffer = self._buffer
        if not buffer and len(data) > _LENGTH.size and _LENGTH.unpack_from(data)[0] == len(data) - _LENGTH.size:
            if len(data) - _LENGTH.size > self._limit_bytes:
                raise OutOfRangeError(f"message of {len(data) - _LENGTH.size} bytes, {self._limit_bytes} is most")
            yield data[_LENGTH.size :]  # one message as it was sent: the rule
            return
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


def split_records(data: bytes) -> Iterator[bytes]:
    """The TLS records in what a TLS object wrote (RFC 8446 §5.1): each travels in a frame of its own."""
    position = 0
    while position < len(data):
        (length,) = _RECORD.unpack_from(data, position)
        end = position + _RECORD.size + length
        yield data[position:end]
        position = end
