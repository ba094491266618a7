"""gRPC over mutual TLS: who gets in, certificate renewal, errors, ports."""

import asyncio
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.empty_pb2 import Empty

from aoscore._pb.iamanager.v6 import iamanager_pb2 as pb
from aoscore._pb.iamanager.v6 import iamanager_pb2_grpc as stubs
from aoscore.common.errors import (
    AlreadyExistsError,
    DeadlineError,
    FailedError,
    InvalidArgumentError,
    NotFoundError,
    NotSupportedError,
    UnreachableError,
)
from aoscore.common.iamclient import CertificateKeeper, IamPublicClient
from aoscore.common.rpc import (
    LazyChannel,
    Server,
    begin_answers,
    handler,
    open_channel,
    peer_host,
    peer_name,
    plain_ip,
    rpc_errors,
    split_address,
)
from aoscore.common.tls import TlsIdentity, TlsRoots, grpc_server_credentials
from aoscore.common.types import CertInfo
from tests.support.pki import TestCa
from tests.support.running import running


class Certificates(stubs.IAMPublicCertServiceServicer):
    """A stand-in IAM that only hands out certificates."""

    def __init__(self) -> None:
        self.cert = pb.CertInfo(type="cm", cert_url="file:///a", key_url="file:///b")
        self.changes: asyncio.Queue[pb.CertInfo] = asyncio.Queue()

    @handler
    async def GetCert(self, request: pb.GetCertRequest, context: Any) -> pb.CertInfo:
        if request.type != self.cert.type:
            raise NotFoundError(f"no certificate {request.type}")
        return self.cert

    @handler
    async def SubscribeCertChanged(self, request: Any, context: Any) -> AsyncIterator[pb.CertInfo]:
        while True:
            self.cert = await self.changes.get()
            if not self.cert.cert_url:
                self.cert.cert_url = "file:///after-break"
                raise FailedError("subscription breaks")
            yield self.cert


def server(servicer: Certificates, credentials: Any = None) -> Server:
    return Server("127.0.0.1:0", credentials, [partial(stubs.add_IAMPublicCertServiceServicer_to_server, servicer)])


async def call(port: int, credentials: grpc.ChannelCredentials | None, name: str | None = "main") -> str:
    async with open_channel(f"127.0.0.1:{port}", credentials, name=name) as channel:
        with rpc_errors("GetCert"):
            answer = await stubs.IAMPublicCertServiceStub(channel).GetCert(pb.GetCertRequest(type="cm"), timeout=5)
        return str(answer.cert_url)


async def test_mutual_tls_lets_in_only_our_own(tmp_path: Path) -> None:
    ours, foreign = TestCa(), TestCa("Foreign")
    identity = ours.identity(tmp_path, "server", ("main",))
    client = ours.identity(tmp_path, "client")
    (tmp_path / "f").mkdir()
    stranger = foreign.identity(tmp_path / "f", "client")
    # The stranger trusts our root, but shows a certificate of another CA.
    stranger = TlsIdentity(identity.ca_file, stranger.cert_url, stranger.key_url)
    one = server(Certificates(), lambda: grpc_server_credentials(lambda: identity))
    async with running(one):
        assert await call(one.port, client.grpc_client_credentials()) == "file:///a"
        address = f"127.0.0.1:{one.port}"
        assert await peer_name(address, client.ssl_client_context()) == "main"
        with pytest.raises(FailedError):
            await call(one.port, stranger.grpc_client_credentials())
        with pytest.raises(FailedError):
            await call(one.port, grpc.ssl_channel_credentials(ours.root_pem))
        with pytest.raises(FailedError):
            await call(one.port, None)
        with pytest.raises(FailedError, match="TLS with"):
            await peer_name(
                address,
                stranger.__class__(
                    foreign.write_root(tmp_path / "f"), client.cert_url, client.key_url
                ).ssl_client_context(),
            )


