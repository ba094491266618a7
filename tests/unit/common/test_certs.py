from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509

from aoscore.common import certs, keys
from aoscore.common.errors import InvalidArgumentError, SignatureError
from tests.support.pki import TestCa

NOW = datetime.now(UTC)


@pytest.fixture(scope="module")
def ca() -> TestCa:
    return TestCa()


def check(ca: TestCa, chain: list[x509.Certificate], at: datetime = NOW) -> list[x509.Certificate]:
    return certs.verify_chain(chain[0], chain[1:], [ca.root.cert], at=at)


def test_chain_to_the_root(ca: TestCa) -> None:
    leaf = ca.issue("leaf")
    assert check(ca, leaf.chain[:2]) == leaf.chain
    assert check(ca, [leaf.cert, leaf.chain[2], leaf.chain[1]]) == leaf.chain, "order of the rest does not matter"


def test_chain_is_judged_at_the_given_time(ca: TestCa) -> None:
    expired = ca.issue("old", not_before=NOW - timedelta(minutes=30), lifetime=timedelta(minutes=10))
    check(ca, expired.chain, at=NOW - timedelta(minutes=25))
    with pytest.raises(SignatureError, match=r"CN=old is not valid at"):
        check(ca, expired.chain)


def test_missing_intermediate_is_named(ca: TestCa) -> None:
    with pytest.raises(SignatureError, match=r"issuer of CN=leaf is not trusted: CN=Test Intermediate"):
        check(ca, [ca.issue("leaf").cert])


def test_foreign_ca_with_the_same_names_is_refused(ca: TestCa) -> None:
    with pytest.raises(SignatureError, match="not trusted"):
        check(ca, TestCa().issue("leaf").chain)


def test_a_leaf_is_no_ca(ca: TestCa) -> None:
    false_ca = ca.issue("false")
    below = TestCa._make("victim", false_ca)
    with pytest.raises(SignatureError, match="CN=false is no CA"):
        check(ca, below.chain)


def test_path_length_is_kept(ca: TestCa) -> None:
    sub = TestCa._make("Sub CA", ca.intermediate, ca=True)
    leaf = TestCa._make("leaf", sub)
    with pytest.raises(SignatureError, match="allows only 0 CAs below it"):
        check(ca, leaf.chain)


def test_reading_by_url(ca: TestCa, tmp_path: Path) -> None:
    leaf = ca.issue("leaf", ("a", "b"))
    cert_url, key_url = leaf.write(tmp_path, "x")
    assert certs.load_chain_url(cert_url) == leaf.chain
    assert certs.load_chain_url(cert_url.replace("file://", "file:")) == leaf.chain
    loaded = keys.load_private_key(key_url)
    assert keys.private_key_pem(loaded) == keys.private_key_pem(leaf.key)
    assert int(certs.serial_hex(leaf.cert), 16) == leaf.cert.serial_number
    assert certs.is_self_signed(ca.root.cert) and not certs.is_self_signed(leaf.cert)
    with pytest.raises(InvalidArgumentError, match="no usable private key"):
        keys.load_private_key(cert_url)
    with pytest.raises(InvalidArgumentError, match=r"x\.key"):
        certs.load_chain_url(key_url)


def test_key_files_are_private(tmp_path: Path) -> None:
    path = tmp_path / "k"
    keys.write_private_key(path, keys.generate_ec_key())
    assert path.stat().st_mode & 0o777 == 0o600
