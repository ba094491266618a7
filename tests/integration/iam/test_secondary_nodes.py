"""A Main Node and a Secondary Node as real processes: every request that is handed on, and who may be handed what."""

import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from google.protobuf.empty_pb2 import Empty

from aoscore._pb.common.v2 import common_pb2 as common
from aoscore._pb.iamanager.v6 import iamanager_pb2 as pb
from aoscore._pb.iamanager.v6 import iamanager_pb2_grpc as stubs
from aoscore.common.keys import private_key_pem
from tests.support.iam import SECONDARY_TYPES, Client, Iam, public_credentials, wait_until

pytestmark = pytest.mark.timeout(180)

Pair = tuple[Iam, Iam]


@pytest.fixture
def make_pair(make_iam: Callable[..., Iam]) -> Callable[..., Pair]:
    """Makes a Main Node and the Secondary Node node-2; both get the configuration keys, nothing runs."""

    def make(**config: Any) -> Pair:
        main = make_iam(**config)
        return main, make_iam(node_id="node-2", main=main, **config)

    return make


@pytest.fixture
def pair(make_pair: Callable[..., Pair]) -> Pair:
    return make_pair()


@pytest.fixture
def unit(pair: Pair) -> Pair:
    """Both provisioned, in normal mode, and connected."""
    main, second = pair
    main.provision(second)
    main.start()
    second.start()
    with main.secure() as client:
        wait_until(partial(connected, client))
    return pair


def connected(client: Client, node_id: str = "node-2") -> bool:
    """Whether requests reach the Node."""
    try:
        client.provisioning.GetCertTypes(pb.GetCertTypesRequest(node_id=node_id))
    except grpc.RpcError:
        return False
    return True


def has_connected(main: Iam, times: int) -> bool:
    return main.log().count("Node connected: nodeID=node-2") == times


def state_at_main(client: Client, node_id: str = "node-2") -> str:
    return str(client.nodes.GetNodeInfo(pb.GetNodeInfoRequest(node_id=node_id)).state)


