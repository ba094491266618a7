"""IAM's protected port as SM uses it: secrets of instances (sm.md §10). The public port is in common.iamclient."""

from collections.abc import Callable, Mapping
from typing import Any, Self

import grpc.aio

from aoscore._pb.iamanager.v6 import iamanager_pb2 as pb
from aoscore._pb.iamanager.v6 import iamanager_pb2_grpc as stubs
from aoscore.common import convert
from aoscore.common.iamclient import CALL_TIMEOUT_S, CertificateKeeper
from aoscore.common.rpc import LazyChannel
from aoscore.common.types import InstanceIdent

_stub: Callable[[grpc.aio.Channel], Any] = stubs.IAMPermissionsServiceStub


class PermissionsClient:
    """Registers instances with IAM. Use as an async context manager; calls raise AosError."""

    def __init__(self, address: str, certificates: CertificateKeeper) -> None:
        self._channel = LazyChannel(address, lambda: certificates.identity)
        self.iam_returned = certificates.iam_returned
        """When secrets may have to be asked for anew: IAM of AosCore 9.1 forgets them with its process."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._channel.drop()

    async def register_instance(self, ident: InstanceIdent, permissions: Mapping[str, Mapping[str, str]]) -> str:
        """The secret by which functional servers recognise the instance; asking again gives a valid one."""
        request = pb.RegisterInstanceRequest(
            instance=convert.ident_to_pb(ident),
            permissions={server: pb.Permissions(permissions=dict(rights)) for server, rights in permissions.items()},
        )
        answer = await self._call("RegisterInstance", request)
        return str(answer.secret)

    async def unregister_instance(self, ident: InstanceIdent) -> None:
        """Make the instance's secret invalid; repeatable."""
        await self._call("UnregisterInstance", pb.UnregisterInstanceRequest(instance=convert.ident_to_pb(ident)))

    async def _call(self, method: str, request: Any) -> Any:
        return await self._channel.call(f"{method} by IAM", _stub, method, request, timeout_s=CALL_TIMEOUT_S)
