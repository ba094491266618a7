"""gRPC with TLS by stdlib ssl: the way of keys on tokens, here with keys in files so that no token is needed."""

import asyncio
import fcntl
import os
import socket
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from aoscore._pb.iamanager.v6 import iamanager_pb2 as pb
from aoscore._pb.iamanager.v6 import iamanager_pb2_grpc as stubs
from aoscore.common import relay
from aoscore.common.errors import AlreadyExistsError, DeadlineError, FailedError, NotFoundError
from aoscore.common.rpc import (
    LazyChannel,
    Server,
    open_channel,
    open_tls_channel,
    peer_address,
    peer_certificate,
    rpc_errors,
)
from aoscore.common.tls import TlsIdentity, TlsRoots, grpc_server_credentials
from tests.support.pki import TestCa, relayed
from tests.support.running import running, until


class Certificates(stubs.IAMPublicCertServiceServicer):
    """Answers with who asks, and as much as is asked for."""

    def __init__(self) -> None:
        self.go_on = asyncio.Event()

    async def GetCert(self, request: pb.GetCertRequest, context: Any) -> pb.CertInfo:
        certificate = peer_certificate(context)
        name = "" if certificate is None else certificate.subject.rfc4514_string()
        padding = bytes(int(request.serial or 0))
        return pb.CertInfo(type=name, cert_url=peer_address(context), serial=padding)

    async def SubscribeCertChanged(self, request: Any, context: Any) -> AsyncIterator[pb.CertInfo]:
        yield pb.CertInfo(type="first")
        await self.go_on.wait()
        yield pb.CertInfo(type="second")


def make_server(
    identity: Callable[[], TlsIdentity], servicer: Certificates | None = None, port: int = 0, **more: Any
) -> Server:
    add = partial(stubs.add_IAMPublicCertServiceServicer_to_server, servicer or Certificates())
    return Server(f"127.0.0.1:{port}", lambda: grpc_server_credentials(identity, **more), [add])


async def ask(channel: grpc.aio.Channel, size: int = 0, padding: bytes = b"") -> pb.CertInfo:
    with rpc_errors("GetCert"):
        request = pb.GetCertRequest(type="cm", serial=str(size), issuer=padding)
        answer: pb.CertInfo = await stubs.IAMPublicCertServiceStub(channel).GetCert(request, timeout=10)
        return answer


@pytest.fixture
def ca() -> TestCa:
    return TestCa()


async def ask_once(address: str, tls: TlsRoots) -> pb.CertInfo:
    channel = await open_tls_channel(address, tls)
    try:
        return await ask(channel)
    finally:
        await channel.close()


@pytest.mark.parametrize("client_way", [relayed, lambda identity: identity], ids=["relay", "grpc"])
@pytest.mark.parametrize("server_way", [relayed, lambda identity: identity], ids=["relay", "grpc"])
async def test_all_combinations_understand_each_other(
    client_way: Callable[[TlsIdentity], TlsIdentity],
    server_way: Callable[[TlsIdentity], TlsIdentity],
    ca: TestCa,
    tmp_path: Path,
) -> None:
    serving = server_way(ca.identity(tmp_path, "server", ("main",)))
    async with running(one := make_server(lambda: serving)):
        channel = await open_tls_channel(f"127.0.0.1:{one.port}", client_way(ca.identity(tmp_path, "client")))
        answers = await asyncio.gather(*(ask(channel) for _ in range(50)))
        assert {answer.type for answer in answers} == {"CN=client"}
        assert answers[0].cert_url.startswith("ipv4:127.0.0.1:")
        # More than all buffers hold, both ways, while others go on.
        big = 3 * 1024 * 1024
        answer, _ = await asyncio.gather(ask(channel, big, bytes(big)), ask(channel))
        assert len(answer.serial) == big
        await channel.close()
    assert not relay._peers


async def test_who_gets_in(ca: TestCa, tmp_path: Path) -> None:
    foreign = TestCa("Foreign")
    for name in ("foreign", "other"):
        (tmp_path / name).mkdir()
    serving = relayed(ca.identity(tmp_path, "server"))
    client = ca.identity(tmp_path, "client")
    stranger = foreign.identity(tmp_path / "foreign", "stranger")
    stranger = TlsIdentity(client.ca_file, stranger.cert_url, stranger.key_url)
    wrong_root = TlsIdentity(foreign.write_root(tmp_path / "other"), client.cert_url, client.key_url)
    async with running(one := make_server(lambda: serving)):
        address = f"127.0.0.1:{one.port}"
        for refused in (stranger, relayed(stranger), TlsRoots(client.ca_file)):
            with pytest.raises(FailedError):
                await ask_once(address, refused)
        for refused in (wrong_root, relayed(wrong_root)):
            with pytest.raises(FailedError, match=f"TLS with {address} failed: CERTIFICATE_VERIFY_FAILED"):
                await ask_once(address, refused)
        async with open_channel(address, None) as channel:
            with pytest.raises(FailedError):
                await ask(channel)
        assert (await ask_once(address, client)).type == "CN=client"
    async with running(one := make_server(lambda: serving, require_client=False)):
        assert (await ask_once(f"127.0.0.1:{one.port}", TlsRoots(client.ca_file))).type == ""


