"""Keys of images that publishers encrypted before upload: files in DIR/image-keys, raw, hex or base64."""

import base64
import binascii
from pathlib import Path

from aoscore.common.errors import InvalidArgumentError
from aoscore.common.files import write_atomic

KEY_BYTES = 32
_FOLDER = "image-keys"


def parse_key(data: bytes, name: str) -> bytes:
    """The 32 bytes of a key file.

    Raises:
        InvalidArgumentError: it is none.
    """
    if len(data) == KEY_BYTES:
        return data
    text = data.strip()
    for decode in (bytes.fromhex, lambda encoded: base64.b64decode(encoded, validate=True)):
        try:
            key = decode(text.decode("ascii"))
        except (ValueError, binascii.Error):
            continue
        if len(key) == KEY_BYTES:
            return key
    raise InvalidArgumentError(f"{name} is no key of {KEY_BYTES} bytes (raw, hex or base64)")


def add_key(directory: Path, source: Path) -> None:
    """Keep the key of the file `source` in the cloud's directory.

    Raises:
        InvalidArgumentError: it is no key.
    """
    key = parse_key(source.read_bytes(), str(source))
    folder = directory / _FOLDER
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_atomic(folder / source.name, key)


def load_keys(directory: Path) -> list[bytes]:
    """All keys, by file name."""
    folder = directory / _FOLDER
    return [parse_key(path.read_bytes(), path.name) for path in sorted(folder.glob("*"))] if folder.is_dir() else []
