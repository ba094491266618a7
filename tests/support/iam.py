"""A real IAM process in directories of its own, and what a provisioning tool and peers do with it."""

import contextlib
import json
import os
import random
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.empty_pb2 import Empty

from aoscore._pb.iamanager import version_pb2_grpc
from aoscore._pb.iamanager.v5 import iamanager_pb2_grpc as v5
from aoscore._pb.iamanager.v6 import iamanager_pb2 as pb
from aoscore._pb.iamanager.v6 import iamanager_pb2_grpc as v6
from tests.support.pki import TestCa

TYPES = ["online", "offline", "iam", "sm", "cm"]
SECONDARY_TYPES = ["iam", "sm"]
READY_S = 30.0


# Names of ports that this process has given out, as sockets: other test processes can't take them, and they go with us.
_taken: list[socket.socket] = []
_FIRST_PORT = 10_000


def free_port() -> int:
    """A port for a server that is started later, again and again: nobody else gets it meanwhile.

    None of those that the kernel gives to outgoing connections: one would be in use when the server wants it.
    """
    last = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0]) - 1
    while True:
        port = random.randint(_FIRST_PORT, last)
        name = socket.socket(socket.AF_UNIX)
        try:
            name.bind(f"\0aoscore-test-port-{port}")
            with socket.socket() as sock:
                sock.bind(("127.0.0.1", port))
        except OSError:
            name.close()
            continue
        _taken.append(name)
        return port


