"""The IAM process of a provisioned Node: who may ask what, renewal, permissions, Node states."""

import queue
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from google.protobuf.empty_pb2 import Empty

from aoscore._pb.common.v1 import common_pb2 as common_v1
from aoscore._pb.common.v2 import common_pb2 as common
from aoscore._pb.iamanager.v5 import iamanager_pb2 as v5
from aoscore._pb.iamanager.v6 import iamanager_pb2 as pb
from aoscore.common.keys import private_key_pem
from tests.support.iam import TYPES, Client, Iam
from tests.support.pki import TestCa

pytestmark = pytest.mark.timeout(120)

IDENT = common.InstanceIdent(item_id="item", subject_id="subject", instance=3, type=common.SERVICE)


def key_and_chain(authority: TestCa, name: str) -> tuple[bytes, bytes]:
    issued = authority.issue(name)
    return private_key_pem(issued.key), issued.pem


def status(call: Callable[[Any], Any], request: Any) -> grpc.StatusCode:
    with pytest.raises(grpc.RpcError) as caught:
        call(request)
    return caught.value.code()


def test_who_gets_in(unit: Iam) -> None:
    version = Empty()
    with unit.secure("sm") as client:
        assert client.version.GetAPIVersion(version).version == 6
        assert client.nodes.GetAllNodeIDs(Empty()).ids == ["node-1"]
    root = unit.authority.root_pem
    foreign = TestCa("Unit CA")
    refused: list[grpc.ChannelCredentials | None] = [
        None,
        grpc.ssl_channel_credentials(root),
        grpc.ssl_channel_credentials(root, *key_and_chain(foreign, "cm")),
    ]
    for credentials in refused:
        with Client(unit, unit.protected, credentials) as client:
            assert status(client.version.GetAPIVersion, version) is grpc.StatusCode.UNAVAILABLE
    with Client(unit, unit.public, None) as client:
        assert status(client.version.GetAPIVersion, version) is grpc.StatusCode.UNAVAILABLE
    with Client(
        unit, unit.protected, grpc.ssl_channel_credentials(root, *key_and_chain(unit.authority, "anyone"))
    ) as client:
        assert client.version.GetAPIVersion(version).version == 6


def test_public_port_serves_public_services_only(unit: Iam) -> None:
    with unit.open() as client:
        assert client.version.GetAPIVersion(Empty()).version == 6
        system = client.identity.GetSystemInfo(Empty())
        assert (system.system_id, system.unit_model, system.version) == ("unit-1", "model", "1.2.3")
        assert client.identity.GetSubjects(Empty()).subjects == ["subject1", "subject2"]
        assert client.node.GetCurrentNodeInfo(Empty()).title == "main"
        assert client.nodes.GetNodeInfo(pb.GetNodeInfoRequest(node_id="node-1")).state == "provisioned"
        for call, request in [
            (client.provisioning.GetCertTypes, pb.GetCertTypesRequest()),
            (client.provisioning.StartProvisioning, pb.StartProvisioningRequest(password="x")),
            (client.provisioning.FinishProvisioning, pb.FinishProvisioningRequest()),
            (client.provisioning.Deprovision, pb.DeprovisionRequest()),
            (client.issue.CreateKey, pb.CreateKeyRequest(type="cm")),
            (client.issue.ApplyCert, pb.ApplyCertRequest(type="cm", cert="x")),
            (client.states.PauseNode, pb.PauseNodeRequest()),
            (client.states.ResumeNode, pb.ResumeNodeRequest()),
            (client.instances.RegisterInstance, pb.RegisterInstanceRequest(instance=IDENT)),
            (client.instances.UnregisterInstance, pb.UnregisterInstanceRequest(instance=IDENT)),
        ]:
            assert status(call, request) is grpc.StatusCode.UNIMPLEMENTED


