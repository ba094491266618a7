"""RegisterNode streams, over a real gRPC server on loopback; Nodes are played by the test."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from aoscore._pb.iamanager.v6 import iamanager_pb2 as pb
from aoscore._pb.iamanager.v6 import iamanager_pb2_grpc as stubs
from aoscore.common import convert
from aoscore.common.aio import ChangeFeed
from aoscore.common.certs import key_digest
from aoscore.common.keys import private_key_pem
from aoscore.common.rpc import Server
from aoscore.common.tls import grpc_server_credentials
from aoscore.common.types import NodeInfo, NodeState, OSInfo
from aoscore.iam.database import IamDatabase
from aoscore.iam.iamserver import nodecontroller
from aoscore.iam.iamserver.admission import Evidence, Port
from aoscore.iam.iamserver.nodecontroller import NodeController
from aoscore.iam.iamserver.nodelink import UnreachableError
from aoscore.iam.iamserver.peer import Peer
from aoscore.iam.iamserver.public import NodesService
from aoscore.iam.iamserver.services import PUBLIC_LIMITS
from aoscore.iam.nodekeys import NodeKeys
from aoscore.iam.nodemanager import NodeManager
from tests.support.pki import Issued, TestCa
from tests.support.running import running, until

LINUX = OSInfo("linux")


def info(node_id: str, state: NodeState = NodeState.PROVISIONED, title: str = "") -> NodeInfo:
    return NodeInfo(node_id, title=title, state=state, os_info=LINUX)


class Node:
    """A Node's end of a stream."""

    def __init__(self, call: Any) -> None:
        self.call = call

    async def tell(self, node: NodeInfo) -> None:
        # A stream may be refused before it has said anything; its status tells.
        with contextlib.suppress(grpc.aio.AioRpcError):
            await self.call.write(pb.IAMOutgoingMessages(node_info=convert.node_info_to_pb(node)))

    async def asked(self) -> str:
        message = await asyncio.wait_for(self.call.read(), 10)
        return str(message.WhichOneof("IAMIncomingMessage"))

    async def end(self) -> grpc.StatusCode:
        """The status with which the Main Node ends the stream."""
        async with asyncio.timeout(10):
            return await self.call.code()


class Bench:
    """A Main Node n1 with both ports; the protected one with mutual TLS."""

    def __init__(self, database: IamDatabase, authority: TestCa, directory: Path) -> None:
        self.database = database
        self.authority = authority
        self.identity = authority.identity(directory, "main")
        self.nodes = NodeManager(database, NodeInfo("n1", os_info=LINUX))
        self.keys = NodeKeys(database)
        self.local = b""
        self.learn_keys = False
        self._stack = contextlib.AsyncExitStack()

    async def evidence(self, peer: Peer) -> Evidence:
        if not peer.key:
            return Evidence()
        return Evidence(
            present=True,
            local=peer.key == self.local,
            owner=self.keys.owner(peer.key),
            same_unit="unit-1" in peer.names,
        )

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator["Bench"]:
        self.controller = NodeController(
            self.nodes, self.keys, "n1", evidence=self.evidence, learn_keys=self.learn_keys
        )
        add = stubs.add_IAMPublicNodesServiceServicer_to_server
        public, protected = (
            [partial(add, NodesService(self.nodes, self.controller, port))] for port in (Port.PUBLIC, Port.PROTECTED)
        )
        self.public = Server("127.0.0.1:0", None, public, options=PUBLIC_LIMITS)
        self.protected = Server("127.0.0.1:0", partial(grpc_server_credentials, lambda: self.identity), protected)
        self.plain = Server("127.0.0.1:0", None, protected)
        async with running(self.public, self.protected, self.plain), self._stack:
            yield self

    async def _open(self, channel: grpc.aio.Channel) -> Node:
        await self._stack.enter_async_context(channel)
        return Node(stubs.IAMPublicNodesServiceStub(channel).RegisterNode())  # type: ignore[no-untyped-call]

    async def on_public(self) -> Node:
        return await self._open(grpc.aio.insecure_channel(f"127.0.0.1:{self.public.port}"))

    async def on_plain_protected(self) -> Node:
        return await self._open(grpc.aio.insecure_channel(f"127.0.0.1:{self.plain.port}"))

    async def on_protected(self, issued: Issued) -> Node:

        credentials = grpc.ssl_channel_credentials(self.authority.root_pem, private_key_pem(issued.key), issued.pem)
        options = [("grpc.ssl_target_name_override", "localhost")]
        return await self._open(
            grpc.aio.secure_channel(f"127.0.0.1:{self.protected.port}", credentials, options=options)
        )

    def certificate(self, node_id: str = "", name: str = "unit-1") -> Issued:
        issued = self.authority.issue(name)
        if node_id:
            self.keys._owners[key_digest(issued.cert)] = node_id
        return issued

    async def connected(self, node_id: str) -> None:
        await until(lambda: node_id in self.nodes._connected)

    async def gone(self, node_id: str) -> None:
        await until(lambda: node_id not in self.nodes._connected)