def wait_until(condition: Callable[[], object], timeout_s: float = READY_S) -> None:
    """Wait for a condition that nothing announces."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def file_keys(root: Path, cert_type: str) -> dict[str, Any]:
    """Key module of a certificate type: files. Another one is a function of the same form."""
    return {"plugin": "swmodule", "params": {"storagePath": str(root / "keys")}}


KeyModule = Callable[[Path, str], dict[str, Any]]


class Iam:
    """The IAM of one Node: its files stay while its process comes and goes.

    With `main` it is that of a Secondary Node of the Main Node's Unit. `netns` is a network namespace in which it runs,
    with the address `host`.
    """

    def __init__(
        self,
        root: Path,
        authority: TestCa,
        *,
        node_id: str = "node-1",
        host: str = "127.0.0.1",
        netns: str = "",
        main: "Iam | None" = None,
        keys: KeyModule = file_keys,
        **config: Any,
    ) -> None:
        self.root = root
        self.authority = authority
        self.node_id = node_id
        self.main = main
        self.netns = netns
        self.types = TYPES if main is None else SECONDARY_TYPES
        self.public = f"{host}:{free_port()}"
        self.protected = f"{host}:{free_port()}"
        self.process: subprocess.Popen[bytes] | None = None
        self.environment: dict[str, str] = {}
        self.verbosity = "debug"
        self.ca_file = root / "ca.pem"
        self.ca_file.write_bytes(authority.root_pem)
        self.state_file = root / ".provisionstate"
        for name, text in {"node-id": f"{node_id}\n", "system-id": "unit-1\n", "model": "model;1.2.3\n"}.items():
            (root / name).write_text(text)
        (root / "subjects").write_text("subject1\nsubject2\n")
        self.config_file = root / "iam.cfg"
        self.config_file.write_text(json.dumps({**self._config(host, keys), **config}))

    def _config(self, host: str, keys: KeyModule) -> dict[str, Any]:
        names = {"extendedKeyUsage": ["serverAuth", "clientAuth"], "alternativeNames": ["localhost", host]}
        main = {"attrs": {"MainNode": "", "AosComponents": "iam,cm,sm"}}
        config = {
            "caCert": str(self.ca_file),
            "certStorage": "iam",
            "iamPublicServerUrl": self.public,
            "iamProtectedServerUrl": self.protected,
            "workingDir": str(self.root / "work"),
            "runtimeDir": str(self.root / "run"),
            "enablePermissionsHandler": True,
            "nodeInfo": {
                "nodeIdPath": str(self.root / "node-id"),
                "nodeName": "main" if self.main is None else f"title of {self.node_id}",
                "nodeType": "main-type" if self.main is None else "secondary-type",
                "maxDmips": 1000,
                "provisioningStatePath": str(self.state_file),
                "partitions": [{"name": "aos", "path": str(self.root), "types": ["storages"]}],
                **(main if self.main is None else {"attrs": {"AosComponents": "iam,sm"}}),
            },
            "certModules": [
                {
                    "id": cert_type,
                    "algorithm": "rsa" if cert_type == "offline" else "ecc",
                    "maxItems": 2,
                    **keys(self.root, cert_type),
                    **(names if cert_type in ("iam", "sm", "cm") else {}),
                }
                for cert_type in self.types
            ],
        }
        if self.main is not None:
            config["mainIamPublicServerUrl"] = self.main.public
            config["mainIamProtectedServerUrl"] = self.main.protected
            config["nodeReconnectInterval"] = "200ms"
            return config
        config["identifier"] = {
            "plugin": "fileidentifier",
            "params": {
                "systemIdPath": str(self.root / "system-id"),
                "unitModelPath": str(self.root / "model"),
                "subjectsPath": str(self.root / "subjects"),
            },
        }
        return config

    def command(self, *, provisioning: bool) -> list[str]:
        """The command line."""
        program = "from aoscore.iam.app import main; main()"
        # The process must not outlive a test run that is killed.
        words = ["ip", "netns", "exec", self.netns] if self.netns else []
        words += ["setpriv", "--pdeathsig", "KILL", sys.executable, "-c", program]
        words += ["-c", str(self.config_file), "-v", self.verbosity]
        return [*words, "-provisioning"] if provisioning else words

    def start(self, *, provisioning: bool = False) -> None:
        """Start the process and wait until it says that it is ready."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            address = str(self.root / "notify")
            Path(address).unlink(missing_ok=True)
            notify.bind(address)
            with (self.root / "iam.log").open("ab") as log:
                self.process = subprocess.Popen(
                    self.command(provisioning=provisioning),
                    stdout=log,
                    stderr=log,
                    env={**os.environ, **self.environment, "NOTIFY_SOCKET": address},
                )
            end = time.monotonic() + READY_S
            while time.monotonic() < end:
                if select.select([notify], [], [], 0.05)[0] and b"READY=1" in notify.recv(4096):
                    return
                assert self.process.poll() is None, f"IAM ended:\n{self.log()}"
        raise AssertionError(f"IAM did not become ready:\n{self.log()}")

    def log(self) -> str:
        """All that the process has logged."""
        return (self.root / "iam.log").read_text()

    def kill(self) -> None:
        """kill -9."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def stop(self) -> int:
        """Orderly stop; the exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(timeout=20)
        self.process = None
        return code

    def credentials(self, cert_type: str) -> grpc.ChannelCredentials:
        """Those of a component that has a certificate of the type."""
        with Client(self, self.public, public_credentials(self)) as client:
            info = client.certs.GetCert(pb.GetCertRequest(type=cert_type))
        key, chain = (Path(url.removeprefix("file://")).read_bytes() for url in (info.key_url, info.cert_url))
        return grpc.ssl_channel_credentials(self.ca_file.read_bytes(), key, chain)

    def plain(self) -> "Client":
        """The protected port in provisioning mode, as aos-prov uses it."""
        return Client(self, self.protected, None)

    def secure(self, cert_type: str = "cm") -> "Client":
        """The protected port in normal mode."""
        return Client(self, self.protected, self.credentials(cert_type))

    def open(self) -> "Client":
        """The public port in normal mode."""
        return Client(self, self.public, public_credentials(self))

    def steps(self, *others: "Iam") -> Iterator[str]:
        """Provision as aos-prov does, with a connection per call; yields the name of each step that is done.

        `others` are the Secondary Nodes; their steps have the id of the Node before the name.
        """
        nodes = (self, *others)
        with self.plain() as client:
            assert client.version.GetAPIVersion(Empty()).version == 6
            assert client.identity.GetSystemInfo(Empty()).system_id == "unit-1"
        requests = {}
        for node in nodes:
            with self.plain() as client:
                client.start_provisioning(node_id=node.node_id)
            yield self._step(node, "start")
            for cert_type in node.types:
                with self.plain() as client:
                    requests[node, cert_type] = client.create_key(cert_type, node_id=node.node_id)
                yield self._step(node, f"key {cert_type}")
        for (node, cert_type), csr in requests.items():
            with self.plain() as client:
                client.apply(cert_type, self.authority.sign_request(csr), node_id=node.node_id)
            yield self._step(node, f"certificate {cert_type}")
        for node in (*others, self):
            with self.plain() as client:
                client.finish_provisioning(node_id=node.node_id)
            yield self._step(node, "finish")

    def _step(self, node: "Iam", name: str) -> str:
        return name if node is self else f"{node.node_id} {name}"

    def provision(self, *others: "Iam") -> None:
        """All of it, with the processes running in provisioning mode before and not running after."""
        for node in (self, *others):
            node.start(provisioning=True)
        if others:
            with self.plain() as client:
                client.wait_for_nodes(1 + len(others))
        for _ in self.steps(*others):
            pass
        for node in (*others, self):
            assert node.stop() == 0