async def test_renewed_certificate_is_used_without_a_restart(tmp_path: Path) -> None:
    ca = TestCa()
    client = ca.identity(tmp_path, "client")
    current = ca.identity(tmp_path, "old", ("old",))
    one = server(Certificates(), lambda: grpc_server_credentials(lambda: current))
    async with running(one):
        address = f"127.0.0.1:{one.port}"
        channel = open_channel(address, client.grpc_client_credentials(), name="old")
        stub = stubs.IAMPublicCertServiceStub(channel)
        await stub.GetCert(pb.GetCertRequest(type="cm"), timeout=5)
        current = ca.identity(tmp_path, "new", ("new",))
        assert await peer_name(address, client.ssl_client_context()) == "new"
        await stub.GetCert(pb.GetCertRequest(type="cm"), timeout=5)
        await channel.close()
        # A certificate that can't be read keeps the last good one.
        current = TlsIdentity(current.ca_file, "file:///nowhere", current.key_url)
        assert await peer_name(address, client.ssl_client_context()) == "new"


async def test_lazy_channel_follows_our_certificate_and_outlives_the_server(tmp_path: Path) -> None:
    ca = TestCa()
    identity = ca.identity(tmp_path, "server", ("main",))
    tls: TlsRoots = ca.identity(tmp_path, "first")

    async def ask(channel: LazyChannel) -> str:
        request = pb.GetCertRequest(type="cm")
        return str((await channel.call("asked", stubs.IAMPublicCertServiceStub, "GetCert", request, timeout_s=5)).type)

    def serve(port: int) -> Server:
        add = partial(stubs.add_IAMPublicCertServiceServicer_to_server, Certificates())
        return Server(f"127.0.0.1:{port}", lambda: grpc_server_credentials(lambda: identity), [add])

    async with running(one := serve(0)), LazyChannel(f"127.0.0.1:{one.port}", lambda: tls) as channel:
        first = await channel.open()
        assert (await asyncio.gather(ask(channel), ask(channel)), await channel.open()) == (["cm", "cm"], first)
        tls = ca.identity(tmp_path, "second")
        second = await channel.open()
        assert second is not first
        # Without a certificate nobody gets in; that the next call brings one is seen at once.
        tls = TlsRoots(identity.ca_file)
        with pytest.raises(UnreachableError, match=f"asked at 127.0.0.1:{one.port}"):
            await ask(channel)
        tls = ca.identity(tmp_path, "third")
        assert await ask(channel) == "cm"
    port = one.port
    async with LazyChannel(f"127.0.0.1:{port}", lambda: tls) as channel:
        async with running(serve(port)):
            assert await ask(channel) == "cm"
        # By the open connection first, then by a new one.
        for _ in range(2):
            with pytest.raises(UnreachableError):
                await ask(channel)
        identity = ca.identity(tmp_path, "renamed", ("other-name",))
        async with running(serve(port)):
            assert await ask(channel) == "cm"


async def test_errors_reach_the_caller_as_ours() -> None:
    one = server(Certificates())
    async with running(one):
        async with open_channel(f"127.0.0.1:{one.port}", None) as channel:
            with pytest.raises(FailedError, match="asked: no certificate x"), rpc_errors("asked"):
                await stubs.IAMPublicCertServiceStub(channel).GetCert(pb.GetCertRequest(type="x"), timeout=5)
            with pytest.raises(NotSupportedError), rpc_errors("asked"):
                await stubs.IAMPublicNodesServiceStub(channel).GetAllNodeIDs(Empty(), timeout=5)
            with pytest.raises(DeadlineError), rpc_errors("asked"):
                call_ = stubs.IAMPublicCertServiceStub(channel).SubscribeCertChanged(
                    pb.SubscribeCertChangedRequest(), timeout=0.1
                )
                await call_.read()


