"""The link of a Secondary Node, against a Main Node that the test plays."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from aoscore._pb.iamanager.v6 import iamanager_pb2 as pb
from aoscore._pb.iamanager.v6 import iamanager_pb2_grpc as stubs
from aoscore.common import convert
from aoscore.common.errors import RuntimeFailure, WrongStateError
from aoscore.common.rpc import Server
from aoscore.common.tls import TlsIdentity, TlsRoots, grpc_server_credentials
from aoscore.common.types import CertInfo, NodeInfo, NodeState, OSInfo
from aoscore.iam.iamclient.client import MainIamClient, Way
from tests.support.iam import free_port
from tests.support.pki import TestCa
from tests.support.running import running, until

INFO = NodeInfo("n2", title="second", os_info=OSInfo("linux"))


class Main(stubs.IAMPublicNodesServiceServicer):
    """RegisterNode of a Main Node: what came goes to `heard`, what is put into `orders` is asked."""

    def __init__(self) -> None:
        self.heard: asyncio.Queue[pb.IAMOutgoingMessages] = asyncio.Queue()
        self.orders: asyncio.Queue[pb.IAMIncomingMessages | None] = asyncio.Queue()
        self.streams = 0
        self.open = 0
        self.serials: list[str] = []
        self.port = free_port()

    async def RegisterNode(self, requests: Any, context: Any) -> None:
        self.streams += 1
        self.open += 1

        async def hear() -> None:
            async for message in requests:
                self.heard.put_nowait(message)

        async def order() -> None:
            while (message := await self.orders.get()) is not None:
                await context.write(message)

        self.serials += [pem.decode() for pem in context.auth_context().get("x509_pem_cert", [])]
        tasks = [asyncio.create_task(hear()), asyncio.create_task(order())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.open -= 1
            for task in tasks:
                task.cancel()

    @contextlib.asynccontextmanager
    async def running(self, credentials: Any = None) -> AsyncIterator["Main"]:
        add = partial(stubs.add_IAMPublicNodesServiceServicer_to_server, self)
        async with running(Server(f"127.0.0.1:{self.port}", credentials, [add])):
            yield self

    async def next(self) -> pb.IAMOutgoingMessages:
        return await asyncio.wait_for(self.heard.get(), 15)

    async def node_info(self) -> NodeInfo:
        message = await self.next()
        assert message.WhichOneof("IAMOutgoingMessage") == "node_info", message
        return convert.node_info_from_pb(message.node_info)

    async def ask(self, **request: Any) -> None:
        await self.orders.put(pb.IAMIncomingMessages(**request))


class Node:
    """The Secondary Node: its info, and its answers to requests."""

    def __init__(self) -> None:
        self.info = INFO
        self.calls: list[str] = []
        self.error: Exception | None = None
        self.go_on = asyncio.Event()
        self.go_on.set()
        self._listener: Callable[[NodeInfo], None] = lambda info: None

    def on_change(self, listener: Callable[[NodeInfo], None]) -> None:
        self._listener = listener

    def set_state(self, state: NodeState) -> None:
        self.info = NodeInfo("n2", title="second", os_info=OSInfo("linux"), state=state)
        self._listener(self.info)

    async def _do(self, what: str, state: NodeState | None = None) -> None:
        self.calls.append(what)
        await self.go_on.wait()
        if self.error:
            raise self.error
        if state is not None:
            self.set_state(state)
        self.calls.append("done")

    async def cert_types(self) -> list[str]:
        return ["iam", "sm"]

    async def start_provisioning(self, password: str) -> None:
        await self._do(f"start {password}")

    async def finish_provisioning(self, password: str) -> None:
        await self._do("finish", NodeState.PROVISIONED)

    async def deprovision(self, password: str) -> None:
        await self._do("deprovision", NodeState.UNPROVISIONED)

    async def pause(self) -> None:
        await self._do("pause", NodeState.PAUSED)

    async def resume(self) -> None:
        await self._do("resume", NodeState.PROVISIONED)

    async def create_key(self, cert_type: str, subject: str) -> str:
        await self._do(f"create {cert_type} {subject}")
        return "csr"

    async def apply_cert(self, cert_type: str, pem: str) -> CertInfo:
        await self._do(f"apply {cert_type} {pem}")
        return CertInfo(cert_type, "file:///c", "file:///k", "0a", b"issuer")


def client(node: Node, *ways: Way, **more: Any) -> MainIamClient:
    return MainIamClient(ways, node, node, pause_s=0.05, **more)  # type: ignore[arg-type]


@pytest.fixture
def main() -> Main:
    return Main()


@pytest.fixture
def node() -> Node:
    return Node()


@pytest.fixture
async def linked(main: Main, node: Node) -> AsyncIterator[Main]:
    """Connected in plain text, the first node_info is heard."""
    async with main.running(), running(client(node, Way(f"127.0.0.1:{main.port}", None))):
        assert await main.node_info() == INFO
        yield main


ERROR = {"error": {"aos_code": 9, "exit_code": 9, "message": "not now"}}
CASES: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any], str]] = [
    (
        {"start_provisioning_request": pb.StartProvisioningRequest(node_id="n2", password="pw")},
        {"start_provisioning_response": pb.StartProvisioningResponse()},
        {"start_provisioning_response": pb.StartProvisioningResponse(**ERROR)},
        "start pw",
    ),
    (
        {"create_key_request": pb.CreateKeyRequest(node_id="x", type="iam", subject="s")},
        {"create_key_response": pb.CreateKeyResponse(node_id="x", type="iam", csr="csr")},
        {"create_key_response": pb.CreateKeyResponse(node_id="x", type="iam", **ERROR)},
        "create iam s",
    ),
    (
        {"apply_cert_request": pb.ApplyCertRequest(node_id="n2", type="iam", cert="pem")},
        {
            "apply_cert_response": pb.ApplyCertResponse(
                node_id="n2",
                cert_info=convert.cert_info_to_pb(CertInfo("iam", "file:///c", "file:///k", "0a", b"issuer")),
            )
        },
        {"apply_cert_response": pb.ApplyCertResponse(node_id="n2", cert_info=pb.CertInfo(type="iam"), **ERROR)},
        "apply iam pem",
    ),
    (
        {"finish_provisioning_request": pb.FinishProvisioningRequest(node_id="n2")},
        {"finish_provisioning_response": pb.FinishProvisioningResponse()},
        {"finish_provisioning_response": pb.FinishProvisioningResponse(**ERROR)},
        "finish",
    ),
    (
        {"deprovision_request": pb.DeprovisionRequest(node_id="n2")},
        {"deprovision_response": pb.DeprovisionResponse()},
        {"deprovision_response": pb.DeprovisionResponse(**ERROR)},
        "deprovision",
    ),
]


@pytest.mark.parametrize(("request_", "answer", "refusal", "call"), CASES, ids=[case[3].split()[0] for case in CASES])
async def test_request_is_done_and_answered(
    linked: Main, node: Node, request_: Any, answer: Any, refusal: Any, call: str
) -> None:
    await linked.ask(**request_)
    assert await linked.next() == pb.IAMOutgoingMessages(**answer)
    assert node.calls == [call, "done"]
    node.error = WrongStateError("not now")
    await linked.ask(**request_)
    assert await linked.next() == pb.IAMOutgoingMessages(**refusal)
    assert linked.heard.empty() and linked.streams == 1


@pytest.mark.parametrize(("order", "state"), [("pause", NodeState.PAUSED), ("resume", NodeState.PROVISIONED)])
async def test_new_state_is_told_before_the_answer(linked: Main, node: Node, order: str, state: NodeState) -> None:
    kind = {"pause": pb.PauseNodeRequest, "resume": pb.ResumeNodeRequest}[order]
    await linked.ask(**{f"{order}_node_request": kind(node_id="n2")})
    assert (await linked.node_info()).state is state
    answer = await linked.next()
    assert answer.WhichOneof("IAMOutgoingMessage") == f"{order}_node_response"
    assert not getattr(answer, f"{order}_node_response").HasField("error")
    node.error = RuntimeFailure("disk", 5)
    await linked.ask(**{f"{order}_node_request": kind(node_id="n2")})
    refusal = getattr(await linked.next(), f"{order}_node_response")
    assert (refusal.error.aos_code, refusal.error.exit_code, refusal.error.message) == (2, 5, "disk")


async def test_cert_types_and_changes_by_others(linked: Main, node: Node) -> None:
    await linked.ask(get_cert_types_request=pb.GetCertTypesRequest(node_id="n2"))
    assert (await linked.next()).cert_types_response.types == ["iam", "sm"]
    node.set_state(NodeState.PAUSED)
    assert (await linked.node_info()).state is NodeState.PAUSED


async def test_requests_are_done_in_their_order(linked: Main, node: Node) -> None:
    node.go_on.clear()
    for cert_type in ("iam", "sm", "cm"):
        await linked.ask(create_key_request=pb.CreateKeyRequest(type=cert_type))
    await until(lambda: node.calls)
    await asyncio.sleep(0.1)
    assert node.calls == ["create iam "]
    node.go_on.set()
    assert [(await linked.next()).create_key_response.type for _ in range(3)] == ["iam", "sm", "cm"]


async def test_unknown_request_drops_the_connection_which_comes_back(linked: Main) -> None:
    await linked.ask()
    assert await linked.node_info() == INFO
    assert linked.streams == 2


async def test_stream_that_ends_is_opened_again(linked: Main, node: Node) -> None:
    await linked.orders.put(None)
    assert await linked.node_info() == INFO
    await linked.ask(get_cert_types_request=pb.GetCertTypesRequest())
    assert (await linked.next()).cert_types_response.types


async def test_what_was_begun_is_done_when_the_link_breaks(main: Main, node: Node) -> None:
    async with running(client(node, Way(f"127.0.0.1:{main.port}", None))):
        async with main.running():
            await main.node_info()
            node.go_on.clear()
            await main.ask(start_provisioning_request=pb.StartProvisioningRequest(password="pw"))
            await until(lambda: node.calls)
        node.go_on.set()
        await until(lambda: node.calls == ["start pw", "done"])
        main.orders = asyncio.Queue()
        async with main.running():
            assert await main.node_info() == INFO


async def test_plain_and_tls_are_tried_in_turn(main: Main, node: Node, authority: TestCa, tmp_path: Path) -> None:
    """The Main Node may be in service already when this one is not (iam.md §8.1)."""
    identity = authority.identity(tmp_path, "main")
    address = f"127.0.0.1:{main.port}"
    ways = [Way(address, None), Way(address, lambda: TlsRoots(identity.ca_file))]
    async with running(client(node, *ways)):
        async with main.running(partial(grpc_server_credentials, lambda: identity, require_client=False)):
            assert await main.node_info() == INFO
        async with main.running():
            assert await main.node_info() == INFO
    assert main.serials == []


async def test_main_node_of_another_unit_gets_nothing(
    main: Main, node: Node, authority: TestCa, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    (tmp_path / "foreign").mkdir()
    foreign = TestCa("foreign").identity(tmp_path / "foreign", "main")
    roots = TlsRoots(authority.write_root(tmp_path))
    async with main.running(partial(grpc_server_credentials, lambda: foreign, require_client=False)):
        ways = [Way(address, lambda: roots) for address in (f"127.0.0.1:{main.port}", "127.0.0.1:1")]
        async with running(client(node, *ways)):
            await until(lambda: caplog.text.count("No link to the Main Node") == 2)
            await asyncio.sleep(0.5)
    assert main.streams == 0
    assert caplog.text.count("No link to the Main Node") == 2, "the same reason is told once for each way"


async def test_new_certificate_is_shown_after_the_answers_have_left(
    main: Main, node: Node, authority: TestCa, tmp_path: Path
) -> None:
    server = authority.identity(tmp_path, "main")
    identity = TlsIdentity(server.ca_file, *authority.issue("old").write(tmp_path, "old"))
    renewals: asyncio.Queue[CertInfo] = asyncio.Queue()

    async def watch() -> AsyncIterator[CertInfo]:
        while True:
            yield await renewals.get()

    way = Way(f"127.0.0.1:{main.port}", lambda: identity)
    async with main.running(partial(grpc_server_credentials, lambda: server)):
        async with running(client(node, way, renewals=watch)):
            await main.node_info()
            node.go_on.clear()
            await main.ask(apply_cert_request=pb.ApplyCertRequest(type="iam", cert="pem"))
            await until(lambda: node.calls)
            identity = TlsIdentity(server.ca_file, *authority.issue("new").write(tmp_path, "new"))
            renewals.put_nowait(CertInfo("iam", "", ""))
            await asyncio.sleep(0.1)
            assert main.open == 1
            node.go_on.set()
            assert (await main.next()).apply_cert_response.cert_info.type == "iam"
            assert await main.node_info() == INFO
            assert main.streams == 2
            old, new = main.serials
            assert old != new
