"""Decryption and signatures of blobs (cm-cloud.md §8). All functions block: call them in a worker."""

from __future__ import annotations

import base64
import binascii
import hashlib
import logging
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple

from cryptography import x509
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.padding import PKCS7

from aoscore.cm.communication.messages import CertificateChain, DecryptInfo, SignInfo, SigningCertificate
from aoscore.common.aio import raise_if_abandoned
from aoscore.common.blobstore import file_digest
from aoscore.common.certs import verify_chain
from aoscore.common.errors import ChecksumError, InvalidArgumentError, NotSupportedError, SignatureError

_log = logging.getLogger(__name__)

_CHUNK_BYTES: Final = 1024 * 1024
_BLOCK_BYTES: Final = 16
_GCM_IV_BYTES: Final = 12
_GCM_TAG_BYTES: Final = 16
_KEY_BYTES: Final = {"AES128": 16, "AES192": 24, "AES256": 32}
_HASHES: Final[dict[str, hashes.HashAlgorithm]] = {
    "SHA256": hashes.SHA256(),
    "SHA384": hashes.SHA384(),
    "SHA512": hashes.SHA512(),
}
# How far the clock of the signer may be ahead of ours.
MAX_AHEAD: Final = timedelta(hours=1)


def check_transfer(path: Path, expected: str) -> None:
    """Checks a file as it was downloaded against `sha256` of the cloud's answer.

    The field sends hex of SHA3-256, the schema says base64 of SHA-256; all four are accepted (cloud-protocol D7).
    Raises ChecksumError, or InvalidArgumentError when `expected` is no such value.
    """
    wanted = _hash_value(expected)
    for algorithm in ("sha3-256", "sha256"):
        if file_digest(path, algorithm).partition(":")[2] == wanted:
            return
    raise ChecksumError(f"downloaded file {path.name} does not have the announced checksum")


def _hash_value(text: str) -> str:
    """32 bytes in hex or base64, as lower-case hex."""
    if len(text) == 64:
        try:
            return bytes.fromhex(text).hex()
        except ValueError:
            pass
    try:
        value = base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        value = b""
    if len(value) != 32:
        raise InvalidArgumentError("the cloud's checksum is neither hex nor base64 of 32 bytes")
    return value.hex()


class _Algorithm(NamedTuple):
    key_bytes: int
    mode: str


def _block_algorithm(text: str) -> _Algorithm:
    """Reads `cipher/mode/padding`; PKCS#7 padding is used with CBC whatever the third part says (§8.1)."""
    cipher, _, rest = text.upper().partition("/")
    mode = rest.partition("/")[0] or "CBC"
    if cipher not in _KEY_BYTES or mode not in ("CBC", "GCM"):
        raise NotSupportedError(f"block cipher {text!r} is not supported")
    return _Algorithm(_KEY_BYTES[cipher], mode)


