"""What a key storage must offer to a certificate module: files or a token."""

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Protocol

import msgspec

from aoscore.iam.config import Algorithm

if TYPE_CHECKING:
    from cryptography import x509

    from aoscore.common.keys import PrivateKey


class StoredKey(msgspec.Struct, frozen=True):
    """A key in the storage. `key_id` is unique in it; `private_key` signs, wherever the key itself is."""

    key_id: str
    private_key: "PrivateKey"


class StoredCertificate(msgspec.Struct, frozen=True):
    """A certificate (DER) whose key is in the storage too, and the addresses by which peers find both."""

    der: bytes
    cert_url: str
    key_url: str


class KeyStore(Protocol):
    """Keys and certificates of one type. All calls may block; a call that returns has made its work durable."""

    @property
    def owned(self) -> bool:
        """Whether the storage was prepared by set_owner and can hold keys."""

    def set_owner(self, password: str) -> None:
        """Prepare an empty storage. `password` guards its administration where the kind of storage knows that."""

    def clear(self) -> None:
        """Delete all keys and certificates of the type; fine when there are none."""

    def create_key(self, algorithm: Algorithm) -> StoredKey:
        """A new key without certificate. Raises WrongStateError when the storage is not owned."""

    def pending_keys(self) -> list[StoredKey]:
        """Keys that have no certificate yet, in any order."""

    def remove_key(self, key_id: str) -> None:
        """Delete a key without certificate."""

    def store_certificate(self, key_id: str, chain: "Sequence[x509.Certificate]") -> StoredCertificate:
        """Put the certificate of a key, leaf first, with what is known of its chain."""

    def certificates(self) -> list[StoredCertificate]:
        """All certificates whose key is there."""

    def remove_certificate(self, cert_url: str) -> None:
        """Delete a certificate and its key."""

    def remove_orphans(self, keep: Collection[str]) -> int:
        """Delete what nobody can use: certificates without key, and keys without certificate but those in `keep`.

        Returns the number of what was deleted.
        """