@contextlib.contextmanager
def provisioned_iam(directory: Path) -> Iterator[Iam]:
    """A process in normal mode, for as long as the block."""
    iam = Iam(directory, TestCa())
    try:
        iam.provision()
        iam.start()
        yield iam
    finally:
        iam.kill()


def public_credentials(iam: Iam) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(iam.ca_file.read_bytes())


class Client:
    """All services over one channel; every call has a deadline."""

    def __init__(self, iam: Iam, address: str, credentials: grpc.ChannelCredentials | None) -> None:
        self._authority = iam.authority
        if credentials is None:
            self._channel = grpc.insecure_channel(address)
        else:
            self._channel = grpc.secure_channel(address, credentials)

        def stub(kind: Callable[[grpc.Channel], Any]) -> Any:
            return _Deadline(kind(self._channel))

        self.version = stub(version_pb2_grpc.IAMVersionServiceStub)
        self.identity = stub(v6.IAMPublicIdentityServiceStub)
        self.node = stub(v6.IAMPublicCurrentNodeServiceStub)
        self.nodes = stub(v6.IAMPublicNodesServiceStub)
        self.certs = stub(v6.IAMPublicCertServiceStub)
        self.permissions = stub(v6.IAMPublicPermissionsServiceStub)
        self.provisioning = stub(v6.IAMProvisioningServiceStub)
        self.issue = stub(v6.IAMCertificateServiceStub)
        self.states = stub(v6.IAMNodesServiceStub)
        self.instances = stub(v6.IAMPermissionsServiceStub)
        self.v5_public = stub(v5.IAMPublicServiceStub)
        self.v5_identity = stub(v5.IAMPublicIdentityServiceStub)
        self.v5_permissions = stub(v5.IAMPublicPermissionsServiceStub)
        self.v5_nodes = stub(v5.IAMPublicNodesServiceStub)
        self.v5_instances = stub(v5.IAMPermissionsServiceStub)

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    def wait_for_nodes(self, count: int) -> list[str]:
        """Ask for the Nodes until there are so many, as aos-prov does; their ids."""
        wait_until(lambda: len(self.nodes.GetAllNodeIDs(Empty()).ids) == count)
        return list(self.nodes.GetAllNodeIDs(Empty()).ids)

    def start_provisioning(self, password: str = "Secret123", *, node_id: str = "node-1") -> None:
        """First step."""
        request = pb.StartProvisioningRequest(node_id=node_id, password=password)
        answer = self.provisioning.StartProvisioning(request)
        assert not answer.HasField("error"), answer.error

    def finish_provisioning(self, *, node_id: str = "node-1") -> None:
        """Last step."""
        request = pb.FinishProvisioningRequest(node_id=node_id, password="Secret123")
        answer = self.provisioning.FinishProvisioning(request)
        assert not answer.HasField("error"), answer.error

    def create_key(self, cert_type: str, subject: str = "", *, node_id: str = "node-1") -> str:
        """The request of a new key."""
        answer = self.issue.CreateKey(pb.CreateKeyRequest(node_id=node_id, type=cert_type, subject=subject))
        assert not answer.HasField("error"), answer.error
        return str(answer.csr)

    def apply(self, cert_type: str, cert: str, *, node_id: str = "node-1") -> pb.CertInfo:
        """Take a certificate into use."""
        answer = self.issue.ApplyCert(pb.ApplyCertRequest(node_id=node_id, type=cert_type, cert=cert))
        assert not answer.HasField("error"), answer.error
        info: pb.CertInfo = answer.cert_info
        return info

    def renew(self, cert_type: str, days: int, *, node_id: str = "node-1") -> pb.CertInfo:
        """A new key and certificate."""
        csr = self.create_key(cert_type, node_id=node_id)
        return self.apply(cert_type, self._authority.sign_request(csr, days=days), node_id=node_id)


class _Deadline:
    """Adds a deadline to each call of a stub."""

    def __init__(self, stub: Any) -> None:
        self._stub = stub

    def __getattr__(self, method: str) -> Callable[..., Any]:
        call = getattr(self._stub, method)
        return lambda request, timeout=15: call(request, timeout=timeout, wait_for_ready=False)
