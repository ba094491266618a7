"""TLS of all links, by certificate and key URLs of IAM, for grpcio and for stdlib ssl.

Peers are identified by their certificate, not by a DNS name (design, "TLS names"): the chain must end at the Unit's
root. TLS 1.2 is the floor. Inside the Unit times of certificates are not checked: a node that boots without a clock has
to start its services, and certificates that ended while there was no cloud have to work until it renews them. (gRPC's
own TLS can't do that: between keys in files, times count.) IAM says when one ends; the cloud's are checked in full.

A key on a token is used through OpenSSL's provider `pkcs11`, which the OpenSSL configuration of the machine must
activate. The gRPC library can't do that (it has a TLS of its own), so there gRPC goes through `common.relay`.
"""

import asyncio
import contextlib
import logging
import os
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import msgspec

from aoscore.common.aio import run_abandonable
from aoscore.common.certurls import read_chain_url, read_file_url, url_path
from aoscore.common.errors import AosError, DeadlineError, FailedError, InvalidArgumentError, NotFoundError
from aoscore.common.pkcs11.turns import turn
from aoscore.common.pkcs11.url import is_token_url, parse_token_url
from aoscore.common.types import CertInfo

_log = logging.getLogger(__name__)

# A token answers within that time or not at all.
_TOKEN_LIMIT_S = 20.0
# OpenSSL, its pkcs11 provider and SoftHSM together are not safe for threads: of handshakes at the same time some fail
# with a bad signature (2 % of them with OpenSSL 3.5, provider 1.0, SoftHSM 2.6). Hence one at a time in a process.
TOKEN_LOCK = threading.Lock()
# X509_V_FLAG_NO_CHECK_TIME of OpenSSL, which Python has no name for.
_NO_CHECK_TIME = 0x200000
# A certificate that could not be used is tried again after that time, seconds.
_RETRY_S = 10.0


def read_roots(ca_file: Path) -> bytes:
    """PEM of the root certificates. Raises NotFoundError naming the file."""
    try:
        return ca_file.read_bytes()
    except FileNotFoundError:
        raise NotFoundError(f"root CA file {ca_file} does not exist") from None


class TokenContext(ssl.SSLContext):
    """A client's context whose key is on a token: handshakes with it go through `common.relay`, see TOKEN_LOCK."""


