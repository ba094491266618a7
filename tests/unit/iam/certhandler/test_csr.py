import ipaddress
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.x509.oid import ExtendedKeyUsageOID

from aoscore.common.errors import InvalidArgumentError
from aoscore.common.keys import generate_ec_key, generate_rsa_key
from aoscore.iam.certhandler.csr import build_csr, build_self_signed, missing_names
from aoscore.iam.config import KeyUsage
from tests.support.pki import TestCa


def test_request_of_a_server() -> None:
    usages = [KeyUsage.SERVER_AUTH, KeyUsage.CLIENT_AUTH]
    text = build_csr(generate_ec_key(), "unit-0001", ["aosmain", "*.local", "10.0.0.1", "::1"], usages)
    assert text.startswith("-----BEGIN CERTIFICATE REQUEST-----\n")
    request = x509.load_pem_x509_csr(text.encode())
    assert request.is_signature_valid
    assert isinstance(request.signature_hash_algorithm, hashes.SHA384)
    (attribute,) = request.subject
    assert (attribute.rfc4514_attribute_name, attribute.value) == ("CN", "unit-0001")
    names, usage = request.extensions
    assert not names.critical and not usage.critical
    assert list(names.value) == [  # type: ignore[call-overload]
        x509.DNSName("aosmain"),
        x509.DNSName("*.local"),
        x509.IPAddress(ipaddress.ip_address("10.0.0.1")),
        x509.IPAddress(ipaddress.ip_address("::1")),
    ]
    assert list(usage.value) == [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]  # type: ignore[call-overload]


def test_request_without_extensions() -> None:
    request = x509.load_pem_x509_csr(build_csr(generate_rsa_key(), "u", [], []).encode())
    assert isinstance(request.signature_hash_algorithm, hashes.SHA256)
    assert not list(request.extensions)


@pytest.mark.parametrize("subject", ["a,O=evil", "a/O=evil", "CN=x", "ü" * 32])
def test_subject_is_one_common_name(subject: str) -> None:
    request = x509.load_pem_x509_csr(build_csr(generate_ec_key(), subject, [], []).encode())
    (attribute,) = request.subject
    assert attribute.value == subject


@pytest.mark.parametrize("subject", ["", "x" * 65, "ü" * 33])
def test_impossible_subject(subject: str) -> None:
    with pytest.raises(InvalidArgumentError, match="64 bytes"):
        build_csr(generate_ec_key(), subject, [], [])


def test_self_signed() -> None:
    key = generate_rsa_key()
    now = datetime(2026, 1, 2, tzinfo=UTC)
    certificate = build_self_signed(key, now)
    certificate.verify_directly_issued_by(certificate)
    assert certificate.subject.rfc4514_string() == certificate.issuer.rfc4514_string() == "CN=Aos Core"
    assert certificate.not_valid_before_utc == now
    assert certificate.not_valid_after_utc - now == timedelta(days=36500)
    assert 0 < certificate.serial_number < 2**63
    assert not [ext for ext in certificate.extensions if isinstance(ext.value, x509.ExtendedKeyUsage)]
    assert certificate.public_key() == key.public_key()


def test_missing_names(authority: TestCa) -> None:
    names = ["aosmain", "10.0.0.1"]
    request = build_csr(generate_ec_key(), "unit", names, [])
    full, bare = (
        x509.load_pem_x509_certificate(authority.sign_request(request, with_extensions=with_names).encode())
        for with_names in (True, False)
    )
    assert missing_names(full, names) == []
    assert missing_names(full, [*names, "other", "10.0.0.2"]) == ["other", "10.0.0.2"]
    assert missing_names(bare, names) == names
