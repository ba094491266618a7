"""What OCSP responses say about signers."""

import base64
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.x509 import ocsp
from cryptography.x509.oid import ExtendedKeyUsageOID

from aoscore.cm.imagemanager.crypto import Signers
from aoscore.common.errors import SignatureError
from tests.support.images import Signer
from tests.support.items import sha256
from tests.support.pki import Issued, TestCa

NOW = datetime.now(UTC).replace(microsecond=0)
DATA = b"blob"
GOOD, REVOKED, UNKNOWN = ocsp.OCSPCertStatus.GOOD, ocsp.OCSPCertStatus.REVOKED, ocsp.OCSPCertStatus.UNKNOWN


def text(der: bytes) -> str:
    return base64.b64encode(der).decode()


class Case:
    def __init__(self, tmp_path: Path) -> None:
        self.ca = TestCa()
        self.signer = Signer(self.ca)
        self.path = tmp_path / "blob"
        self.path.write_bytes(DATA)

    def response(
        self,
        status: ocsp.OCSPCertStatus = GOOD,
        *,
        of: Issued | None = None,
        by: Issued | None = None,
        shown: Issued | None = None,
        revoked: datetime | None = None,
        reason: x509.ReasonFlags | None = None,
        until: datetime | None = None,
    ) -> str:
        """About `of` (the signer), signed by `by` (its issuer), with `shown` as the responder's certificate."""
        of = of or self.signer.issued
        by = by or Issued(self.ca.intermediate.key, of.chain[1:])
        builder = ocsp.OCSPResponseBuilder().add_response(
            of.cert,
            of.chain[1],
            hashes.SHA1(),
            status,
            NOW - timedelta(hours=2),
            until or NOW + timedelta(days=1),
            revoked or (NOW - timedelta(hours=1) if status is REVOKED else None),
            reason,
        )
        builder = builder.responder_id(ocsp.OCSPResponderEncoding.HASH, by.cert)
        if shown is not None:
            builder = builder.certificates([shown.cert])
        der = builder.sign(by.key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)
        return text(der)

    def verify(self, *values: str) -> None:
        info = msgspec.structs.replace(self.signer.sign(DATA, at=NOW), ocsp_values=values)
        signers = Signers(self.signer.certificates, self.signer.chains, [self.ca.root.cert])
        signers.verify(self.path, sha256(DATA), info, now=NOW)


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


def test_good_ones(case: Case) -> None:
    case.verify(case.response())
    root = Issued(case.ca.root.key, case.ca.root.chain)
    case.verify(case.response(), case.response(of=case.ca.intermediate, by=root))


def test_revoked_before_signing(case: Case) -> None:
    with pytest.raises(SignatureError, match=r"CN=signer was revoked at"):
        case.verify(case.response(), case.response(REVOKED))


def test_a_revoked_ca_counts_too(case: Case) -> None:
    root = Issued(case.ca.root.key, case.ca.root.chain)
    with pytest.raises(SignatureError, match=r"CN=Test Intermediate was revoked"):
        case.verify(case.response(REVOKED, of=case.ca.intermediate, by=root))


def test_revoked_after_signing_counts_only_when_the_key_was_lost(case: Case) -> None:
    later = NOW + timedelta(minutes=30)
    case.verify(case.response(REVOKED, revoked=later))
    case.verify(case.response(REVOKED, revoked=later, reason=x509.ReasonFlags.superseded))
    with pytest.raises(SignatureError, match="revoked"):
        case.verify(case.response(REVOKED, revoked=later, reason=x509.ReasonFlags.key_compromise))


def test_unknown_and_outdated(case: Case) -> None:
    with pytest.raises(SignatureError, match="unknown to its issuer"):
        case.verify(case.response(UNKNOWN))
    with pytest.raises(SignatureError, match="outdated"):
        case.verify(case.response(until=NOW - timedelta(minutes=5)))


def test_who_may_answer(case: Case) -> None:
    """The issuer, or whom it made a responder."""
    plain = case.ca.issue("responder")
    with pytest.raises(SignatureError, match="is not signed for issuer"):
        case.verify(case.response(by=plain, shown=plain))
    right = case.ca.issue("responder", usages=[ExtendedKeyUsageOID.OCSP_SIGNING])
    case.verify(case.response(by=right, shown=right))
    with pytest.raises(SignatureError, match="revoked"):
        case.verify(case.response(REVOKED, by=right, shown=right))
    foreign = TestCa("Other").issue("responder", usages=[ExtendedKeyUsageOID.OCSP_SIGNING])
    with pytest.raises(SignatureError, match="is not signed for issuer"):
        case.verify(case.response(REVOKED, by=foreign, shown=foreign))


def test_what_says_nothing_is_passed_over(case: Case, caplog: pytest.LogCaptureFixture) -> None:
    ca = TestCa("Other")
    other = ca.issue("other")
    foreign = case.response(REVOKED, of=other, by=Issued(ca.intermediate.key, other.chain[1:]))
    busy = ocsp.OCSPResponseBuilder.build_unsuccessful(ocsp.OCSPResponseStatus.TRY_LATER)
    case.verify(foreign, "no base64!", *map(text, (b"no DER", busy.public_bytes(serialization.Encoding.DER))))
    assert "about no certificate" in caplog.text
    assert caplog.text.count("can't be read") == 2 and "TRY_LATER" in caplog.text
