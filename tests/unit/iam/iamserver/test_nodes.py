"""Requests to this Node and to others, and what becomes of the answers."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from aoscore._pb.common.v2 import common_pb2 as common
from aoscore._pb.iamanager.v6 import iamanager_pb2 as pb
from aoscore.common.errors import AosError, FailedError, InvalidArgumentError, NotFoundError, WrongStateError
from aoscore.common.types import NodeInfo, NodeState, OSInfo, SystemInfo
from aoscore.iam.certhandler.csr import build_csr
from aoscore.iam.database import IamDatabase
from aoscore.iam.iamserver.admission import Evidence, Port
from aoscore.iam.iamserver.nodecontroller import NodeController
from aoscore.iam.iamserver.nodelink import NodeLink, UnreachableError
from aoscore.iam.iamserver.nodes import LocalNode, NodeRouter, RemoteNode, raise_error
from aoscore.iam.iamserver.peer import Peer
from aoscore.iam.nodekeys import NodeKeys, request_digest
from aoscore.iam.nodemanager import NodeManager

LINUX = OSInfo("linux")
STATES = {
    "pause": NodeState.PAUSED,
    "resume": NodeState.PROVISIONED,
    "finish_provisioning": NodeState.PROVISIONED,
    "deprovision": NodeState.UNPROVISIONED,
}


class Certs:
    async def create_key(self, cert_type: str, subject: str) -> str:
        return f"{cert_type} of {subject}"


class Identifier:
    async def system_info(self) -> SystemInfo:
        return SystemInfo("unit")


def local(identifier: Identifier | None) -> LocalNode:
    return LocalNode(None, Certs(), identifier)  # type: ignore[arg-type]


def test_empty_id_and_own_id_are_this_node() -> None:
    here = local(None)
    asked: list[tuple[str, float | None]] = []

    def remote(node_id: str, remaining_s: float | None) -> Any:
        asked.append((node_id, remaining_s))
        return "remote"

    router = NodeRouter(SimpleNamespace(info=NodeInfo("n1")), here, remote)  # type: ignore[arg-type]
    context = SimpleNamespace(time_remaining=lambda: 7.5)
    assert router.of("", context) is here and router.of("n1", context) is here and not asked
    for other in ("n2", "N1", "n1 "):
        assert router.of(other, context) == "remote"
    assert asked == [("n2", 7.5), ("N1", 7.5), ("n1 ", 7.5)]


async def test_empty_subject_is_the_system_id() -> None:
    assert await local(Identifier()).create_key("cm", "") == "cm of unit"
    assert await local(Identifier()).create_key("cm", "other") == "cm of other"
    assert await local(None).create_key("cm", "other") == "cm of other"
    with pytest.raises(NotFoundError, match="no identifier"):
        await local(None).create_key("cm", "")


@pytest.mark.parametrize(
    ("message", "error"),
    [
        (common.ErrorInfo(aos_code=9, message="not now"), WrongStateError),
        (common.ErrorInfo(exit_code=5, message="disk"), AosError),
        (common.ErrorInfo(message="words only"), FailedError),
    ],
)
def test_any_member_makes_it_an_error(message: common.ErrorInfo, error: type[AosError]) -> None:
    with pytest.raises(error, match=message.message):
        raise_error(message)
    raise_error(common.ErrorInfo())


class Bench:
    """Node n2, in service and connected unless said otherwise; `answers` are what it says to each request."""

    def __init__(self, database: IamDatabase) -> None:
        self.database = database
        self.nodes = NodeManager(database, NodeInfo("n1", os_info=LINUX))
        self.keys = NodeKeys(database)

        async def evidence(peer: Peer) -> Evidence:
            return Evidence()

        self.controller = NodeController(self.nodes, self.keys, "n1", evidence=evidence)
        self.link = NodeLink(Port.PROTECTED)
        self.link.node_id = "n2"
        self.controller._links["n2"] = self.link
        self.asked: list[pb.IAMIncomingMessages] = []
        self.answers: dict[str, Any] = {}
        self.identifier: Identifier | None = Identifier()
        self._task = asyncio.create_task(self.link.work(self._write))

    async def _write(self, message: pb.IAMIncomingMessages) -> None:
        self.asked.append(message)
        kind = message.WhichOneof("IAMIncomingMessage") or ""
        reply = {"get_cert_types_request": "cert_types_response"}.get(kind, kind.replace("_request", "_response"))
        if kind in self.answers:
            self.link.on_reply(reply, self.answers[kind])

    def node(self, node_id: str = "n2", remaining_s: float | None = 10) -> RemoteNode:
        return RemoteNode(
            node_id,
            remaining_s,
            nodes=self.nodes,
            keys=self.keys,
            controller=self.controller,
            identifier=self.identifier,  # type: ignore[arg-type]
        )

    async def state(self, state: NodeState) -> None:
        await self.nodes.connect(NodeInfo("n2", state=state, os_info=LINUX))

    async def stored(self) -> list[NodeState]:
        return [node.state for node in await self.database.nodes()]

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


@pytest.fixture
async def bench(database: IamDatabase) -> Any:
    bench = Bench(database)
    await bench.state(NodeState.PROVISIONED)
    yield bench
    await bench.close()


def call(node: RemoteNode, operation: str) -> Any:
    arguments = {
        "start_provisioning": ["pw"],
        "finish_provisioning": ["pw"],
        "deprovision": ["pw"],
        "create_key": ["iam", ""],
        "apply_cert": ["iam", "pem"],
    }
    return getattr(node, operation)(*arguments.get(operation, []))


REQUESTS = {
    "cert_types": "get_cert_types_request",
    "start_provisioning": "start_provisioning_request",
    "finish_provisioning": "finish_provisioning_request",
    "deprovision": "deprovision_request",
    "pause": "pause_node_request",
    "resume": "resume_node_request",
    "create_key": "create_key_request",
    "apply_cert": "apply_cert_request",
}
ANSWERS: dict[str, Any] = {
    "start_provisioning": pb.StartProvisioningResponse,
    "finish_provisioning": pb.FinishProvisioningResponse,
    "deprovision": pb.DeprovisionResponse,
    "pause": pb.PauseNodeResponse,
    "resume": pb.ResumeNodeResponse,
    "create_key": pb.CreateKeyResponse,
    "apply_cert": pb.ApplyCertResponse,
}


@pytest.mark.parametrize("operation", list(REQUESTS))
async def test_unknown_and_offline_node_fail_at_once(bench: Bench, operation: str) -> None:
    await bench.nodes.connect(NodeInfo("off", state=NodeState.ERROR, os_info=LINUX))
    for node_id, text in (("n9", "'n9' is not known"), ("off", "'off' is not connected")):
        with pytest.raises(UnreachableError, match=text):
            async with asyncio.timeout(2):
                await call(bench.node(node_id), operation)
    assert bench.asked == []


@pytest.mark.parametrize("operation", list(REQUESTS))
async def test_silent_node_costs_the_time_of_the_caller(bench: Bench, operation: str) -> None:
    await bench.state(NodeState.ERROR)
    with pytest.raises(UnreachableError, match="did not answer in the time of the caller"):
        await call(bench.node(remaining_s=0.05), operation)
    (asked,) = bench.asked
    assert asked.WhichOneof("IAMIncomingMessage") == REQUESTS[operation]
    assert getattr(asked, REQUESTS[operation]).node_id == "n2"
    assert bench.nodes.get("n2").state is NodeState.ERROR


@pytest.mark.parametrize("operation", list(ANSWERS))
async def test_error_of_the_node_is_relayed_and_changes_no_record(bench: Bench, operation: str) -> None:
    """9.1 changes its record after such an answer (iam.md §9.2)."""
    await bench.state(NodeState.ERROR)
    error = common.ErrorInfo(aos_code=9, message="not now")
    bench.answers[REQUESTS[operation]] = ANSWERS[operation](error=error)
    with pytest.raises(WrongStateError, match="not now"):
        await call(bench.node(), operation)
    assert bench.nodes.get("n2").state is NodeState.ERROR and await bench.stored() == [NodeState.ERROR]


@pytest.mark.parametrize("operation", list(STATES))
async def test_success_changes_the_record(bench: Bench, operation: str) -> None:
    new = STATES[operation]
    await bench.state(NodeState.ERROR)
    bench.answers[REQUESTS[operation]] = ANSWERS[operation]()
    await call(bench.node(), operation)
    assert bench.nodes.get("n2").state is new
    assert await bench.stored() == ([] if new is NodeState.UNPROVISIONED else [new])


@pytest.mark.parametrize("operation", ["pause", "resume", "finish_provisioning"])
async def test_state_that_is_there_is_answered_from_the_record(bench: Bench, operation: str) -> None:
    """CM pauses or resumes every Node with each desired status, also one that is away just now (iam.md §16, 4)."""
    await bench.state(STATES[operation])
    del bench.controller._links["n2"]
    await call(bench.node(), operation)
    assert bench.asked == []


async def test_cert_types(bench: Bench) -> None:
    bench.answers["get_cert_types_request"] = pb.CertTypes(types=["iam", "sm"])
    assert await bench.node().cert_types() == ["iam", "sm"]


async def test_password_goes_to_the_node_and_its_old_keys_prove_nothing(bench: Bench) -> None:
    await bench.keys.bind("n2", b"old")
    await bench.keys.bind("n3", b"other")
    bench.answers["start_provisioning_request"] = pb.StartProvisioningResponse()
    await bench.node().start_provisioning("Secret123")
    assert bench.asked[0].start_provisioning_request.password == "Secret123"
    assert bench.keys.owner(b"old") == "n2", "a node in service keeps its keys, and refuses"
    await bench.state(NodeState.UNPROVISIONED)
    await bench.node().start_provisioning("Secret123")
    assert bench.keys.owner(b"old") is None and bench.keys.owner(b"other") == "n3"


async def test_key_belongs_to_the_node_that_answered(bench: Bench) -> None:
    csr = build_csr(ec.generate_private_key(ec.SECP384R1()), "unit", [], [])
    bench.answers["create_key_request"] = pb.CreateKeyResponse(node_id="n2", type="iam", csr=csr)
    assert await bench.node().create_key("iam", "") == csr
    assert bench.asked[0].create_key_request.subject == "unit"
    assert await bench.database.node_keys() == {request_digest(csr): "n2"}
    await bench.node().create_key("iam", "other")
    assert bench.asked[1].create_key_request.subject == "other"
    bench.answers["create_key_request"] = pb.CreateKeyResponse(csr="garbage")
    with pytest.raises(InvalidArgumentError, match="not a certificate request"):
        await bench.node().create_key("iam", "")
    bench.identifier = None
    with pytest.raises(NotFoundError, match="no identifier"):
        await bench.node().create_key("iam", "")


async def test_certificate_is_relayed(bench: Bench) -> None:
    info = pb.CertInfo(type="iam", cert_url="pkcs11:x", serial=b"0a")
    bench.answers["apply_cert_request"] = pb.ApplyCertResponse(node_id="n2", cert_info=info)
    answer = await bench.node().apply_cert("iam", "pem")
    assert (answer.type, answer.cert_url, answer.serial) == ("iam", "pkcs11:x", "0a")
    assert bench.asked[0].apply_cert_request.cert == "pem"


@pytest.mark.parametrize("operation", ["start_provisioning", "deprovision"])
async def test_node_set_aside_is_taken_up_by_an_explicit_request(bench: Bench, operation: str) -> None:
    del bench.controller._links["n2"]
    new = NodeInfo("n2", state=NodeState.UNPROVISIONED, os_info=LINUX)
    bench.controller._aside["n2"] = bench.link, new
    with pytest.raises(UnreachableError, match="shows up as new"):
        await bench.node().cert_types()
    bench.answers["start_provisioning_request"] = pb.StartProvisioningResponse()
    await call(bench.node(), operation)
    assert len(bench.asked) == (operation == "start_provisioning"), "it is unprovisioned already"
    assert bench.nodes.get("n2") == new and await bench.stored() == []
    bench.answers["get_cert_types_request"] = pb.CertTypes(types=["iam"])
    assert await bench.node().cert_types() == ["iam"]
