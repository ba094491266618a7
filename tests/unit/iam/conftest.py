"""A certificate authority and an open database for tests of IAM."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from aoscore.common.aio import Worker
from aoscore.iam.database import IamDatabase


def name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


class Authority:
    """Root and intermediate CA. `issue` signs a request; its answer is leaf, intermediate, root."""

    def __init__(self, title: str = "Test CA", *, intermediate: bool = True) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.root = self._ca(name(f"{title} root"), self.key, name(f"{title} root"), self.key)
        self.chain = [self.root]
        if intermediate:
            key = ec.generate_private_key(ec.SECP256R1())
            self.chain.insert(0, self._ca(name(f"{title} 2"), key, self.root.subject, self.key))
            self.key = key

    @staticmethod
    def _ca(
        subject: x509.Name, key: ec.EllipticCurvePrivateKey, issuer: x509.Name, issuer_key: ec.EllipticCurvePrivateKey
    ) -> x509.Certificate:
        now = datetime.now(UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=400))
            .not_valid_after(now + timedelta(days=4000))
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(issuer_key, hashes.SHA256())
        )

    def issue(
        self,
        csr_pem: str,
        *,
        days: float = 365,
        begin_days: float = -1,
        chain: bool = True,
        with_names: bool = True,
    ) -> str:
        """PEM certificate for a request; `days` from now until its end."""
        request = x509.load_pem_x509_csr(csr_pem.encode())
        now = datetime.now(UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(request.subject)
            .issuer_name(self.chain[0].subject)
            .public_key(request.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + timedelta(days=begin_days))
            .not_valid_after(now + timedelta(days=days))
        )
        for extension in request.extensions if with_names else ():
            builder = builder.add_extension(extension.value, extension.critical)
        leaf = builder.sign(self.key, hashes.SHA256())
        return pem(leaf, *(self.chain if chain else ()))


def pem(*certificates: x509.Certificate) -> str:
    return "".join(certificate.public_bytes(serialization.Encoding.PEM).decode() for certificate in certificates)


@pytest.fixture(scope="session")
def authority() -> Authority:
    return Authority()


@pytest.fixture
async def worker() -> AsyncIterator[Worker]:
    async with Worker("test") as worker:
        yield worker


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[IamDatabase]:
    async with IamDatabase(tmp_path / "work") as database:
        yield database