def test_services_can_be_kept_for_certificate_types(make_iam: Callable[..., Iam]) -> None:
    iam = make_iam(access={"IAMNodesService": ["cm"], "IAMPermissionsService": ["sm"]}, enablePermissionsHandler=True)
    iam.provision()
    iam.start()
    pause, register = pb.PauseNodeRequest(node_id="node-1"), pb.RegisterInstanceRequest(instance=IDENT)
    stranger = grpc.ssl_channel_credentials(iam.authority.root_pem, *key_and_chain(iam.authority, "anyone"))
    with iam.secure("cm") as cm, iam.secure("sm") as sm, Client(iam, iam.protected, stranger) as other:
        for client in (sm, other):
            assert status(client.states.PauseNode, pause) is grpc.StatusCode.PERMISSION_DENIED
        for client in (cm, other):
            assert status(client.instances.RegisterInstance, register) is grpc.StatusCode.PERMISSION_DENIED
        assert not cm.states.PauseNode(pause).HasField("error")
        assert sm.instances.RegisterInstance(register).secret
        # What is not named is open to the Unit, and so is what both ports have.
        for client in (cm, sm, other):
            assert client.provisioning.GetCertTypes(pb.GetCertTypesRequest(node_id="node-1")).types
            assert client.nodes.GetAllNodeIDs(Empty()).ids == ["node-1"]
    assert "Call refused: method=IAMNodesService.PauseNode, certType=sm" in iam.log()


def test_names_in_server_certificate(unit: Iam) -> None:
    """C++ peers check the name by which they call us; clients of stdlib ssl do too."""
    context = ssl.create_default_context(cafile=str(unit.ca_file))
    for name in ("localhost", "127.0.0.1"):
        host, port = unit.public.split(":")
        with socket.create_connection((host, int(port))) as plain, context.wrap_socket(plain, server_hostname=name):
            pass


