"""A certificate in use, as the index knows it."""

from datetime import UTC, datetime

import msgspec
from cryptography import x509

from aoscore.common.certs import issuer_der, serial_hex
from aoscore.common.types import CertInfo


class CertRecord(msgspec.Struct, frozen=True):
    """Where a certificate is, and until when it is valid."""

    info: CertInfo
    not_after: datetime

    @classmethod
    def of(cls, cert_type: str, certificate: x509.Certificate, cert_url: str, key_url: str) -> "CertRecord":
        """The record of a certificate that is stored at these addresses."""
        info = CertInfo(cert_type, cert_url, key_url, serial_hex(certificate), issuer_der(certificate))
        return cls(info, certificate.not_valid_after_utc)

    @property
    def not_after_ns(self) -> int:
        """Nanoseconds since 1970, exact."""
        whole = self.not_after - datetime.fromtimestamp(0, UTC)
        return (whole.days * 86400 + whole.seconds) * 10**9 + whole.microseconds * 1000


def newest(records: list[CertRecord]) -> CertRecord | None:
    """The certificate that peers are to use: the one that is valid longest (iam.md §5.10)."""
    return max(records, key=lambda record: record.not_after, default=None)
