"""Who of the Unit may call which service of the protected port (iam.md §16, 10)."""

import logging
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Any

import grpc

from aoscore.common.log import kv
from aoscore.common.services import Servicer
from aoscore.iam.iamserver.peer import Peer

_log = logging.getLogger(__name__)


class AccessList:
    """Services by name with the certificate types of their callers. A service that is not named is open to the Unit.

    Only certificates of this Node have a type that we know: whoever comes from another Node is refused where there is
    a list.
    """

    def __init__(self, allowed: Mapping[str, Collection[str]], type_of: Callable[[bytes, str], str | None]) -> None:
        """`type_of` finds the type of a certificate by issuer (DER) and serial (hex); None when it is not ours."""
        self._allowed = allowed
        self._type_of = type_of

    def guard(self, service: str, servicer: Servicer) -> Servicer:
        """The servicer of a service with unary methods, for those who may call it."""
        if service not in self._allowed:
            return servicer

        async def check(method: str, context: Any) -> None:
            peer = Peer.of(context)
            cert_type = self._type_of(peer.issuer, peer.serial) if peer.serial else None
            if cert_type in self._allowed[service]:
                return
            _log.warning(kv("Call refused", method=f"{service}.{method}", certType=cert_type, peer=peer.address))
            text = f"{service} is not for certificates of type {cert_type or 'unknown'}"
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, text)

        return _Guarded(servicer, check)


class _Guarded(Servicer):
    def __init__(self, servicer: Servicer, check: Callable[[str, Any], Awaitable[None]]) -> None:
        self._servicer = servicer
        self._check = check

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._servicer, name)

        async def guarded(request: Any, context: Any) -> Any:
            await self._check(name, context)
            return await method(request, context)

        return guarded
