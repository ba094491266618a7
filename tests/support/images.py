"""Small OCI images, and a cloud's side of the blobs: encrypted, signed, served over HTTP, with faults on demand."""

import hashlib
import json
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.padding import PKCS7

from aoscore.cm.communication.messages import (
    BlobInfo,
    BlobUrls,
    CertificateChain,
    DecryptInfo,
    DesiredItem,
    Identity,
    SignInfo,
    SigningCertificate,
)
from aoscore.common.errors import AosError
from aoscore.common.fileserver import FileServer
from aoscore.common.types import ItemType
from tests.support.items import sha256
from tests.support.pki import Issued, TestCa
from tests.support.running import running

CHAIN = "sp-1"


class Image:
    """An image with its blobs by digest."""

    def __init__(
        self, layers: Sequence[bytes], *, architectures: Sequence[str] = ("amd64",), **configured: object
    ) -> None:
        """`configured`: more members of the Aos item configuration."""
        self.blobs: dict[str, bytes] = {}
        self.layers = [self._add(layer) for layer in layers]
        self.manifests = {}
        for name in architectures:
            config = self._add(json.dumps({"architecture": name, "os": "linux", "config": {}}).encode())
            members = {"runtimes": [{"codename": "crun"}], "author": name, **configured}
            item_config = self._add(json.dumps(members).encode())
            manifest = {
                "schemaVersion": 2,
                "config": {"digest": config},
                "aosItemConfig": {"digest": item_config},
                "layers": [{"digest": digest} for digest in self.layers],
            }
            self.manifests[name] = self._add(json.dumps(manifest).encode())
        entries = [
            {"digest": digest, "platform": {"architecture": name, "os": "linux"}}
            for name, digest in self.manifests.items()
        ]
        self.index = self._add(json.dumps({"schemaVersion": 2, "manifests": entries}).encode())

    def _add(self, data: bytes) -> str:
        digest = sha256(data)
        self.blobs[digest] = data
        return digest


def desired(item_id: str, version: str, image: Image | str) -> DesiredItem:
    """A wanted version of a service."""
    return DesiredItem(
        item=Identity(id=item_id, type=ItemType.SERVICE),
        version=version,
        owner=Identity(id="owner"),
        index_digest=image if isinstance(image, str) else image.index,
    )


class Signer:
    """Signs blobs as the cloud does, with a certificate chain below a CA."""

    def __init__(self, ca: TestCa, *, rsa_key: bool = True, not_before: datetime | None = None) -> None:
        key = rsa.generate_private_key(public_exponent=65537, key_size=2048) if rsa_key else None
        self.issued: Issued = ca.issue("signer", key=key, not_before=not_before)
        self.chain = self.issued.chain[:-1]  # the root is known to the Unit

    @property
    def certificates(self) -> tuple[SigningCertificate, ...]:
        return tuple(
            SigningCertificate(certificate=_der(cert), fingerprint=hashlib.sha256(_der(cert)).hexdigest())
            for cert in self.chain
        )

    @property
    def chains(self) -> tuple[CertificateChain, ...]:
        fingerprints = tuple(entry.fingerprint.upper() for entry in self.certificates)
        return (CertificateChain(name=CHAIN, fingerprints=fingerprints),)

    def sign(self, data: bytes, algorithm: str = "RSA/SHA256", at: datetime | None = None) -> SignInfo:
        parts = algorithm.split("/")
        hash_algorithm = {"SHA256": hashes.SHA256(), "SHA384": hashes.SHA384(), "SHA512": hashes.SHA512()}[parts[1]]
        key = self.issued.key
        if isinstance(key, rsa.RSAPrivateKey):
            pss = padding.PSS(padding.MGF1(hash_algorithm), padding.PSS.MAX_LENGTH)
            value = key.sign(data, pss if parts[2:] == ["PSS"] else padding.PKCS1v15(), hash_algorithm)
        else:
            value = key.sign(data, ec.ECDSA(hash_algorithm))
        return SignInfo(
            chain_name=CHAIN, alg=algorithm, value=value, trusted_timestamp=at or datetime.now(UTC), ocsp_values=()
        )


def _der(cert: x509.Certificate) -> bytes:
    return cert.public_bytes(serialization.Encoding.DER)


def encrypt(data: bytes, key: bytes, iv: bytes) -> bytes:
    """AES-CBC with PKCS#7."""
    padder = PKCS7(128).padder()
    cipher = Cipher(algorithms.AES(key), modes.CBC(iv)).encryptor()
    return cipher.update(padder.update(data) + padder.finalize()) + cipher.finalize()


class BlobCloud:
    """Publishes images and answers for their URLs. `infos` may be changed to make it lie."""

    def __init__(self, directory: Path, signer: Signer | None = None, *, encrypted: bool = True) -> None:
        self._directory = directory
        self._signer = signer
        self._encrypted = encrypted
        self.base = ""
        self.infos: dict[str, BlobInfo] = {}
        self.asked: list[list[str]] = []
        self.served: list[str] = []
        self.failures: list[AosError] = []

    @asynccontextmanager
    async def running(self) -> AsyncIterator["BlobCloud"]:
        """Serve the files for the length of the block."""

        def resolve(target: str) -> Path | None:
            self.served.append(target.lstrip("/"))
            path = self._directory / target.lstrip("/")
            return path if path.is_file() else None

        server = FileServer("127.0.0.1:0", resolve)
        async with running(server):
            self.base = f"http://127.0.0.1:{server.port}"
            yield self

    def publish(self, image: Image) -> None:
        """Make an image available."""
        for digest, data in image.blobs.items():
            self.publish_blob(digest, data)

    def publish_blob(self, digest: str, data: bytes) -> None:
        """Make one blob available under a digest."""
        name = digest.removeprefix("sha256:")
        info = BlobInfo(digest=digest, urls=(f"{self.base}/{name}",))
        transfer = data
        if self._encrypted:
            key, iv = os.urandom(32), os.urandom(16)
            transfer = encrypt(data, key, iv)
            decrypt_info = DecryptInfo(block_alg="AES256/CBC/pkcs7", block_iv=iv, block_key=key)
            info = msgspec.structs.replace(info, decrypt_info=decrypt_info)
        if self._signer is not None:
            info = msgspec.structs.replace(info, sign_info=self._signer.sign(data))
        (self._directory / name).write_bytes(transfer)
        self.infos[digest] = msgspec.structs.replace(
            info, sha256=hashlib.sha3_256(transfer).hexdigest(), size=len(transfer)
        )

    def file(self, digest: str) -> Path:
        """The served file of a blob, to be damaged."""
        return self._directory / digest.removeprefix("sha256:")

    def change(self, digest: str, **members: object) -> None:
        """Lie about a blob."""
        self.infos[digest] = msgspec.structs.replace(self.infos[digest], **members)

    async def blob_urls(self, digests: Sequence[str]) -> BlobUrls:
        """The answer of the cloud."""
        self.asked.append(list(digests))
        if self.failures:
            raise self.failures.pop(0)
        return BlobUrls(items=tuple(self.infos[digest] for digest in digests if digest in self.infos))
