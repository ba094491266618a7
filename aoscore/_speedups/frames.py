"""Frames of MP's link and the pieces of downloads in them: the native module or its plain twin."""

from typing import TYPE_CHECKING

from aoscore._speedups._choice import native_wanted
from aoscore._speedups.frames_types import HEADER_BYTES, MAX_PAYLOAD_BYTES

if TYPE_CHECKING or native_wanted("_frames"):
    from aoscore._speedups._frames import FrameCutter, encode_pieces, encode_records, join_pieces, new_buffer
else:
    from aoscore._speedups._plain.frames import FrameCutter, encode_pieces, encode_records, join_pieces, new_buffer

__all__ = [
    "HEADER_BYTES",
    "MAX_PAYLOAD_BYTES",
    "FrameCutter",
    "encode_pieces",
    "encode_records",
    "join_pieces",
    "new_buffer",
]
