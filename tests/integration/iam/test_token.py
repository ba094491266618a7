"""The IAM process with its keys on tokens of SoftHSM: the whole life of a Node."""

import queue
import socket
import ssl
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from cryptography import x509
from google.protobuf.empty_pb2 import Empty

from aoscore._pb.iamanager.v6 import iamanager_pb2 as pb
from tests.support.iam import TYPES, Iam
from tests.support.tokeniam import DISK, TokenIam, token_of

pytestmark = pytest.mark.timeout(180)


@pytest.fixture
def node(make_iam: Callable[..., TokenIam]) -> TokenIam:
    """A provisioned Node in normal mode."""
    node = make_iam(TokenIam)
    node.provision()
    node.start()
    return node


PAIR_AND_CERTIFICATE = Counter(certificate=1, public=1, private=1)


def test_life_of_a_node(node: TokenIam) -> None:
    for label in ("aoscore", "aoscloud"):
        expected = {cert_type: PAIR_AND_CERTIFICATE for cert_type in (*TYPES, DISK) if token_of(cert_type) == label}
        assert node.hsm.counts(label) == {**expected, "": Counter(certificate=2)}
    with node.open() as client:
        for cert_type in TYPES:
            info = client.certs.GetCert(pb.GetCertRequest(type=cert_type))
            assert info.cert_url == info.key_url
            assert info.cert_url.startswith(f"pkcs11:token={token_of(cert_type)};object={cert_type};id=%")
            assert info.cert_url.endswith(f"?pin-source={node.hsm.pin_file}")
    for secret in ("Secret123", node.hsm.pin_file.read_text()):
        assert secret not in node.log()
    with node.secure() as client, node.secure() as bystander:
        changes: queue.Queue[Any] = queue.Queue()
        stream = bystander.certs.SubscribeCertChanged(pb.SubscribeCertChangedRequest(type="iam"))

        def read() -> None:
            try:
                for change in stream:
                    changes.put(change)
            except grpc.RpcError:
                pass

        reader = threading.Thread(target=read)
        reader.start()
        time.sleep(0.5)
        new = client.renew("iam", 500)
        assert changes.get(timeout=10) == new
        # The server shows the new one at once, and the stream from before goes on.
        assert served_serial(node) == int(new.serial, 16)
        newer = client.renew("iam", 600)
        assert changes.get(timeout=10) == newer
        stream.cancel()
        reader.join()
    assert node.hsm.counts()["iam"] == Counter(certificate=2, public=2, private=2)
    node.kill()
    node.start()
    assert served_serial(node) == int(newer.serial, 16)
    assert node.stop() == 0, node.log()


def served_serial(node: TokenIam) -> int:
    """Of the certificate that the protected port shows."""
    context = ssl.create_default_context(cafile=str(node.ca_file))
    host, port = node.public.split(":")
    with socket.create_connection((host, int(port))) as plain:
        with context.wrap_socket(plain, server_hostname="localhost") as tls:
            der = tls.getpeercert(binary_form=True)
    assert der is not None
    return x509.load_der_x509_certificate(der).serial_number


def test_component_with_its_key_on_the_token(node: TokenIam) -> None:
    for cert_type in ("cm", "sm"):
        result = node.client(cert_type, "50", "20")
        assert result["url"].startswith(f"pkcs11:token=aoscore;object={cert_type};")
        assert (result["answers"], result["greeted"], result["error"]) == (50, 20, "")


def test_callers_are_known_behind_the_relay(node: TokenIam) -> None:
    with node.secure("anyone") as client:
        client.create_key("sm")
        port = node.protected.split(":")[1]
    line = next(line for line in node.log().splitlines() if "Create key sm: " in line and " anyone" in line)
    assert "peer=ipv4:127.0.0.1:" in line and port
    with node.open() as client, pytest.raises(grpc.RpcError) as caught:
        client.provisioning.GetCertTypes(pb.GetCertTypesRequest())
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_second_process_can_not_take_the_ports(node: TokenIam, make_iam: Callable[..., Iam]) -> None:
    """observed.md, defect 7."""
    rival = make_iam(iamPublicServerUrl=node.public)
    ended = subprocess.run(rival.command(provisioning=True), capture_output=True, text=True, timeout=30)
    assert ended.returncode == 70 and f"can't listen on {node.public}" in ended.stdout
    assert "is ready" not in ended.stdout


def test_deprovision_and_provision_again(node: TokenIam) -> None:
    with node.secure() as client:
        assert not client.provisioning.Deprovision(pb.DeprovisionRequest()).HasField("error")
    assert node.stop() == 0
    before = {entry["id"] for entry in node.hsm.objects()}
    node.provision()
    node.start()
    assert not before & {entry["id"] for entry in node.hsm.objects()}
    with node.open() as client:
        assert client.node.GetCurrentNodeInfo(Empty()).state == "provisioned"


def test_broken_database_is_rebuilt_from_the_token(node: TokenIam) -> None:
    with node.open() as client:
        infos = [client.certs.GetCert(pb.GetCertRequest(type=cert_type)) for cert_type in TYPES]
    node.kill()
    for path in (node.root / "work").glob("iamanager.db*"):
        path.write_bytes(b"\xff" * 5000)
    node.start()
    with node.open() as client:
        assert [client.certs.GetCert(pb.GetCertRequest(type=cert_type)) for cert_type in TYPES] == infos