@pytest.mark.parametrize("begin_days", [-100, 100])
async def test_inside_the_unit_times_of_certificates_do_not_count(ca: TestCa, tmp_path: Path, begin_days: int) -> None:
    """Expired while there was no cloud, or a node without a clock: who is of our Unit gets in all the same."""
    begin = datetime.now(UTC) + timedelta(days=begin_days)

    def identity(name: str) -> TlsIdentity:
        urls = ca.issue(name, (name,), not_before=begin, lifetime=timedelta(days=30)).write(tmp_path, name)
        return relayed(TlsIdentity(ca.write_root(tmp_path), *urls))

    serving, client = identity("server"), identity("client")
    async with running(one := make_server(lambda: serving)):
        assert (await ask_once(f"127.0.0.1:{one.port}", client)).type == "CN=client"
    async with running(one := make_server(lambda: serving, require_client=False)):
        address = f"127.0.0.1:{one.port}"
        assert (await ask_once(address, TlsRoots(client.ca_file))).type == ""
        # The cloud's certificate is another matter.
        with pytest.raises(ssl.SSLCertVerificationError, match=r"expired|not yet valid"):
            await asyncio.open_connection(
                "127.0.0.1", one.port, ssl=client.ssl_client_context(), server_hostname="server"
            )


async def test_renewal_cuts_nobody_off(ca: TestCa, tmp_path: Path) -> None:
    client = relayed(ca.identity(tmp_path, "client"))
    current = relayed(ca.identity(tmp_path, "old", ("old",)))
    servicer = Certificates()

    def served(port: int) -> str:
        with socket.create_connection(("127.0.0.1", port)) as sock:
            with client.ssl_client_context(check_hostname=False).wrap_socket(sock) as tls:
                certificate = tls.getpeercert()
        assert certificate is not None
        return str(certificate["subjectAltName"][0][1])  # type: ignore[index]

    async with running(one := make_server(lambda: current, servicer)):
        channel = await open_tls_channel(f"127.0.0.1:{one.port}", client)
        stream = stubs.IAMPublicCertServiceStub(channel).SubscribeCertChanged(pb.SubscribeCertChangedRequest())
        assert (await stream.read()).type == "first"
        current = relayed(ca.identity(tmp_path, "new", ("new",)))
        assert await asyncio.to_thread(served, one.port) == "new"
        await ask(channel)
        # One that can't be used keeps the last good one.
        current = relayed(TlsIdentity(current.ca_file, "file:///nowhere", current.key_url))
        assert await asyncio.to_thread(served, one.port) == "new"
        servicer.go_on.set()
        assert (await stream.read()).type == "second", "the stream from before the renewal goes on"
        await channel.close()


async def test_server_survives_that_its_certificate_is_gone_for_a_while(ca: TestCa, tmp_path: Path) -> None:
    client = relayed(ca.identity(tmp_path, "client"))
    known: list[TlsIdentity] = [relayed(ca.identity(tmp_path, "server"))]

    def identity() -> TlsIdentity:
        if not known:
            raise NotFoundError("there is no certificate")
        return known[0]

    async with running(one := make_server(identity)):
        kept = known.pop()
        with pytest.raises(FailedError):
            await ask_once(f"127.0.0.1:{one.port}", client)
        known.append(kept)
        assert (await ask_once(f"127.0.0.1:{one.port}", client)).type == "CN=client"


async def test_server_whose_certificate_can_not_be_used_does_not_start(ca: TestCa, tmp_path: Path) -> None:
    broken = relayed(TlsIdentity(ca.write_root(tmp_path), "file:///nowhere", "file:///nowhere"))
    with pytest.raises(FailedError, match="can't use certificate file:///nowhere"):
        async with running(make_server(lambda: broken)):
            pass


async def test_port_that_is_taken(ca: TestCa, tmp_path: Path) -> None:
    """Two servers must never share a port (observed.md, defect 7)."""
    identity = relayed(ca.identity(tmp_path, "server"))
    async with running(one := make_server(lambda: identity)):
        for way in (relayed, lambda same: TlsIdentity(same.ca_file, same.cert_url, same.key_url)):
            with pytest.raises(AlreadyExistsError, match=f"can't listen on 127.0.0.1:{one.port}"):
                async with running(make_server(partial(way, identity), port=one.port)):
                    pass


async def test_server_that_goes_and_comes(ca: TestCa, tmp_path: Path) -> None:
    identity = relayed(ca.identity(tmp_path, "server"))
    client = relayed(ca.identity(tmp_path, "client"))

    async def call(channel: LazyChannel) -> None:
        await channel.call(
            "asked", stubs.IAMPublicCertServiceStub, "GetCert", pb.GetCertRequest(type="cm"), timeout_s=10
        )

    async with running(one := make_server(lambda: identity)):
        channel = LazyChannel(f"127.0.0.1:{one.port}", lambda: client)
        await call(channel)
    for _ in range(2):
        with pytest.raises(FailedError, match=r"can't connect to|asked"):
            await call(channel)
    async with running(make_server(lambda: identity, port=one.port)):
        await call(channel)
        await channel.drop()


