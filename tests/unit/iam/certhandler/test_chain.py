from datetime import UTC, datetime

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519

from aoscore.common.errors import InvalidArgumentError, NotFoundError, SignatureError
from aoscore.common.keys import generate_ec_key
from aoscore.iam.certhandler.chain import check_chain
from aoscore.iam.certhandler.csr import build_csr
from tests.support.pki import Issued, TestCa, pem

NOW = datetime.now(UTC)


@pytest.fixture(scope="module")
def csr() -> str:
    return build_csr(generate_ec_key(), "unit", [], [])


def split(text: str) -> list[str]:
    return [part + "-----END CERTIFICATE-----\n" for part in text.split("-----END CERTIFICATE-----\n")[:-1]]


def test_leaf_first_then_any_order(authority: TestCa, csr: str) -> None:
    leaf, middle, root = split(authority.sign_request(csr))
    for text in (leaf + middle + root, leaf + root + middle):
        path = check_chain(text, [], NOW)
        assert [pem(certificate) for certificate in path] == [leaf, middle, root]


def test_root_may_be_the_known_one(authority: TestCa, csr: str) -> None:
    leaf, middle, root = split(authority.sign_request(csr))
    assert len(check_chain(leaf + middle, [authority.root.cert], NOW)) == 3
    with pytest.raises(NotFoundError, match=r"Test Root.*is missing"):
        check_chain(leaf + middle, [], NOW)
    with pytest.raises(NotFoundError, match=r"Test Intermediate.*is missing"):
        check_chain(leaf + root, [], NOW)
    with pytest.raises(NotFoundError):
        check_chain(leaf, [authority.root.cert], NOW)


@pytest.mark.parametrize("text", ["", "text", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"])
def test_no_certificates(text: str) -> None:
    with pytest.raises(InvalidArgumentError):
        check_chain(text, [], NOW)


def test_too_many(authority: TestCa) -> None:
    with pytest.raises(InvalidArgumentError, match="9 certificates"):
        check_chain(pem(authority.root.cert) * 9, [], NOW)


def test_forged_signature(authority: TestCa, csr: str) -> None:
    """Right names, but signed by somebody else of that name."""
    leaf, *_ = split(TestCa().sign_request(csr))
    with pytest.raises(SignatureError):
        check_chain(leaf + pem(*authority.intermediate.chain), [], NOW)


def test_expired_is_refused_and_not_yet_valid_is_not(authority: TestCa, csr: str) -> None:
    with pytest.raises(SignatureError, match="not valid"):
        check_chain(authority.sign_request(csr, days=-1, begin_days=-2), [], NOW)
    # A new Unit may start with a clock of long ago.
    assert check_chain(authority.sign_request(csr), [], datetime(1970, 1, 1, tzinfo=UTC))
    assert check_chain(authority.sign_request(csr, begin_days=10, days=20), [], NOW)


def test_two_issuers_of_each_other_end(csr: str) -> None:
    one, other = TestCa._make("one", None, ca=True), TestCa._make("other", None, ca=True)
    authority = TestCa()
    authority.intermediate = Issued(one.key, [TestCa._make("one", other, ca=True, key=one.key).cert])
    text = authority.sign_request(csr) + pem(TestCa._make("other", one, ca=True, key=other.key).cert)
    assert text.count("BEGIN") == 3
    with pytest.raises(SignatureError, match="longer than"):
        check_chain(text, [], NOW)


def test_leaf_of_another_leaf(authority: TestCa, csr: str) -> None:
    """Who has a certificate of the Unit must not be able to issue others."""
    evil = TestCa()
    evil.intermediate = authority.issue("unit")
    with pytest.raises(SignatureError, match="no CA"):
        check_chain(evil.sign_request(csr), [], NOW)


def test_kinds_of_keys(authority: TestCa) -> None:
    key = ed25519.Ed25519PrivateKey.generate()
    request = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "unit")]))
        .sign(key, None)
    )
    with pytest.raises(InvalidArgumentError, match="no EC or RSA key"):
        check_chain(authority.sign_request(request.public_bytes(serialization.Encoding.PEM).decode()), [], NOW)


def test_self_signed_leaf_is_its_own_root(authority: TestCa) -> None:
    assert check_chain(pem(authority.root.cert), [], NOW) == [authority.root.cert]
