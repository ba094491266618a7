"""Where certificates and keys are: the URLs that IAM gives out, and what is behind them, unparsed.

Apart from `certs`, so that a daemon that only hands certificates to TLS does without an X.509 library in memory.
"""

import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from aoscore.common.errors import InvalidArgumentError, NotFoundError
from aoscore.common.pkcs11.url import is_token_url, parse_token_url

_PEM_BEGIN, _PEM_END = b"-----BEGIN CERTIFICATE-----", b"-----END CERTIFICATE-----"


def url_path(url: str) -> Path:
    """The file of a `file:` URL as IAM writes it: `file:///path` or `file:/path` (cm-cloud.md §8.3)."""
    parts = urlsplit(url)
    if parts.scheme != "file" or not parts.path:
        raise InvalidArgumentError(f"certificate URL {url!r} is no file: URL")
    return Path(unquote(parts.path))


def file_url(path: Path) -> str:
    """The `file:` URL of an absolute path."""
    return f"file://{path}"


def read_file_url(url: str) -> bytes:
    """Content behind a `file:` URL; NotFoundError when the file is not there."""
    path = url_path(url)
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise NotFoundError(f"{path} does not exist") from None


def read_chain_url(cert_url: str) -> bytes:
    """PEM of the chain behind a certificate URL, leaf first; with a token it blocks for the time of a helper process.

    Raises what `read_file_url` and `pkcs11.token.Token` raise.
    """
    if not is_token_url(cert_url):
        return read_file_url(cert_url)
    # Import on use: where keys are files this is never needed.
    from aoscore.common.pkcs11.token import read_chain

    return "".join(ssl.DER_cert_to_PEM_cert(der) for der in read_chain(parse_token_url(cert_url))).encode()


def first_der(pem: bytes, *, what: str) -> bytes:
    """DER of the first certificate of a PEM text. Raises InvalidArgumentError naming `what`."""
    begin, end = pem.find(_PEM_BEGIN), pem.find(_PEM_END)
    try:
        if begin == -1 or end == -1:
            raise ValueError("it has no BEGIN and END")
        return ssl.PEM_cert_to_DER_cert(pem[begin : end + len(_PEM_END)].decode("ascii"))
    except ValueError as error:
        raise InvalidArgumentError(f"{what} is no PEM certificate: {error}") from error


def names_of_peer(shown: Mapping[str, Any]) -> list[str]:
    """Names a TLS client may know a peer by: DNS SANs, else the common names of the subject.

    `shown` is what `SSLObject.getpeercert()` tells of a certificate that TLS has checked.
    """
    names = [value for kind, value in shown.get("subjectAltName", ()) if kind == "DNS"]
    subject = [pair for group in shown.get("subject", ()) for pair in group]
    return names or [value for kind, value in subject if kind == "commonName"]