async def test_peers_that_say_nothing_or_nonsense_hold_up_nobody(
    ca: TestCa, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay, "_MAX_THREADS", 1)
    monkeypatch.setattr(relay, "_HANDSHAKE_LIMIT_S", 2.0)
    identity = relayed(ca.identity(tmp_path, "server"))
    async with running(one := make_server(lambda: identity)):
        silent = [socket.create_connection(("127.0.0.1", one.port)) for _ in range(20)]
        for sock in silent[:2]:
            sock.send(b"GET / HTTP/1.1\r\n\r\n")
        assert (await ask_once(f"127.0.0.1:{one.port}", relayed(ca.identity(tmp_path, "client")))).type == "CN=client"
        # Their time is over at last.
        for sock in silent:
            sock.settimeout(10)
            await asyncio.to_thread(end_of, sock)
            sock.close()


def end_of(sock: socket.socket) -> None:
    try:
        while sock.recv(4096):
            pass
    except ConnectionError:
        pass


async def test_token_that_hangs_is_told_and_does_not_block(
    ca: TestCa, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Foreign code in the middle of a handshake: the connection fails in time, and the loop turns meanwhile."""
    release = asyncio.Event()
    loop = asyncio.get_running_loop()

    original = ssl.SSLSocket.do_handshake

    def hang(self: ssl.SSLSocket, block: bool = False) -> None:
        asyncio.run_coroutine_threadsafe(release.wait(), loop).result()
        original(self, block)

    monkeypatch.setattr(relay, "_HANDSHAKE_LIMIT_S", 0.5)
    client = relayed(ca.identity(tmp_path, "client"))
    async with running(one := make_server(lambda: client)):
        with monkeypatch.context() as patch:
            patch.setattr(ssl.SSLSocket, "do_handshake", hang)
            with pytest.raises(DeadlineError, match=f"no TLS answer from 127.0.0.1:{one.port} within 0.5 s"):
                await open_tls_channel(f"127.0.0.1:{one.port}", client)
        release.set()
        monkeypatch.setattr(relay, "_HANDSHAKE_LIMIT_S", 10.0)
        assert (await ask_once(f"127.0.0.1:{one.port}", client)).type == "CN=client"


async def test_nobody_else_uses_our_connection(ca: TestCa, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    identity = relayed(ca.identity(tmp_path, "server"))
    async with running(one := make_server(lambda: identity)):
        back = await relay.TlsBack.open("127.0.0.1", one.port, identity)
        name = back.target.removeprefix("unix-abstract:")
        code = f"import socket; s = socket.socket(socket.AF_UNIX); s.connect('\\0{name}'); print(s.recv(1))"
        other = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=subprocess.PIPE)
        assert (await other.communicate())[0] == b"b''\n"
        assert f"Another process tried to use our TLS connection: pid={other.pid}" in caplog.text
        await back.close()


async def test_a_connection_that_says_nothing_ends(ca: TestCa, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "_FIRST_WORD_LIMIT_S", 0.05)
    identity = relayed(ca.identity(tmp_path, "server"))
    async with running(one := make_server(lambda: identity)):
        async with relay.tls_pipe("127.0.0.1", one.port, identity.ssl_client_context(check_hostname=False)) as silent:
            assert await asyncio.wait_for(asyncio.get_running_loop().sock_recv(silent, 1), 5) == b""
        assert not relay._peers


async def test_nothing_is_left_behind(ca: TestCa, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    # That of a process that was killed goes too, and one that is new or in use stays.
    killed, new, used = (tmp_path / "tmp" / f"aos-tls-{name}" for name in ("killed", "new", "used"))
    for path in (killed, new, used):
        path.mkdir()
    for path in (killed, used):
        os.utime(path, (0, 0))
    held = os.open(used, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    relay._remove_abandoned()
    assert not killed.exists() and new.exists() and used.exists()
    os.close(held)
    new.rmdir()
    used.rmdir()
    identity = relayed(ca.identity(tmp_path, "server"))
    async with running(one := make_server(lambda: identity)):
        (directory,) = (tmp_path / "tmp").iterdir()
        assert directory.stat().st_mode & 0o777 == 0o700
        channel = await open_tls_channel(f"127.0.0.1:{one.port}", identity)
        await ask(channel)
        assert [path.name for path in directory.iterdir()] == ["grpc"]
        await channel.close()
        await until(lambda: not relay._peers)
    assert not list((tmp_path / "tmp").iterdir())


async def test_root_file_is_missing(ca: TestCa, tmp_path: Path) -> None:
    identity = ca.identity(tmp_path, "client")
    lost = relayed(TlsIdentity(tmp_path / "nowhere.pem", identity.cert_url, identity.key_url))
    with pytest.raises(NotFoundError, match=r"nowhere\.pem does not exist"):
        await open_tls_channel("127.0.0.1:1", lost)
