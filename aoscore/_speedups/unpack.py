"""Unpacking of image layers: the public face of the native module and its plain twin."""

from typing import TYPE_CHECKING

from aoscore._speedups._choice import native_wanted
from aoscore._speedups.unpack_types import (
    DEFAULT_MAX_MEMBERS,
    DEFAULT_MAX_UNPACKED_BYTES,
    Code,
    Compression,
    LayerFormatError,
    LayerLimitError,
    Owners,
    UnpackError,
    UnpackResult,
    UnsafeMemberError,
    UnsupportedLayerError,
    Whiteouts,
)

if TYPE_CHECKING or native_wanted("_unpack"):
    from aoscore._speedups._unpack import unpack_layer
else:
    from aoscore._speedups._plain.unpack import unpack_layer

__all__ = [
    "DEFAULT_MAX_MEMBERS",
    "DEFAULT_MAX_UNPACKED_BYTES",
    "Code",
    "Compression",
    "LayerFormatError",
    "LayerLimitError",
    "Owners",
    "UnpackError",
    "UnpackResult",
    "UnsafeMemberError",
    "UnsupportedLayerError",
    "Whiteouts",
    "unpack_layer",
]
