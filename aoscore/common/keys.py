"""Private keys by URL: in files, or on a token that does the work with them."""

from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from aoscore.common.certurls import read_file_url
from aoscore.common.errors import InvalidArgumentError
from aoscore.common.files import write_atomic
from aoscore.common.pkcs11.url import is_token_url, parse_token_url

PrivateKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey


def generate_ec_key() -> ec.EllipticCurvePrivateKey:
    """A new P-384 key, the curve of AosCore 9.1 (iam.md §2.5)."""
    return ec.generate_private_key(ec.SECP384R1())


def generate_rsa_key() -> rsa.RSAPrivateKey:
    """A new RSA 2048 key."""
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


def private_key_pem(key: PrivateKey) -> bytes:
    """PKCS#8 PEM without password: the file's mode guards it."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def write_private_key(path: Path, key: PrivateKey) -> None:
    """Store a key so that only its owner can read it."""
    write_atomic(path, private_key_pem(key), mode=0o600)


def load_private_key(key_url: str) -> PrivateKey:
    """The key behind a URL. Raises NotFoundError or InvalidArgumentError naming the URL, never its content.

    A key on a token stays there: each use of it blocks for the time of a helper process, and may raise what
    `pkcs11.token.Token` raises.
    """
    if is_token_url(key_url):
        from aoscore.common.pkcs11.keys import load_token_key

        return load_token_key(parse_token_url(key_url))
    try:
        key = serialization.load_pem_private_key(read_file_url(key_url), password=None)
    except (ValueError, TypeError):
        raise InvalidArgumentError(f"{key_url} holds no usable private key") from None
    if not isinstance(key, (ec.EllipticCurvePrivateKey, rsa.RSAPrivateKey)):
        raise InvalidArgumentError(f"{key_url} holds a key of an unsupported kind")
    return key
