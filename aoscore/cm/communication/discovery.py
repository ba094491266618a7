"""Service discovery: where the cloud is (cloud-protocol §1.2, §2.2). Pure; the link does the requests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit, urlunsplit

import msgspec

from aoscore.cm.communication.messages import PROTOCOL_VERSION
from aoscore.cm.communication.reader import read
from aoscore.common.config import JSON_ERRORS
from aoscore.common.errors import FailedError, InvalidArgumentError, NotFoundError

if TYPE_CHECKING:
    from cryptography import x509

DISCOVERY_PORT: Final = 9000
MIN_DELAY_S: Final = 1.0

# Values of `errorCode` in the answer.
NO_ERROR, REDIRECT, REPEAT_LATER, ERROR = range(4)


class Answer(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """The answer of the discovery service; `next_request_delay` in milliseconds."""

    next_request_delay: int = 0
    connection_info: tuple[str, ...] = ()
    auth_token: str = ""
    error_code: int = NO_ERROR

    def __repr__(self) -> str:
        return f"Answer(connection_info={self.connection_info!r}, error_code={self.error_code})"

    @property
    def delay_s(self) -> float | None:
        """The pause the cloud wishes between attempts, at least a second; None when it does not say."""
        return max(self.next_request_delay / 1000, MIN_DELAY_S) if self.next_request_delay > 0 else None


def request_body(system_id: str) -> bytes:
    """What is posted to the discovery service."""
    return msgspec.json.encode({"version": PROTOCOL_VERSION, "systemId": system_id, "supportedProtocols": ["wss"]})


def parse_answer(status: int, body: bytes, url: str) -> Answer:
    """Reads the answer of the discovery service at `url`.

    Raises:
        FailedError: it refuses (HTTP status or error code "error").
        InvalidArgumentError: it cannot be read, or names no address although it should.
    """
    if status != 200:
        raise FailedError(f"service discovery at {url} answered HTTP {status}")
    try:
        answer, _ = read(Answer, msgspec.json.decode(body))
    except (*JSON_ERRORS, InvalidArgumentError) as error:
        raise InvalidArgumentError(f"service discovery at {url} answered something else: {error}") from error
    if answer.error_code == ERROR:
        raise FailedError(f"service discovery at {url} refused this Unit (error code {ERROR})")
    if not answer.connection_info and answer.error_code != REPEAT_LATER:
        raise InvalidArgumentError(f"service discovery at {url} named no address")
    return answer


def certificate_urls(certificate: x509.Certificate) -> list[str]:
    """Discovery URLs in a Unit's `online` certificate: the URIs of its Issuer Alternative Name, else by its O."""
    from cryptography import x509

    try:
        names = certificate.extensions.get_extension_for_class(x509.IssuerAlternativeName).value
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    except x509.ExtensionNotFound:
        uris = []
    if uris:
        return list(uris)
    organizations = certificate.subject.get_attributes_for_oid(x509.NameOID.ORGANIZATION_NAME)
    return [f"https://{organizations[0].value!s}:{DISCOVERY_PORT}"] if organizations else []


def discovery_urls(*, configured: str, override: str, named: Sequence[str]) -> list[str]:
    """The URLs to ask, in this order.

    An override stands alone. Else what the certificate has `named` comes first and the configured URL last. The path is
    always that of the configured URL (cloud-protocol §1.2, trap b).

    Raises:
        NotFoundError: nothing says where the cloud is.
    """
    found = [override] if override else [*named, configured]
    path = urlsplit(configured).path or "/"
    urls = []
    for url in found:
        parts = urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname:
            urls.append(urlunsplit((parts.scheme, parts.netloc, path, parts.query, "")))
    if not urls:
        raise NotFoundError(
            "no service discovery URL: set serviceDiscoveryUrl, or use a certificate that names the cloud"
        )
    return list(dict.fromkeys(urls))


class Addresses:
    """The WebSocket addresses of one discovery answer and which to try next.

    Addresses are tried in turn, beginning with the one that worked last. The answer is used up when each of them has
    failed once in a row, or when its token was refused.
    """

    def __init__(self) -> None:
        self._urls: list[str] = []
        self._failures = 0
        self.token = ""

    def take(self, answer: Answer) -> None:
        """Uses a new answer."""
        self._urls = list(answer.connection_info)
        self._failures = 0
        self.token = answer.auth_token

    @property
    def current(self) -> str | None:
        """The address to try now; None: ask the discovery service first."""
        return self._urls[0] if self._urls else None

    def worked(self) -> None:
        """The current address gave a connection."""
        self._failures = 0

    def failed(self) -> None:
        """The current address gave none."""
        self._failures += 1
        if self._failures >= len(self._urls):
            self.forget()
        else:
            self._urls.append(self._urls.pop(0))

    def forget(self) -> None:
        """The token is refused, or nothing works: a new answer is needed."""
        self._urls = []
        self._failures = 0
        self.token = ""
