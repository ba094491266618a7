"""IAM's protected port as SM uses it: secrets of instances (sm.md §10). The public port is in common.iamclient."""

from collections.abc import Callable, Mapping
from typing import Any, Self

import grpc.aio

from aoscore._pb.iamanager.v6 import iamanager_pb2 as pb
from aoscore._pb.iamanager.v6 import iamanager_pb2_grpc as stubs
from aoscore.common import convert
from aoscore.common.errors import AosError
from aoscore.common.iamclient import CALL_TIMEOUT_S, CertificateKeeper
from aoscore.common.rpc import open_channel, peer_name, rpc_errors
from aoscore.common.tls import TlsIdentity
from aoscore.common.types import InstanceIdent

_stub: Callable[[grpc.aio.Channel], Any] = stubs.IAMPermissionsServiceStub


class PermissionsClient:
    """Registers instances with IAM. Use as an async context manager; calls raise AosError.

    The channel is opened at the first call, and again after a failure or with a new certificate of ours.
    """

    def __init__(self, address: str, certificates: CertificateKeeper) -> None:
        self._address = address
        self._certificates = certificates
        self._channel: grpc.aio.Channel | None = None
        self._identity: TlsIdentity | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._close()

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
        channel = await self._open()
        try:
            with rpc_errors(f"{method} at IAM at {self._address}"):
                return await getattr(_stub(channel), method)(request, timeout=CALL_TIMEOUT_S)
        except AosError:
            if channel is self._channel and channel.get_state() != grpc.ChannelConnectivity.READY:
                await self._close()
            raise

    async def _open(self) -> grpc.aio.Channel:
        identity = self._certificates.identity
        if self._channel is not None and identity == self._identity:
            return self._channel
        name = await peer_name(self._address, identity.ssl_client_context(check_hostname=False))
        await self._close()
        self._channel, self._identity = (
            open_channel(self._address, identity.grpc_client_credentials(), name=name),
            identity,
        )
        return self._channel

    async def _close(self) -> None:
        if self._channel is not None:
            channel, self._channel = self._channel, None
            await channel.close()
