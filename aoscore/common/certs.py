"""X.509 certificates: reading, naming, and checking chains at a point in time.

Import on use in what a daemon loads at start: the library below takes 9 MB that most daemons do without when idle.
"""

import hashlib
from collections.abc import Iterable, Sequence
from datetime import datetime

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization

from aoscore.common.certurls import read_chain_url
from aoscore.common.errors import InvalidArgumentError, SignatureError

_MAX_CHAIN = 8


def load_certificates(pem: bytes, *, what: str = "certificate") -> list[x509.Certificate]:
    """All certificates of a PEM text, in its order. Raises InvalidArgumentError naming `what`."""
    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError as error:
        raise InvalidArgumentError(f"{what} is no PEM certificate: {error}") from error


def load_der(der: bytes, *, what: str) -> x509.Certificate:
    """A certificate from DER. Raises InvalidArgumentError naming `what`."""
    try:
        return x509.load_der_x509_certificate(der)
    except ValueError as error:
        raise InvalidArgumentError(f"{what} is no certificate: {error}") from error


def to_der(certificate: x509.Certificate) -> bytes:
    """DER of a certificate."""
    return certificate.public_bytes(serialization.Encoding.DER)


def to_pem(chain: Iterable[x509.Certificate]) -> bytes:
    """PEM of certificates, in their order."""
    return b"".join(certificate.public_bytes(serialization.Encoding.PEM) for certificate in chain)


def load_chain_url(cert_url: str) -> list[x509.Certificate]:
    """The chain behind a certificate URL, leaf first; with a token it blocks for the time of a helper process."""
    chain = load_certificates(read_chain_url(cert_url), what=cert_url)
    if not chain:
        raise InvalidArgumentError(f"{cert_url} holds no certificate")
    return chain


def serial_hex(certificate: x509.Certificate) -> str:
    """Serial as lower-case hex of whole bytes, the form of CertInfo.serial (observed.md, wire 4)."""
    number = certificate.serial_number
    return number.to_bytes((number.bit_length() + 7) // 8 or 1, "big").hex()


def issuer_der(certificate: x509.Certificate) -> bytes:
    """DER of the issuer's name."""
    return certificate.issuer.public_bytes()


def key_digest(holder: x509.Certificate | x509.CertificateSigningRequest) -> bytes:
    """SHA-256 of the public key (its SubjectPublicKeyInfo, RFC 5280 §4.1.2.7)."""
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return hashlib.sha256(holder.public_key().public_bytes(serialization.Encoding.DER, form)).digest()


def common_names(certificate: x509.Certificate) -> list[str]:
    """The common names of the subject."""
    return [str(name.value) for name in certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)]


def is_self_signed(certificate: x509.Certificate) -> bool:
    """Whether the certificate is its own issuer, signature checked."""
    if certificate.issuer != certificate.subject:
        return False
    try:
        certificate.verify_directly_issued_by(certificate)
    except (InvalidSignature, ValueError, TypeError):
        return False
    return True


def verify_chain(
    leaf: x509.Certificate,
    intermediates: Sequence[x509.Certificate],
    roots: Sequence[x509.Certificate],
    *,
    at: datetime,
) -> list[x509.Certificate]:
    """Find and check the path from leaf to one of the roots, valid at the time `at`.

    The check of RFC 5280 §6 as far as item signatures need it: issuer names, signatures, validity of every
    certificate at that time, CA flag, key usage and path length of issuers. Revocation is the caller's matter.
    Returns the path, leaf first, root last. Raises SignatureError saying which certificate fails and why.
    """
    path = [leaf]
    while True:
        current = path[-1]
        _check_validity(current, at)
        if any(current == root for root in roots):
            return path
        if len(path) > _MAX_CHAIN:
            raise SignatureError(f"certificate chain of {_name(leaf)} is longer than {_MAX_CHAIN}")
        issuer = _find_issuer(current, [*roots, *intermediates])
        _check_is_ca(issuer, below=len(path) - 1)
        path.append(issuer)


def _find_issuer(certificate: x509.Certificate, candidates: Sequence[x509.Certificate]) -> x509.Certificate:
    for candidate in candidates:
        if candidate.subject != certificate.issuer or candidate == certificate:
            continue
        try:
            certificate.verify_directly_issued_by(candidate)
        except (InvalidSignature, ValueError, TypeError):
            continue
        return candidate
    raise SignatureError(f"issuer of {_name(certificate)} is not trusted: {certificate.issuer.rfc4514_string()}")


def _check_validity(certificate: x509.Certificate, at: datetime) -> None:
    if not certificate.not_valid_before_utc <= at <= certificate.not_valid_after_utc:
        raise SignatureError(
            f"certificate {_name(certificate)} is not valid at {at.isoformat()}, only from "
            f"{certificate.not_valid_before_utc.isoformat()} to {certificate.not_valid_after_utc.isoformat()}"
        )


def _check_is_ca(certificate: x509.Certificate, *, below: int) -> None:
    """`below`: number of CA certificates between this one and the leaf."""
    try:
        constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
    except x509.ExtensionNotFound:
        raise SignatureError(f"certificate {_name(certificate)} is no CA") from None
    if not constraints.ca:
        raise SignatureError(f"certificate {_name(certificate)} is no CA")
    if constraints.path_length is not None and below > constraints.path_length:
        raise SignatureError(f"certificate {_name(certificate)} allows only {constraints.path_length} CAs below it")
    try:
        usage = certificate.extensions.get_extension_for_class(x509.KeyUsage).value
    except x509.ExtensionNotFound:
        return
    if not usage.key_cert_sign:
        raise SignatureError(f"certificate {_name(certificate)} may not sign certificates")


def _name(certificate: x509.Certificate) -> str:
    return certificate.subject.rfc4514_string() or serial_hex(certificate)