class TlsRoots(msgspec.Struct, frozen=True):
    """Whom we trust on a link where we show no certificate of our own (IAM's public port)."""

    ca_file: Path

    def grpc_client_credentials(self) -> grpc.ChannelCredentials:
        """TLS as a gRPC client."""
        return grpc.ssl_channel_credentials(read_roots(self.ca_file))

    def ssl_client_context(self, *, check_hostname: bool = True) -> ssl.SSLContext:
        """TLS as a client of stdlib ssl; the chain is always checked. Without `check_hostname`: inside the Unit."""
        return self._client_context(ssl.SSLContext, check_hostname=check_hostname)

    def _client_context(self, kind: type[ssl.SSLContext], *, check_hostname: bool) -> ssl.SSLContext:
        context = kind(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.check_hostname = check_hostname
        if not check_hostname:
            context.verify_flags |= _NO_CHECK_TIME
        try:
            context.load_verify_locations(self.ca_file)
        except FileNotFoundError:
            raise NotFoundError(f"root CA file {self.ca_file} does not exist") from None
        except ssl.SSLError as error:
            raise InvalidArgumentError(f"root CA file {self.ca_file} is not usable: {error}") from error
        return context


class TlsIdentity(TlsRoots, frozen=True):
    """Who we are on a link: our certificate and key, and the roots we trust."""

    cert_url: str
    key_url: str

    @classmethod
    def of(cls, ca_file: Path, cert: CertInfo) -> "TlsIdentity":
        """The identity of a certificate that IAM told us about."""
        return cls(ca_file, cert.cert_url, cert.key_url)

    @property
    def on_token(self) -> bool:
        """Whether the key is on a token, so that only stdlib ssl can use it."""
        return is_token_url(self.key_url)

    def _pem(self) -> tuple[bytes, bytes]:
        return read_file_url(self.key_url), read_file_url(self.cert_url)

    def grpc_client_credentials(self) -> grpc.ChannelCredentials:
        """Mutual TLS as a gRPC client. Raises InvalidArgumentError for a key on a token."""
        key, chain = self._pem()
        return grpc.ssl_channel_credentials(read_roots(self.ca_file), key, chain)

    def ssl_client_context(self, *, check_hostname: bool = True) -> ssl.SSLContext:
        """Mutual TLS as a client of stdlib ssl, see `TlsRoots`."""
        kind = TokenContext if self.on_token else ssl.SSLContext
        context = self._client_context(kind, check_hostname=check_hostname)
        self._load_into(context)
        return context

    def ssl_server_context(self, *, require_client: bool = True) -> ssl.SSLContext:
        """TLS server; with `require_client` only peers with a certificate of our roots get in."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if require_client:
            context.verify_mode = ssl.CERT_REQUIRED
            context.verify_flags |= _NO_CHECK_TIME
            context.load_verify_locations(self.ca_file)
        self._load_into(context)
        return context

    def _load_into(self, context: ssl.SSLContext) -> None:
        on_token = is_token_url(self.key_url)
        try:
            if on_token:
                # OpenSSL wants names of files; none of this belongs on a disk.
                url = parse_token_url(self.key_url)
                with (
                    _memory_file(read_chain_url(self.cert_url)) as chain,
                    _memory_file(url.provider_pem()) as key,
                ):
                    with TOKEN_LOCK, turn(url.pin_source):
                        context.load_cert_chain(chain, key)
            else:
                context.load_cert_chain(url_path(self.cert_url), url_path(self.key_url))
        except (ssl.SSLError, OSError) as error:
            hint = "; is OpenSSL's pkcs11 provider installed and active in openssl.cnf?" if on_token else ""
            raise FailedError(f"can't use certificate {self.cert_url}: {error}{hint}") from error


@contextlib.contextmanager
def _memory_file(content: bytes) -> Iterator[str]:
    """A file that is only in memory; its name."""
    fd = os.memfd_create("aos-tls", os.MFD_CLOEXEC)
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(content)
        yield f"/proc/self/fd/{fd}"
    finally:
        os.close(fd)


async def within_token_limit(what: str, function: Callable[[], ssl.SSLContext]) -> ssl.SSLContext:
    """Make a TLS context whose key is on a token: the token may be slow, or hang for good. Raises DeadlineError."""
    try:
        return await run_abandonable(function, _TOKEN_LIMIT_S)
    except TimeoutError:
        raise DeadlineError(f"{what}: the token did not answer within {_TOKEN_LIMIT_S:g} s") from None


class ServerTls:
    """TLS of a gRPC server that takes a renewed certificate without a restart.

    With the key in a file `credentials` are for use, with the key on a token `context`.
    """

    def __init__(self, identity: Callable[[], TlsIdentity], *, require_client: bool) -> None:
        """`identity` is asked at every handshake."""
        self._identity = identity
        self._require_client = require_client
        self._used = identity()
        self._context: ssl.SSLContext | None = None
        self._changing = asyncio.Lock()
        self._retry_at_s = 0.0
        self.on_token = self._used.on_token
        self._credentials = None if self.on_token else _dynamic_credentials(identity, require_client=require_client)

    def credentials(self) -> grpc.ServerCredentials:
        """For a gRPC server that does TLS itself."""
        if self._credentials is None:
            raise InvalidArgumentError(f"gRPC can't use the key {self._used.key_url}: it is on a token")
        return self._credentials

    async def context(self) -> ssl.SSLContext:
        """The context for a handshake that begins now. Raises the error of the first certificate; a later one that
        can't be used is logged, and the last good one stays.
        """
        async with self._changing:
            wanted = self._identity()
            if self._context is None:
                self._context = await self._make(wanted)
                self._used = wanted
            elif wanted != self._used and time.monotonic() >= self._retry_at_s:
                try:
                    self._context = await self._make(wanted)
                    self._used = wanted
                except (AosError, OSError) as error:
                    self._retry_at_s = time.monotonic() + _RETRY_S
                    _log.error("Can't use new certificate, the old one stays in use: error=%s", error)
            return self._context

    async def _make(self, identity: TlsIdentity) -> ssl.SSLContext:
        def make() -> ssl.SSLContext:
            context = identity.ssl_server_context(require_client=self._require_client)
            context.set_alpn_protocols(["h2"])
            return context

        return await within_token_limit(f"certificate {identity.cert_url}", make)


def grpc_server_credentials(identity: Callable[[], TlsIdentity], *, require_client: bool = True) -> ServerTls:
    """gRPC server TLS that takes a renewed certificate without a restart.

    `identity` is asked at every handshake; running calls keep the certificate they began with. Raises the error of
    the first read, later ones keep the last good certificate.
    """
    return ServerTls(identity, require_client=require_client)


def _dynamic_credentials(identity: Callable[[], TlsIdentity], *, require_client: bool) -> grpc.ServerCredentials:
    current = identity()

    def configuration(of: TlsIdentity) -> grpc.ServerCertificateConfiguration:
        roots = read_roots(of.ca_file) if require_client else None
        return grpc.ssl_server_certificate_configuration([of._pem()], roots)

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        nonlocal current
        wanted = identity()
        if wanted == current:
            return None
        fresh = configuration(wanted)
        current = wanted
        return fresh

    return grpc.dynamic_ssl_server_credentials(
        configuration(current),
        fetch,  # type: ignore[arg-type]  # None keeps the present one, as gRPC documents
        require_client_authentication=require_client,
    )
