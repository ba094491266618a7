"""Keys on a token of SoftHSM. What peers rely on is read with pkcs11-tool, not with our own eyes (iam.md §5)."""

import random
import re
import shutil
import stat
import subprocess
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa

from aoscore.common.certs import load_chain_url
from aoscore.common.config import load_section
from aoscore.common.errors import (
    ConfigError,
    DeadlineError,
    FailedError,
    InvalidArgumentError,
    NotFoundError,
    NotSupportedError,
    RuntimeFailure,
    WrongStateError,
)
from aoscore.common.keys import load_private_key
from aoscore.common.pkcs11.token import Token, TokenPlace, command
from aoscore.iam.certhandler import tokenstore
from aoscore.iam.certhandler.csr import build_csr, build_self_signed
from aoscore.iam.certhandler.keystore import StoredKey
from aoscore.iam.certhandler.tokenstore import SharedToken, TokenKeyStore, TokenStoreParams, tee_identity
from aoscore.iam.config import Algorithm, KeyUsage
from tests.support.badlibrary import build_library
from tests.support.pki import TestCa
from tests.support.softhsm import SoftHsm

PASSWORD = "Secret12345"


def read(section: dict[str, Any]) -> TokenStoreParams:
    return load_section(section, TokenStoreParams, path=Path("iam.cfg"), where="params")


def make_store(hsm: SoftHsm, cert_type: str = "iam", token: SharedToken | None = None, **more: Any) -> TokenKeyStore:
    params = read(hsm.params(**more))
    return TokenKeyStore(params, cert_type, token or SharedToken(Token(params.library, params.place(None))), None)


@pytest.fixture
def store(hsm: SoftHsm) -> TokenKeyStore:
    store = make_store(hsm)
    store.set_owner(PASSWORD)
    return store


def issue(authority: TestCa, key: StoredKey, **more: Any) -> list[x509.Certificate]:
    return x509.load_pem_x509_certificates(
        authority.sign_request(build_csr(key.private_key, "u", [], []), **more).encode()
    )


def use(store: TokenKeyStore, authority: TestCa, **more: Any) -> str:
    """A new certificate on the token; its URL."""
    key = store.create_key(Algorithm.ECC)
    return store.store_certificate(key.key_id, issue(authority, key, **more)).cert_url


def test_ownership(hsm: SoftHsm) -> None:
    store = make_store(hsm)
    assert not store.owned and not store.certificates() and not store.pending_keys()
    with pytest.raises(WrongStateError, match="start provisioning first"):
        store.create_key(Algorithm.ECC)
    store.clear()
    store.set_owner(PASSWORD)
    assert store.owned and make_store(hsm).owned
    assert stat.S_IMODE(hsm.pin_file.stat().st_mode) == 0o600
    pin = hsm.pin_file.read_text()
    assert re.fullmatch("[0-9a-f]{30}", pin)
    # C++ peers strip blanks only from a label, so it must not be filled up with zero bytes.
    raw = b"".join(path.read_bytes() for path in hsm.tokens.glob("*/token.object"))
    assert b"aoscore".ljust(32) in raw
    assert "token label        : aoscore\n" in hsm.tool("--list-token-slots", login=False)
    # Another start of provisioning empties the token and keeps the PIN.
    store.create_key(Algorithm.ECC)
    store.set_owner(PASSWORD)
    assert not hsm.objects() and hsm.pin_file.read_text() == pin


