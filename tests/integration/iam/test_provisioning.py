"""The IAM process on its way from an empty Node to a provisioned one, and what happens when it is killed there."""

import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from google.protobuf.empty_pb2 import Empty

from aoscore._pb.iamanager.v6 import iamanager_pb2 as pb
from tests.support.iam import TYPES, Client, Iam
from tests.support.pki import TestCa

pytestmark = pytest.mark.timeout(180)


def test_provision_and_restart(iam: Iam) -> None:
    iam.start(provisioning=True)
    with iam.plain() as client:
        assert list(client.nodes.GetAllNodeIDs(Empty()).ids) == ["node-1"]
        node = client.nodes.GetNodeInfo(pb.GetNodeInfoRequest(node_id="node-1"))
        assert node.state == "unprovisioned"
        assert [attr.name for attr in node.attrs if attr.name == "MainNode"]
        assert node.total_ram > 0 and node.cpus and node.partitions[0].total_size > 0
        for _ in iam.steps():
            pass
        assert client.nodes.GetNodeInfo(pb.GetNodeInfoRequest(node_id="node-1")).state == "provisioned"
        assert client.node.GetCurrentNodeInfo(Empty()).state == "provisioned"
    assert iam.state_file.read_text() == "provisioned"
    assert iam.stop() == 0
    iam.start()
    with iam.secure() as client:
        assert client.node.GetCurrentNodeInfo(Empty()).state == "provisioned"
        for cert_type in TYPES:
            assert client.certs.GetCert(pb.GetCertRequest(type=cert_type)).type == cert_type
    assert "Secret123" not in iam.log()


def test_requests_are_what_the_cloud_expects(iam: Iam) -> None:
    iam.start(provisioning=True)
    with iam.plain() as client:
        client.start_provisioning()
        assert list(client.provisioning.GetCertTypes(pb.GetCertTypesRequest()).types) == TYPES
        for cert_type in TYPES:
            request = x509.load_pem_x509_csr(client.create_key(cert_type).encode())
            assert request.subject.rfc4514_string() == "CN=unit-1"
            key = request.public_key()
            if cert_type == "offline":
                assert isinstance(key, rsa.RSAPublicKey) and key.key_size == 2048
            else:
                assert isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name == "secp384r1"
            server = cert_type in ("iam", "sm", "cm")
            names = [ext for ext in request.extensions if isinstance(ext.value, x509.SubjectAlternativeName)]
            assert len(names) == server
            if server:
                assert names[0].value.get_values_for_type(x509.DNSName) == ["localhost"]
        other = x509.load_pem_x509_csr(client.create_key("cm", "someone else").encode())
        assert other.subject.rfc4514_string() == "CN=someone else"


def test_kill_after_every_step_and_go_on(iam: Iam) -> None:
    """After each answer the process is killed; the tool goes on with what it has."""
    iam.start(provisioning=True)
    killed = []
    for step in iam.steps():
        iam.kill()
        killed.append(step)
        iam.start(provisioning=step != "finish")
    assert killed == ["start", *(f"key {name}" for name in TYPES), *(f"certificate {name}" for name in TYPES), "finish"]
    with iam.secure() as client:
        assert client.node.GetCurrentNodeInfo(Empty()).state == "provisioned"


def test_kill_in_the_middle_of_a_step_and_repeat_it(iam: Iam) -> None:
    """Whatever of a step has reached the disk: repeating it goes on to the end."""
    iam.start(provisioning=True)
    certificates: list[str] = []

    def interrupt(step: Callable[[Client], object], delays_ms: list[float]) -> None:
        for delay_ms in delays_ms:
            with iam.plain() as client, ThreadPoolExecutor() as pool:
                client.version.GetAPIVersion(Empty())
                running = pool.submit(step, client)
                time.sleep(delay_ms / 1000)
                iam.kill()
                wait([running])
            state = iam.state_file.read_text() if iam.state_file.exists() else ""
            assert state in ("", "provisioned")
            iam.start(provisioning=not state)
            if state:
                return
        with iam.plain() as client:
            step(client)

    def create(client: Client) -> None:
        certificates[:] = [iam.authority.sign_request(client.create_key("iam"))]

    interrupt(lambda client: client.start_provisioning(), [1, 3, 6, 10])
    interrupt(create, [1, 3, 6, 10, 20])
    interrupt(lambda client: client.apply("iam", certificates[0]), [1, 2, 4, 8, 12, 20])
    interrupt(lambda client: client.finish_provisioning(), [1, 2, 4, 8])
    iam.kill()
    iam.start()
    with iam.open() as client:
        assert client.node.GetCurrentNodeInfo(Empty()).state == "provisioned"
        leaf = x509.load_pem_x509_certificate(certificates[0].encode())
        info = client.certs.GetCert(pb.GetCertRequest(type="iam"))
        assert int(info.serial, 16) == leaf.serial_number


def test_a_new_start_forgets_the_old_keys(iam: Iam) -> None:
    iam.start(provisioning=True)
    with iam.plain() as client:
        client.start_provisioning()
        stale = iam.authority.sign_request(client.create_key("iam"))
        client.renew("iam", 10)
        client.start_provisioning("Another42")
        answer = client.issue.ApplyCert(pb.ApplyCertRequest(type="iam", cert=stale))
        assert (answer.error.aos_code, answer.error.exit_code) == (5, 5)
        assert "create a key first" in answer.error.message
        with pytest.raises(grpc.RpcError, match="no certificate of type 'iam'"):
            client.certs.GetCert(pb.GetCertRequest(type="iam"))
        # Without a certificate the node could never start again.
        finish = client.provisioning.FinishProvisioning(pb.FinishProvisioningRequest())
        assert finish.error.aos_code == 9 and "no certificate of type 'iam'" in finish.error.message
    assert not iam.state_file.exists()