@pytest.fixture
async def bench(database: IamDatabase, authority: TestCa, tmp_path: Path) -> AsyncIterator[Bench]:
    async with Bench(database, authority, tmp_path).running() as bench:
        yield bench


async def test_unprovisioned_node_on_the_public_port(bench: Bench) -> None:
    node = await bench.on_public()
    await node.tell(info("n2", NodeState.UNPROVISIONED))
    await bench.connected("n2")
    assert bench.nodes.ids() == ["n1", "n2"]
    link = bench.controller.link("n2")
    message = pb.IAMIncomingMessages(pause_node_request=pb.PauseNodeRequest(node_id="n2"))
    asking = asyncio.create_task(link.request(message, "pause_node_response", limit_s=10, remaining_s=None))
    assert await node.asked() == "pause_node_request"
    await node.call.write(pb.IAMOutgoingMessages())
    await node.call.write(pb.IAMOutgoingMessages(resume_node_response=pb.ResumeNodeResponse()))
    await node.call.write(pb.IAMOutgoingMessages(pause_node_response=pb.PauseNodeResponse()))
    await asking
    await node.call.write(pb.IAMOutgoingMessages(pause_node_response=pb.PauseNodeResponse()))
    await node.tell(info("n2", NodeState.UNPROVISIONED, title="new"))
    await until(lambda: bench.nodes.get("n2").title == "new")
    await node.call.done_writing()
    assert await node.end() is grpc.StatusCode.OK
    await bench.gone("n2")
    with pytest.raises(UnreachableError, match="'n2' is not connected"):
        bench.controller.link("n2")
    with pytest.raises(UnreachableError, match="'n9' is not known"):
        bench.controller.link("n9")


async def test_node_with_its_certificate_on_the_protected_port(bench: Bench) -> None:
    node = await bench.on_protected(bench.certificate("n2"))
    await node.tell(info("n2"))
    await bench.connected("n2")
    assert [one.node_id for one in await bench.database.nodes()] == ["n2"]


async def test_state_on_the_wrong_port_is_ignored_and_the_stream_stays(bench: Bench) -> None:
    public, protected = await bench.on_public(), await bench.on_protected(bench.certificate("n3"))
    await public.tell(info("n2"))
    await protected.tell(info("n3", NodeState.UNPROVISIONED))
    await public.tell(info("n2", NodeState.UNPROVISIONED))
    await protected.tell(info("n3"))
    await bench.connected("n2")
    await bench.connected("n3")
    await public.tell(info("n2"))
    await bench.gone("n2")
    assert bench.nodes.get("n2").state is NodeState.UNPROVISIONED
    assert not public.call.done()


async def test_defect_8_certificate_of_one_node_cannot_register_another(bench: Bench) -> None:
    """Any certificate of the Unit's CA could register any node id (observed.md, defect 8)."""
    mine, other = bench.certificate("n2"), bench.certificate("n3")
    node = await bench.on_protected(mine)
    await node.tell(info("n2"))
    await bench.connected("n2")
    for certificate in (other, bench.certificate(), bench.certificate(name="someone")):
        thief = await bench.on_protected(certificate)
        await thief.tell(info("n2", title="stolen"))
        assert await thief.end() is grpc.StatusCode.PERMISSION_DENIED
    plain = await bench.on_plain_protected()
    await plain.tell(info("n2", title="stolen"))
    assert await plain.end() is grpc.StatusCode.PERMISSION_DENIED
    stranger = await bench.on_protected(bench.certificate(name="other unit"))
    await stranger.tell(info("n4"))
    assert await stranger.end() is grpc.StatusCode.PERMISSION_DENIED
    assert bench.nodes.ids() == ["n1", "n2"] and bench.nodes.get("n2").title == ""
    await bench.connected("n2")


