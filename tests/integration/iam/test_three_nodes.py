"""A Unit of three Nodes, each with its IAM in a network namespace of its own, and the real aos-prov before it.

bed (aos-prov, devcloud)  10.77.0.254
main 10.77.0.1    node-2 10.77.0.2    node-3 10.77.0.3       all on one bridge
"""

import subprocess
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import grpc
import pytest
from google.protobuf.empty_pb2 import Empty

from aoscore._pb.iamanager.v6 import iamanager_pb2 as pb
from tests.support import provider
from tests.support.cloudtools import Tools, new_user
from tests.support.devcloud import DevcloudProcess
from tests.support.iam import SECONDARY_TYPES, TYPES, Client, Iam, wait_until
from tests.support.pki import TestCa
from tests.support.tokeniam import TokenIam

pytestmark = [pytest.mark.net, pytest.mark.timeout(300)]

# Keys in files, and on tokens of SoftHSM: all types of all Nodes.
KINDS = [
    pytest.param(Iam, id="files"),
    pytest.param(TokenIam, id="tokens", marks=pytest.mark.debian(provider.PACKAGE)),
]


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


class Network:
    """The bridge, and a namespace for each Node."""

    def __init__(self) -> None:
        ip("link", "add", "unit", "type", "bridge")
        ip("addr", "add", "10.77.0.254/24", "dev", "unit")
        ip("link", "set", "unit", "up")

    def join(self, name: str, number: int) -> str:
        """A new namespace on the bridge; its address."""
        address = f"10.77.0.{number}"
        ip("netns", "add", name)
        ip("link", "add", f"v{number}", "type", "veth", "peer", "name", "eth0", "netns", name)
        ip("link", "set", f"v{number}", "master", "unit", "up")
        ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
        for link in ("eth0", "lo"):
            ip("-n", name, "link", "set", link, "up")
        return address

    def cut(self, number: int, *, off: bool) -> None:
        """Take a Node's link down, or up again."""
        ip("link", "set", f"v{number}", "down" if off else "up")


class Unit:
    """Main Node and two Secondary Nodes."""

    def __init__(self, directory: Path, network: Network, kind: type[Iam]) -> None:
        self.network = network
        authority = TestCa("Unit CA")
        self.nodes: list[Iam] = []
        for number in (1, 2, 3):
            root = directory / f"node-{number}"
            root.mkdir()
            host = network.join(f"node-{number}", number)
            main = self.nodes[0] if self.nodes else None
            name = f"node-{number}"
            self.nodes.append(kind(root, authority, node_id=name, host=host, netns=name, main=main))
        self.main, *self.others = self.nodes

    def trust(self, root_file: Path) -> None:
        """All Nodes come with the root of this cloud."""
        for node in self.nodes:
            node.ca_file.write_bytes(root_file.read_bytes())

    def restart(self, *, provisioning: bool = False) -> None:
        """What the finish and deprovision hooks of a device, and the units of systemd, do to all Nodes."""
        for node in self.nodes:
            if node.process is not None:
                assert node.stop() == 0
        for node in self.nodes:
            if provisioning and isinstance(node, TokenIam):
                node.hsm.wipe()
            node.start(provisioning=provisioning)

    def states(self, client: object) -> dict[str, str]:
        nodes = client.nodes  # type: ignore[attr-defined]
        ids = nodes.GetAllNodeIDs(Empty()).ids
        return {node_id: nodes.GetNodeInfo(pb.GetNodeInfoRequest(node_id=node_id)).state for node_id in ids}


@pytest.fixture(params=KINDS)
def unit(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Unit]:
    unit = Unit(tmp_path, Network(), request.param)
    yield unit
    for node in unit.nodes:
        node.kill()


def credentials_of_user(cloud: DevcloudProcess) -> grpc.ChannelCredentials:
    """A client of the Unit's protected ports, whose CA is that of the cloud."""
    cloud.user_context("oem")
    key, begin, chain = (cloud.directory / "users" / "oem.pem").read_text().partition("-----BEGIN CERTIFICATE")
    return grpc.ssl_channel_credentials(cloud.root_file.read_bytes(), key.encode(), (begin + chain).encode())


