"""PKCS#11 addresses of IAM, and the form of them that OpenSSL's provider reads. Pure (iam.md §5.6, §5.14)."""

import base64
from pathlib import Path
from urllib.parse import unquote, unquote_to_bytes

import msgspec

from aoscore.common.errors import InvalidArgumentError

SCHEME = "pkcs11:"
# A URL without module-path means this one (iam.md §5.6).
DEFAULT_LIBRARY = Path("/usr/lib/softhsm/libsofthsm2.so")
_PEM_TEXT = b"PKCS#11 Provider URI v1.0"
_PEM_LABEL = "PKCS#11 PROVIDER URI"
_PEM_COLUMNS = 64


class TokenUrl(msgspec.Struct, frozen=True, kw_only=True):
    """A certificate or key on a token: `object` is the certificate type, `id` the key's id in hex."""

    token: str
    object: str
    id: str
    module_path: Path | None = None
    pin_source: Path | None = None

    def __str__(self) -> str:
        query = []
        if self.module_path is not None:
            query.append(f"module-path={self.module_path}")
        if self.pin_source is not None:
            query.append(f"pin-source={self.pin_source}")
        return f"{SCHEME}token={self.token};object={self.object};id={_percent(self.id)}?{'&'.join(query)}"

    @property
    def library(self) -> Path:
        """The library of the token."""
        return self.module_path or DEFAULT_LIBRARY

    def provider_pem(self) -> bytes:
        """What stands for the private key where OpenSSL expects a PEM file.

        The provider looks for a private key by token and id: AosCore 9.1 leaves object and module-path out too.
        """
        query = f"?pin-source={self.pin_source}" if self.pin_source is not None else ""
        uri = f"{SCHEME}type=private;token={self.token};id={_percent(self.id)}{query}"
        body = _der(0x1A, _PEM_TEXT) + _der(0x0C, uri.encode())
        text = base64.b64encode(_der(0x30, body)).decode()
        lines = [text[start : start + _PEM_COLUMNS] for start in range(0, len(text), _PEM_COLUMNS)]
        return "\n".join([f"-----BEGIN {_PEM_LABEL}-----", *lines, f"-----END {_PEM_LABEL}-----", ""]).encode()


def is_token_url(url: str) -> bool:
    """Whether a URL leads to a token."""
    return url.startswith(SCHEME)


def parse_token_url(url: str) -> TokenUrl:
    """Read an address as IAM writes it. Raises InvalidArgumentError naming the URL."""
    path, _, query = url.removeprefix(SCHEME).partition("?")
    attributes = _attributes(path.split(";")) | _attributes(query.split("&"))
    missing = [name for name in ("token", "object", "id") if not attributes.get(name)]
    if not is_token_url(url) or missing:
        raise InvalidArgumentError(f"{url!r} is no address of a key on a token: {' and '.join(missing)} missing")
    if "pin-value" in attributes:
        raise InvalidArgumentError("a PKCS#11 URL holds a PIN itself, only pin-source is supported")
    return TokenUrl(
        token=unquote(attributes["token"]),
        object=unquote(attributes["object"]),
        id=unquote_to_bytes(attributes["id"]).hex(),
        module_path=_path(attributes.get("module-path")),
        pin_source=_path(attributes.get("pin-source")),
    )


def _attributes(parts: list[str]) -> dict[str, str]:
    return {name: value for name, _, value in (part.partition("=") for part in parts)}


def _path(value: str | None) -> Path | None:
    return Path(unquote(value.removeprefix("file:"))) if value else None


def _percent(key_id: str) -> str:
    return "".join(f"%{byte:02X}" for byte in bytes.fromhex(key_id))


def _der(tag: int, content: bytes) -> bytes:
    size = len(content)
    if size < 0x80:
        length = bytes([size])
    else:
        raw = size.to_bytes((size.bit_length() + 7) // 8, "big")
        length = bytes([0x80 | len(raw)]) + raw
    return bytes([tag]) + length + content
