"""One certificate type: its keys, its certificates, and the rules by which they come and go (iam.md §5)."""

import logging
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

from cryptography import x509

from aoscore.common.aio import Worker
from aoscore.common.errors import AosError, FailedError, NotFoundError
from aoscore.common.log import kv
from aoscore.common.types import CertInfo
from aoscore.iam.certhandler.chain import check_chain
from aoscore.iam.certhandler.csr import build_csr, build_self_signed, missing_names
from aoscore.iam.certhandler.keystore import KeyStore, StoredKey
from aoscore.iam.certhandler.record import CertRecord, newest
from aoscore.iam.config import CertModuleConfig, KeyUsage
from aoscore.iam.database import IamDatabase

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
        roots: Callable[[], Sequence[x509.Certificate]],
    ) -> None:
        """`roots` gives the certificates at which a chain may end besides a root that comes with it."""
        self.type = config.id
        self.self_signed = config.self_signed
        self.records: list[CertRecord] = []
        self._config = config
        self._store = store
        self._database = database
        self._worker = worker
        self._roots = roots
        self._failure: AosError | None = None

    async def load(self) -> None:
        """Find out which certificates there are: the storage tells, the database follows.

        A storage that can't be read does not stop the others: every call of this type then fails with its error.
        """
        try:
            if self._config.skip_validation:
                self.records = await self._database.certificates(self.type)
            else:
                await self._refresh()
            self._failure = None
        except (AosError, OSError) as error:
            self._failure = FailedError(f"key storage of {self.type} can't be used: {error}")
            _log.error(kv("Can't use key storage", type=self.type, error=error))
            self.records = await self._database.certificates(self.type)

    async def clear(self) -> None:
        """Delete all keys and certificates of the type."""
        await self._worker.run(self._store.clear)
        await self._index([])

    async def set_owner(self, password: str) -> None:
        """Prepare the storage for new keys."""
        await self._worker.run(self._store.set_owner, password)
        self._failure = None

    async def create_key(self, common_name: str) -> str:
        """A new key, and the PEM request for its certificate. Earlier requests stay valid, up to a limit."""
        self._check()
        return await self._worker.run(self._create_request, common_name)

    async def create_self_signed(self) -> CertInfo:
        """A new key with a certificate that it signs itself."""
        self._check()

        def create() -> tuple[StoredKey, x509.Certificate]:
            stored = self._store.create_key(self._config.algorithm)
            return stored, build_self_signed(stored.private_key, datetime.now(UTC))

        stored, certificate = await self._worker.run(create)
        return await self._store_chain(stored, [certificate])

    async def apply(self, pem: str) -> CertInfo:
        """Take an issued certificate into use.

        Repeating it is fine. Raises NotFoundError when the key was not made here or an issuer is missing, and the
        errors of check_chain; then all stays as it was.
        """
        self._check()
        chain = check_chain(pem, self._roots(), datetime.now(UTC))
        leaf = chain[0]
        record = CertRecord.of(self.type, leaf, "", "")
        known = next((old for old in self.records if _same(old, record)), None)
        if known is not None:
            return known.info
        stored = await self._worker.run(self._pending_key_of, leaf)
        if stored is None:
            raise NotFoundError(f"there is no key of type {self.type} for this certificate: create a key first")
        self._warn_about(leaf)
        return await self._store_chain(stored, chain)

    def _create_request(self, common_name: str) -> str:
        self._store.remove_orphans()
        stored = self._store.create_key(self._config.algorithm)
        try:
            request = build_csr(
                stored.private_key, common_name, self._config.alternative_names, self._config.extended_key_usage
            )
        except BaseException:
            self._store.remove_key(stored.key_id)
            raise
        for old in self._store.pending_keys()[:-MAX_PENDING_KEYS]:
            _log.info(kv("Key without certificate given up", type=self.type, id=old.key_id))
            self._store.remove_key(old.key_id)
        return request

    def _pending_key_of(self, certificate: x509.Certificate) -> StoredKey | None:
        public_key = certificate.public_key()
        return next((key for key in self._store.pending_keys() if key.private_key.public_key() == public_key), None)

    async def _store_chain(self, key: StoredKey, chain: Sequence[x509.Certificate]) -> CertInfo:
        stored = await self._worker.run(self._store.store_certificate, key.key_id, chain)
        record = CertRecord.of(self.type, stored.certificate, stored.cert_url, stored.key_url)
        records = [*self.records, record]
        await self._index(records)
        await self._trim(keep=record)
        _log.info(kv("Certificate in use", type=self.type, serial=record.info.serial, notAfter=record.not_after))
        return record.info

    async def _trim(self, keep: CertRecord) -> None:
        """Old certificates go last, when the new one is in use."""
        while len(self.records) > self._config.max_items:
            oldest = min((old for old in self.records if old != keep), key=lambda old: old.not_after)
            await self._worker.run(self._store.remove_certificate, oldest.info.cert_url)
            await self._index([old for old in self.records if old != oldest])
            _log.info(kv("Old certificate removed", type=self.type, serial=oldest.info.serial))

    async def _refresh(self) -> None:
        stored = await self._worker.run(self._store.certificates)
        await self._index([CertRecord.of(self.type, cert.certificate, cert.cert_url, cert.key_url) for cert in stored])

    async def _index(self, records: list[CertRecord]) -> None:
        await self._database.replace_certificates(self.type, records)
        self.records = records

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _warn_about(self, leaf: x509.Certificate) -> None:
        """Peers of AosCore 9.1 refuse a server whose certificate lacks the name by which they call it."""
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
