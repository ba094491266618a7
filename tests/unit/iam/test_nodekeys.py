import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from aoscore.common.certs import key_digest
from aoscore.common.errors import InvalidArgumentError
from aoscore.iam.certhandler.csr import build_csr
from aoscore.iam.database import IamDatabase
from aoscore.iam.nodekeys import NodeKeys, request_digest
from tests.support.pki import TestCa


def test_request_and_certificate_have_the_digest_of_their_key(authority: TestCa) -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    csr = build_csr(key, "unit-1", [], [])
    first, second = (x509.load_pem_x509_certificate(authority.sign_request(csr).encode()) for _ in range(2))
    assert first.serial_number != second.serial_number
    assert request_digest(csr) == key_digest(first) == key_digest(second)
    assert request_digest(build_csr(ec.generate_private_key(ec.SECP384R1()), "unit-1", [], [])) != key_digest(first)


def test_request_must_prove_that_it_has_the_key() -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "x")])
    der = bytearray(
        x509.CertificateSigningRequestBuilder()
        .subject_name(name)
        .sign(key, hashes.SHA256())
        .public_bytes(serialization.Encoding.DER)
    )
    at = der.index(b"x", 8)
    der[at] = ord("y")
    forged = x509.load_der_x509_csr(bytes(der)).public_bytes(serialization.Encoding.PEM).decode()
    with pytest.raises(InvalidArgumentError, match="wrong signature"):
        request_digest(forged)
    with pytest.raises(InvalidArgumentError, match="not a certificate request"):
        request_digest("garbage")


async def test_keys_are_stored_and_forgotten_by_node(database: IamDatabase) -> None:
    keys = NodeKeys(database)
    await keys.load()
    await keys.bind("n2", b"1")
    await keys.bind("n2", b"2")
    await keys.bind("n3", b"3")
    again = NodeKeys(database)
    await again.load()
    for known in (keys, again):
        assert [known.owner(digest) for digest in (b"1", b"2", b"3", b"4")] == ["n2", "n2", "n3", None]
        assert known.knows("n2") and not known.knows("n4")
    await keys.forget("n2")
    await keys.forget("n4")
    await again.load()
    for known in (keys, again):
        assert [known.owner(digest) for digest in (b"1", b"2", b"3")] == [None, None, "n3"]


async def test_only_the_newest_keys_of_a_node_are_kept(database: IamDatabase) -> None:
    keys = NodeKeys(database)
    await keys.bind("n3", b"other")
    for number in range(66):
        await keys.bind("n2", bytes([number]))
    await keys.bind("n2", bytes([65]))
    again = NodeKeys(database)
    await again.load()
    for known in (keys, again):
        assert [known.owner(bytes([number])) for number in (0, 1, 2, 65)] == [None, None, "n2", "n2"]
        assert known.owner(b"other") == "n3"
