"""The optional log of all frames (`cloudMessageLog`, cloud-protocol §3.7): secrets masked, size bounded."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Final

import msgspec

from aoscore.common.aio import log_and_continue
from aoscore.common.config import JSON_ERRORS

_log = logging.getLogger(__name__)

_SECRET: Final = frozenset({"password", "secret", "blockkey", "authtoken", "bearertoken"})
_LIMIT_BYTES: Final = 4 * 1024 * 1024


def mask(value: Any) -> Any:
    """The document with every secret member replaced, at any depth and in any case."""
    if isinstance(value, dict):
        return {
            name: "***" if str(name).lower() in _SECRET and member else mask(member) for name, member in value.items()
        }
    if isinstance(value, list):
        return [mask(member) for member in value]
    return value


class MessageLog:
    """Appends one line per frame; at its limit the file becomes `<name>.1` and a new one begins.

    A line that cannot be written is lost, with a word in the log of CM: the link goes on.
    """

    def __init__(self, path: Path, limit_bytes: int = _LIMIT_BYTES) -> None:
        self._path = path
        self._limit_bytes = limit_bytes

    def write(self, direction: str, frame: bytes | str) -> None:
        """Notes a frame; `direction` is `TX` or `RX`."""
        try:
            text = msgspec.json.encode(mask(msgspec.json.decode(frame)))
        except JSON_ERRORS:
            text = f"({len(frame)} bytes that are not JSON)".encode()
        with log_and_continue(_log, "Can't write the log of cloud messages"):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if self._path.exists() and self._path.stat().st_size > self._limit_bytes:
                self._path.replace(self._path.with_name(f"{self._path.name}.1"))
            with self._path.open("ab") as file:
                file.write(direction.encode() + b": " + text + b"\n")