def test_get_cert_by_type_and_by_serial(unit: Iam) -> None:
    with unit.secure() as client:
        old = client.certs.GetCert(pb.GetCertRequest(type="offline"))
        leaf = x509.load_pem_x509_certificate(Path(old.cert_url.removeprefix("file://")).read_bytes())
        assert bytes.fromhex(old.serial.decode()) == leaf.serial_number.to_bytes(len(old.serial) // 2, "big")
        assert old.issuer == leaf.issuer.public_bytes()
        new = client.renew("offline", 500)
        assert client.certs.GetCert(pb.GetCertRequest(type="offline")) == new
        # Keys for which the cloud encrypted earlier must stay findable.
        request = pb.GetCertRequest(type="offline", issuer=old.issuer, serial=old.serial.decode())
        assert client.certs.GetCert(request) == old
        request.serial = old.serial.decode().lstrip("0").upper()
        assert client.certs.GetCert(request) == old
        request.issuer = b"other"
        assert status(client.certs.GetCert, request) is grpc.StatusCode.INTERNAL
        # maxItems is 2: the third takes the place of the first.
        client.renew("offline", 600)
        request.issuer = old.issuer
        assert status(client.certs.GetCert, request) is grpc.StatusCode.INTERNAL
        assert not Path(old.key_url.removeprefix("file://")).exists()


@contextmanager
def watching(call: Callable[[Any], Any], request: Any) -> Iterator["queue.Queue[Any]"]:
    """Answers of a stream as they come."""
    answers: queue.Queue[Any] = queue.Queue()
    stream = call(request)

    def read() -> None:
        try:
            for answer in stream:
                answers.put(answer)
        except grpc.RpcError as error:
            answers.put(error)

    thread = threading.Thread(target=read)
    thread.start()
    # The subscription is in force when the server has sent its initial metadata, which comes with the first answer
    # only; a call on the same connection afterwards is not ordered. Half a second is.
    time.sleep(0.5)
    try:
        yield answers
    finally:
        stream.cancel()
        thread.join()


def test_renewal_tells_subscribers_and_changes_the_server_certificate(unit: Iam) -> None:
    def served(address: str) -> int:
        host, port = address.split(":")
        key, chain = key_and_chain(unit.authority, "cm")
        (unit.root / "client.pem").write_bytes(key + chain)
        context = ssl.create_default_context(cafile=str(unit.ca_file))
        context.load_cert_chain(unit.root / "client.pem")
        with socket.create_connection((host, int(port))) as plain:
            with context.wrap_socket(plain, server_hostname="localhost") as tls:
                der = tls.getpeercert(binary_form=True)
                assert der is not None
                return x509.load_der_x509_certificate(der).serial_number

    pid = unit.process.pid if unit.process else 0
    with unit.open() as watcher, unit.secure() as client, unit.secure() as bystander:
        assert status(lambda request: next(watcher.certs.SubscribeCertChanged(request)), type_request("bogus")) is (
            grpc.StatusCode.INTERNAL
        )
        with watching(watcher.certs.SubscribeCertChanged, type_request("iam")) as answers:
            before = client.certs.GetCert(pb.GetCertRequest(type="iam"))
            client.renew("cm", 700)
            new = client.renew("iam", 800)
            assert answers.get(timeout=5) == new != before
            for address in (unit.public, unit.protected):
                assert served(address) == int(new.serial, 16)
            # Nobody was cut off.
            assert bystander.version.GetAPIVersion(Empty()).version == 6
            client.renew("iam", 30)
            assert client.certs.GetCert(pb.GetCertRequest(type="iam")) == new, "an earlier end must not win"
            assert answers.empty()
    assert unit.process is not None and unit.process.pid == pid and unit.process.poll() is None
    unit.kill()
    unit.start()
    assert served(unit.protected) == int(new.serial, 16)


def test_new_certificate_that_can_not_be_read_leaves_the_old_one_in_use(unit: Iam) -> None:
    with unit.secure() as client:
        new = client.renew("iam", 800)
        Path(new.key_url.removeprefix("file://")).unlink()
    with unit.open() as client:
        assert client.version.GetAPIVersion(Empty()).version == 6
    assert "does not exist" in unit.log()


def test_broken_database_is_rebuilt_from_the_key_storage(unit: Iam) -> None:
    with unit.open() as client:
        infos = [client.certs.GetCert(pb.GetCertRequest(type=cert_type)) for cert_type in TYPES]
    unit.kill()
    for path in (unit.root / "work").glob("iamanager.db*"):
        path.write_bytes(b"\xff" * 5000)
    unit.start()
    with unit.open() as client:
        assert [client.certs.GetCert(pb.GetCertRequest(type=cert_type)) for cert_type in TYPES] == infos
        assert client.node.GetCurrentNodeInfo(Empty()).state == "provisioned"
    assert list((unit.root / "work").glob("iamanager.db.broken-*"))
    unit.kill()
    unit.state_file.unlink()
    unit.start(provisioning=True)
    assert unit.state_file.read_text() == "provisioned", "the new database must hold the copy of the state again"


def type_request(cert_type: str) -> pb.SubscribeCertChangedRequest:
    return pb.SubscribeCertChangedRequest(type=cert_type)


def test_permissions_survive_a_kill(unit: Iam) -> None:
    permissions = {"vis": pb.Permissions(permissions={"*": "r", "door": "rw"})}
    with unit.secure("sm") as client:
        register = pb.RegisterInstanceRequest(instance=IDENT, permissions=permissions)
        secret = client.instances.RegisterInstance(register).secret
        assert len(secret) == 36
        assert client.instances.RegisterInstance(register).secret == secret
    unit.kill()
    unit.start()
    with unit.open() as client:
        answer = client.permissions.GetPermissions(pb.PermissionsRequest(secret=secret, functional_server_id="vis"))
        assert answer.permissions.permissions == {"*": "r", "door": "rw"}
        assert (answer.instance.item_id, answer.instance.subject_id, answer.instance.instance) == ("item", "subject", 3)
        old = client.v5_permissions.GetPermissions(v5.PermissionsRequest(secret=secret, functional_server_id="vis"))
        assert old.permissions.permissions == {"*": "r", "door": "rw"}
        assert old.instance == common_v1.InstanceIdent(service_id="item", subject_id="subject", instance=3)
        for wrong, server in ((secret, "other"), ("x", "vis")):
            request = pb.PermissionsRequest(secret=wrong, functional_server_id=server)
            assert status(client.permissions.GetPermissions, request) is grpc.StatusCode.INTERNAL
    with unit.secure("sm") as client:
        narrow = {"vis": pb.Permissions(permissions={"*": "r"})}
        again = client.instances.RegisterInstance(pb.RegisterInstanceRequest(instance=IDENT, permissions=narrow))
        assert again.secret == secret
        older = common_v1.InstanceIdent(service_id="item", subject_id="subject", instance=3)
        rights = {"vis": v5.Permissions(permissions={"*": "r"})}
        by_v5 = client.v5_instances.RegisterInstance(v5.RegisterInstanceRequest(instance=older, permissions=rights))
        assert by_v5.secret == secret
        client.v5_instances.UnregisterInstance(v5.UnregisterInstanceRequest(instance=older))
        assert (
            status(client.v5_instances.UnregisterInstance, v5.UnregisterInstanceRequest(instance=older))
            is grpc.StatusCode.INTERNAL
        )
        assert client.instances.RegisterInstance(register).secret != secret
        client.instances.UnregisterInstance(pb.UnregisterInstanceRequest(instance=IDENT))
        unknown = pb.UnregisterInstanceRequest(instance=IDENT)
        assert status(client.instances.UnregisterInstance, unknown) is grpc.StatusCode.INTERNAL
    assert secret not in unit.log()


def test_permissions_only_when_enabled(make_iam: Callable[..., Iam]) -> None:
    iam = make_iam(enablePermissionsHandler=False)
    iam.start(provisioning=True)
    with iam.plain() as client:
        register = pb.RegisterInstanceRequest(instance=IDENT)
        assert status(client.instances.RegisterInstance, register) is grpc.StatusCode.UNIMPLEMENTED
        look_up = pb.PermissionsRequest(secret="x", functional_server_id="vis")
        assert status(client.permissions.GetPermissions, look_up) is grpc.StatusCode.UNIMPLEMENTED


def test_pause_and_resume_may_be_repeated_and_are_told(unit: Iam) -> None:
    with unit.secure() as client, unit.open() as watcher:
        with (
            watching(watcher.nodes.SubscribeNodeChanged, Empty()) as nodes,
            watching(watcher.node.SubscribeCurrentNodeChanged, Empty()) as current,
        ):
            for call, state in [
                (client.states.PauseNode, "paused"),
                (client.states.PauseNode, "paused"),
                (client.states.ResumeNode, "provisioned"),
                (client.states.ResumeNode, "provisioned"),
                (client.states.PauseNode, "paused"),
            ]:
                request = pb.PauseNodeRequest(node_id="node-1") if "aus" in state else pb.ResumeNodeRequest()
                assert not call(request).HasField("error")
                assert client.node.GetCurrentNodeInfo(Empty()).state == state
                assert unit.state_file.read_text() == state
                time.sleep(0.1)
            for answers in (nodes, current):
                assert [answers.get(timeout=5).state for _ in range(3)] == ["paused", "provisioned", "paused"]
                assert answers.empty()
    unit.kill()
    unit.start()
    with unit.secure() as client:
        assert client.node.GetCurrentNodeInfo(Empty()).state == "paused"
        assert not client.states.ResumeNode(pb.ResumeNodeRequest(node_id="")).HasField("error")


def test_subjects_file_is_watched(unit: Iam) -> None:
    with unit.open() as client, watching(client.identity.SubscribeSubjectsChanged, Empty()) as answers:
        (unit.root / "subjects").write_text(" subject2 \n\nsubject3\n")
        assert answers.get(timeout=15).subjects == ["subject2", "subject3"]
        assert client.identity.GetSubjects(Empty()).subjects == ["subject2", "subject3"]


def test_older_interface(unit: Iam) -> None:
    with unit.open() as client:
        assert client.v5_identity.GetSystemInfo(Empty()).unit_model == "model;1.2.3"
        assert client.v5_identity.GetSubjects(Empty()).subjects == ["subject1", "subject2"]
        node = client.v5_public.GetNodeInfo(Empty())
        assert (node.node_id, node.name, node.status) == ("node-1", "main", "provisioned")
        info = client.certs.GetCert(pb.GetCertRequest(type="sm"))
        assert client.v5_nodes.GetAllNodeIDs(Empty()).ids == ["node-1"]
        assert client.v5_nodes.GetNodeInfo(v5.GetNodeInfoRequest(node_id="node-1")) == node
        assert status(client.v5_nodes.GetNodeInfo, v5.GetNodeInfoRequest(node_id="x")) is grpc.StatusCode.INTERNAL
        register = client.v5_nodes.RegisterNode(iter([v5.IAMOutgoingMessages()]))
        assert status(lambda _: next(register), None) is grpc.StatusCode.UNIMPLEMENTED
        old = client.v5_public.GetCert(v5.GetCertRequest(type="sm"))
        assert (old.type, old.cert_url, old.key_url) == ("sm", info.cert_url, info.key_url)


def test_deprovision_and_provision_again(unit: Iam) -> None:
    with unit.secure() as client:
        start = client.provisioning.StartProvisioning(pb.StartProvisioningRequest(password="x"))
        assert start.error.aos_code == 9, "a Node in service must keep its keys"
        assert not client.provisioning.Deprovision(pb.DeprovisionRequest(node_id="node-1")).HasField("error")
        assert client.node.GetCurrentNodeInfo(Empty()).state == "unprovisioned"
    assert not unit.state_file.exists()
    assert unit.stop() == 0
    unit.provision()
    unit.start()


def test_main_node_without_identifier(make_iam: Callable[..., Iam]) -> None:
    iam = make_iam(identifier={"plugin": "none"})
    iam.start(provisioning=True)
    with iam.plain() as client:
        assert status(client.identity.GetSystemInfo, Empty()) is grpc.StatusCode.UNAVAILABLE
        assert status(client.identity.GetSubjects, Empty()) is grpc.StatusCode.UNAVAILABLE
        client.start_provisioning()
        answer = client.issue.CreateKey(pb.CreateKeyRequest(type="cm"))
        assert answer.error.aos_code == 5 and "system id" in answer.error.message


def test_secondary_node_serves_its_own_part(make_iam: Callable[..., Iam], tmp_path: Path) -> None:
    iam = make_iam(
        nodeInfo={"nodeIdPath": str(tmp_path / "unit0/node-id"), "provisioningStatePath": str(tmp_path / "s")}
    )
    iam.start(provisioning=True)
    with iam.plain() as client:
        assert client.node.GetCurrentNodeInfo(Empty()).node_id == "node-1"
        for call, request in [
            (client.identity.GetSystemInfo, Empty()),
            (client.nodes.GetAllNodeIDs, Empty()),
            (client.issue.CreateKey, pb.CreateKeyRequest()),
            (client.provisioning.GetCertTypes, pb.GetCertTypesRequest()),
            (client.states.PauseNode, pb.PauseNodeRequest()),
        ]:
            assert status(call, request) is grpc.StatusCode.UNIMPLEMENTED


def test_working_directory_stays_clean(unit: Iam) -> None:
    """Files for root only, and after an orderly stop one plain database file that AosCore 9.1 can open."""
    assert len(TYPES) == len(list(unit.root.glob("keys/*/*.key.pem")))
    for key in unit.root.glob("keys/*/*.key.pem"):
        assert key.stat().st_mode & 0o777 == 0o600
    assert (unit.root / "keys").stat().st_mode & 0o777 == 0o700
    assert unit.stop() == 0
    files = {path.name for path in (unit.root / "work").iterdir()}
    assert files == {"iamanager.db", ".lock"}
    assert (unit.root / "work/iamanager.db").stat().st_mode & 0o777 == 0o600
