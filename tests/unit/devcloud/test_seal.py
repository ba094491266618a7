"""Sealed blobs open with independent code."""

import base64
import hashlib
import os
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding

from aoscore.common.errors import InvalidArgumentError
from aoscore.devcloud.ca import Authority
from aoscore.devcloud.imagekeys import add_key, load_keys, parse_key
from aoscore.devcloud.seal import seal


@pytest.mark.parametrize("size_bytes", [0, 1, 15, 16, (1 << 20) - 1, 1 << 20, (1 << 20) + 17])
def test_a_sealed_blob_opens_with_openssl(authority: Authority, tmp_path: Path, size_bytes: int) -> None:
    plain, encrypted, opened = tmp_path / "plain", tmp_path / "encrypted", tmp_path / "opened"
    plain.write_bytes(os.urandom(size_bytes))
    sealed = seal(plain, encrypted, authority.signer_key)
    content = encrypted.read_bytes()
    assert sealed.size_bytes == len(content)
    assert sealed.sha3_256 == hashlib.sha3_256(content).hexdigest()
    command = ["openssl", "enc", "-d", "-aes-256-cbc", "-in", str(encrypted), "-out", str(opened)]
    subprocess.run([*command, "-K", sealed.key.hex(), "-iv", sealed.iv.hex()], check=True)
    assert opened.read_bytes() == plain.read_bytes()
    (tmp_path / "signature").write_bytes(sealed.signature)
    (tmp_path / "key.pem").write_bytes(
        authority.signer.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    verify = ["openssl", "dgst", "-sha256", "-verify", "key.pem", "-signature", "signature", "plain"]
    subprocess.run(verify, check=True, cwd=tmp_path, stdout=subprocess.DEVNULL)


def test_every_blob_has_a_key_of_its_own(authority: Authority, tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"same")
    first, second = (seal(tmp_path / "plain", tmp_path / name, authority.signer_key) for name in "ab")
    assert first.key != second.key
    assert first.iv != second.iv
    key = authority.signer_key.public_key()
    key.verify(first.signature, b"same", padding.PKCS1v15(), hashes.SHA256())


def test_image_keys_are_read_in_every_form(tmp_path: Path) -> None:
    key = bytes(range(32))
    forms = {"a.raw": key, "b.hex": key.hex().encode() + b"\n", "c.b64": base64.b64encode(key)}
    for name, content in forms.items():
        (tmp_path / name).write_bytes(content)
        add_key(tmp_path / "cloud", tmp_path / name)
    assert load_keys(tmp_path / "cloud") == [key] * 3
    assert load_keys(tmp_path) == []


@pytest.mark.parametrize("content", [b"", b"short", b"x" * 31, b"0" * 62, bytes(33)])
def test_a_wrong_key_file_is_refused(content: bytes) -> None:
    with pytest.raises(InvalidArgumentError, match=r"k\.key"):
        parse_key(content, "k.key")