async def test_first_key_of_a_node_of_9_1_is_taken_on_trust_and_then_binds(bench: Bench) -> None:
    certificate = bench.certificate()
    node = await bench.on_protected(certificate)
    await node.tell(info("n2"))
    await bench.connected("n2")
    assert await bench.database.node_keys() == {key_digest(certificate.cert): "n2"}
    other = await bench.on_protected(bench.certificate())
    await other.tell(info("n2"))
    assert await other.end() is grpc.StatusCode.PERMISSION_DENIED
    for_n3 = await bench.on_protected(certificate)
    await for_n3.tell(info("n3"))
    assert await for_n3.end() is grpc.StatusCode.PERMISSION_DENIED


async def test_keys_can_be_learned_anew(database: IamDatabase, authority: TestCa, tmp_path: Path) -> None:
    bench = Bench(database, authority, tmp_path)
    bench.learn_keys = True
    async with bench.running():
        bench.certificate("n2")
        node = await bench.on_protected(bench.certificate())
        await node.tell(info("n2"))
        await bench.connected("n2")


async def test_gateway_of_the_main_node_speaks_for_all_nodes_but_not_for_the_main_node(bench: Bench) -> None:
    gateway = bench.certificate()
    bench.local = key_digest(gateway.cert)
    for node_id in ("n2", "n3"):
        node = await bench.on_protected(gateway)
        await node.tell(info(node_id))
        await bench.connected(node_id)
    node = await bench.on_protected(gateway)
    await node.tell(info("n1"))
    assert await node.end() is grpc.StatusCode.PERMISSION_DENIED
    assert bench.nodes.get("n1").state is NodeState.UNPROVISIONED


async def test_only_the_stream_that_holds_a_node_makes_it_disconnected(bench: Bench) -> None:
    certificate = bench.certificate("n2")
    older, newer = await bench.on_protected(certificate), await bench.on_protected(certificate)
    await older.tell(info("n2", title="older"))
    await until(lambda: bench.nodes.find("n2") and bench.nodes.get("n2").title == "older")
    held = bench.controller.link("n2")
    await newer.tell(info("n2", title="newer"))
    await until(lambda: bench.controller.link("n2") is not held)
    older.call.cancel()
    watching: ChangeFeed[str, NodeInfo] = bench.nodes.changes
    changes = watching.values()
    await anext(changes)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(anext(changes), 0.2)
    assert "n2" in bench.nodes._connected
    newer.call.cancel()
    await bench.gone("n2")


