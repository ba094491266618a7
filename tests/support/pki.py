"""A small certificate authority for tests."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from aoscore.common.certurls import file_url
from aoscore.common.keys import PrivateKey, private_key_pem
from aoscore.common.tls import TlsIdentity


def pem(*certificates: x509.Certificate) -> str:
    """Certificates as PEM text."""
    return "".join(certificate.public_bytes(serialization.Encoding.PEM).decode() for certificate in certificates)


class Issued:
    """A certificate with its key and its chain (leaf first, root last)."""

    def __init__(self, key: PrivateKey, chain: list[x509.Certificate]) -> None:
        self.key = key
        self.chain = chain
        self.cert = chain[0]

    @property
    def pem(self) -> bytes:
        """The chain as PEM."""
        return b"".join(cert.public_bytes(serialization.Encoding.PEM) for cert in self.chain)

    def write(self, directory: Path, name: str) -> tuple[str, str]:
        """Write chain and key; their file: URLs."""
        (directory / f"{name}.pem").write_bytes(self.pem)
        (directory / f"{name}.key").write_bytes(private_key_pem(self.key))
        return file_url(directory / f"{name}.pem"), file_url(directory / f"{name}.key")


class TestCa:
    """A root with one intermediate that issues leaves."""

    __test__ = False

    def __init__(self, name: str = "Test") -> None:
        self.root = self._make(f"{name} Root", None, ca=True)
        self.intermediate = self._make(f"{name} Intermediate", self.root, ca=True, path_length=0)

    @property
    def root_pem(self) -> bytes:
        """The root certificate as PEM."""
        return self.root.cert.public_bytes(serialization.Encoding.PEM)

    def write_root(self, directory: Path) -> Path:
        """Write the root certificate; its path."""
        path = directory / "root.pem"
        path.write_bytes(self.root_pem)
        return path

    def issue(
        self,
        common_name: str,
        dns: tuple[str, ...] = ("localhost",),
        *,
        not_before: datetime | None = None,
        lifetime: timedelta = timedelta(days=30),
        key: PrivateKey | None = None,
        usages: Sequence[x509.ObjectIdentifier] = (),
    ) -> Issued:
        """A leaf certificate for clients and servers, or for `usages`."""
        return self._make(
            common_name, self.intermediate, dns=dns, not_before=not_before, lifetime=lifetime, key=key, usages=usages
        )

    def sign_request(
        self, csr_pem: str, *, days: float = 30, begin_days: float = -0.01, with_extensions: bool = True
    ) -> str:
        """PEM chain, leaf first, for a certificate signing request; valid from `begin_days` to `days` from now."""
        request = x509.load_pem_x509_csr(csr_pem.encode())
        now = datetime.now(UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(request.subject)
            .issuer_name(self.intermediate.cert.subject)
            .public_key(request.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + timedelta(days=begin_days))
            .not_valid_after(now + timedelta(days=days))
        )
        for extension in request.extensions if with_extensions else ():
            builder = builder.add_extension(extension.value, extension.critical)
        leaf = builder.sign(self.intermediate.key, hashes.SHA256())
        return pem(leaf, *self.intermediate.chain)

    def identity(self, directory: Path, name: str, dns: tuple[str, ...] = ("localhost",)) -> TlsIdentity:
        """A leaf written to files, as the components use it."""
        cert_url, key_url = self.issue(name, dns).write(directory, name)
        return TlsIdentity(self.write_root(directory), cert_url, key_url)

    @staticmethod
    def _make(
        common_name: str,
        issuer: Issued | None,
        *,
        ca: bool = False,
        path_length: int | None = None,
        dns: tuple[str, ...] = (),
        not_before: datetime | None = None,
        lifetime: timedelta = timedelta(days=365),
        key: PrivateKey | None = None,
        usages: Sequence[x509.ObjectIdentifier] = (),
    ) -> Issued:
        key = key or ec.generate_private_key(ec.SECP256R1())
        begin = not_before or datetime.now(UTC) - timedelta(hours=1)
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, common_name)])
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer.cert.subject if issuer else subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(begin)
            .not_valid_after(begin + lifetime)
            .add_extension(x509.BasicConstraints(ca, path_length if ca else None), critical=True)
        )
        if ca:
            usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
            builder = builder.add_extension(usage, critical=True)
        if usages:
            builder = builder.add_extension(x509.ExtendedKeyUsage(usages), False)
        if dns:
            builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(name) for name in dns]), False)
        cert = builder.sign(issuer.key if issuer else key, hashes.SHA256())
        return Issued(key, [cert, *(issuer.chain if issuer else [])])


class Relayed(TlsIdentity, frozen=True):
    """Takes the way of a key on a token."""

    @property
    def on_token(self) -> bool:
        return True


def relayed(identity: TlsIdentity) -> TlsIdentity:
    return Relayed(identity.ca_file, identity.cert_url, identity.key_url)
