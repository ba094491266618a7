"""Both MP processes between a test CM, test IAMs and a test SM.

Their link goes through a wire that can be cut, or through vchans over stand-ins for Xen.
"""

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any

import grpc.aio

from aoscore._pb.iamanager.v6 import iamanager_pb2_grpc as iam_stubs
from aoscore.common.rpc import Server, open_channel
from aoscore.common.tls import TlsIdentity, grpc_server_credentials
from aoscore.common.types import CertInfo, NodeInfo
from tests.support.cm import TestCm
from tests.support.fakeiam import TestIam
from tests.support.fakexen import FakeXen
from tests.support.iam import free_port
from tests.support.items import Blobs
from tests.support.pki import TestCa
from tests.support.running import running, until
from tests.support.smbed import Child, child

NODE_ID = "second"
READY_S = 30.0


class Wire:
    """A TCP relay in front of the gateway. `cut` breaks what is connected; while `is_open` is False nobody gets in.

    Everything is held back by `delay_s`. A bit is flipped once so many bytes have passed towards the node, and then
    again after every `spoil_every_bytes`.
    """

    def __init__(self) -> None:
        self.target = 0
        self.port = 0
        self.is_open = True
        self.passed_bytes = 0
        self.connections = 0
        self.spoil_after_bytes: int | None = None
        self.spoil_every_bytes = 0
        self.spoiled = 0
        self.delay_s = 0.0
        self._writers: set[asyncio.StreamWriter] = set()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator["Wire"]:
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            self.cut()

    def cut(self) -> None:
        """Break the connections."""
        for writer in list(self._writers):
            writer.transport.abort()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not self.is_open:
            writer.transport.abort()
            return
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            writer.transport.abort()
            return
        self.connections += 1
        self._writers |= {writer, far_writer}
        try:
            with contextlib.suppress(OSError):
                await asyncio.gather(self._pump(reader, far_writer, False), self._pump(far_reader, writer, True))
        finally:
            for one in (writer, far_writer):
                one.transport.abort()
                self._writers.discard(one)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, to_node: bool) -> None:
        while data := await reader.read(65536):
            if to_node:
                self.passed_bytes += len(data)
                if self.spoil_after_bytes is not None and self.passed_bytes >= self.spoil_after_bytes:
                    every = self.spoil_every_bytes
                    self.spoil_after_bytes = self.passed_bytes + every if every else None
                    self.spoiled += 1
                    data = data[:-1] + bytes([data[-1] ^ 1])
            if self.delay_s:
                await asyncio.sleep(self.delay_s)
            writer.write(data)
            await writer.drain()
        raise ConnectionResetError


class Registration:
    """One RegisterNode stream at main IAM, or one of RegisterSM at a CM of the older kind."""

    def __init__(self) -> None:
        self.messages: list[Any] = []
        self.outbox: asyncio.Queue[Any] = asyncio.Queue()
        self.is_over = False


class MainNodes:
    """RegisterNode of the main IAM, on one port; with the `add` of another interface the same of that."""

    def __init__(
        self,
        credentials: Callable[[], grpc.ServerCredentials] | None,
        add: Callable[[Any, Any], None] = iam_stubs.add_IAMPublicNodesServiceServicer_to_server,
    ) -> None:
        self.streams: list[Registration] = []
        self.server = Server("127.0.0.1:0", credentials, [partial(add, self)])

    async def RegisterNode(self, requests: Any, context: Any) -> AsyncIterator[Any]:
        registration = Registration()
        self.streams.append(registration)

        async def read() -> None:
            async for message in requests:
                registration.messages.append(message)

        reader = asyncio.create_task(read())
        try:
            while True:
                yield await registration.outbox.get()
        finally:
            registration.is_over = True
            reader.cancel()

    RegisterSM = RegisterNode
    # What the generated registration asks for; nobody calls it here.
    GetAllNodeIDs = GetNodeInfo = SubscribeNodeChanged = None