def test_errors_say_what_is_wrong(iam: Iam) -> None:
    iam.start(provisioning=True)
    foreign = TestCa("foreign")
    with iam.plain() as client:
        early = client.issue.CreateKey(pb.CreateKeyRequest(type="iam"))
        assert early.error.aos_code == 9 and "start provisioning first" in early.error.message
        client.start_provisioning()
        with pytest.raises(grpc.RpcError) as caught:
            client.provisioning.GetCertTypes(pb.GetCertTypesRequest(node_id="node-9"))
        assert caught.value.code() is grpc.StatusCode.INTERNAL
        assert caught.value.details() == "node 'node-9' is not known"
        with pytest.raises(grpc.RpcError, match="node 'node-9' is not known"):
            client.nodes.GetNodeInfo(pb.GetNodeInfoRequest(node_id="node-9"))
        with pytest.raises(grpc.RpcError, match="type 'bogus' is not configured"):
            client.certs.GetCert(pb.GetCertRequest(type="bogus"))
        assert client.issue.CreateKey(pb.CreateKeyRequest(type="bogus")).error.aos_code == 5
        garbage = client.issue.ApplyCert(pb.ApplyCertRequest(type="sm", cert="garbage"))
        assert garbage.error.aos_code == 6 and garbage.cert_info.type == "sm"
        csr = client.create_key("online")
        leaf_only = foreign.sign_request(csr).split("-----END")[0] + "-----END CERTIFICATE-----\n"
        answer = client.issue.ApplyCert(pb.ApplyCertRequest(type="online", cert=leaf_only))
        assert answer.error.aos_code == 5 and "chain up to the root" in answer.error.message
        assert client.apply("online", foreign.sign_request(csr)).type == "online"
        for answer in (
            client.states.PauseNode(pb.PauseNodeRequest(node_id="node-1")),
            client.states.ResumeNode(pb.ResumeNodeRequest()),
            client.provisioning.Deprovision(pb.DeprovisionRequest()),
        ):
            assert (answer.error.aos_code, answer.error.exit_code) == (9, 9)
            assert "unprovisioned" in answer.error.message


def test_hooks(make_iam: Callable[..., Iam], tmp_path: Path) -> None:
    """They run in order, their failure stops the step, and a background child is not waited for."""
    log = tmp_path / "hooks.log"
    slow = f"echo finish $NOTIFY_SOCKET >>{log}; (sleep 30; echo late) &"
    iam = make_iam(
        startProvisioningCmdArgs=["sh", "-c", f"echo start >>{log}"],
        diskEncryptionCmdArgs=[
            "sh",
            "-c",
            f"echo disk >>{log}; ls {tmp_path}/unit0/keys | wc -l >>{log}; [ -e {tmp_path}/go ]",
        ],
        finishProvisioningCmdArgs=["sh", "-c", slow],
        deprovisionCmdArgs=["sleep", "60"],
        hookTimeout="1s",
    )
    iam.start(provisioning=True)
    with iam.plain() as client:
        answer = client.provisioning.StartProvisioning(pb.StartProvisioningRequest(password="Secret123"))
        assert answer.error.message == "sh failed with code 1: no output"
        assert answer.error.exit_code != 0
        assert not list((iam.root / "keys").iterdir()), "a failed start must leave no storage"
        (tmp_path / "go").touch()
        client.start_provisioning()
        client.renew("iam", 10)
        begin = time.monotonic()
        client.finish_provisioning()
        assert time.monotonic() - begin < 5
        assert log.read_text().split() == ["start", "disk", "5", "start", "disk", "5", "finish"]
        answer = client.provisioning.Deprovision(pb.DeprovisionRequest())
        assert answer.error.aos_code == 7 and "within 1 s" in answer.error.message
    assert iam.state_file.read_text() == "provisioned"


def test_lost_state_file_comes_back(unit: Iam) -> None:
    """A provisioned Node never wakes up as a new one, and never speaks plain text."""
    unit.kill()
    unit.state_file.unlink()
    unit.start(provisioning=True)
    assert unit.state_file.read_text() == "provisioned"
    with pytest.raises(grpc.RpcError), unit.plain() as client:
        client.version.GetAPIVersion(Empty())
    with unit.secure() as client:
        assert client.node.GetCurrentNodeInfo(Empty()).state == "provisioned"
    unit.kill()
    unit.state_file.write_text("prov")
    unit.start()
    assert unit.state_file.read_text() == "provisioned"


def test_defect_7_second_process_and_taken_port_are_start_errors(unit: Iam, make_iam: Callable[..., Iam]) -> None:
    """IAM reported ready although it could not bind, and a second one shared the ports (observed.md, defect 7)."""
    second = subprocess.run(unit.command(provisioning=False), capture_output=True, text=True, timeout=30)
    assert second.returncode == 70
    assert "in use by another process" in second.stdout
    for taken in ("iamPublicServerUrl", "iamProtectedServerUrl"):
        rival = make_iam(**{taken: unit.public})
        ended = subprocess.run(rival.command(provisioning=True), capture_output=True, text=True, timeout=30)
        assert ended.returncode == 70
        assert f"can't listen on {unit.public}" in ended.stdout
        assert "is ready" not in ended.stdout


def test_normal_mode_needs_a_certificate(iam: Iam) -> None:
    ended = subprocess.run(iam.command(provisioning=False), capture_output=True, text=True, timeout=30)
    assert ended.returncode == 70
    assert "can't serve with certificate type 'iam'" in ended.stdout
