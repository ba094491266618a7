"""Encryption and signing of blobs for Units, so that cm-cloud.md §5.4 and §8 accept them.

A blob is signed in the clear and then encrypted: RSA PKCS#1 v1.5 over SHA-256 of the plain file, AES-256-CBC with
PKCS#7 padding, a key and IV of its own. Protocol v7 sends that key in the blob URLs answer, unwrapped; it is never
encrypted for a certificate of the Unit.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa, utils
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.padding import PKCS7

BLOCK_ALGORITHM = "AES256/CBC/pkcs7"
SIGN_ALGORITHM = "RSA/SHA256"
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Sealed:
    """What a Unit needs to open one encrypted blob."""

    sha3_256: str
    size_bytes: int
    key: bytes
    iv: bytes
    signature: bytes


def seal(plain: Path, encrypted: Path, signing_key: rsa.RSAPrivateKey) -> Sealed:
    """Sign `plain` and write it encrypted to `encrypted`; blocking, reads the file once."""
    key, iv = os.urandom(32), os.urandom(16)
    encryptor = Cipher(algorithms.AES256(key), modes.CBC(iv)).encryptor()
    padder = PKCS7(128).padder()
    plain_hash, sealed_hash, size_bytes = hashlib.sha256(), hashlib.sha3_256(), 0
    with plain.open("rb") as source, encrypted.open("wb") as target:
        more = True
        while more:
            chunk = source.read(_CHUNK_BYTES)
            more = bool(chunk)
            plain_hash.update(chunk)
            block = encryptor.update(padder.update(chunk) if more else padder.finalize())
            if not more:
                block += encryptor.finalize()
            sealed_hash.update(block)
            size_bytes += target.write(block)
    signature = signing_key.sign(plain_hash.digest(), padding.PKCS1v15(), utils.Prehashed(hashes.SHA256()))
    return Sealed(sealed_hash.hexdigest(), size_bytes, key, iv, signature)
