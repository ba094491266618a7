"""Certificates: chains, what a CSR keeps, who a user is."""

import base64
import ssl
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import pkcs12
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from aoscore.common.certs import load_certificates, verify_chain
from aoscore.common.errors import InvalidArgumentError
from aoscore.devcloud.ca import Authority, User, domain_of, fingerprint, serial, user_of

UNIT = "unit-1"


def csr(common_name: str = UNIT, *extensions: x509.ExtensionType) -> str:
    builder = x509.CertificateSigningRequestBuilder().subject_name(
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)] if common_name else [])
    )
    for extension in extensions:
        builder = builder.add_extension(extension, critical=False)
    request = builder.sign(ec.generate_private_key(ec.SECP384R1()), hashes.SHA384())
    return request.public_bytes(serialization.Encoding.PEM).decode()


def test_a_chain_ends_in_the_self_signed_root(authority: Authority) -> None:
    certificate = authority.unit_certificate(csr(), UNIT)
    chain = load_certificates(authority.chain_pem(certificate).encode())
    assert chain == verify_chain(chain[0], chain[1:-1], [authority.root], at=datetime.now(UTC))
    assert chain[-1].issuer == chain[-1].subject
    assert len(authority.root.public_bytes(serialization.Encoding.DER)) < 2048


def test_a_unit_certificate_keeps_names_and_usage_of_its_csr(authority: Authority) -> None:
    names = x509.SubjectAlternativeName([x509.DNSName("main"), x509.DNSName("localhost")])
    usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
    certificate = authority.unit_certificate(csr(UNIT, names, usage), UNIT)
    assert certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value == names
    assert certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value == usage
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert user_of(certificate) is None


def test_a_csr_cannot_make_a_ca(authority: Authority) -> None:
    certificate = authority.unit_certificate(csr(UNIT, x509.BasicConstraints(ca=True, path_length=None)), UNIT)
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def test_an_online_certificate_says_where_discovery_is(authority: Authority) -> None:
    certificate = authority.unit_certificate(csr(), UNIT, "https://cloud.test:9000")
    names = certificate.extensions.get_extension_for_class(x509.IssuerAlternativeName).value
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == ["https://cloud.test:9000"]
    organization = certificate.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)[0].value
    assert organization == "cloud.test"


@pytest.mark.parametrize("text", ["", "no csr", csr("unit-2"), csr("")])
def test_a_wrong_csr_is_refused(authority: Authority, text: str) -> None:
    with pytest.raises(InvalidArgumentError, match=UNIT):
        authority.unit_certificate(text, UNIT)


def test_a_csr_with_a_wrong_signature_is_refused(authority: Authority) -> None:
    der = bytearray(x509.load_pem_x509_csr(csr().encode()).public_bytes(serialization.Encoding.DER))
    der[60] ^= 1  # inside the public key
    label = "CERTIFICATE REQUEST-----\n"
    broken = f"-----BEGIN {label}{base64.encodebytes(bytes(der)).decode()}-----END {label}"
    with pytest.raises(InvalidArgumentError):
        authority.unit_certificate(broken, UNIT)


@pytest.mark.parametrize("role", ["oem", "sp"])
def test_a_users_file_has_key_certificate_and_one_ca(authority: Authority, role: str) -> None:
    content = pkcs12.load_pkcs12(authority.user_pkcs12(role, "alice"), None)
    assert content.cert is not None
    certificate = content.cert.certificate
    assert isinstance(content.key, rsa.RSAPrivateKey)
    assert [one.certificate for one in content.additional_certs] == [authority.intermediate]
    assert user_of(certificate) == User("alice", role)
    assert domain_of(certificate) == "cloud.test"


def test_an_unknown_role_is_refused(authority: Authority) -> None:
    with pytest.raises(InvalidArgumentError, match="king"):
        authority.user_pkcs12("king", "alice")


def test_a_user_certificate_takes_the_key_only(authority: Authority) -> None:
    (leaf, *_rest) = load_certificates(authority.user_certificate(csr(""), User("bob", "sp")).encode())
    assert user_of(leaf) == User("bob", "sp")


def test_the_authority_stays_the_same_when_opened_again(tmp_path: Path) -> None:
    first = Authority.open(tmp_path, "a.test")
    second = Authority.open(tmp_path, "a.test")
    assert (first.root, first.intermediate, first.signer) == (second.root, second.intermediate, second.signer)
    assert first.signer_key.private_numbers() == second.signer_key.private_numbers()
    assert {path.name: path.stat().st_mode & 0o777 for path in tmp_path.glob("*.key")} == {
        "root.key": 0o600,
        "intermediate.key": 0o600,
        "signer.key": 0o600,
    }


def test_the_server_certificate_names_domain_and_loopback(authority: Authority) -> None:
    chain_file, key_file = authority.server_files(["192.0.2.7", "other.test"])
    leaf = load_certificates(chain_file.read_bytes())[0]
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert set(names.get_values_for_type(x509.DNSName)) == {"cloud.test", "other.test", "localhost"}
    assert {str(one) for one in names.get_values_for_type(x509.IPAddress)} == {"192.0.2.7", "127.0.0.1", "::1"}
    ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(chain_file, key_file)


def test_names_of_certificates_are_written_as_the_wire_wants(authority: Authority) -> None:
    assert fingerprint(authority.signer) == authority.signer.fingerprint(hashes.SHA256()).hex().upper()
    assert int(serial(authority.signer), 16) == authority.signer.serial_number