def test_pin_does_not_come_from_a_clock(hsm: SoftHsm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """AosCore 9.1 seeds its generator with the time (observed.md, defect 1)."""
    monkeypatch.setattr(time, "time", lambda: 1.0)
    monkeypatch.setattr(time, "time_ns", lambda: 10**9)
    pins = set()
    for number in range(3):
        random.seed(1)
        path = tmp_path / f"pin{number}"
        params = read(hsm.params(userPinPath=str(path)))
        TokenKeyStore(params, "iam", SharedToken(Token(params.library, params.place(None))), None)._user_pin()
        pins.add(path.read_text())
    assert len(pins) == 3


def test_pin_file_that_is_there_is_used(hsm: SoftHsm) -> None:
    hsm.pin_file.parent.mkdir()
    hsm.pin_file.write_text("1234\n")
    store = make_store(hsm)
    store.set_owner(PASSWORD)
    store.create_key(Algorithm.ECC)
    assert hsm.pin_file.read_text() == "1234\n"


def test_another_password_in_the_same_run_and_after_it(hsm: SoftHsm, store: TokenKeyStore) -> None:
    store.create_key(Algorithm.ECC)
    store.set_owner("Another42xx")
    assert not hsm.objects()
    store.create_key(Algorithm.ECC)
    with pytest.raises(RuntimeFailure, match="initialized with another password") as caught:
        make_store(hsm).set_owner("Third42xxxx")
    assert caught.value.errno == 0xA0
    assert len(hsm.objects()) == 2


def usages(block: str) -> set[str]:
    """What a key may be used for; SoftHSM allows more than it is asked for."""
    return set(re.findall(r"Usage: +(.*)", block)[0].split(", "))


def test_objects_are_those_of_the_facts(hsm: SoftHsm, store: TokenKeyStore, authority: TestCa) -> None:
    use(store, authority)
    rsa_key = make_store(hsm, "offline").create_key(Algorithm.RSA)
    text = hsm.tool("--list-objects")
    blocks = {block.splitlines()[0]: block for block in re.split(r"\n(?=\S)", text.strip())}
    private = next(block for name, block in blocks.items() if name == "Private Key Object; EC")
    assert re.search(r"label: +iam\b", private) and "sign" in usages(private)
    assert re.search(r"Access: +sensitive, always sensitive, never extractable, local", private)
    public = next(block for name, block in blocks.items() if name.startswith("Public Key Object; EC"))
    assert "EC_PARAMS:  06052b81040022" in public and "verify" in usages(public)
    other = next(block for name, block in blocks.items() if name.startswith("Private Key Object; RSA"))
    assert {"decrypt", "sign"} <= usages(other)
    modulus = next(block for name, block in blocks.items() if name.startswith("Public Key Object; RSA"))
    assert "RSA 2048 bits" in modulus and {"encrypt", "verify"} <= usages(modulus)
    certificates = [block for block in re.split(r"\n(?=\S)", text.strip()) if block.startswith("Certificate")]
    labels = sorted(re.findall(r"label: +(\S*)", "\n".join(certificates)))
    assert len(certificates) == 3 and labels[-1] == "iam"
    assert isinstance(rsa_key.private_key, rsa.RSAPrivateKey) and len(bytes.fromhex(rsa_key.key_id)) == 16
    ids = re.findall(r"ID: +([0-9a-f]+)", private + public)
    assert len(set(ids)) == 1


def test_serial_with_high_bit_is_right_der(hsm: SoftHsm, store: TokenKeyStore) -> None:
    assert tokenstore._der_integer(0x80) == bytes.fromhex("02020080")
    assert tokenstore._der_integer(0x7F) == bytes.fromhex("02017f")
    assert tokenstore._der_integer(2**159) == b"\x02\x15\x00\x80" + bytes(19)


def test_requests_and_signatures(store: TokenKeyStore, authority: TestCa) -> None:
    for algorithm, kind in ((Algorithm.ECC, hashes.SHA384), (Algorithm.RSA, hashes.SHA256)):
        key = store.create_key(algorithm)
        text = build_csr(key.private_key, "unit", ["main"], [KeyUsage.SERVER_AUTH])
        request = x509.load_pem_x509_csr(text.encode())
        assert request.is_signature_valid and isinstance(request.signature_hash_algorithm, kind)
        certificate = build_self_signed(key.private_key, datetime.now(UTC))
        certificate.verify_directly_issued_by(certificate)
    curve = store.create_key(Algorithm.ECC).private_key
    assert isinstance(curve, ec.EllipticCurvePrivateKey) and curve.curve.name == "secp384r1" and curve.key_size == 384
    with pytest.raises(NotSupportedError, match="can't be exported"):
        curve.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def test_life_of_a_certificate(hsm: SoftHsm, store: TokenKeyStore, authority: TestCa) -> None:
    first, second = store.create_key(Algorithm.ECC), store.create_key(Algorithm.ECC)
    again = make_store(hsm)
    assert {key.key_id for key in again.pending_keys()} == {first.key_id, second.key_id}
    path = issue(authority, second)
    stored = store.store_certificate(second.key_id, path)
    percent = "".join(f"%{byte:02X}" for byte in bytes.fromhex(second.key_id))
    assert stored.cert_url == f"pkcs11:token=aoscore;object=iam;id={percent}?pin-source={hsm.pin_file}"
    assert stored.key_url == stored.cert_url
    assert make_store(hsm).certificates() == [stored]
    assert load_chain_url(stored.cert_url) == path
    key = load_private_key(stored.key_url)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    public_key = path[0].public_key()
    assert isinstance(public_key, ec.EllipticCurvePublicKey)
    public_key.verify(key.sign(b"data", ec.ECDSA(hashes.SHA256())), b"data", ec.ECDSA(hashes.SHA256()))
    assert [one.key_id for one in store.pending_keys()] == [first.key_id]
    store.remove_certificate(stored.cert_url)
    store.remove_certificate(stored.cert_url)
    store.remove_key(first.key_id)
    assert not hsm.objects()


def test_module_path_in_url(hsm: SoftHsm, authority: TestCa) -> None:
    store = make_store(hsm, modulePathInUrl=True)
    store.set_owner(PASSWORD)
    url = use(store, authority)
    assert url.endswith(f"?module-path={hsm.library}&pin-source={hsm.pin_file}")
    assert len(load_chain_url(url)) == 3


def test_update_keys_can_be_decrypted(store: TokenKeyStore, authority: TestCa) -> None:
    key = store.create_key(Algorithm.RSA)
    url = store.store_certificate(key.key_id, issue(authority, key)).key_url
    private_key = load_private_key(url)
    public_key = key.private_key.public_key()
    assert isinstance(private_key, rsa.RSAPrivateKey) and isinstance(public_key, rsa.RSAPublicKey)
    # SoftHSM 2.6 knows OAEP with SHA-1 only.
    oaep = padding.OAEP(padding.MGF1(hashes.SHA1()), hashes.SHA1(), None)
    for how in (padding.PKCS1v15(), oaep):
        assert private_key.decrypt(public_key.encrypt(b"block key", how), how) == b"block key"


def test_shared_token_and_shared_issuers(hsm: SoftHsm, store: TokenKeyStore, authority: TestCa) -> None:
    """Three certificates for two types with one root and one issuer between them (iam.md §18)."""
    other = make_store(hsm, "sm", store._token)
    use(store, authority)
    use(other, authority)
    assert hsm.counts()[""] == Counter(certificate=2)
    store.clear()
    assert set(hsm.counts()) == {"sm", ""}
    other.clear()
    assert not hsm.objects()


def test_orphans_go(hsm: SoftHsm, store: TokenKeyStore, authority: TestCa) -> None:
    """All of them at once, also more than AosCore 9.1 can see (iam.md §5.7)."""
    kept = use(store, authority)
    for lost in ("public", "private", "certificate"):
        for _ in range(3):
            key_id = load_id(use(store, authority))
            store._token.change(command("destroy_half", label="iam", key_id=key_id, kind=lost))
            if lost == "public":
                # The private key and the certificate are all that is needed.
                assert key_id in {load_id(one.cert_url) for one in store.certificates()}
                store._token.change(command("destroy_half", label="iam", key_id=key_id, kind="certificate"))
    awaited = store.create_key(Algorithm.ECC).key_id
    assert store.remove_orphans(keep=[awaited]) == 9
    assert hsm.counts()["iam"] == Counter(certificate=1, public=2, private=2)
    assert [one.cert_url for one in make_store(hsm).certificates()] == [kept]
    assert store.remove_orphans(keep=[awaited]) == 0
    assert store.remove_orphans(keep=[]) == 1


def load_id(url: str) -> str:
    return tokenstore.parse_token_url(url).id


def test_certificate_needs_its_key(store: TokenKeyStore, authority: TestCa) -> None:
    key = store.create_key(Algorithm.ECC)
    path = issue(authority, key)
    store.remove_key(key.key_id)
    with pytest.raises(NotFoundError, match="no private key 'iam'"):
        store.store_certificate(key.key_id, path)
    assert not store.certificates()


@pytest.mark.parametrize("place", [{"slotIndex": 0}, {"slotId": None}])
def test_slots(hsm: SoftHsm, place: dict[str, Any], authority: TestCa) -> None:
    if "slotId" in place:
        text = hsm.tool("--list-slots", login=False)
        place = {"slotId": int(re.findall(r"Slot 0 \((0x[0-9a-f]+)\)", text)[0], 16)}
    params = read({**hsm.params(), "tokenLabel": "", **place})
    store = TokenKeyStore(params, "iam", SharedToken(Token(params.library, params.place(None))), None)
    store.set_owner(PASSWORD)
    # SoftHSM gives an initialized token another number of slot; the index stays.
    assert "token label        : aos\n" in hsm.tool("--list-token-slots", login=False)
    if "slotIndex" in place:
        assert len(load_chain_url(use(store, authority))) == 3


def test_wrong_index(hsm: SoftHsm) -> None:
    params = read({**hsm.params(), "tokenLabel": "", "slotIndex": 7})
    store = TokenKeyStore(params, "iam", SharedToken(Token(params.library, params.place(None))), None)
    with pytest.raises(NotFoundError, match="none has the index 7"):
        store.certificates()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slotIndex": 1}, "only one of slotId, slotIndex and tokenLabel"),
        ({"tokenLabel": "a;b"}, "tokenLabel: 'a;b'"),
        ({"tokenLabel": "x" * 32}, "tokenLabel"),
        ({"userPinPath": None}, "userPinPath is missing"),
        ({"userPinPath": "pin"}, "userPinPath: pin is not absolute"),
        ({"library": "lib.so"}, "library: lib.so is not absolute"),
    ],
)
def test_wrong_parameters(change: dict[str, Any], message: str, hsm: SoftHsm) -> None:
    params = read({**hsm.params(), **change})
    with pytest.raises(ConfigError, match=message):
        params.place(None)