@contextlib.asynccontextmanager
async def mp_process(
    root: Path,
    name: str,
    document: dict[str, Any],
    *,
    provisioning: bool = False,
    env: dict[str, str] | None = None,
    verbosity: str = "debug",
) -> AsyncIterator[Child]:
    """An MP with that configuration, ready; its log is `<root>/<name>.log`."""
    config = root / f"{name}.cfg"
    config.write_text(json.dumps(document))
    program = "from aoscore.mp.app import main; main()"
    words = ["setpriv", "--pdeathsig", "KILL", sys.executable, "-c", program, "-c", str(config), "-v", verbosity]
    async with child(*words, *(["-provisioning"] if provisioning else []), log=root / f"{name}.log", env=env) as one:
        before = one.text().count("MP is ready")
        async with asyncio.timeout(READY_S):
            while one.text().count("MP is ready") == before:
                assert one.process.returncode is None, one.text()
                await asyncio.sleep(0.02)
        yield one


DOMAINS = {"gateway": 1, "node": 2}


def vchan_transport(name: str) -> dict[str, Any]:
    """The section of one end."""
    other = DOMAINS["node" if name == "gateway" else "gateway"]
    paths = {"xsRxPath": "data/vchan/aos/rx", "xsTxPath": "data/vchan/aos/tx"}
    return {"type": "vchan", "peers": [{"domain": other, **paths}]}


