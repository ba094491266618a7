"""A real IAM process in directories of its own, and what a provisioning tool and peers do with it."""

import json
import os
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
READY_S = 30.0


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


class Iam:
    """One Unit's IAM: its files stay while its process comes and goes."""

    def __init__(self, root: Path, authority: TestCa, **config: Any) -> None:
        self.root = root
        self.authority = authority
        self.public = f"127.0.0.1:{free_port()}"
        self.protected = f"127.0.0.1:{free_port()}"
        self.process: subprocess.Popen[bytes] | None = None
        self.environment: dict[str, str] = {}
        self.verbosity = "debug"
        self.ca_file = root / "ca.pem"
        self.ca_file.write_bytes(authority.root_pem)
        self.state_file = root / ".provisionstate"
        for name, text in {"node-id": "node-1\n", "system-id": "unit-1\n", "model": "model;1.2.3\n"}.items():
            (root / name).write_text(text)
        (root / "subjects").write_text("subject1\nsubject2\n")
        self.config_file = root / "iam.cfg"
        self.config_file.write_text(json.dumps({**self._config(), **config}))

    def _config(self) -> dict[str, Any]:
        names = {"extendedKeyUsage": ["serverAuth", "clientAuth"], "alternativeNames": ["localhost", "127.0.0.1"]}
        return {
            "caCert": str(self.ca_file),
            "certStorage": "iam",
            "iamPublicServerUrl": self.public,
            "iamProtectedServerUrl": self.protected,
            "workingDir": str(self.root / "work"),
            "runtimeDir": str(self.root / "run"),
            "enablePermissionsHandler": True,
            "nodeInfo": {
                "nodeIdPath": str(self.root / "node-id"),
                "nodeName": "main",
                "nodeType": "main-type",
                "maxDmips": 1000,
                "provisioningStatePath": str(self.state_file),
                "attrs": {"MainNode": "", "AosComponents": "iam,cm,sm"},
                "partitions": [{"name": "aos", "path": str(self.root), "types": ["storages"]}],
            },
            "identifier": {
                "plugin": "fileidentifier",
                "params": {
                    "systemIdPath": str(self.root / "system-id"),
                    "unitModelPath": str(self.root / "model"),
                    "subjectsPath": str(self.root / "subjects"),
                },
            },
            "certModules": [
                {
                    "id": cert_type,
                    "plugin": "swmodule",
                    "algorithm": "rsa" if cert_type == "offline" else "ecc",
                    "maxItems": 2,
                    "params": {"storagePath": str(self.root / "keys")},
                    **(names if cert_type in ("iam", "sm", "cm") else {}),
                }
                for cert_type in TYPES
            ],
        }

    def command(self, *, provisioning: bool) -> list[str]:
        """The command line."""
        program = "from aoscore.iam.app import main; main()"
        # The process must not outlive a test run that is killed.
        words = ["setpriv", "--pdeathsig", "KILL", sys.executable, "-c", program]
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
        return grpc.ssl_channel_credentials(self.authority.root_pem, key, chain)

    def plain(self) -> "Client":
        """The protected port in provisioning mode, as aos-prov uses it."""
        return Client(self, self.protected, None)

    def secure(self, cert_type: str = "cm") -> "Client":
        """The protected port in normal mode."""
        return Client(self, self.protected, self.credentials(cert_type))

    def open(self) -> "Client":
        """The public port in normal mode."""
        return Client(self, self.public, public_credentials(self))

    def steps(self) -> Iterator[str]:
        """Provision as aos-prov does, with a connection per call; yields the name of each step that is done."""
        with self.plain() as client:
            assert client.version.GetAPIVersion(Empty()).version == 6
            assert client.identity.GetSystemInfo(Empty()).system_id == "unit-1"
            client.start_provisioning()
        yield "start"
        requests = {}
        for cert_type in TYPES:
            with self.plain() as client:
                requests[cert_type] = client.create_key(cert_type)
            yield f"key {cert_type}"
        for cert_type, csr in requests.items():
            with self.plain() as client:
                client.apply(cert_type, self.authority.sign_request(csr))
            yield f"certificate {cert_type}"
        with self.plain() as client:
            client.finish_provisioning()
        yield "finish"

    def provision(self) -> None:
        """All of it, with the process running in provisioning mode before and not running after."""
        self.start(provisioning=True)
        for _ in self.steps():
            pass
        assert self.stop() == 0


def public_credentials(iam: Iam) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(iam.authority.root_pem)


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

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    def start_provisioning(self, password: str = "Secret123") -> None:
        """First step."""
        request = pb.StartProvisioningRequest(node_id="node-1", password=password)
        answer = self.provisioning.StartProvisioning(request)
        assert not answer.HasField("error"), answer.error

    def finish_provisioning(self) -> None:
        """Last step."""
        request = pb.FinishProvisioningRequest(node_id="node-1", password="Secret123")
        answer = self.provisioning.FinishProvisioning(request)
        assert not answer.HasField("error"), answer.error

    def create_key(self, cert_type: str, subject: str = "") -> str:
        """The request of a new key."""
        answer = self.issue.CreateKey(pb.CreateKeyRequest(node_id="node-1", type=cert_type, subject=subject))
        assert not answer.HasField("error"), answer.error
        return str(answer.csr)

    def apply(self, cert_type: str, cert: str) -> pb.CertInfo:
        """Take a certificate into use."""
        answer = self.issue.ApplyCert(pb.ApplyCertRequest(node_id="node-1", type=cert_type, cert=cert))
        assert not answer.HasField("error"), answer.error
        info: pb.CertInfo = answer.cert_info
        return info

    def renew(self, cert_type: str, days: int) -> pb.CertInfo:
        """A new key and certificate."""
        return self.apply(cert_type, self._authority.sign_request(self.create_key(cert_type), days=days))


class _Deadline:
    """Adds a deadline to each call of a stub."""

    def __init__(self, stub: Any) -> None:
        self._stub = stub

    def __getattr__(self, method: str) -> Callable[[Any], Any]:
        call = getattr(self._stub, method)
        return lambda request: call(request, timeout=15, wait_for_ready=False)