def failure(call: Callable[[Any], Any], request: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call(request)
    return caught.value.code(), caught.value.details()


def calls(client: Client, node_id: str) -> dict[str, tuple[Callable[[Any], Any], Any]]:
    """Every method that names a Node."""
    provisioning, issue, states = client.provisioning, client.issue, client.states
    return {
        "GetCertTypes": (provisioning.GetCertTypes, pb.GetCertTypesRequest(node_id=node_id)),
        "StartProvisioning": (
            provisioning.StartProvisioning,
            pb.StartProvisioningRequest(node_id=node_id, password="Secret123"),
        ),
        "FinishProvisioning": (provisioning.FinishProvisioning, pb.FinishProvisioningRequest(node_id=node_id)),
        "Deprovision": (provisioning.Deprovision, pb.DeprovisionRequest(node_id=node_id)),
        "CreateKey": (issue.CreateKey, pb.CreateKeyRequest(node_id=node_id, type="iam")),
        "ApplyCert": (issue.ApplyCert, pb.ApplyCertRequest(node_id=node_id, type="iam", cert="x")),
        "PauseNode": (states.PauseNode, pb.PauseNodeRequest(node_id=node_id)),
        "ResumeNode": (states.ResumeNode, pb.ResumeNodeRequest(node_id=node_id)),
    }


def test_defect_9_every_method_fails_at_once_for_an_unknown_and_an_offline_node(unit: Pair) -> None:
    """Defect 9 of observed.md: GetCertTypes of an unknown node took 30 s to fail."""
    main, second = unit
    second.kill()
    with main.secure() as client:
        wait_until(lambda: not connected(client))
        for node_id, text in (("node-9", "node 'node-9' is not known"), ("node-2", "node 'node-2' is not connected")):
            for name, (call, request) in calls(client, node_id).items():
                begin = time.monotonic()
                if node_id == "node-2" and name in ("ResumeNode", "FinishProvisioning"):
                    # What it is asked for is what it is, by the record of the Main Node.
                    assert not call(request).HasField("error")
                else:
                    assert failure(call, request) == (grpc.StatusCode.INTERNAL, text), name
                assert time.monotonic() - begin < 5
        assert failure(client.nodes.GetNodeInfo, pb.GetNodeInfoRequest(node_id="node-9")) == (
            grpc.StatusCode.INTERNAL,
            "node 'node-9' is not known",
        )
        assert state_at_main(client) == "provisioned"


def test_every_method_of_an_unprovisioned_node(pair: Pair) -> None:
    main, second = pair
    main.start(provisioning=True)
    second.start(provisioning=True)
    with main.plain() as client:
        assert client.wait_for_nodes(2) == ["node-1", "node-2"]
        info = client.nodes.GetNodeInfo(pb.GetNodeInfoRequest(node_id="node-2"))
        assert (info.state, info.node_type, info.title) == ("unprovisioned", "secondary-type", "title of node-2")
        assert info.total_ram > 0 and info.cpus and info.partitions[0].total_size > 0
        with second.plain() as there:
            assert there.node.GetCurrentNodeInfo(Empty()) == info
        every = calls(client, "node-2")

        def error(name: str) -> common.ErrorInfo:
            call, request = every[name]
            answer = call(request)
            assert answer.HasField("error"), name
            assert answer.error.exit_code and answer.error.message, "C++ clients look at the code, aos-prov at the text"
            return answer.error

        for name in ("Deprovision", "PauseNode", "ResumeNode"):
            assert error(name).aos_code == 9, name
        assert "start provisioning first" in error("CreateKey").message
        assert "no certificate of type 'iam'" in error("FinishProvisioning").message
        client.start_provisioning(node_id="node-2")
        types = client.provisioning.GetCertTypes(pb.GetCertTypesRequest(node_id="node-2")).types
        assert types == SECONDARY_TYPES
        unknown = client.issue.CreateKey(pb.CreateKeyRequest(node_id="node-2", type="bogus"))
        assert unknown.error.aos_code == 5
        csr = client.create_key("iam", node_id="node-2")
        request = x509.load_pem_x509_csr(csr.encode())
        assert request.subject.rfc4514_string() == "CN=unit-1", "the Main Node tells the system id"
        garbage = client.issue.ApplyCert(pb.ApplyCertRequest(node_id="node-2", type="iam", cert="garbage"))
        assert garbage.error.aos_code == 6 and (garbage.node_id, garbage.cert_info.type) == ("node-2", "iam")
        leaf = main.authority.sign_request(csr).split("-----END")[0] + "-----END CERTIFICATE-----\n"
        alone = client.issue.ApplyCert(pb.ApplyCertRequest(node_id="node-2", type="iam", cert=leaf))
        assert alone.error.aos_code == 5 and "chain up to the root" in alone.error.message
        info = client.apply("iam", main.authority.sign_request(csr), node_id="node-2")
        assert info.type == "iam" and info.cert_url and bytes.fromhex(info.serial.decode())
        assert state_at_main(client) == "unprovisioned"
        client.finish_provisioning(node_id="node-2")
        client.finish_provisioning(node_id="node-2")
        assert state_at_main(client) == second.state_file.read_text() == "provisioned"


def test_every_method_of_a_node_in_service(unit: Pair) -> None:
    main, second = unit
    with main.secure() as client, second.open() as there:
        every = calls(client, "node-2")
        changes = client.nodes.SubscribeNodeChanged(Empty(), timeout=60)
        for name, state in (("PauseNode", "paused"), ("PauseNode", "paused"), ("ResumeNode", "provisioned")):
            call, request = every[name]
            assert not call(request).HasField("error")
            assert there.node.GetCurrentNodeInfo(Empty()).state == state
            assert state_at_main(client) == second.state_file.read_text() == state
            while (told := next(changes)).node_id != "node-2" or told.state != state:
                pass
            changes.cancel()
            changes = client.nodes.SubscribeNodeChanged(Empty(), timeout=60)
        start = client.provisioning.StartProvisioning(pb.StartProvisioningRequest(node_id="node-2", password="x"))
        assert start.error.aos_code == 9 and start.error.message == (
            "can't start provisioning: node is provisioned, must be unprovisioned"
        )
        before = there.certs.GetCert(pb.GetCertRequest(type="sm"))
        new = client.renew("sm", 500, node_id="node-2")
        assert there.certs.GetCert(pb.GetCertRequest(type="sm")).serial == new.serial != before.serial
        call, request = every["Deprovision"]
        assert not call(request).HasField("error")
        assert state_at_main(client) == "unprovisioned" and not second.state_file.exists()
        assert "Secret123" not in main.log() + second.log()


def test_renewal_of_the_certificate_by_which_a_node_is_connected(unit: Pair) -> None:
    main, second = unit
    with main.secure() as client:
        for days in (500, 600):
            links = main.log().count("Node connected: nodeID=node-2")
            serial = client.renew("iam", days, node_id="node-2").serial
            # Before, a request comes to the old link, or between the two.
            wait_until(partial(has_connected, main, links + 1))
        assert second.log().count("Certificate changed, connecting to the Main Node anew") == 2
        pause = client.states.PauseNode(pb.PauseNodeRequest(node_id="node-2"))
        assert not pause.HasField("error")
    # The new key is the Node's also for the next processes.
    for node in unit:
        node.kill()
    for node in unit:
        node.start()
    with main.secure() as client, second.open() as there:
        assert there.certs.GetCert(pb.GetCertRequest(type="iam")).serial == serial
        wait_until(partial(connected, client))
    assert "is refused" not in main.log()


def test_main_node_restarts_and_its_nodes_come_back(unit: Pair) -> None:
    main, _ = unit
    main.kill()
    main.start()
    with main.secure() as client:
        assert list(client.nodes.GetAllNodeIDs(Empty()).ids) == ["node-1", "node-2"]
        assert state_at_main(client) == "provisioned"
        wait_until(partial(connected, client))


def register(channel: grpc.Channel, node: pb.NodeInfo) -> grpc.StatusCode:
    """The status with which a stream that shows this Node ends; OK when it is kept for two seconds."""
    stub: Any = stubs.IAMPublicNodesServiceStub(channel)  # type: ignore[no-untyped-call]
    done = False

    def messages() -> Iterator[pb.IAMOutgoingMessages]:
        yield pb.IAMOutgoingMessages(node_info=node)
        while not done:
            time.sleep(0.05)

    stream = stub.RegisterNode(messages(), timeout=2)
    try:
        for _ in stream:
            pass
        return grpc.StatusCode.OK
    except grpc.RpcError as error:
        code = error.code()
        return grpc.StatusCode.OK if code is grpc.StatusCode.DEADLINE_EXCEEDED else code
    finally:
        done = True


def test_defect_8_certificates_speak_for_their_own_node_only(unit: Pair) -> None:
    """Any certificate of the Unit's CA could register any node id (observed.md, defect 8)."""
    main, second = unit
    root = main.authority.root_pem

    def as_(key: bytes, chain: bytes) -> grpc.Channel:
        return grpc.secure_channel(main.protected, grpc.ssl_channel_credentials(root, key, chain))

    (key,) = second.root.glob("keys/sm/*.key.pem")
    (chain,) = second.root.glob("keys/sm/*.cert.pem")
    stranger = main.authority.issue("unit-1")
    of_second = as_(key.read_bytes(), chain.read_bytes())
    of_stranger = as_(private_key_pem(stranger.key), stranger.pem)
    open_port = grpc.secure_channel(main.public, public_credentials(main))
    denied = grpc.StatusCode.PERMISSION_DENIED
    with of_second, of_stranger, open_port:
        # Its own certificates are of use for node-2 alone, others for no known node, and nobody is the Main Node.
        assert register(of_second, pb.NodeInfo(node_id="node-3", state="provisioned")) is denied
        assert register(of_second, pb.NodeInfo(node_id="node-1", state="provisioned")) is denied
        assert register(of_stranger, pb.NodeInfo(node_id="node-2", state="provisioned")) is denied
        assert register(open_port, pb.NodeInfo(node_id="node-2", state="unprovisioned")) is denied
        assert register(open_port, pb.NodeInfo(node_id="node-1", state="unprovisioned")) is denied
        with main.secure() as client:
            assert connected(client) and state_at_main(client) == "provisioned"
            assert list(client.nodes.GetAllNodeIDs(Empty()).ids) == ["node-1", "node-2"]
        # What has the wrong state for its port is ignored.
        assert register(open_port, pb.NodeInfo(node_id="node-4", state="provisioned")) is grpc.StatusCode.OK
        with main.secure() as client:
            assert list(client.nodes.GetAllNodeIDs(Empty()).ids) == ["node-1", "node-2"]
        large = pb.NodeInfo(node_id="node-5", state="unprovisioned", title="x" * 100_000)
        assert register(open_port, large) is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_node_that_was_wiped_is_kept_aside_until_somebody_wants_it(unit: Pair) -> None:
    main, second = unit
    second.kill()
    for path in (second.root / "work").glob("iamanager.db*"):
        path.unlink()
    second.state_file.unlink()
    second.start(provisioning=True)
    wait_until(lambda: "it is in service and shows up as new" in main.log())
    with main.secure() as client:
        assert state_at_main(client) == "provisioned"
        code, text = failure(client.provisioning.GetCertTypes, pb.GetCertTypesRequest(node_id="node-2"))
        assert code is grpc.StatusCode.INTERNAL and "in service but shows up as new" in text
        client.start_provisioning(node_id="node-2")
        assert state_at_main(client) == "unprovisioned"
        for cert_type in SECONDARY_TYPES:
            client.renew(cert_type, 400, node_id="node-2")
        client.finish_provisioning(node_id="node-2")
        assert second.stop() == 0
        second.start()
        wait_until(partial(connected, client))


def test_unit_of_9_1_is_taken_over_with_its_nodes(unit: Pair) -> None:
    """AosCore 9.1 keeps no keys of Nodes: the first one that comes is taken on trust, when it is of the Unit."""
    main, second = unit
    main.kill()
    subprocess.run(
        [
            "python3",
            "-c",
            "import sqlite3, sys; c = sqlite3.connect(sys.argv[1]); "
            "[c.execute(f'DROP TABLE {name}') for (name,) in list(c.execute("
            "\"SELECT name FROM sqlite_master WHERE type='table' AND name LIKE 'aoscore_%'\"))]; c.commit()",
            str(main.root / "work/iamanager.db"),
        ],
        check=True,
    )
    main.start()
    with main.secure() as client:
        wait_until(partial(connected, client))
        assert "Key of Node taken on trust: nodeID=node-2" in main.log()
        client.renew("iam", 500, node_id="node-2")
        wait_until(partial(connected, client))
    assert second.process is not None and second.process.poll() is None


STEPS = ["start", "key iam", "key sm", "certificate iam", "certificate sm", "finish"]


@pytest.mark.parametrize("victims", ["main", "second", "both"])
def test_kill_after_every_step_of_provisioning_and_go_on(pair: Pair, victims: str) -> None:
    main, second = pair
    killed = {"main": [main], "second": [second], "both": [main, second]}[victims]
    main.start(provisioning=True)
    second.start(provisioning=True)
    with main.plain() as client:
        client.wait_for_nodes(2)
    done = []
    for step in main.steps(second):
        done.append(step)
        for node in killed:
            node.kill()
        for node in killed:
            node.start(provisioning=not node.state_file.exists())
        if not second.state_file.exists():
            with main.plain() as client:
                wait_until(partial(connected, client))
    assert [step.removeprefix("node-2 ") for step in done if step.startswith("node-2 ")] == STEPS
    for node in (main, second):
        node.kill()
        node.start()
    with main.secure() as client:
        wait_until(partial(connected, client))
        assert state_at_main(client) == "provisioned"
        assert not client.states.PauseNode(pb.PauseNodeRequest(node_id="node-2")).HasField("error")
    for cert_type in SECONDARY_TYPES:
        assert len(list(second.root.glob(f"keys/{cert_type}/*.key.pem"))) == 1, "no orphan keys"
        assert len(list(second.root.glob(f"keys/{cert_type}/*.cert.pem"))) == 1


def test_kill_of_a_node_in_the_middle_of_a_step_and_repeat_it(pair: Pair) -> None:
    """The caller gets an error at once; whatever of the step has reached the disk, repeating it goes on to the end."""
    main, second = pair
    main.start(provisioning=True)
    second.start(provisioning=True)
    certificates: list[str] = []

    def create(client: Client) -> None:
        certificates[:] = [main.authority.sign_request(client.create_key("iam", node_id="node-2"))]

    steps: list[tuple[Callable[[Client], object], list[float]]] = [
        (lambda client: client.start_provisioning(node_id="node-2"), [1, 4, 10]),
        (create, [1, 4, 10, 20]),
        (lambda client: client.apply("iam", certificates[0], node_id="node-2"), [1, 4, 8, 14]),
        (lambda client: client.finish_provisioning(node_id="node-2"), [1, 4, 8]),
    ]
    for step, delays_ms in steps:
        for delay_ms in delays_ms:
            if second.state_file.exists():
                break
            with main.plain() as client, ThreadPoolExecutor() as pool:
                wait_until(partial(connected, client))
                running = pool.submit(step, client)
                time.sleep(delay_ms / 1000)
                second.kill()
                error = running.exception(timeout=10)
                assert error is None or "was disconnected" in str(error) or "not connected" in str(error), error
            second.start(provisioning=not second.state_file.exists())
        with main.plain() as client:
            # A Node that is in service already comes back when the Main Node is too: the record has it, or the keys.
            if not second.state_file.exists():
                wait_until(partial(connected, client))
                step(client)
    assert second.state_file.read_text() == "provisioned"
    with main.plain() as client:
        client.start_provisioning()
        for cert_type in main.types:
            client.renew(cert_type, 400)
        client.finish_provisioning()
    for node in pair:
        node.kill()
        node.start()
    with main.secure() as client:
        wait_until(partial(connected, client))
        assert state_at_main(client) == "provisioned"


def test_kill_in_the_middle_of_a_start_leaves_nothing_that_looks_usable(make_pair: Callable[..., Pair]) -> None:
    """The hook of the disk encryption is killed with IAM; without it the keys must not be used."""
    main, second = make_pair(diskEncryptionCmdArgs=["sleep", "60"])
    main.start(provisioning=True)
    second.start(provisioning=True)
    with main.plain() as client:
        client.wait_for_nodes(2)
        for victim in (second, main):
            start = pb.StartProvisioningRequest(node_id=victim.node_id, password="Secret123")
            with pytest.raises(grpc.RpcError) as caught:
                client.provisioning.StartProvisioning(start, timeout=1)
            assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            assert list((victim.root / "keys").iterdir()), "the storages are prepared before the hook runs"
            victim.kill()
            victim.start(provisioning=True)
            assert not list((victim.root / "keys").iterdir())
    with main.plain() as client:
        wait_until(partial(connected, client))
        for victim in (second, main):
            answer = client.issue.CreateKey(pb.CreateKeyRequest(node_id=victim.node_id, type="iam"))
            assert answer.error.aos_code == 9 and "start provisioning first" in answer.error.message
            finish = client.provisioning.FinishProvisioning(pb.FinishProvisioningRequest(node_id=victim.node_id))
            assert finish.error.aos_code == 9


def test_hooks_of_a_node_that_hang_or_fail(make_pair: Callable[..., Pair], tmp_path: Path) -> None:
    gate = tmp_path / "go"
    main, second = make_pair(
        startProvisioningCmdArgs=["sh", "-c", f"echo preparing; [ -e {gate} ] || {{ echo no gate; exit 7; }}"],
        finishProvisioningCmdArgs=["sh", "-c", f"[ -e {gate} ] || {{ echo waiting; exec sleep 60; }}"],
        deprovisionCmdArgs=["sh", "-c", f"[ -e {gate} ] || exec sleep 60"],
        hookTimeout="1s",
    )
    main.start(provisioning=True)
    second.start(provisioning=True)
    with main.plain() as client:
        client.wait_for_nodes(2)
        every = calls(client, "node-2")

        def answer(name: str) -> common.ErrorInfo:
            call, request = every[name]
            found: common.ErrorInfo = call(request).error
            return found

        failed = answer("StartProvisioning")
        assert failed.message == "sh failed with code 7: no gate" and failed.exit_code
        assert "startProvisioning: preparing" in second.log()
        gate.touch()
        client.start_provisioning(node_id="node-2")
        for cert_type in SECONDARY_TYPES:
            client.renew(cert_type, 400, node_id="node-2")
        gate.unlink()
        hung = answer("FinishProvisioning")
        assert hung.aos_code == 7 and hung.message == "sh did not end within 1 s and was killed: waiting"
        assert state_at_main(client) == "unprovisioned" and not second.state_file.exists()
        # The rest goes on.
        assert client.provisioning.GetCertTypes(pb.GetCertTypesRequest(node_id="node-2")).types == SECONDARY_TYPES
        gate.touch()
        client.finish_provisioning(node_id="node-2")
        gate.unlink()
        assert answer("Deprovision").aos_code == 7
        assert state_at_main(client) == second.state_file.read_text() == "provisioned"


def test_provisioning_mode_closes_when_nobody_comes(make_iam: Callable[..., Iam]) -> None:
    iam = make_iam(provisioningTimeout="6s", provisioningInterface="lo")
    iam.start(provisioning=True)
    with iam.plain() as client:
        client.start_provisioning()
    wait_until(lambda: iam.log().count("its port is closed until the next start") == 2)
    for address in (iam.public, iam.protected):
        with Client(iam, address, None) as client, pytest.raises(grpc.RpcError):
            client.version.GetAPIVersion(Empty())
    assert iam.process is not None and iam.process.poll() is None
    assert iam.stop() == 0
    iam.start(provisioning=True)
    with iam.plain() as client:
        client.renew("iam", 400)
        client.finish_provisioning()
    assert iam.stop() == 0
    iam.start()
    with iam.secure("iam") as client:
        assert client.version.GetAPIVersion(Empty()).version == 6


def test_provisioning_interface_without_address_is_a_start_error(make_iam: Callable[..., Iam]) -> None:
    iam = make_iam(provisioningInterface="nothing0")
    ended = subprocess.run(iam.command(provisioning=True), capture_output=True, text=True, timeout=30)
    assert ended.returncode != 0 and "'nothing0' (provisioningInterface) has no address" in ended.stdout