class MpBed:
    """See the module text."""

    def __init__(self, root: Path, xen: FakeXen | None = None) -> None:
        self.root = root
        self.xen = xen
        self.verbosity = "debug"
        self.ca = TestCa()
        self.pki = root / "pki"
        self.pki.mkdir()
        self.ca_file = self.ca.write_root(self.pki)
        self._identities: dict[str, TlsIdentity] = {}
        self.blobs = Blobs(root / "blobs")
        self.cm = TestCm(self.identity("main-cm"), self.blobs)
        self.main_iam = self._iam("main")
        self.node_iam = self._iam(NODE_ID)
        server = self.identity("main-iam-server")
        self.open_nodes = MainNodes(partial(grpc_server_credentials, lambda: server, require_client=False))
        self.secure_nodes = MainNodes(partial(grpc_server_credentials, lambda: server))
        self.plain_nodes = MainNodes(None)
        self.wire = Wire()
        self.gateway_port = free_port()
        self.sm_port, self.iam_open_port, self.iam_secure_port, self.blob_port = (free_port() for _ in range(4))
        self.gateway: Child | None = None
        self.node: Child | None = None

    def identity(self, name: str) -> TlsIdentity:
        """A certificate of the Unit. Files that are there stay as they are: processes read them at any time."""
        if name not in self._identities:
            self._identities[name] = TlsIdentity(self.ca_file, *self.ca.issue(name).write(self.pki, name))
        return self._identities[name]

    def certificate(self, kind: str, name: str) -> CertInfo:
        """The same, as IAM hands it out."""
        identity = self.identity(name)
        return CertInfo(kind, identity.cert_url, identity.key_url)

    def _iam(self, node: str) -> TestIam:
        certs = {kind: self.certificate(kind, f"{node}-{kind}") for kind in ("iam", "sm")}
        return TestIam(
            self.identity(f"{node}-iam-server"), NodeInfo(node, node, max_dmips=1000, total_ram=1 << 30), certs
        )

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator["MpBed"]:
        """Everything but the two processes."""
        self.wire.target = self.gateway_port
        servers = [nodes.server for nodes in (self.open_nodes, self.secure_nodes, self.plain_nodes)]
        async with self.main_iam.running(), self.node_iam.running(), self.cm.running(), running(*servers):
            async with self.wire.running():
                yield self

    @contextlib.asynccontextmanager
    async def both(self, *, provisioning: bool = False, **changes: Any) -> AsyncIterator["MpBed"]:
        """Everything, both processes included."""
        async with self.running(), self.run_gateway(provisioning=provisioning, **changes):
            async with self.run_node(provisioning=provisioning, **changes):
                await until(lambda: "Link is up" in (self.root / "gateway.log").read_text(), READY_S)
                yield self

    @contextlib.asynccontextmanager
    async def run_gateway(self, *, provisioning: bool = False, **changes: Any) -> AsyncIterator[Child]:
        """The gateway's process."""
        public = self.plain_nodes if provisioning else self.open_nodes
        document = {
            "caCert": str(self.ca_file),
            "certStorage": "sm",
            "workingDir": str(self.root / "gateway"),
            "iamConfig": {
                "iamPublicServerUrl": f"127.0.0.1:{self.main_iam.public_port}",
                "iamMainPublicServerUrl": f"127.0.0.1:{public.server.port}",
                "iamMainProtectedServerUrl": f"127.0.0.1:{self.secure_nodes.server.port}",
                "certStorage": "iam",
                "openPort": 1,
                "securePort": 2,
            },
            "cmConfig": {"cmServerUrl": f"127.0.0.1:{self.cm.port}", "openPort": 3, "securePort": 4},
            "vchan": {"iamCertStorage": "iam", "smCertStorage": "sm"},
            "transport": {"listen": f"127.0.0.1:{self.gateway_port}"},
            **changes,
        }
        async with self._process("gateway", document, provisioning) as self.gateway:
            yield self.gateway

    @contextlib.asynccontextmanager
    async def _process(self, name: str, document: dict[str, Any], provisioning: bool) -> AsyncIterator[Child]:
        env = None
        if self.xen is not None:
            document["transport"] = vchan_transport(name)
            env = self.xen.environment(DOMAINS[name])
        process = mp_process(self.root, name, document, provisioning=provisioning, env=env, verbosity=self.verbosity)
        async with process as one:
            yield one

    async def kill(self, one: Child) -> None:
        """kill -9, and what the kernel does then."""
        one.kill()
        await one.wait()
        if self.xen is not None:
            self.xen.bury(DOMAINS["gateway" if one is self.gateway else "node"], one.process.pid)

    @contextlib.asynccontextmanager
    async def run_node(self, *, provisioning: bool = False, **changes: Any) -> AsyncIterator[Child]:
        """The node's process."""
        document = {
            "role": "node",
            "caCert": str(self.ca_file),
            "certStorage": "sm",
            "workingDir": str(self.root / "node"),
            "iamConfig": {"iamPublicServerUrl": f"127.0.0.1:{self.node_iam.public_port}"},
            "transport": {"connect": f"127.0.0.1:{self.wire.port}"},
            "node": {
                "cmProxyUrl": f"localhost:{self.sm_port}",
                "iamPublicProxyUrl": f"localhost:{self.iam_open_port}",
                "iamProtectedProxyUrl": f"localhost:{self.iam_secure_port}",
                "blobServerUrl": f"127.0.0.1:{self.blob_port}",
                # The link is tested, not the clock of this machine.
                "clockSync": {"enabled": False},
            },
            "images": {"minFreeSpace": 0},
            **changes,
        }
        async with self._process("node", document, provisioning) as self.node:
            yield self.node

    def iam_channel(self, port: int, *, secure: bool, cert: bool = True) -> grpc.aio.Channel:
        """The node's IAM connects to MP."""
        if not secure:
            return open_channel(f"127.0.0.1:{port}", None)
        identity = self.identity("second-iam-client")
        credentials = identity.grpc_client_credentials() if cert else grpc.ssl_channel_credentials(self.ca.root_pem)
        return open_channel(f"127.0.0.1:{port}", credentials, name="localhost")

    def blob_url(self, digest: str) -> str:
        """Where the node's SM gets a blob."""
        return f"http://127.0.0.1:{self.blob_port}/sha256/{digest.removeprefix('sha256:')}"

    def logs(self) -> str:
        """Of both processes, for a failure."""
        return "\n".join(path.read_text() for path in self.root.glob("*.log"))
