"""Decryption and signatures, good and bad."""

import base64
import hashlib
import os
import random
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from aoscore.cm.communication.messages import CertificateChain, DecryptInfo, SigningCertificate
from aoscore.cm.imagemanager.crypto import Signers, check_transfer, decrypt
from aoscore.common.blobstore import file_digest
from aoscore.common.errors import ChecksumError, InvalidArgumentError, NotSupportedError, SignatureError
from tests.support.images import CHAIN, Signer, encrypt
from tests.support.items import sha256
from tests.support.pki import TestCa

# Always the same: of random blocks one in 256 ends like a padding.
DATA = random.Random(1).randbytes(3 * 1024 * 1024 + 5)
NOW = datetime.now(UTC)


def write(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "blob"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 1024 * 1024, len(DATA)])
@pytest.mark.parametrize(("name", "key_bytes"), [("AES128", 16), ("AES192", 24), ("aes256", 32)])
def test_cbc(tmp_path: Path, name: str, key_bytes: int, size: int) -> None:
    key, iv = os.urandom(key_bytes), os.urandom(16)
    source = write(tmp_path, encrypt(DATA[:size], key, iv))
    for algorithm in (name, f"{name}/CBC", f"{name}/cbc/PKCS7PADDING"):
        digest = decrypt(source, tmp_path / "plain", DecryptInfo(block_alg=algorithm, block_iv=iv, block_key=key))
        assert (tmp_path / "plain").read_bytes() == DATA[:size]
        assert digest == file_digest(tmp_path / "plain")


def test_gcm(tmp_path: Path) -> None:
    key, iv = os.urandom(32), os.urandom(12)
    cipher = Cipher(algorithms.AES(key), modes.GCM(iv)).encryptor()
    sealed = cipher.update(DATA) + cipher.finalize() + cipher.tag
    info = DecryptInfo(block_alg="AES256/GCM/", block_iv=iv, block_key=key)
    digest = decrypt(write(tmp_path, sealed), tmp_path / "plain", info)
    assert (tmp_path / "plain").read_bytes() == DATA
    assert digest == file_digest(tmp_path / "plain")
    for broken in (sealed[:-1], b"x" + sealed[1:], sealed[:10]):
        with pytest.raises((ChecksumError, InvalidArgumentError)):
            decrypt(write(tmp_path, broken), tmp_path / "plain", info)


@pytest.mark.parametrize("told", [True, False])
def test_gcm_of_a_layer_that_begins_with_its_iv(tmp_path: Path, told: bool) -> None:
    """As the media types `…layer.enc.v1.aes256gcm+tar…` have it: IV, ciphertext, tag."""
    key, iv = os.urandom(32), os.urandom(12)
    cipher = Cipher(algorithms.AES(key), modes.GCM(iv)).encryptor()
    sealed = iv + cipher.update(DATA) + cipher.finalize() + cipher.tag
    info = DecryptInfo(block_alg="AES256/GCM", block_iv=iv if told else b"", block_key=key)
    digest = decrypt(write(tmp_path, sealed), tmp_path / "plain", info)
    assert (tmp_path / "plain").read_bytes() == DATA
    assert digest == file_digest(tmp_path / "plain")
    for broken in (sealed[:-1], b"x" + sealed[1:], sealed[:27], b""):
        with pytest.raises((ChecksumError, InvalidArgumentError)):
            decrypt(write(tmp_path, broken), tmp_path / "plain", info)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"block_key": b"x" * 31}, InvalidArgumentError),
        ({"block_iv": b"x" * 15}, InvalidArgumentError),
        ({"block_iv": b""}, InvalidArgumentError),
        ({"block_key": b"x" * 32}, ChecksumError),
        ({"block_alg": "AES256/CTR"}, NotSupportedError),
        ({"block_alg": "DES"}, NotSupportedError),
        ({"block_alg": ""}, NotSupportedError),
    ],
)
def test_what_cannot_be_decrypted(tmp_path: Path, change: dict[str, object], error: type[Exception]) -> None:
    key, iv = b"k" * 32, b"i" * 16
    info = msgspec.structs.replace(DecryptInfo(block_iv=iv, block_key=key), **change)
    with pytest.raises(error) as caught:
        decrypt(write(tmp_path, encrypt(b"some data", key, iv)), tmp_path / "plain", info)
    assert "kkkk" not in str(caught.value)


@pytest.mark.parametrize("cut", [0, 7, 16])
def test_a_cut_file_is_refused(tmp_path: Path, cut: int) -> None:
    key, iv = b"k" * 32, b"i" * 16
    sealed = encrypt(DATA[:4000], key, iv)
    with pytest.raises(ChecksumError):
        decrypt(write(tmp_path, sealed[:cut]), tmp_path / "plain", DecryptInfo(block_iv=iv, block_key=key))


