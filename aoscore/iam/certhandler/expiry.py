"""When to speak of a certificate's end: 30, 7 and 1 day before it, and when it is over (iam.md §16, 33). Pure."""

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta

from aoscore.common.log import kv
from aoscore.iam.certhandler.record import CertRecord

STAGES = (timedelta(days=30), timedelta(days=7), timedelta(days=1), timedelta(0))
# A clock that shows an earlier time was never set; from it nothing can be said about certificates.
CLOCK_FLOOR = datetime(2026, 1, 1, tzinfo=UTC)


def stage(not_after: datetime, now: datetime) -> int:
    """How many of the stages have been reached."""
    return sum(not_after - now <= limit for limit in STAGES)


class ExpiryWatch:
    """Remembers what was said, so that each stage of each certificate is told once."""

    def __init__(self) -> None:
        self._told: dict[str, int] = {}

    def warnings(self, records: Iterable[CertRecord], now: datetime) -> list[str]:
        """What to say now about the certificates in use, one per type."""
        if now < CLOCK_FLOOR:
            return []
        warnings = []
        told = {}
        for record in records:
            serial = record.info.serial
            reached = stage(record.not_after, now)
            # A clock that is set back does not make anybody hear it twice.
            told[serial] = max(reached, self._told.get(serial, 0))
            if reached > self._told.get(serial, 0):
                text = "Certificate has expired" if reached == len(STAGES) else "Certificate will expire soon"
                warnings.append(kv(text, type=record.info.type, serial=serial, notAfter=record.not_after))
        self._told = told
        return warnings
