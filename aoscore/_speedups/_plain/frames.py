"""Plain twin of ``_frames.pyx``: frames of MP's link and the pieces of downloads in them (mp-wire §3, §9)."""

import hashlib
import struct
from typing import TYPE_CHECKING

from aoscore._speedups.frames_types import HEADER_BYTES, MAX_PAYLOAD_BYTES, MOST_TOGETHER

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_HEADER = struct.Struct("<II32s")
_RECORD = struct.Struct(">3xH")
_LENGTH = struct.Struct("<I")
_MOST_U64 = 2**64 - 1
# Fields of ProxyIncomingMessages and of DownloadContent in it, as their proto file says: number and wire type.
_CONTENT, _REQUEST_ID, _OFFSET, _DATA = 0x0A, 0x08, 0x10, 0x1A


class FrameCutter:
    """Cuts the bytes of a transport into frames. Holds at most one incomplete frame."""

    def __init__(self) -> None:
        self.refused: tuple[int, int] | None = None
        """Port and size of a frame above MAX_PAYLOAD_BYTES: nothing behind its header is looked at."""
        self._begun = bytearray()

    @property
    def begun_bytes(self) -> int:
        """What is there of an incomplete frame."""
        return len(self._begun)

    def feed(self, data: "ReadableBuffer") -> list[tuple[int, list[bytes | memoryview]]]:
        """The frames that are complete with `data`, by runs of one channel: port and payloads.

        A frame whose checksum does not fit its payload is a run without payload. Payloads may be views of `data`.
        """
        runs: list[tuple[int, list[bytes | memoryview]]] = []
        view = memoryview(data).cast("B")
        begun = self._begun
        position = 0
        if self.refused is not None:
            return runs
        if begun:
            # Only what the begun frame lacks is copied to it: most of the data is cut where it lies.
            position = self._fill(HEADER_BYTES, view, 0)
            if len(begun) < HEADER_BYTES:
                return runs
            port, size, checksum = _HEADER.unpack_from(begun)
            if size > MAX_PAYLOAD_BYTES:
                self.refused = port, size
                return runs
            position = self._fill(HEADER_BYTES + size, view, position)
            if len(begun) < HEADER_BYTES + size:
                return runs
            _add(runs, port, bytes(begun[HEADER_BYTES:]), checksum)
            begun.clear()
        while len(view) - position >= HEADER_BYTES:
            port, size, checksum = _HEADER.unpack_from(view, position)
            if size > MAX_PAYLOAD_BYTES:
                self.refused = port, size
                return runs
            begin = position + HEADER_BYTES
            if len(view) - begin < size:
                break
            position = begin + size
            _add(runs, port, view[begin:position], checksum)
        begun += view[position:]
        return runs

    def _fill(self, size: int, data: memoryview, position: int) -> int:
        """Let the begun frame grow to `size` bytes, as far as there is data; where the rest of it begins."""
        end = position + max(0, size - len(self._begun))
        self._begun += data[position:end]
        return min(end, len(data))


def _add(
    runs: list[tuple[int, list[bytes | memoryview]]], port: int, payload: bytes | memoryview, checksum: bytes
) -> None:
    if hashlib.sha256(payload).digest() != checksum:
        runs.append((port, []))
    elif runs and runs[-1][0] == port and runs[-1][1]:
        runs[-1][1].append(payload)
    else:
        runs.append((port, [payload]))


