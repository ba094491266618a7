"""All certificate types of the Node: look-up, issue, renewal, change notices (iam.md §5)."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import UTC, datetime

import msgspec

from aoscore.common.aio import Broadcast
from aoscore.common.errors import InvalidArgumentError, NotFoundError
from aoscore.common.types import CertInfo
from aoscore.iam.certhandler.expiry import ExpiryWatch
from aoscore.iam.certhandler.module import CertModule

_log = logging.getLogger(__name__)

# Short, so that a clock that was set meanwhile is noticed.
_EXPIRY_CHECK_PERIOD_S = 3600.0


class CertHandler:
    """The certificate modules together. As a service it watches for certificates that come near their end."""

    def __init__(self, modules: Sequence[CertModule]) -> None:
        """The order of modules is that in which types are told to the provisioning tool."""
        self._changed: Broadcast[CertInfo] = Broadcast("certificates")
        self._modules = {module.type: module for module in modules}
        # One operation per type at a time: a storage that hangs holds up nobody else.
        self._locks = {module.type: asyncio.Lock() for module in modules}
        self._expiry = ExpiryWatch()

    async def load(self) -> None:
        """Read what is stored, before anything else is called."""
        async with asyncio.TaskGroup() as group:
            for module in self._modules.values():
                group.create_task(module.load())

    async def run(self, started: Callable[[], None]) -> None:
        """Log certificates near their end: as errors, which SM takes from the journal as alerts for the cloud."""
        started()
        while True:
            in_use = [module.newest for module in self._modules.values()]
            for text in self._expiry.warnings(filter(None, in_use), datetime.now(UTC)):
                _log.error(text)
            await asyncio.sleep(_EXPIRY_CHECK_PERIOD_S)

    def cert_types(self) -> list[str]:
        """Types that are issued by the cloud, in the order of the configuration."""
        return [module.type for module in self._modules.values() if not module.self_signed]

    def get_cert(self, cert_type: str, issuer: bytes = b"", serial: str = "") -> CertInfo:
        """The newest certificate of the type, or with a serial that very certificate, whatever its type.

        Raises NotFoundError naming what was asked for. May be called from any thread.
        """
        module = self._module(cert_type)
        if serial:
            return self._by_serial(cert_type, issuer, serial)
        record = module.newest
        if record is None:
            raise NotFoundError(f"there is no certificate of type {cert_type!r}")
        module.mark_used(record)
        return record.info

    def type_of(self, issuer: bytes, serial: str) -> str | None:
        """The type of a certificate of this Node; None for any other. Does not count as a use of it."""
        for module in self._modules.values():
            if any((record.info.issuer, record.info.serial) == (issuer, serial) for record in module.records):
                return module.type
        return None

    async def changes_of(self, cert_type: str) -> AsyncIterator[CertInfo]:
        """Every new certificate of a type from now on. Raises NotFoundError while there is none (iam.md §5.11)."""
        self.get_cert(cert_type)
        with self._changed.subscribe() as changes:
            while True:
                info = await changes.get()
                if info.type == cert_type:
                    yield info

    async def create_key(self, cert_type: str, common_name: str) -> str:
        """A new key of the type; the PEM request for its certificate."""
        module = self._module(cert_type)
        async with self._locks[cert_type]:
            return await module.create_key(common_name)

    async def apply_cert(self, cert_type: str, pem: str) -> CertInfo:
        """Take an issued certificate into use and tell those who use the type."""
        module = self._module(cert_type)
        async with self._locks[cert_type]:
            before = module.newest
            info = await module.apply(pem)
        if module.newest != before and module.newest is not None:
            self._changed.publish(module.newest.info)
        return info

    async def clear(self) -> None:
        """Delete all keys and certificates of all types."""
        async with self._all_locks():
            for module in self._modules.values():
                await module.clear()

    async def set_owner(self, password: str) -> None:
        """Prepare the storages of all types, and make the certificates that sign themselves."""
        async with self._all_locks():
            for module in self._modules.values():
                await module.set_owner(password)
            # Types may share a storage, and each set_owner empties all of it.
            for module in self._modules.values():
                if module.self_signed:
                    await module.create_self_signed()

    @contextlib.asynccontextmanager
    async def _all_locks(self) -> AsyncIterator[None]:
        async with contextlib.AsyncExitStack() as stack:
            for lock in self._locks.values():
                await stack.enter_async_context(lock)
            yield

    def _module(self, cert_type: str) -> CertModule:
        try:
            return self._modules[cert_type]
        except KeyError:
            raise NotFoundError(f"certificate type {cert_type!r} is not configured") from None

    def _by_serial(self, cert_type: str, issuer: bytes, serial: str) -> CertInfo:
        try:
            number = int(serial, 16)
        except ValueError:
            raise InvalidArgumentError(f"serial {serial[:64]!r} is no hexadecimal number") from None
        for module in self._modules.values():
            for record in module.records:
                if record.info.issuer == issuer and int(record.info.serial, 16) == number:
                    module.mark_used(record)
                    return msgspec.structs.replace(record.info, type=cert_type)
        raise NotFoundError(f"there is no certificate with serial {serial} of that issuer")
