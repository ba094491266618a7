"""Our certificates, from the first one on and through every renewal (mp.md §11)."""

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

from aoscore.common.aio import Broadcast
from aoscore.common.errors import AosError, NotFoundError
from aoscore.common.iamclient import IamPublicClient
from aoscore.common.log import kv
from aoscore.common.tls import TlsIdentity
from aoscore.common.types import CertInfo

_log = logging.getLogger(__name__)

# The answer to "apply certificate" may travel through the very channel that a renewal closes.
APPLY_DELAY_S = 10.0
RETRY_S = 3.0


class Certificate:
    """The certificate of one type, as a service that waits for IAM as long as it takes.

    `known` is set with the first certificate; `changed` tells of every later one, `apply_delay_s` after IAM did. One
    that can't be loaded is not taken: the one before it stays, and IAM is asked again.
    """

    def __init__(
        self,
        iam: IamPublicClient,
        cert_type: str,
        ca_file: Path,
        *,
        apply_delay_s: float = APPLY_DELAY_S,
        retry_s: float = RETRY_S,
    ) -> None:
        self.type = cert_type
        self.known = asyncio.Event()
        self.changed: Broadcast[TlsIdentity] = Broadcast(f"certificate {cert_type}")
        self._iam = iam
        self._ca_file = ca_file
        self._apply_delay_s = apply_delay_s
        self._retry_s = retry_s
        self._identity: TlsIdentity | None = None

    @property
    def identity(self) -> TlsIdentity:
        """Certificate, key and roots for a connection that begins now. Raises NotFoundError before the first one."""
        if self._identity is None:
            raise NotFoundError(f"certificate {self.type} is not known yet")
        return self._identity

    async def run(self, started: Callable[[], None]) -> None:
        """Follow the certificate until cancelled. IAM being there is no part of being started."""
        started()
        while True:
            try:
                await self._take(await self._iam.get_cert(self.type))
                async for cert in self._iam.watch_cert(self.type):
                    await self._take(cert)
            except AosError as error:
                if self._identity is None:
                    pause_s, level = self._retry_s, logging.WARNING
                else:
                    # An error in the journal reaches the cloud as a core alert.
                    pause_s, level = self._apply_delay_s, logging.ERROR
                _log.log(level, kv("No usable certificate", type=self.type, error=error, next_try_s=pause_s))
                await asyncio.sleep(pause_s)

    async def _take(self, cert: CertInfo) -> None:
        identity = TlsIdentity.of(self._ca_file, cert)
        if identity == self._identity:
            return
        if self._identity is not None:
            await asyncio.sleep(self._apply_delay_s)
        identity.ssl_client_context(check_hostname=False)  # raises when certificate and key can't be used
        is_first = self._identity is None
        self._identity = identity
        _log.info(kv("Certificate is in use", type=self.type, url=cert.cert_url))
        if is_first:
            self.known.set()
        else:
            self.changed.publish(identity)
