"""Certificate signing requests and self-signed certificates (iam.md §5.8, §5.12)."""

import ipaddress
from collections.abc import Sequence
from datetime import datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from aoscore.common.errors import InvalidArgumentError
from aoscore.common.keys import PrivateKey
from aoscore.iam.config import KeyUsage, is_ip_address

_USAGES = {
    KeyUsage.CLIENT_AUTH: ExtendedKeyUsageOID.CLIENT_AUTH,
    KeyUsage.SERVER_AUTH: ExtendedKeyUsageOID.SERVER_AUTH,
}
_SELF_SIGNED_NAME = "Aos Core"
_SELF_SIGNED_DAYS = 365 * 100
_MAX_COMMON_NAME_BYTES = 64


def build_csr(key: PrivateKey, common_name: str, alternative_names: Sequence[str], usages: Sequence[KeyUsage]) -> str:
    """PEM of a request for `key`; names and usages become extensions when there are any.

    Raises InvalidArgumentError when the common name does not fit into a certificate.
    """
    builder = x509.CertificateSigningRequestBuilder().subject_name(_name(common_name))
    if alternative_names:
        names = x509.SubjectAlternativeName([_general_name(name) for name in alternative_names])
        builder = builder.add_extension(names, critical=False)
    if usages:
        builder = builder.add_extension(x509.ExtendedKeyUsage([_USAGES[usage] for usage in usages]), critical=False)
    return builder.sign(key, _hash(key)).public_bytes(serialization.Encoding.PEM).decode()


def build_self_signed(key: PrivateKey, now: datetime) -> x509.Certificate:
    """A certificate for keys that never leave the Node, such as that of the disk encryption."""
    name = _name(_SELF_SIGNED_NAME)
    serial = int(now.timestamp() * 10**9) & (2**63 - 1)
    public_key = key.public_key()
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(public_key)
        .serial_number(serial)
        .not_valid_before(now)
        .not_valid_after(now + timedelta(days=_SELF_SIGNED_DAYS))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(public_key), critical=False)
        .sign(key, _hash(key))
    )


def missing_names(certificate: x509.Certificate, wanted: Sequence[str]) -> list[str]:
    """The wanted names that the certificate does not have."""
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return list(wanted)
    return [name for name in wanted if _general_name(name) not in list(found)]


def _name(common_name: str) -> x509.Name:
    if not 0 < len(common_name.encode()) <= _MAX_COMMON_NAME_BYTES:
        raise InvalidArgumentError(f"subject {common_name!r} is empty or longer than {_MAX_COMMON_NAME_BYTES} bytes")
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _general_name(name: str) -> x509.GeneralName:
    return x509.IPAddress(ipaddress.ip_address(name)) if is_ip_address(name) else x509.DNSName(name)


def _hash(key: PrivateKey) -> hashes.SHA256 | hashes.SHA384:
    return hashes.SHA384() if isinstance(key, ec.EllipticCurvePrivateKey) else hashes.SHA256()