def test_identities_of_optee() -> None:
    assert tee_identity("user", "uid", 0) == b"user:ef0180a3-13f3-5d1c-b7f5-888c0e21059a"
    assert tee_identity("group", "gid", 42) == b"group:d56e41db-cf37-53f7-a036-5bef82e127fb"


@pytest.mark.parametrize("kind", ["public", "user", "group", "other"])
def test_login_type_of_optee(kind: str, hsm: SoftHsm) -> None:
    params = read(hsm.params())
    place = params.place(kind)
    assert place.pin_file is None
    store = TokenKeyStore(params, "iam", SharedToken(Token(params.library, place)), kind)
    if kind == "other":
        with pytest.raises(InvalidArgumentError, match="must be public, user or group"):
            store._user_pin()
        return
    assert store._user_pin().startswith(kind.encode())
    assert not hsm.pin_file.exists()
    assert store._stored("00ff", TestCa().root.cert).cert_url == "pkcs11:token=aoscore;object=iam;id=%00%FF?"


class TestFaults:
    """A library that is not there, refuses, crashes or hangs: the caller hears what is wrong."""

    def test_library_is_missing(self, hsm: SoftHsm) -> None:
        store = make_store(hsm, library="/nowhere/lib.so")
        with pytest.raises(FailedError, match=r"can't use library /nowhere/lib\.so"):
            store.certificates()

    def test_library_is_none(self, hsm: SoftHsm) -> None:
        store = make_store(hsm, library="/lib/x86_64-linux-gnu/libm.so.6")
        with pytest.raises(FailedError, match="no PKCS#11 library"):
            store.certificates()

    def test_wrong_pin(self, hsm: SoftHsm, store: TokenKeyStore) -> None:
        store.create_key(Algorithm.ECC)
        pin = hsm.pin_file.read_text()
        hsm.pin_file.write_text("0000")
        for call in (lambda: store.create_key(Algorithm.ECC), make_store(hsm).certificates):
            with pytest.raises(RuntimeFailure, match="token 'aoscore': wrong PIN") as caught:
                call()
            assert caught.value.errno == 0xA0
        # A new start of provisioning needs no PIN of before.
        store.clear()
        store.set_owner(PASSWORD)
        store.create_key(Algorithm.ECC)
        hsm.pin_file.write_text(pin)

    def test_pin_file_is_lost(self, hsm: SoftHsm, store: TokenKeyStore) -> None:
        hsm.pin_file.unlink()
        with pytest.raises(NotFoundError, match="can't read PIN file"):
            store.create_key(Algorithm.ECC)

    def test_power_cut_between_token_and_pin(self, hsm: SoftHsm) -> None:
        """An initialized token into which nobody can log in does not stop the next attempt."""
        init = ["pkcs11-tool", "--module", hsm.library, "--init-token", "--slot-index", "0"]
        subprocess.run([*init, "--label", "aoscore", "--so-pin", PASSWORD], check=True, capture_output=True)
        store = make_store(hsm)
        hsm.pin_file.parent.mkdir()
        hsm.pin_file.write_text("1234")
        store.clear()
        store.set_owner(PASSWORD)
        store.create_key(Algorithm.ECC)

    def test_token_is_gone_while_its_pin_is_there(self, hsm: SoftHsm, store: TokenKeyStore) -> None:
        """Its files were removed under us, as the hook at the start of provisioning does; who comes next owns it."""
        store.create_key(Algorithm.ECC)
        assert store.owned
        shutil.rmtree(hsm.tokens)
        hsm.tokens.mkdir()
        store.clear()
        store.set_owner("another")
        store.create_key(Algorithm.ECC)

    def test_crash_and_hang(self, hsm: SoftHsm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        place = TokenPlace(label="aoscore", pin_file=hsm.pin_file)
        crashing = SharedToken(Token(build_library(tmp_path, "crash"), place))
        with pytest.raises(FailedError, match="crashed, its process ended by signal 11"):
            crashing.objects()
        full = SharedToken(Token(build_library(tmp_path, "full"), place))
        with pytest.raises(RuntimeFailure, match="the token is full") as caught:
            full.objects()
        assert caught.value.errno == 0x31
        hanging = SharedToken(Token(build_library(tmp_path, "hang"), place))
        with pytest.raises(DeadlineError, match=r"did not answer within 0.5 s"):
            hanging.change(limit_s=0.5)

        def never(*_: object, **__: object) -> None:
            raise AssertionError("a library that hangs must not be waited for again at once")

        with monkeypatch.context() as patch:
            patch.setattr(hanging.token, "run", never)
            with pytest.raises(DeadlineError):
                hanging.objects()
        printing = SharedToken(Token(build_library(tmp_path, "print"), place))
        assert printing.objects() is None
