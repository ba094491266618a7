"""Hashing, copying and sending of files: the public face of the native module and its plain twin."""

from typing import TYPE_CHECKING

from aoscore._speedups._choice import native_wanted
from aoscore._speedups.chunker_types import DIGEST_DIGITS, UnknownDigestError

if TYPE_CHECKING or native_wanted("_chunker"):
    from aoscore._speedups._chunker import Digest, copy_file, hash_file, hash_file_all, read_chunks, send_file
else:
    from aoscore._speedups._plain.chunker import Digest, copy_file, hash_file, hash_file_all, read_chunks, send_file

__all__ = [
    "DIGEST_DIGITS",
    "Digest",
    "UnknownDigestError",
    "copy_file",
    "hash_file",
    "hash_file_all",
    "read_chunks",
    "send_file",
]
