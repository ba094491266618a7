"""TLS of all links, by certificate and key URLs of IAM, for grpcio and for stdlib ssl.

Peers are identified by their certificate, not by a DNS name (design, "TLS names"): the chain must end at the Unit's
root. TLS 1.2 is the floor.
"""

import ssl
from collections.abc import Callable
from pathlib import Path

import grpc
import msgspec

from aoscore.common.certs import read_file_url, url_path
from aoscore.common.errors import FailedError, InvalidArgumentError, NotFoundError
from aoscore.common.types import CertInfo


def read_roots(ca_file: Path) -> bytes:
    """PEM of the root certificates. Raises NotFoundError naming the file."""
    try:
        return ca_file.read_bytes()
    except FileNotFoundError:
        raise NotFoundError(f"root CA file {ca_file} does not exist") from None


class TlsRoots(msgspec.Struct, frozen=True):
    """Whom we trust on a link where we show no certificate of our own (IAM's public port)."""

    ca_file: Path

    def grpc_client_credentials(self) -> grpc.ChannelCredentials:
        """TLS as a gRPC client."""
        return grpc.ssl_channel_credentials(read_roots(self.ca_file))

    def ssl_client_context(self, *, check_hostname: bool = True) -> ssl.SSLContext:
        """TLS as a client of stdlib ssl; the chain is always checked."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.check_hostname = check_hostname
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

    def _pem(self) -> tuple[bytes, bytes]:
        return read_file_url(self.key_url), read_file_url(self.cert_url)

    def grpc_client_credentials(self) -> grpc.ChannelCredentials:
        """Mutual TLS as a gRPC client."""
        key, chain = self._pem()
        return grpc.ssl_channel_credentials(read_roots(self.ca_file), key, chain)

    def ssl_client_context(self, *, check_hostname: bool = True) -> ssl.SSLContext:
        """Mutual TLS as a client of stdlib ssl; the chain is always checked."""
        context = super().ssl_client_context(check_hostname=check_hostname)
        self._load_into(context)
        return context

    def ssl_server_context(self, *, require_client: bool = True) -> ssl.SSLContext:
        """TLS server; with `require_client` only peers with a certificate of our roots get in."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if require_client:
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_verify_locations(self.ca_file)
        self._load_into(context)
        return context

    def _load_into(self, context: ssl.SSLContext) -> None:
        try:
            context.load_cert_chain(url_path(self.cert_url), url_path(self.key_url))
        except (ssl.SSLError, OSError) as error:
            raise FailedError(f"can't use certificate {self.cert_url}: {error}") from error


def grpc_server_credentials(
    identity: Callable[[], TlsIdentity], *, require_client: bool = True
) -> grpc.ServerCredentials:
    """gRPC server TLS that takes a renewed certificate without a restart.

    `identity` is asked at every handshake; running calls keep the certificate they began with. Raises the error of
    the first read, later ones keep the last good certificate.
    """
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
