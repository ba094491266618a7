"""Keys and certificates in files: for development and for Nodes without a token (iam.md §5.15).

    <storagePath>/<type>/<key id>.key.pem     the key, PKCS#8, mode 0600
    <storagePath>/<type>/<key id>.cert.pem    its chain, leaf first

The directory of a type exists once the type has an owner. A key without certificate waits for it, also over a restart.
"""

import logging
import uuid
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from aoscore.common.aio import log_and_continue
from aoscore.common.certurls import file_url, first_der, url_path
from aoscore.common.errors import InvalidArgumentError, WrongStateError
from aoscore.common.files import fsync_dir, remove_tree, write_atomic
from aoscore.common.log import kv
from aoscore.iam.certhandler.keystore import StoredCertificate, StoredKey
from aoscore.iam.config import Algorithm

if TYPE_CHECKING:
    from cryptography import x509

_log = logging.getLogger(__name__)

_KEY = ".key.pem"
_CERTIFICATE = ".cert.pem"


class FileStoreParams(msgspec.Struct, frozen=True, rename="camel"):
    """Section params of a certificate module of the plug-in swmodule."""

    storage_path: Path


class FileKeyStore:
    """A KeyStore in the directory of one certificate type."""

    def __init__(self, params: FileStoreParams, cert_type: str) -> None:
        if not params.storage_path.is_absolute():
            # Peers get the path in URLs, and they work in other directories.
            raise InvalidArgumentError(f"storagePath {params.storage_path} of {cert_type} is not absolute")
        self._type = cert_type
        self._directory = params.storage_path / cert_type

    @property
    def owned(self) -> bool:
        """Whether set_owner has been called since the last clear."""
        return self._directory.is_dir()

    def set_owner(self, password: str) -> None:
        """Make the directory. Files have no administration, so the password has no meaning here."""
        self._directory.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._directory.mkdir(mode=0o700, exist_ok=True)
        fsync_dir(self._directory.parent)

    def clear(self) -> None:
        """Delete the directory."""
        if self.owned:
            remove_tree(self._directory)
            fsync_dir(self._directory.parent)

    def create_key(self, algorithm: Algorithm) -> StoredKey:
        """A new key, on disk before it is returned."""
        if not self.owned:
            raise WrongStateError(f"key storage of {self._type} has no owner: start provisioning first")
        # Imports on use, here and below: a Node that has its certificates needs no cryptography of its own.
        from aoscore.common.keys import generate_ec_key, generate_rsa_key, write_private_key

        key = generate_ec_key() if algorithm is Algorithm.ECC else generate_rsa_key()
        key_id = uuid.uuid4().hex
        write_private_key(self._path(key_id, _KEY), key)
        return StoredKey(key_id, key)

    def pending_keys(self) -> list[StoredKey]:
        """Keys without a certificate file."""
        from aoscore.common.keys import load_private_key

        keys = []
        for key_id in sorted(self._ids(_KEY) - self._ids(_CERTIFICATE)):
            # A key that can't be read can't be used, and it must not stand in the way of the others.
            with log_and_continue(_log, f"Can't read pending key {key_id} of {self._type}"):
                keys.append(StoredKey(key_id, load_private_key(file_url(self._path(key_id, _KEY)))))
        return keys

    def remove_key(self, key_id: str) -> None:
        """Delete the key file."""
        self._path(key_id, _KEY).unlink(missing_ok=True)
        fsync_dir(self._directory)

    def store_certificate(self, key_id: str, chain: "Sequence[x509.Certificate]") -> StoredCertificate:
        """Write the chain beside its key."""
        from aoscore.common.certs import to_der, to_pem

        write_atomic(self._path(key_id, _CERTIFICATE), to_pem(chain), mode=0o644)
        return self._stored(key_id, to_der(chain[0]))

    def certificates(self) -> list[StoredCertificate]:
        """All certificates with their keys; one that can't be read is logged and left out."""
        found = []
        for key_id in sorted(self._ids(_CERTIFICATE) & self._ids(_KEY)):
            path = self._path(key_id, _CERTIFICATE)
            with log_and_continue(_log, f"Can't read certificate {path}"):
                found.append(self._stored(key_id, first_der(path.read_bytes(), what=str(path))))
        return found

    def remove_certificate(self, cert_url: str) -> None:
        """Delete certificate and key; the certificate first, so that a crash leaves no certificate without key."""
        key_id = url_path(cert_url).name.removesuffix(_CERTIFICATE)
        self._path(key_id, _CERTIFICATE).unlink(missing_ok=True)
        self.remove_key(key_id)

    def remove_orphans(self, keep: Collection[str]) -> int:
        """Delete what nobody can use, also what a crash has left of files that were being written."""
        for path in self._directory.glob(".*.tmp"):
            path.unlink(missing_ok=True)
        keys, certificates = self._ids(_KEY), self._ids(_CERTIFICATE)
        orphans = (keys ^ certificates) - (keys & set(keep))
        for key_id in orphans:
            _log.warning(kv("File that nobody can use removed", type=self._type, id=key_id))
            self._path(key_id, _CERTIFICATE).unlink(missing_ok=True)
            self.remove_key(key_id)
        return len(orphans)

    def _ids(self, suffix: str) -> set[str]:
        if not self.owned:
            return set()
        return {
            path.name.removesuffix(suffix)
            for path in self._directory.iterdir()
            if path.name.endswith(suffix) and not path.name.startswith(".")
        }

    def _path(self, key_id: str, suffix: str) -> Path:
        return self._directory / f"{key_id}{suffix}"

    def _stored(self, key_id: str, der: bytes) -> StoredCertificate:
        cert_url, key_url = (file_url(self._path(key_id, suffix)) for suffix in (_CERTIFICATE, _KEY))
        return StoredCertificate(der, cert_url, key_url)