def test_aos_prov_provisions_three_nodes_and_does_so_again(
    unit: Unit, tools_cloud: DevcloudProcess, tools: Tools
) -> None:
    user = new_user(tools_cloud, tools, "oem")
    unit.trust(tools_cloud.root_file)
    provision = ["provision", "-u", unit.main.protected, "-p", str(user), "--nodes", "3"]
    provision += ["--skip-check-version", "--retry-count", "1"]
    serials: list[set[str]] = []
    for _ in range(2):
        unit.restart(provisioning=True)
        with unit.main.plain() as client:
            client.wait_for_nodes(3)
        output = tools.succeed("aos-prov", *provision)
        assert "Finished successfully" in output
        assert [node.state_file.read_text() for node in unit.nodes] == ["provisioned"] * 3
        issued = {(one["node_id"], one["type"]) for one in tools_cloud.client.call("certificates", unit="unit-1")}
        assert issued == {("node-1", cert_type) for cert_type in TYPES} | {
            (node.node_id, cert_type) for node in unit.others for cert_type in SECONDARY_TYPES
        }
        unit.restart()
        with Client(unit.main, unit.main.protected, credentials_of_user(tools_cloud)) as client:
            assert unit.states(client) == {node.node_id: "provisioned" for node in unit.nodes}
            for node in unit.others:
                with node.open() as peer:
                    info = peer.certs.GetCert(pb.GetCertRequest(type="iam"))
                    assert info.key_url.startswith("pkcs11:" if isinstance(node, TokenIam) else "file:")
                    assert peer.node.GetCurrentNodeInfo(Empty()).state == "provisioned"
                serials.append({info.serial.decode()})
                wait_until(partial(connected, client, node))
                pause = client.states.PauseNode(pb.PauseNodeRequest(node_id=node.node_id))
                assert not pause.HasField("error"), pause
                assert node.state_file.read_text() == "paused"
            for node in (*unit.others, unit.main):
                answer = client.provisioning.Deprovision(pb.DeprovisionRequest(node_id=node.node_id))
                assert not answer.HasField("error"), answer
            assert unit.states(client) == {node.node_id: "unprovisioned" for node in unit.nodes}
        assert not any(node.state_file.exists() for node in unit.nodes)
        tools_cloud.client.call("forget_unit", unit="unit-1")
    assert len(set.union(*serials)) == 4, "each time and each Node has its own certificate"


def test_node_whose_network_is_cut_is_offline_and_comes_back(unit: Unit) -> None:
    unit.main.provision(*unit.others)
    unit.restart()
    second, third = unit.others
    with unit.main.secure() as client:
        for node in unit.others:
            wait_until(partial(connected, client, node))
        unit.network.cut(2, off=True)
        begin = time.monotonic()
        with pytest.raises(grpc.RpcError) as caught:
            # The deadline of the caller counts, and the other Node is not held up.
            client.provisioning.GetCertTypes(pb.GetCertTypesRequest(node_id="node-2"), timeout=2)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert time.monotonic() - begin < 10
        assert client.provisioning.GetCertTypes(pb.GetCertTypesRequest(node_id="node-3")).types == SECONDARY_TYPES
        wait_until(lambda: "Node disconnected: nodeID=node-2" in unit.main.log().rpartition("Init IAM")[2], 60)
        begin = time.monotonic()
        with pytest.raises(grpc.RpcError, match="'node-2' is not connected"):
            client.provisioning.GetCertTypes(pb.GetCertTypesRequest(node_id="node-2"))
        assert time.monotonic() - begin < 5
        assert unit.states(client)["node-2"] == "provisioned"
        unit.network.cut(2, off=False)
        wait_until(partial(connected, client, second), 60)
        assert third.process is not None and third.process.poll() is None


def connected(client: object, node: Iam) -> bool:
    """Whether requests reach the Node."""
    try:
        client.provisioning.GetCertTypes(pb.GetCertTypesRequest(node_id=node.node_id))  # type: ignore[attr-defined]
    except grpc.RpcError:
        return False
    return True
