"""Revocation of signers, by the OCSP responses that come with a signature (cm-cloud.md §18, RFC 6960). Pure.

A response counts when it is signed by the issuer of the certificate that it is about, or by a responder to which that
issuer has given the right. Then these signatures are refused:

* of a certificate that was revoked before it signed, or at any time for the loss of its key: nothing but the signer's
  word proves when it signed;
* of a certificate that its issuer does not know;
* where a response about a certificate of the chain is forged, or was outdated already when the signature was made.

Other values are passed over with a warning: they say nothing about this chain, and AosCore 9.1 reads none of them.
"""

from __future__ import annotations

import base64
import binascii
import itertools
import logging
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.x509 import ocsp
from cryptography.x509.oid import ExtendedKeyUsageOID

from aoscore.common.errors import SignatureError

_log = logging.getLogger(__name__)

_KEY_LOST: Final = (
    x509.ReasonFlags.key_compromise,
    x509.ReasonFlags.ca_compromise,
    x509.ReasonFlags.aa_compromise,
)


def check_responses(values: Sequence[str], path: Sequence[x509.Certificate], *, signed_at: datetime) -> None:
    """Refuses a signature by what the responses say about its certificates.

    Args:
        values: responses in DER, base64.
        path: signer first, root last, checked already.
        signed_at: when the signature was made.

    Raises:
        SignatureError: see the module text.
    """
    for value in values:
        response = _load(value)
        if response is None:
            continue
        matches = [
            (single, certificate, issuer)
            for certificate, issuer in itertools.pairwise(path)
            for single in response.responses
            if _is_about(single, certificate, issuer)
        ]
        if not matches:
            _log.warning("OCSP response is about no certificate of the signer's chain")
        for single, certificate, issuer in matches:
            _check_signer(response, issuer)
            _check_single(single, certificate, signed_at)


def _load(value: str) -> ocsp.OCSPResponse | None:
    try:
        response = ocsp.load_der_ocsp_response(base64.b64decode("".join(value.split()), validate=True))
    except (binascii.Error, ValueError) as error:
        _log.warning("OCSP value can't be read: %s", error)
        return None
    if response.response_status is not ocsp.OCSPResponseStatus.SUCCESSFUL:
        _log.warning("OCSP responder gave no answer: %s", response.response_status.name)
        return None
    return response


def _is_about(single: ocsp.OCSPSingleResponse, certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    if single.serial_number != certificate.serial_number:
        return False
    algorithm = single.hash_algorithm
    return (single.issuer_name_hash, single.issuer_key_hash) == (
        _hash(issuer.subject.public_bytes(), algorithm),
        _hash(_key_bits(issuer), algorithm),
    )


def _hash(data: bytes, algorithm: hashes.HashAlgorithm) -> bytes:
    digest = hashes.Hash(algorithm)
    digest.update(data)
    return digest.finalize()


def _key_bits(certificate: x509.Certificate) -> bytes:
    """The content of the BIT STRING subjectPublicKey, which the key hash is over (RFC 6960 §4.1.1)."""
    key = certificate.public_key()
    if isinstance(key, rsa.RSAPublicKey):
        return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.PKCS1)
    if isinstance(key, ec.EllipticCurvePublicKey):
        return key.public_bytes(serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint)
    raise SignatureError(f"issuer {certificate.subject.rfc4514_string()} has a kind of key that is not supported")


def _check_signer(response: ocsp.OCSPResponse, issuer: x509.Certificate) -> None:
    produced_at = _time(response, "produced_at") or datetime.now(UTC)
    for candidate in (issuer, *(one for one in response.certificates if _may_answer(one, issuer, produced_at))):
        if _is_signed_by(response, candidate):
            return
    raise SignatureError(f"OCSP response is not signed for issuer {issuer.subject.rfc4514_string()}")


def _may_answer(certificate: x509.Certificate, issuer: x509.Certificate, at: datetime) -> bool:
    """Whether the issuer lets this certificate answer for it (RFC 6960 §4.2.2.2)."""
    try:
        certificate.verify_directly_issued_by(issuer)
        usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except (InvalidSignature, ValueError, TypeError, x509.ExtensionNotFound):
        return False
    in_time = certificate.not_valid_before_utc <= at <= certificate.not_valid_after_utc
    return in_time and ExtendedKeyUsageOID.OCSP_SIGNING in usage


def _is_signed_by(response: ocsp.OCSPResponse, certificate: x509.Certificate) -> bool:
    key = certificate.public_key()
    try:
        algorithm = response.signature_hash_algorithm
        if isinstance(key, rsa.RSAPublicKey) and algorithm is not None:
            key.verify(response.signature, response.tbs_response_bytes, padding.PKCS1v15(), algorithm)
        elif isinstance(key, ec.EllipticCurvePublicKey) and algorithm is not None:
            key.verify(response.signature, response.tbs_response_bytes, ec.ECDSA(algorithm))
        else:
            return False
    except (InvalidSignature, UnsupportedAlgorithm):
        return False
    return True


def _check_single(single: ocsp.OCSPSingleResponse, certificate: x509.Certificate, signed_at: datetime) -> None:
    name = certificate.subject.rfc4514_string()
    if single.certificate_status is ocsp.OCSPCertStatus.UNKNOWN:
        raise SignatureError(f"certificate {name} is unknown to its issuer")
    if single.certificate_status is ocsp.OCSPCertStatus.REVOKED:
        revoked_at = _time(single, "revocation_time")
        if revoked_at is None or revoked_at <= signed_at or single.revocation_reason in _KEY_LOST:
            raise SignatureError(f"certificate {name} was revoked at {revoked_at.isoformat() if revoked_at else '?'}")
        return
    until = _time(single, "next_update")
    if until is not None and until < signed_at:
        raise SignatureError(f"OCSP response about certificate {name} was outdated when the signature was made")


def _time(holder: Any, name: str) -> datetime | None:
    """A time in UTC; before cryptography 43 they come without a zone."""
    value: datetime | None = getattr(holder, f"{name}_utc", None) or getattr(holder, name)
    return value.replace(tzinfo=UTC) if value is not None and value.tzinfo is None else value


__all__ = ["check_responses"]