def encode_records(port: int, records: "ReadableBuffer", most_bytes: int) -> list[tuple[bytes, int]]:
    """TLS records (RFC 8446 §5.1), each in a frame of its own: frames to send in one go, and how many they are.

    What goes together are MOST_TOGETHER records with at most `most_bytes`, but for a single one. Raises ValueError when
    what is there are no whole records that fit frames.
    """
    view = memoryview(records).cast("B")
    found: list[tuple[bytes, int]] = []
    parts: list[bytes | memoryview] = []
    position = size = 0
    while position < len(view):
        if len(view) - position < _RECORD.size:
            raise ValueError("the last TLS record is cut")
        end = position + _RECORD.size + _RECORD.unpack_from(view, position)[0]
        record = view[position:end]
        if end > len(view) or len(record) > MAX_PAYLOAD_BYTES:
            raise ValueError(f"TLS record of {end - position} bytes is cut or does not fit a frame")
        if parts and (size + len(record) > most_bytes or len(parts) == 2 * MOST_TOGETHER):
            found.append((b"".join(parts), len(parts) // 2))
            parts, size = [], 0
        parts += (_HEADER.pack(port, len(record), hashlib.sha256(record).digest()), record)
        size += len(record)
        position = end
    if parts:
        found.append((b"".join(parts), len(parts) // 2))
    return found


def new_buffer(size: int) -> bytearray:
    """A buffer to write to, with anything in it: clearing a large one costs as much as filling it."""
    return bytearray(size)


def encode_pieces(request_id: int, offset: int, data: "ReadableBuffer", piece_bytes: int) -> bytes:
    """Part of a download, from its byte `offset` on, as messages of at most `piece_bytes` with their lengths before.

    A message is what protobuf writes for a ProxyIncomingMessages with a DownloadContent. Raises ValueError for numbers
    that make no sense.
    """
    view = memoryview(data).cast("B")
    if not 0 < piece_bytes <= MAX_PAYLOAD_BYTES:
        raise ValueError(f"pieces can't have {piece_bytes} bytes")
    if not (0 <= request_id <= _MOST_U64 and 0 <= offset <= _MOST_U64 - len(view)):
        raise ValueError(f"request {request_id} can't have {len(view)} bytes at {offset}")
    begin = bytes((_REQUEST_ID, *_varint(request_id), _OFFSET))
    parts: list[bytes | memoryview] = []
    for position in range(0, len(view), piece_bytes):
        piece = view[position : position + piece_bytes]
        content = begin + bytes((*_varint(offset + position), _DATA, *_varint(len(piece))))
        head = bytes((_CONTENT, *_varint(len(content) + len(piece)))) + content
        parts += (_LENGTH.pack(len(head) + len(piece)), head, piece)
    return b"".join(parts)


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def join_pieces(
    messages: list[bytes | memoryview], most_bytes: int
) -> list[bytes | memoryview | tuple[int, int, bytes]]:
    """What `encode_pieces` made of downloads, back: request, offset and data.

    Pieces of a download that follow one another are joined, up to `most_bytes`. Every other message is given as it is:
    also a DownloadContent that has more than these members, or writes them in another way.
    """
    found: list[bytes | memoryview | tuple[int, int, bytes]] = []
    parts: list[memoryview] = []
    request_id = offset = size = 0

    def end_run() -> None:
        nonlocal size
        if parts:
            found.append((request_id, offset, b"".join(parts)))
            parts.clear()
            size = 0

    for message in messages:
        piece = _piece(message)
        if piece is None:
            end_run()
            found.append(message)
            continue
        if (piece[0], piece[1]) != (request_id, offset + size) or size + len(piece[2]) > most_bytes:
            end_run()
        if not parts:
            request_id, offset = piece[0], piece[1]
        parts.append(piece[2])
        size += len(piece[2])
    end_run()
    return found


def _piece(whole: bytes | memoryview) -> tuple[int, int, memoryview] | None:
    """Request, offset and data of a message, if it is just that."""
    message = memoryview(whole)
    position = 0
    numbers = []
    for tag in (_CONTENT, _REQUEST_ID, _OFFSET, _DATA):
        if position >= len(message) or message[position] != tag:
            return None
        value = shift = 0
        while True:
            position += 1
            if position >= len(message) or shift > 63:
                return None
            byte = message[position]
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
        if value > _MOST_U64:
            return None
        position += 1
        numbers.append((value, position))
    (content_bytes, content), (request_id, _), (offset, _), (data_bytes, data) = numbers
    if content_bytes != len(message) - content or data_bytes != len(message) - data or not data_bytes:
        return None
    return request_id, offset, message[data:]
