"""Renewal and provisioning: order, partial failures, what the cloud is told."""

import asyncio
from typing import Any

import pytest

from aoscore.cm.communication.messages import (
    CertType,
    DeprovisioningRequest,
    DeprovisioningResponse,
    ExpiringCertificate,
    FinishProvisioningRequest,
    FinishProvisioningResponse,
    Identity,
    InstallUnitCertificatesConfirmation,
    IssuedCertificate,
    IssuedUnitCertificates,
    IssueUnitCertificates,
    Message,
    NodeCertificate,
    NodeSecret,
    RenewCertificatesNotification,
    StartProvisioningRequest,
    StartProvisioningResponse,
    UnitSecrets,
)
from aoscore.cm.iamclient import certificates
from aoscore.cm.iamclient.certificates import Certificates
from aoscore.common.errors import AosError, FailedError, UnreachableError
from aoscore.common.types import CertInfo

MAIN, N1, N2 = (Identity.of_codename(name) for name in ("main", "n1", "n2"))


class Iam:
    """IAM that does as told, except where `fails` names the call."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.fails: dict[str, AosError] = {}

    def _do(self, call: str) -> None:
        self.calls.append(call)
        if call in self.fails:
            raise self.fails[call]

    async def create_key(self, node_id: str, cert_type: str, password: str) -> str:
        self._do(f"key {node_id} {cert_type} {password}")
        return f"csr {node_id} {cert_type}"

    async def apply_cert(self, node_id: str, cert_type: str, chain_pem: str) -> CertInfo:
        self._do(f"apply {node_id} {cert_type}")
        return CertInfo(cert_type, "file:///c", "file:///k", "0a")

    async def cert_types(self, node_id: str) -> tuple[str, ...]:
        self._do(f"types {node_id}")
        return ("iam", "sm")

    async def start_provisioning(self, node_id: str, password: str) -> None:
        self._do(f"start {node_id} {password}")

    async def finish_provisioning(self, node_id: str, password: str) -> None:
        self._do(f"finish {node_id} {password}")

    async def deprovision(self, node_id: str, password: str) -> None:
        self._do(f"deprovision {node_id} {password}")


class Bench:
    def __init__(self) -> None:
        self.iam = Iam()
        self.sent: list[Message] = []
        self.provisioned: set[str] = set()
        self.certificates = Certificates(
            self.iam, self, main_node_id=lambda: "main", is_provisioned=self.provisioned.__contains__
        )

    async def send(self, message: Message) -> None:
        self.sent.append(message)


@pytest.fixture
def bench() -> Bench:
    return Bench()


def renewal(*entries: tuple[CertType, Identity]) -> RenewCertificatesNotification:
    secrets = tuple(NodeSecret(node=node, secret=f"pw-{node.codename}") for node in (MAIN, N1))
    return RenewCertificatesNotification(
        certificates=tuple(ExpiringCertificate(type=kind, node=node) for kind, node in entries),
        unit_secrets=UnitSecrets(version="2.0.0", nodes=secrets),
    )


async def test_one_failure_does_not_stop_the_other_renewals(bench: Bench) -> None:
    """AosCore 9.1 drops the whole request (cm-cloud.md §11)."""
    bench.iam.fails["key main sm pw-main"] = FailedError("token is full")
    await bench.certificates.on_renew(renewal((CertType.SM, MAIN), (CertType.IAM, N1), (CertType.SM, N2)))
    issue, confirmation = bench.sent
    assert isinstance(issue, IssueUnitCertificates) and isinstance(confirmation, InstallUnitCertificatesConfirmation)
    assert [(entry.node.codename, entry.csr) for entry in issue.requests] == [("n1", "csr n1 iam")]
    failed = {entry.node.codename: entry.error_info for entry in confirmation.certificates}
    assert failed["main"] is not None and failed["main"].message == "token is full"
    assert failed["n2"] is not None and failed["n2"].aos_code == 5
    assert bench.iam.calls == ["key main sm pw-main", "key n1 iam pw-n1"]


@pytest.mark.parametrize("comes_back", [True, False])
async def test_iam_that_only_starts_is_waited_for(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, comes_back: bool
) -> None:
    call = "key main sm pw-main"
    bench.iam.fails[call] = UnreachableError("creating key: no connection")
    monkeypatch.setattr(certificates, "_IAM_RETRY_S", 0.0)
    if not comes_back:
        monkeypatch.setattr(certificates, "_IAM_WAIT_S", 0.05)
    renewing = asyncio.create_task(bench.certificates.on_renew(renewal((CertType.SM, MAIN), (CertType.IAM, MAIN))))
    while bench.iam.calls.count(call) < 3:
        await asyncio.sleep(0)
    if comes_back:
        del bench.iam.fails[call]
    await renewing
    issue, *failed = bench.sent
    assert isinstance(issue, IssueUnitCertificates)
    assert [entry.type for entry in issue.requests] == [CertType.SM, CertType.IAM][not comes_back :]
    assert len(failed) == (not comes_back)
    assert bench.iam.calls.count("key main iam pw-main") == 1


async def test_a_renewal_that_was_interrupted_is_to_be_asked_again(bench: Bench) -> None:
    await bench.certificates.on_interrupted_renewal(renewal((CertType.SM, MAIN), (CertType.IAM, N1)).without_secrets())
    (confirmation,) = bench.sent
    assert isinstance(confirmation, InstallUnitCertificatesConfirmation)
    assert [(entry.type, entry.node) for entry in confirmation.certificates] == [
        (CertType.SM, MAIN),
        (CertType.IAM, N1),
    ]
    assert all(entry.error_info and "ask again" in entry.error_info.message for entry in confirmation.certificates)
    assert bench.iam.calls == []


@pytest.mark.parametrize(
    ("request_", "answer", "done_when_provisioned"),
    [
        (StartProvisioningRequest(correlation_id="c", node=N1), StartProvisioningResponse, None),
        (FinishProvisioningRequest(correlation_id="c", node=N1, certificates=()), FinishProvisioningResponse, True),
        (DeprovisioningRequest(correlation_id="c", node=N1), DeprovisioningResponse, False),
    ],
)
@pytest.mark.parametrize("provisioned", [True, False])
async def test_a_provisioning_that_was_interrupted_is_answered(
    bench: Bench, request_: Any, answer: type[Any], done_when_provisioned: bool | None, provisioned: bool
) -> None:
    if provisioned:
        bench.provisioned.add("n1")
    await bench.certificates.on_interrupted(request_)
    (sent,) = bench.sent
    assert type(sent) is answer and sent.correlation_id == "c" and sent.node == N1
    assert (sent.error_info is None) == (provisioned is done_when_provisioned)
    assert bench.iam.calls == []


async def test_an_empty_renewal_sends_nothing(bench: Bench) -> None:
    await bench.certificates.on_renew(renewal())
    await bench.certificates.on_issued(IssuedUnitCertificates())
    assert bench.sent == []


async def test_the_main_node_s_iam_comes_last(bench: Bench) -> None:
    order = [(MAIN, CertType.IAM), (N2, CertType.IAM), (MAIN, CertType.CM), (N2, CertType.SM), (N1, CertType.IAM)]
    bench.iam.fails["apply n2 sm"] = FailedError("bad chain")
    await bench.certificates.on_issued(
        IssuedUnitCertificates(
            certificates=tuple(IssuedCertificate(type=kind, node=node, certificate_chain="pem") for node, kind in order)
        )
    )
    assert bench.iam.calls == ["apply n1 iam", "apply n2 sm", "apply n2 iam", "apply main cm", "apply main iam"]
    (confirmation,) = bench.sent
    assert isinstance(confirmation, InstallUnitCertificatesConfirmation)
    assert [(entry.serial, entry.error_info is None) for entry in confirmation.certificates] == [
        ("0a", True),
        ("", False),
        ("0a", True),
        ("0a", True),
        ("0a", True),
    ]


async def test_provisioning(bench: Bench) -> None:
    request: dict[str, Any] = {"correlation_id": "c", "node": N1, "password": "pw"}
    await bench.certificates.on_start_provisioning(StartProvisioningRequest(**request))
    certificates = (NodeCertificate(type=CertType.IAM, chain="pem"), NodeCertificate(type=CertType.SM, chain="pem"))
    await bench.certificates.on_finish_provisioning(FinishProvisioningRequest(**request, certificates=certificates))
    await bench.certificates.on_deprovisioning(DeprovisioningRequest(**request))
    start, finish, deprovision = bench.sent
    assert isinstance(start, StartProvisioningResponse)
    assert [(csr.type, csr.csr) for csr in start.csrs] == [("iam", "csr n1 iam"), ("sm", "csr n1 sm")]
    assert finish == FinishProvisioningResponse(correlation_id="c", node=N1)
    assert deprovision == DeprovisioningResponse(correlation_id="c", node=N1)
    assert bench.iam.calls == [
        "start n1 pw",
        "types n1",
        "key n1 iam pw",
        "key n1 sm pw",
        "apply n1 iam",
        "apply n1 sm",
        "finish n1 pw",
        "deprovision n1 pw",
    ]


@pytest.mark.parametrize(
    ("call", "csrs"), [("start n1 pw", 0), ("types n1", 0), ("key n1 iam pw", 0), ("key n1 sm pw", 1)]
)
async def test_a_failing_start_answers_with_what_was_made(bench: Bench, call: str, csrs: int) -> None:
    bench.iam.fails[call] = FailedError("no")
    request = StartProvisioningRequest(correlation_id="c", node=N1, password="pw")
    await bench.certificates.on_start_provisioning(request)
    (answer,) = bench.sent
    assert isinstance(answer, StartProvisioningResponse) and answer.error_info is not None
    assert len(answer.csrs) == csrs


@pytest.mark.parametrize("call", ["apply n1 iam", "finish n1 pw"])
async def test_a_failing_end_is_answered(bench: Bench, call: str) -> None:
    bench.iam.fails[call] = FailedError("no")
    await bench.certificates.on_finish_provisioning(
        FinishProvisioningRequest(
            node=N1, password="pw", certificates=(NodeCertificate(type=CertType.IAM, chain="pem"),)
        )
    )
    (answer,) = bench.sent
    assert isinstance(answer, FinishProvisioningResponse) and answer.error_info is not None
