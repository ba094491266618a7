import os
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from aoscore.common.certs import load_chain_url
from aoscore.common.errors import WrongStateError
from aoscore.common.keys import load_private_key
from aoscore.iam.certhandler.csr import build_csr
from aoscore.iam.certhandler.filestore import FileKeyStore, FileStoreParams
from aoscore.iam.certhandler.keystore import StoredKey
from aoscore.iam.config import Algorithm
from tests.support.pki import TestCa


@pytest.fixture
def store(tmp_path: Path) -> FileKeyStore:
    store = FileKeyStore(FileStoreParams(tmp_path / "keys"), "iam")
    store.set_owner("secret")
    return store


def chain(authority: TestCa, key: StoredKey) -> list[x509.Certificate]:
    return x509.load_pem_x509_certificates(authority.sign_request(build_csr(key.private_key, "u", [], [])).encode())


def test_ownership(tmp_path: Path) -> None:
    store = FileKeyStore(FileStoreParams(tmp_path / "keys"), "iam")
    other = FileKeyStore(FileStoreParams(tmp_path / "keys"), "sm")
    assert not store.owned and not store.pending_keys() and not store.certificates()
    with pytest.raises(WrongStateError, match="iam has no owner"):
        store.create_key(Algorithm.ECC)
    store.clear()
    store.set_owner("a")
    store.set_owner("b")
    other.set_owner("c")
    store.create_key(Algorithm.ECC)
    other.create_key(Algorithm.ECC)
    store.clear()
    assert not store.owned
    assert len(other.pending_keys()) == 1


def test_keys_are_for_root_only_and_of_the_kind(store: FileKeyStore, tmp_path: Path) -> None:
    old_mask = os.umask(0)
    try:
        curve = store.create_key(Algorithm.ECC).private_key
        modulus = store.create_key(Algorithm.RSA).private_key
    finally:
        os.umask(old_mask)
    assert isinstance(curve, ec.EllipticCurvePrivateKey) and curve.curve.name == "secp384r1"
    assert isinstance(modulus, rsa.RSAPrivateKey) and modulus.key_size == 2048
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "keys/iam").iterdir()} == {0o600}
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "keys", tmp_path / "keys/iam")} == {0o700}


def test_life_of_a_certificate(store: FileKeyStore, authority: TestCa, tmp_path: Path) -> None:
    first, second = store.create_key(Algorithm.ECC), store.create_key(Algorithm.ECC)
    again = FileKeyStore(FileStoreParams(tmp_path / "keys"), "iam")
    assert {key.key_id for key in again.pending_keys()} == {first.key_id, second.key_id}
    path = chain(authority, second)
    stored = store.store_certificate(second.key_id, path)
    assert load_chain_url(stored.cert_url) == path
    assert load_private_key(stored.key_url).public_key() == path[0].public_key()
    assert again.certificates() == [stored]
    assert [key.key_id for key in again.pending_keys()] == [first.key_id]
    store.remove_certificate(stored.cert_url)
    store.remove_certificate(stored.cert_url)
    store.remove_key(first.key_id)
    assert not list((tmp_path / "keys/iam").iterdir())


def test_damage_is_survived(
    store: FileKeyStore, authority: TestCa, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good, broken, lost, unread = (store.create_key(Algorithm.ECC) for _ in range(4))
    for key in (good, broken, lost):
        store.store_certificate(key.key_id, chain(authority, key))
    directory = tmp_path / "keys/iam"
    (directory / f"{broken.key_id}.cert.pem").write_text("x")
    (directory / f"{lost.key_id}.key.pem").unlink()
    (directory / f"{unread.key_id}.key.pem").write_text("x")
    (directory / ".abc.key.pem.123.tmp").write_text("left by a crash")
    (directory / "README").write_text("by hand")
    assert len(store.certificates()) == 1
    assert store.pending_keys() == []
    assert broken.key_id in caplog.text and unread.key_id in caplog.text
    assert store.remove_orphans(keep=[unread.key_id]) == 1
    left = {path.name for path in directory.iterdir()}
    assert f"{lost.key_id}.cert.pem" not in left and ".abc.key.pem.123.tmp" not in left and "README" in left


def test_keys_for_which_nobody_waits_go(store: FileKeyStore) -> None:
    awaited, orphan = store.create_key(Algorithm.ECC), store.create_key(Algorithm.ECC)
    assert store.remove_orphans(keep=[awaited.key_id]) == 1
    assert [key.key_id for key in store.pending_keys()] == [awaited.key_id] != [orphan.key_id]
