"""One certificate type: its keys, its certificates, and the rules by which they come and go (iam.md §5)."""

import logging
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from aoscore.common.aio import Worker, log_and_continue
from aoscore.common.errors import AosError, FailedError, NotFoundError
from aoscore.common.log import kv
from aoscore.common.types import CertInfo
from aoscore.iam.certhandler.keystore import KeyStore, StoredCertificate, StoredKey
from aoscore.iam.certhandler.pending import PendingKeys
from aoscore.iam.certhandler.record import CertRecord, newest, surplus
from aoscore.iam.config import CertModuleConfig, KeyUsage
from aoscore.iam.database import IamDatabase

if TYPE_CHECKING:
    from cryptography import x509

_log = logging.getLogger(__name__)

MAX_PENDING_KEYS = 5


class CertModule:
    """Not safe for calls at the same time: the handler takes one after the other.

    `records` are the certificates in use; the list is replaced, never changed, so other threads may read it.
    """

    def __init__(
        self,
        config: CertModuleConfig,
        store: KeyStore,
        database: IamDatabase,
        worker: Worker,
        pending: PendingKeys,
        roots: "Callable[[], Sequence[x509.Certificate]]",
    ) -> None:
        """`roots` gives the certificates at which a chain may end besides a root that comes with it."""
        self.type = config.id
        self.self_signed = config.self_signed
        self.records: list[CertRecord] = []
        self._config = config
        self._store = store
        self._database = database
        self._worker = worker
        self._pending = pending
        self._roots = roots
        self._failed = False
        # Serials of certificates that somebody has begun to use. What was there at start may have been.
        self._used: set[str] = set()

    async def load(self) -> None:
        """Find out which certificates there are: the storage tells, the database follows.

        A storage that can't be read does not stop the others: calls of this type try again, and fail with its error.
        """
        try:
            await self._load()
        except (AosError, OSError) as error:
            _log.error(kv("Can't use key storage", type=self.type, error=error))
            self._failed = True
            self.records = await self._database.certificates(self.type)

    async def _load(self) -> None:
        if self._config.skip_validation:
            self.records = await self._database.certificates(self.type)
        else:
            stored = await self._worker.run(self._clean_up)
            known = {record.info.cert_url: record for record in await self._database.certificates(self.type)}
            records = [self._record(certificate, known.get(certificate.cert_url)) for certificate in stored]
            await self._index([record for record in records if record is not None])
        self._used = {record.info.serial for record in self.records}
        self._failed = False
        await self._trim(added=None)

    def _record(self, stored: StoredCertificate, known: CertRecord | None) -> CertRecord | None:
        """What the index is to say of a certificate; None for one that can't be read."""
        if known is not None and known.info.key_url == stored.key_url and known.describes(stored.der, stored.cert_url):
            return known
        with log_and_continue(_log, f"Can't read certificate {stored.cert_url}"):
            return CertRecord.of(self.type, stored.der, stored.cert_url, stored.key_url)
        return None

    def _clean_up(self) -> list[StoredCertificate]:
        """What the storage has, after what a crash has left there is gone."""
        self._store.remove_orphans(keep=self._pending.of(self.type))
        return self._store.certificates()

    async def clear(self) -> None:
        """Delete all keys and certificates of the type."""
        await self._worker.run(self._store.clear)
        await self._worker.run(self._pending.clear, self.type)
        await self._index([])

    async def set_owner(self, password: str) -> None:
        """Prepare the storage for new keys."""
        await self._worker.run(self._store.set_owner, password)
        self._failed = False

    async def create_key(self, common_name: str) -> str:
        """A new key, and the PEM request for its certificate. Earlier requests stay valid, up to a limit."""
        await self._check()
        return await self._worker.run(self._create_request, common_name)

    async def create_self_signed(self) -> CertInfo:
        """A new key with a certificate that it signs itself."""
        from aoscore.iam.certhandler.csr import build_self_signed

        await self._check()

        def create() -> "tuple[StoredKey, x509.Certificate]":
            stored = self._store.create_key(self._config.algorithm)
            return stored, build_self_signed(stored.private_key, datetime.now(UTC))

        stored, certificate = await self._worker.run(create)
        return await self._store_chain(stored, [certificate])

    async def apply(self, pem: str) -> CertInfo:
        """Take an issued certificate into use.

        Repeating it is fine. Raises NotFoundError when the key was not made here or an issuer is missing, and the
        errors of check_chain; then all stays as it was.
        """
        # Imports on use, here and in what follows: a Node at rest needs no cryptography of its own.
        from aoscore.common.certs import to_der
        from aoscore.iam.certhandler.chain import check_chain

        await self._check()
        chain = check_chain(pem, self._roots(), datetime.now(UTC))
        leaf = chain[0]
        record = CertRecord.of(self.type, to_der(leaf), "", "")
        known = next((old for old in self.records if _same(old, record)), None)
        if known is not None:
            return known.info
        stored = await self._worker.run(self._pending_key_of, leaf)
        if stored is None:
            raise NotFoundError(f"there is no key of type {self.type} for this certificate: create a key first")
        self._warn_about(leaf)
        return await self._store_chain(stored, chain)

    def _create_request(self, common_name: str) -> str:
        from aoscore.iam.certhandler.csr import build_csr

        self._store.remove_orphans(keep=self._pending.of(self.type))
        stored = self._store.create_key(self._config.algorithm)
        try:
            request = build_csr(
                stored.private_key, common_name, self._config.alternative_names, self._config.extended_key_usage
            )
            self._pending.add(self.type, stored.key_id)
        except BaseException:
            self._store.remove_key(stored.key_id)
            raise
        for old in self._pending.of(self.type)[:-MAX_PENDING_KEYS]:
            _log.info(kv("Key without certificate given up", type=self.type, id=old))
            self._store.remove_key(old)
            self._pending.remove(self.type, old)
        return request

    def _pending_key_of(self, certificate: "x509.Certificate") -> StoredKey | None:
        public_key = certificate.public_key()
        return next((key for key in self._store.pending_keys() if key.private_key.public_key() == public_key), None)

    async def _store_chain(self, key: StoredKey, chain: "Sequence[x509.Certificate]") -> CertInfo:
        stored = await self._worker.run(self._store.store_certificate, key.key_id, chain)
        record = CertRecord.of(self.type, stored.der, stored.cert_url, stored.key_url)
        await self._index([*self.records, record])
        await self._worker.run(self._pending.remove, self.type, key.key_id)
        await self._trim(added=record)
        _log.info(kv("Certificate in use", type=self.type, serial=record.info.serial, notAfter=record.not_after))
        return record.info

    async def _trim(self, added: CertRecord | None) -> None:
        """Old certificates go last, when the new one is in use."""
        for old in surplus(self.records, self._config.max_items, added=added, used=self._used):
            await self._worker.run(self._store.remove_certificate, old.info.cert_url)
            await self._index([record for record in self.records if record != old])
            _log.info(kv("Old certificate removed", type=self.type, serial=old.info.serial))

    def mark_used(self, record: CertRecord) -> None:
        """Somebody asked for this certificate to use it; until then its predecessor stays. Any thread may call."""
        self._used.add(record.info.serial)

    async def _index(self, records: list[CertRecord]) -> None:
        await self._database.replace_certificates(self.type, records)
        self.records = records

    async def _check(self) -> None:
        """A storage that failed may be back. Raises FailedError while it is not."""
        if not self._failed:
            return
        try:
            await self._load()
        except (AosError, OSError) as error:
            raise FailedError(f"key storage of {self.type} can't be used: {error}") from error
        _log.info(kv("Key storage can be used again", type=self.type))

    def _warn_about(self, leaf: "x509.Certificate") -> None:
        """Peers of AosCore 9.1 refuse a server whose certificate lacks the name by which they call it."""
        from aoscore.iam.certhandler.csr import missing_names

        if KeyUsage.SERVER_AUTH in self._config.extended_key_usage and (
            missing := missing_names(leaf, self._config.alternative_names)
        ):
            _log.warning(kv("Certificate lacks names that were asked for", type=self.type, names=missing))

    @property
    def newest(self) -> CertRecord | None:
        """The certificate that peers are to use."""
        return newest(self.records)


def _same(one: CertRecord, other: CertRecord) -> bool:
    return (one.info.issuer, one.info.serial) == (other.info.issuer, other.info.serial)