async def test_node_in_service_that_shows_up_as_new_is_kept_aside(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    await bench.nodes.connect(info("n2"))
    await bench.nodes.disconnect("n2")
    bench.certificate("n2")
    node = await bench.on_public()
    for _ in range(3):
        await node.tell(info("n2", NodeState.UNPROVISIONED))
    await until(lambda: "n2" in bench.controller._aside)
    with pytest.raises(UnreachableError, match="in service but shows up as new"):
        bench.controller.link("n2")
    assert bench.nodes.get("n2").state is NodeState.PROVISIONED
    assert [one.node_id for one in await bench.database.nodes()] == ["n2"]
    assert [record.levelname for record in caplog.records if "shows up as new" in record.message] == ["ERROR"]
    assert not await bench.controller.readmit("n3")
    assert await bench.controller.readmit("n2")
    assert bench.nodes.get("n2").state is NodeState.UNPROVISIONED
    assert not bench.keys.knows("n2") and await bench.database.nodes() == []
    bench.controller.link("n2")
    node.call.cancel()
    await bench.gone("n2")


async def test_node_set_aside_that_leaves_is_forgotten(bench: Bench) -> None:
    await bench.nodes.connect(info("n2"))
    await bench.nodes.disconnect("n2")
    node = await bench.on_public()
    await node.tell(info("n2", NodeState.UNPROVISIONED))
    await until(lambda: "n2" in bench.controller._aside)
    node.call.cancel()
    await until(lambda: "n2" not in bench.controller._aside)
    assert not await bench.controller.readmit("n2")


async def test_connected_node_in_service_cannot_be_displaced_from_the_public_port(bench: Bench) -> None:
    node = await bench.on_protected(bench.certificate("n2"))
    await node.tell(info("n2"))
    await bench.connected("n2")
    for node_id in ("n2", "n1"):
        thief = await bench.on_public()
        await thief.tell(info(node_id, NodeState.UNPROVISIONED))
        assert await thief.end() is grpc.StatusCode.PERMISSION_DENIED
    assert "n2" in bench.nodes._connected


async def test_unprovisioned_node_keeps_its_stream_against_another_address(bench: Bench) -> None:
    node = await bench.on_public()
    await node.tell(info("n2", NodeState.UNPROVISIONED))
    await bench.connected("n2")
    held = bench.controller.link("n2")
    held.host = "ipv4:10.0.0.9"
    thief = await bench.on_public()
    await thief.tell(info("n2", NodeState.UNPROVISIONED))
    assert await thief.end() is grpc.StatusCode.PERMISSION_DENIED
    assert bench.controller.link("n2") is held
    held.host = "ipv4:127.0.0.1"
    again = await bench.on_public()
    await again.tell(info("n2", NodeState.UNPROVISIONED))
    await until(lambda: bench.controller.link("n2") is not held)


async def test_a_stream_shows_one_node(bench: Bench) -> None:
    node = await bench.on_public()
    await node.tell(info("n2", NodeState.UNPROVISIONED))
    await bench.connected("n2")
    await node.tell(info("n3", NodeState.UNPROVISIONED))
    assert await node.end() is grpc.StatusCode.PERMISSION_DENIED
    await bench.gone("n2")
    assert bench.nodes.ids() == ["n1", "n2"]


async def test_broken_node_info_ends_the_stream(bench: Bench) -> None:
    node = await bench.on_public()
    await node.call.write(pb.IAMOutgoingMessages(node_info=pb.NodeInfo(node_id="n2", state="asleep")))
    assert await node.end() is grpc.StatusCode.INTERNAL
    large = await bench.on_public()
    await large.tell(info("n2", NodeState.UNPROVISIONED, title="x" * 70_000))
    assert await large.end() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert bench.nodes.ids() == ["n1"]


async def test_public_port_has_room_for_so_many_streams(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodecontroller, "MAX_PUBLIC_STREAMS_OF_PEER", 3)
    nodes = []
    for number in range(3):
        nodes.append(await bench.on_public())
        await nodes[-1].tell(info(f"m{number}", NodeState.UNPROVISIONED))
        await bench.connected(f"m{number}")
    # It says nothing: it may be refused before it can.
    surplus = await bench.on_public()
    assert await surplus.end() is grpc.StatusCode.RESOURCE_EXHAUSTED
    protected = await bench.on_protected(bench.certificate("n2"))
    await protected.tell(info("n2"))
    await bench.connected("n2")
    nodes[0].call.cancel()
    await bench.gone("m0")
    again = await bench.on_public()
    await again.tell(info("more", NodeState.UNPROVISIONED))
    await bench.connected("more")
    assert bench.controller._public_streams.total() == 3


async def test_who_opens_a_stream_and_says_nothing_is_sent_away(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodecontroller, "FIRST_MESSAGE_TIMEOUT_S", 0.05)
    node = await bench.on_public()
    assert await node.end() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_silent_node_loses_its_stream(bench: Bench) -> None:
    node = await bench.on_public()
    await node.tell(info("n2", NodeState.UNPROVISIONED))
    await bench.connected("n2")
    message = pb.IAMIncomingMessages(pause_node_request=pb.PauseNodeRequest(node_id="n2"))
    with pytest.raises(UnreachableError, match="did not answer"):
        await bench.controller.link("n2").request(message, "pause_node_response", limit_s=0.05, remaining_s=None)
    assert await node.asked() == "pause_node_request"
    assert await node.end() is grpc.StatusCode.INTERNAL
    await bench.gone("n2")
