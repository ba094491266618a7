"""URLs of certificates, and what can be said of a certificate without parsing it."""

import ssl
import subprocess
import sys
from pathlib import Path

import pytest

from aoscore.common import certurls
from aoscore.common.certs import to_der, to_pem
from aoscore.common.errors import InvalidArgumentError, NotFoundError
from tests.support.pki import TestCa


@pytest.fixture(scope="module")
def ca() -> TestCa:
    return TestCa()


def test_a_file_is_found_by_its_url(ca: TestCa, tmp_path: Path) -> None:
    leaf = ca.issue("leaf", ("a", "b"))
    cert_url, key_url = leaf.write(tmp_path, "x")
    assert certurls.url_path(certurls.file_url(tmp_path / "x.pem")) == tmp_path / "x.pem"
    for url in (cert_url, cert_url.replace("file://", "file:")):
        assert certurls.read_chain_url(url) == to_pem(leaf.chain)
    assert certurls.read_file_url(key_url) == (tmp_path / "x.key").read_bytes()


def test_the_first_certificate_of_a_chain(ca: TestCa) -> None:
    leaf = ca.issue("leaf", ())
    text = b"subject=leaf\n" + to_pem(leaf.chain)
    assert certurls.first_der(text, what="x") == to_der(leaf.cert)


@pytest.mark.parametrize("pem", [b"", b"-----BEGIN CERTIFICATE-----", b"-----END CERTIFICATE-----", b"\xff"])
def test_what_is_no_pem_is_named(pem: bytes) -> None:
    with pytest.raises(InvalidArgumentError, match="x is no PEM certificate"):
        certurls.first_der(pem, what="x")


@pytest.mark.parametrize(
    ("names", "expected"),
    [(("a", "b"), ["a", "b"]), ((), ["leaf"])],
    ids=["alternative names", "common name"],
)
def test_names_as_tls_tells_them(ca: TestCa, tmp_path: Path, names: tuple[str, ...], expected: list[str]) -> None:
    """The dictionary is made by a real handshake in memory."""
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    ca.issue("leaf", names).write(tmp_path, "x")
    server.load_cert_chain(tmp_path / "x.pem", tmp_path / "x.key")
    client.check_hostname = False
    client.load_verify_locations(cadata=to_pem([ca.root.cert]).decode())
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [client.wrap_bio(back, there), server.wrap_bio(there, back, server_side=True)]
    for _ in range(3):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                pass
    assert certurls.names_of_peer(ends[0].getpeercert() or {}) == expected


def test_nobody_shown_has_no_names() -> None:
    assert certurls.names_of_peer({}) == []


@pytest.mark.parametrize(
    ("url", "error"),
    [
        ("pkcs11:token=a;object=b", InvalidArgumentError),
        ("http://x/y", InvalidArgumentError),
        ("", InvalidArgumentError),
        ("file:///nowhere/at/all", NotFoundError),
    ],
)
def test_urls_that_cannot_be_read(url: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        certurls.read_chain_url(url)


def test_links_are_opened_without_the_x509_library() -> None:
    """It takes 9 MB of a daemon that only hands its certificates on."""
    code = "import sys, aoscore.common.rpc, aoscore.common.tls, aoscore.iam.app; print('cryptography' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "False"
