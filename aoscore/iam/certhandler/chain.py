"""Is an issued certificate fit to be used? (iam.md §5.9 and §16, 15)"""

from collections.abc import Sequence
from datetime import datetime

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from aoscore.common.certs import is_self_signed, load_certificates, verify_chain
from aoscore.common.errors import InvalidArgumentError, NotFoundError

_MAX_CERTIFICATES = 8


def check_chain(pem: str, roots: Sequence[x509.Certificate], now: datetime) -> list[x509.Certificate]:
    """The path from the leaf, which must come first, to a self-signed root in the PEM or in `roots`.

    Signatures, CA flags and expiry are checked. A certificate that is valid only in the future is fine, because a new
    Unit may have no clock yet. Raises InvalidArgumentError for what is no list of usable certificates, NotFoundError
    when an issuer is missing, SignatureError for a chain that does not hold.
    """
    certificates = load_certificates(pem.encode())
    if not certificates or len(certificates) > _MAX_CERTIFICATES:
        raise InvalidArgumentError(f"there are {len(certificates)} certificates, expected 1 to {_MAX_CERTIFICATES}")
    for certificate in certificates:
        if not isinstance(certificate.public_key(), ec.EllipticCurvePublicKey | rsa.RSAPublicKey):
            raise InvalidArgumentError(f"certificate {certificate.subject.rfc4514_string()} has no EC or RSA key")
    leaf, *others = certificates
    anchors = [*(certificate for certificate in certificates if is_self_signed(certificate)), *roots]
    subjects = [certificate.subject for certificate in [*others, *anchors]]
    for certificate in certificates:
        if certificate.issuer not in subjects:
            raise NotFoundError(
                f"issuer {certificate.issuer.rfc4514_string()} of certificate {certificate.subject.rfc4514_string()} "
                "is missing: give the chain up to the root"
            )
    at = max([now, *(certificate.not_valid_before_utc for certificate in certificates)])
    return verify_chain(leaf, others, anchors, at=at)