async def test_closed_channel_is_an_error_and_no_cancellation() -> None:
    one = server(Certificates())
    async with running(one):
        channel = open_channel(f"127.0.0.1:{one.port}", None)

        async def follow() -> None:
            with rpc_errors("follow"):
                stub = stubs.IAMPublicCertServiceStub(channel)
                await stub.SubscribeCertChanged(pb.SubscribeCertChangedRequest()).read()

        waiting, canceled = asyncio.create_task(follow()), asyncio.create_task(follow())
        await asyncio.sleep(0.05)
        canceled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await canceled
        await channel.close()
        with pytest.raises(UnreachableError, match="follow: the connection was closed"):
            await waiting
        with pytest.raises(FailedError, match="follow: Channel is closed"):
            await follow()


async def test_taken_port_is_an_error() -> None:
    one = server(Certificates())
    async with running(one):
        second = Server(f"127.0.0.1:{one.port}", None, [])
        with pytest.raises(AlreadyExistsError, match=f"127.0.0.1:{one.port}"):
            async with running(second):
                pass


async def test_certificate_keeper_follows_and_misses_nothing(tmp_path: Path) -> None:
    iam = Certificates()
    one = server(iam)
    async with running(one), IamPublicClient(f"127.0.0.1:{one.port}", None) as client:
        assert await client.get_cert("cm") == CertInfo("cm", "file:///a", "file:///b")
        with pytest.raises(FailedError, match="certificate x from IAM"):
            await client.get_cert("x")
        keeper = CertificateKeeper(client, "cm", tmp_path)
        with pytest.raises(NotFoundError):
            _ = keeper.identity
        async with running(keeper):
            with keeper.changed.subscribe() as changes, keeper.iam_returned.subscribe() as returns:
                assert keeper.identity.cert_url == "file:///a"
                iam.changes.put_nowait(pb.CertInfo(type="cm", cert_url="file:///new", key_url="file:///b"))
                assert (await asyncio.wait_for(changes.get(), 5)).cert_url == "file:///new"
                assert returns.empty()
                iam.changes.put_nowait(pb.CertInfo(type="cm"))
                assert (await asyncio.wait_for(changes.get(), 5)).cert_url == "file:///after-break"
                assert returns.get_nowait() == "certificate cm"


@pytest.mark.parametrize(
    ("text", "parts"),
    [(":8090", ("0.0.0.0", 8090)), ("main:1", ("main", 1)), ("[::1]:5", ("::1", 5))],
)
def test_addresses(text: str, parts: tuple[str, int]) -> None:
    assert split_address(text) == parts


@pytest.mark.parametrize("text", ["", "main", "main:", "main:x", "main:99999", ":"])
def test_no_addresses(text: str) -> None:
    with pytest.raises(InvalidArgumentError):
        split_address(text)


@pytest.mark.parametrize("turns", range(4))
async def test_a_stream_ends_for_its_caller_though_its_writer_was_cancelled_in_its_first_write(turns: int) -> None:
    async def serve(requests: AsyncIterator[bytes], context: Any) -> None:
        await begin_answers(context)
        writing = asyncio.ensure_future(context.write(b"x"))
        for _ in range(turns):
            await asyncio.sleep(0)
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)

    def add(server: grpc.aio.Server) -> None:
        method = grpc.stream_stream_rpc_method_handler(serve)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("service", {"method": method}),))

    one = Server("127.0.0.1:0", None, [add])
    async with running(one), open_channel(f"127.0.0.1:{one.port}", None) as channel:
        async with asyncio.timeout(10):
            async for _ in channel.stream_stream("/service/method")():
                pass


@pytest.mark.parametrize(
    ("peer", "host"),
    [
        ("ipv4:10.0.0.2:4711", "10.0.0.2"),
        ("ipv6:%5B::1%5D:4711", "::1"),
        ("ipv6:[::ffff:10.0.0.2]:4711", "10.0.0.2"),
        ("unix:/run/x", ""),
        ("unix:", ""),
    ],
)
def test_host_of_a_caller(peer: str, host: str) -> None:
    class Context:
        def peer(self) -> str:
            return peer

    assert peer_host(Context()) == host


def test_what_is_no_ip_address() -> None:
    with pytest.raises(InvalidArgumentError, match="'main' is no IP"):
        plain_ip("main")