def test_the_transfer_checksum_in_all_four_forms(tmp_path: Path) -> None:
    path = write(tmp_path, DATA)
    for algorithm in ("sha3_256", "sha256"):
        value = hashlib.new(algorithm, DATA)
        check_transfer(path, value.hexdigest())
        check_transfer(path, value.hexdigest().upper())
        check_transfer(path, base64.b64encode(value.digest()).decode())
    with pytest.raises(ChecksumError, match="blob"):
        check_transfer(path, "0" * 64)
    for nonsense in ("", "xyz", "00" * 31):
        with pytest.raises(InvalidArgumentError):
            check_transfer(path, nonsense)


class Case:
    """A signed blob and who may have signed it."""

    def __init__(self, tmp_path: Path, *, rsa_key: bool = True, not_before: datetime | None = None) -> None:
        self.ca = TestCa()
        self.signer = Signer(self.ca, rsa_key=rsa_key, not_before=not_before)
        self.path = write(tmp_path, DATA)
        self.certificates = list(self.signer.certificates)
        self.chains = list(self.signer.chains)
        self.roots = [self.ca.root.cert]
        self.digest = sha256(DATA)

    def verify(self, algorithm: str = "RSA/SHA256", at: datetime | None = None, **change: object) -> None:
        info = msgspec.structs.replace(self.signer.sign(DATA, algorithm, at), **change)
        Signers(self.certificates, self.chains, self.roots).verify(self.path, self.digest, info, now=NOW)


@pytest.mark.parametrize("algorithm", ["RSA/SHA256", "RSA/SHA384/PKCS1V1_5", "RSA/SHA512/PSS", "RSA/SHA256/PSS"])
def test_rsa(tmp_path: Path, algorithm: str) -> None:
    Case(tmp_path).verify(algorithm)


@pytest.mark.parametrize("algorithm", ["EC/SHA256", "EC/SHA384"])
def test_ec(tmp_path: Path, algorithm: str) -> None:
    Case(tmp_path, rsa_key=False).verify(algorithm)


def test_the_signer_is_judged_at_the_time_of_signing(tmp_path: Path) -> None:
    case = Case(tmp_path, not_before=NOW - timedelta(days=30, minutes=-10))
    case.verify(at=NOW)  # expires in ten minutes
    later = NOW + timedelta(minutes=20)
    info = case.signer.sign(DATA, at=NOW)
    Signers(case.certificates, case.chains, case.roots).verify(case.path, case.digest, info, now=later)
    with pytest.raises(SignatureError, match="not valid at"):
        case.verify(at=NOW + timedelta(minutes=30))


def test_bad_signatures(tmp_path: Path) -> None:
    case = Case(tmp_path)
    with pytest.raises(SignatureError, match="is wrong"):
        case.verify(value=b"x" * 256)
    with pytest.raises(SignatureError, match="is wrong"):
        case.verify("RSA/SHA256/PSS", alg="RSA/SHA256")
    with pytest.raises(SignatureError, match="'other' is not in the desired status"):
        case.verify(chain_name="other")
    with pytest.raises(SignatureError, match="another kind of key"):
        case.verify(alg="EC/SHA256")
    with pytest.raises(SignatureError, match="future"):
        case.verify(at=NOW + timedelta(hours=2))
    for algorithm in ("DSA/SHA256", "RSA/MD5", "RSA/SHA256/OAEP", ""):
        with pytest.raises(NotSupportedError):
            case.verify(alg=algorithm)
    case.digest = sha256(b"something else")
    with pytest.raises(SignatureError, match="is wrong"):
        case.verify()


def test_chains_that_lead_nowhere(tmp_path: Path) -> None:
    case = Case(tmp_path)
    full = case.chains[0]
    case.chains = [CertificateChain(name=CHAIN, fingerprints=full.fingerprints[:1])]
    with pytest.raises(SignatureError, match="issuer"):
        case.verify()
    case.chains = [CertificateChain(name=CHAIN)]
    with pytest.raises(SignatureError, match="not in the desired status"):
        case.verify()
    case.chains, case.certificates = [full], case.certificates[:1]
    with pytest.raises(SignatureError, match=r"certificate .* of chain"):
        case.verify()
    case = Case(tmp_path)
    case.roots = [TestCa("Other").root.cert]
    with pytest.raises(SignatureError, match="not trusted"):
        case.verify()


def test_a_certificate_under_a_foreign_fingerprint_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    case = Case(tmp_path)
    foreign = Signer(TestCa("Other")).certificates[0]
    case.certificates[0] = SigningCertificate(
        certificate=foreign.certificate, fingerprint=case.certificates[0].fingerprint
    )
    with pytest.raises(SignatureError, match=r"certificate .* of chain"):
        case.verify()
    assert "fingerprint is not the certificate's" in caplog.text
    case.certificates[0] = SigningCertificate(certificate=b"nonsense", fingerprint="name")
    with pytest.raises(SignatureError):
        case.verify()