class _HashingWriter:
    """Writes and hashes in one pass."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._hasher = hashlib.sha256()

    def write(self, data: bytes) -> None:
        self._hasher.update(data)
        self._file.write(data)

    @property
    def digest(self) -> str:
        """Of all that was written."""
        return f"sha256:{self._hasher.hexdigest()}"


def decrypt(source: Path, target: Path, info: DecryptInfo) -> str:
    """Decrypts a file into a new one: AES-CBC, or AES-GCM with the tag at the end (cloud-protocol D10, cloud-rest).

    Returns the digest of what was written.
    Raises NotSupportedError for an unknown algorithm, InvalidArgumentError for a key or IV of the wrong length,
    ChecksumError when the file is not what this key decrypts (cut, damaged, or another key).
    """
    algorithm = _block_algorithm(info.block_alg)
    if len(info.block_key) != algorithm.key_bytes:
        raise InvalidArgumentError(f"key for {info.block_alg} has {len(info.block_key)} bytes")
    size = source.stat().st_size
    with source.open("rb") as reader, target.open("wb") as file:
        writer = _HashingWriter(file)
        if algorithm.mode == "GCM":
            # Layers that were encrypted when their item was built begin with the IV, and nobody else may know it.
            head = reader.read(_GCM_IV_BYTES)
            begins_with_iv = info.block_iv in (b"", head)
            iv = head if begins_with_iv else info.block_iv
            begin = len(iv) if begins_with_iv else 0
            left = size - begin - _GCM_TAG_BYTES
            if not 8 <= len(iv) <= 128 or left < 0:
                raise InvalidArgumentError(f"IV for {info.block_alg} has {len(iv)} bytes, file {size}")
            reader.seek(begin + left)
            tag = reader.read()
            reader.seek(begin)
            cipher = Cipher(algorithms.AES(info.block_key), modes.GCM(iv, tag)).decryptor()
            while left > 0:
                raise_if_abandoned()
                chunk = reader.read(min(_CHUNK_BYTES, left))
                left -= len(chunk)
                writer.write(cipher.update(chunk))
            try:
                writer.write(cipher.finalize())
            except InvalidTag:
                raise ChecksumError(f"blob {source.name} can't be decrypted: wrong key or damaged") from None
            return writer.digest
        if len(info.block_iv) != _BLOCK_BYTES:
            raise InvalidArgumentError(f"IV for {info.block_alg} has {len(info.block_iv)} bytes")
        if size == 0 or size % _BLOCK_BYTES:
            raise ChecksumError(f"encrypted blob {source.name} is cut: {size} bytes are no whole number of blocks")
        plain = Cipher(algorithms.AES(info.block_key), modes.CBC(info.block_iv)).decryptor()
        unpadder = PKCS7(_BLOCK_BYTES * 8).unpadder()
        try:
            while chunk := reader.read(_CHUNK_BYTES):
                raise_if_abandoned()
                writer.write(unpadder.update(plain.update(chunk)))
            writer.write(unpadder.update(plain.finalize()) + unpadder.finalize())
        except ValueError:
            raise ChecksumError(f"blob {source.name} can't be decrypted: wrong key or damaged") from None
        return writer.digest


class Signers:
    """Certificates and chains of a desired status, and the roots they must lead to."""

    def __init__(
        self,
        certificates: Sequence[SigningCertificate],
        chains: Sequence[CertificateChain],
        roots: Sequence[x509.Certificate],
    ) -> None:
        """A certificate that cannot be read is left out; what needs it fails later and says so."""
        self._roots = roots
        self._chains = {chain.name: tuple(name.upper() for name in chain.fingerprints) for chain in chains}
        self._certificates: dict[str, x509.Certificate] = {}
        for entry in certificates:
            fingerprint = entry.fingerprint.upper()
            if fingerprint in self._certificates:
                continue
            try:
                _check_fingerprint(entry)
                self._certificates[fingerprint] = x509.load_der_x509_certificate(entry.certificate)
            except (ValueError, SignatureError) as error:
                _log.error("Signing certificate is left out: fingerprint=%s, error=%s", entry.fingerprint, error)

    def verify(self, path: Path, digest: str, info: SignInfo, *, now: datetime) -> None:
        """Checks the signature over a decrypted blob, and its signer at the time of signing.

        Args:
            path: the decrypted file.
            digest: what its SHA-256 must be; the caller checks that, and a signature over SHA-256 relies on it.
            info: signature of the cloud.
            now: the present; a signature from the future is refused.

        Raises:
            SignatureError: signature, chain or time is wrong, or a certificate was revoked.
            NotSupportedError: unknown algorithm.
        """
        hash_name, pad = _signature_algorithm(info.alg)
        if info.trusted_timestamp > now + MAX_AHEAD:
            raise SignatureError(f"signature is from the future: {info.trusted_timestamp.isoformat()}")
        signer, intermediates = self._chain(info.chain_name)
        if hash_name == "SHA256":
            value = bytes.fromhex(digest.partition(":")[2])
        else:
            value = bytes.fromhex(file_digest(path, hash_name.lower()).partition(":")[2])
        algorithm = Prehashed(_HASHES[hash_name])
        key = signer.public_key()
        try:
            if isinstance(key, rsa.RSAPublicKey) and pad is not None:
                key.verify(info.value, value, pad, algorithm)
            elif isinstance(key, ec.EllipticCurvePublicKey) and pad is None:
                key.verify(info.value, value, ec.ECDSA(algorithm))
            else:
                raise SignatureError(f"signer of chain {info.chain_name!r} has another kind of key than {info.alg}")
        except InvalidSignature:
            raise SignatureError(f"signature of blob {digest} is wrong (chain {info.chain_name!r})") from None
        certified = verify_chain(signer, intermediates, self._roots, at=info.trusted_timestamp)
        if info.ocsp_values:
            # Import on use: most clouds send none.
            from aoscore.cm.imagemanager.ocsp import check_responses

            check_responses(info.ocsp_values, certified, signed_at=info.trusted_timestamp)

    def _chain(self, name: str) -> tuple[x509.Certificate, list[x509.Certificate]]:
        fingerprints = self._chains.get(name)
        if not fingerprints:
            raise SignatureError(f"certificate chain {name!r} is not in the desired status")
        missing = [value for value in fingerprints if value not in self._certificates]
        if missing:
            raise SignatureError(f"certificate {missing[0]} of chain {name!r} is not in the desired status")
        first, *rest = (self._certificates[value] for value in fingerprints)
        return first, rest


def _check_fingerprint(entry: SigningCertificate) -> None:
    """A fingerprint with the length of SHA-256 or SHA-1 must be that of the certificate; others are only names."""
    text = entry.fingerprint.replace(":", "").lower()
    for name in ("sha256", "sha1"):
        actual = hashlib.new(name, entry.certificate, usedforsecurity=name == "sha256").hexdigest()
        if len(text) == len(actual) and text != actual:
            raise SignatureError(f"fingerprint is not the certificate's: {actual}")


def _signature_algorithm(text: str) -> tuple[str, padding.AsymmetricPadding | None]:
    """Reads `RSA/<hash>[/<padding>]` or `EC/<hash>`; the padding is None for EC."""
    parts = text.upper().split("/")
    cipher, hash_name = parts[0], (parts[1] if len(parts) > 1 and parts[1] else "SHA256")
    name = parts[2] if len(parts) > 2 else ""
    if hash_name in _HASHES:
        if cipher == "EC" and not name:
            return hash_name, None
        if cipher == "RSA" and name in ("", "PKCS1V1_5"):
            return hash_name, padding.PKCS1v15()
        if cipher == "RSA" and name == "PSS":
            return hash_name, padding.PSS(padding.MGF1(_HASHES[hash_name]), padding.PSS.AUTO)
    raise NotSupportedError(f"signature algorithm {text!r} is not supported")
