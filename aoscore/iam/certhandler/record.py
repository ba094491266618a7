"""A certificate in use, as the index knows it."""

from collections.abc import Collection, Sequence
from datetime import UTC, datetime

import msgspec

from aoscore.common.types import CertInfo


class CertRecord(msgspec.Struct, frozen=True):
    """Where a certificate is, and until when it is valid."""

    info: CertInfo
    not_after: datetime

    @classmethod
    def of(cls, cert_type: str, der: bytes, cert_url: str, key_url: str) -> "CertRecord":
        """The record of a certificate that is stored at these addresses. Raises InvalidArgumentError for none."""
        # Import on use: a Node whose index is whole starts without the library.
        from aoscore.common.certs import issuer_der, load_der, serial_hex

        certificate = load_der(der, what=cert_url)
        info = CertInfo(cert_type, cert_url, key_url, serial_hex(certificate), issuer_der(certificate))
        return cls(info, certificate.not_valid_after_utc)

    def describes(self, der: bytes, cert_url: str) -> bool:
        """Whether the index still tells the truth about what is stored at an address, without parsing it.

        No store uses an address twice, so this only has to notice what has been spoilt.
        """
        serial = bytes.fromhex(self.info.serial)
        return self.info.cert_url == cert_url and self.info.issuer in der and serial in der

    @property
    def not_after_ns(self) -> int:
        """Nanoseconds since 1970, exact."""
        whole = self.not_after - datetime.fromtimestamp(0, UTC)
        return (whole.days * 86400 + whole.seconds) * 10**9 + whole.microseconds * 1000


def newest(records: Sequence[CertRecord]) -> CertRecord | None:
    """The certificate that peers are to use: the one that is valid longest (iam.md §5.10)."""
    return max(records, key=lambda record: record.not_after, default=None)


def surplus(
    records: Sequence[CertRecord], max_items: int, *, added: CertRecord | None, used: Collection[str]
) -> list[CertRecord]:
    """Certificates that have to go so that `max_items` are left, those that end first before others. Pure.

    Never `added`, which has just come, and never the last that has been `used` (by serial) before `added` has: until
    the new one works, the old one is all there is. Then one more than `max_items` may stay.
    """
    kept = {added.info.serial} if added is not None else set()
    proven = [record for record in records if record.info.serial in used]
    if proven and not kept & set(used):
        last = newest(proven)
        kept |= {last.info.serial} if last is not None else set()
    by_end = sorted(records, key=lambda record: record.not_after)
    candidates = [record for record in by_end if record.info.serial not in kept]
    return candidates[: max(0, len(records) - max_items)]
