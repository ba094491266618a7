"""A devcloud process, and a minimal Unit that talks to it with code of its own.

The Unit shares no line with the cloud or with CM: it is made of the standard library, `websockets` and `cryptography`,
so that a mistake in the cloud's messages, encryption or signing is not made twice.
"""

import base64
import ctypes
import hashlib
import itertools
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.request
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.serialization import pkcs12

from aoscore.devcloud.client import AdminClient
from tests.support.websocket import WebSocket

Message = dict[str, Any]

_READY_S = 30.0
_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Run in a child before exec: it is killed when its parent dies, however that happens."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def run_devcloud(directory: Path, command: str, *arguments: str, timeout_s: float = 60) -> str:
    """Output of one `aos-devcloud` command."""
    args = [sys.executable, "-m", "aoscore.devcloud.app", command, "--dir", str(directory), *arguments]
    return subprocess.run(args, check=True, capture_output=True, text=True, timeout=timeout_s).stdout


class DevcloudProcess:
    """`aos-devcloud serve` on free ports of loopback; its directory stays while the process comes and goes."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.client = AdminClient(directory, timeout_s=30)
        self.ports: dict[str, Any] = {}
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *arguments: str) -> None:
        """Start and wait until it listens. Arguments are added to free ports for everything."""
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        ports = [f"--{name}-port=0" for name in ("rest", "discovery", "blob")]
        args = [sys.executable, "-m", "aoscore.devcloud.app", "serve", "--dir", str(self.directory)]
        with (self.directory / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [*args, *ports, *arguments], stdout=log, stderr=log, preexec_fn=die_with_parent
            )
        end = time.monotonic() + _READY_S
        while not (self.directory / "ports.json").exists():
            assert self._process.poll() is None and time.monotonic() < end, (self.directory / "log").read_text()
            time.sleep(0.02)
        self.ports = json.loads((self.directory / "ports.json").read_text())

    def stop(self) -> int:
        """Orderly stop; the exit code."""
        if self._process is None:
            return 0
        self._process.send_signal(signal.SIGTERM)
        try:
            code = self._process.wait(timeout=20)
        finally:
            self._process.kill()
            self._process.wait()
            self._process = None
        return code

    @property
    def root_file(self) -> Path:
        """The cloud's root certificate."""
        return self.directory / "ca" / "root.crt"

    def run(self, command: str, *arguments: str) -> str:
        """Output of a client command."""
        return run_devcloud(self.directory, command, *arguments)

    def user_context(self, role: str) -> ssl.SSLContext:
        """TLS context of a user, made on first use."""
        path = self.directory / "users" / f"{role}.p12"
        if not path.exists():
            self.run("user-cert", "--role", role)
        content = pkcs12.load_pkcs12(path.read_bytes(), None)
        assert content.cert and content.key
        chain = [content.cert, *content.additional_certs]
        pem = b"".join(one.certificate.public_bytes(serialization.Encoding.PEM) for one in chain)
        key = content.key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        file = path.with_suffix(".pem")
        file.write_bytes(key + pem)
        return client_context(self.root_file, file)

    def rest(self, method: str, path: str, context: ssl.SSLContext, body: Any = None, **headers: str) -> Any:
        """One REST request; its JSON answer, or its text. HTTP errors are raised."""
        url = f"https://localhost:{self.ports['rest_port']}/api/v11{path}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url, data, {"Content-Type": "application/json", **headers}, method=method)
        with urllib.request.urlopen(request, context=context, timeout=20) as response:
            text = response.read().decode()
        return json.loads(text) if "json" in response.headers["Content-Type"] else text


def client_context(root_file: Path, identity: Path | None = None) -> ssl.SSLContext:
    """TLS context that trusts the cloud's root only."""
    context = ssl.create_default_context(cafile=str(root_file))
    if identity is not None:
        context.load_cert_chain(identity)
    return context


class MiniUnit:
    """A Unit with one node `main`: keys, registration, discovery, link, downloads."""

    node_id = "main"

    def __init__(self, cloud: DevcloudProcess, system_id: str = "unit-1") -> None:
        self.cloud = cloud
        self.system_id = system_id
        self.identities: dict[str, Path] = {}
        self.roots = x509.load_pem_x509_certificates(cloud.root_file.read_bytes())
        self._keys: dict[str, Any] = {}
        self._folder = cloud.directory.parent / system_id
        self._folder.mkdir(exist_ok=True)
        self._socket: WebSocket | None = None
        self._backlog: list[Message] = []

    # Provisioning

    def csr(self, cert_type: str) -> str:
        """A new key and its request, as IAM makes them."""
        key: Any = ec.generate_private_key(ec.SECP384R1())
        if cert_type == "offline":
            key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        self._keys[cert_type] = key
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, self.system_id)])
        builder = x509.CertificateSigningRequestBuilder().subject_name(name)
        return builder.sign(key, hashes.SHA384()).public_bytes(serialization.Encoding.PEM).decode()

    def apply(self, cert_type: str, chain: str) -> str:
        """Take a certificate into use; its serial."""
        leaf, *issuers = x509.load_pem_x509_certificates(chain.encode())
        for certificate, issuer in itertools.pairwise([leaf, *issuers]):
            certificate.verify_directly_issued_by(issuer)
        assert issuers[-1] == self.roots[0]
        assert leaf.public_key() == self._keys[cert_type].public_key()
        key = self._keys[cert_type].private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        path = self._folder / f"{cert_type}.pem"
        path.write_bytes(key + chain.encode())
        self.identities[cert_type] = path
        text = f"{leaf.serial_number:x}"
        return text if len(text) % 2 == 0 else f"0{text}"

    def provision(self) -> None:
        """Register over REST as aos-prov does."""
        request = {
            "hardware_id": self.system_id,
            "system_uid": self.system_id,
            "model_name": "mini",
            "model_version": "1",
            "provisioning_software": "aos-provisioning:5.5.0",
            "nodes": [{"id": self.node_id, "type": "main-type", "attrs": {"MainNode": ""}}],
            "secure_data": json.dumps({"version": "2.0.0", "nodes": {self.node_id: "password"}}),
            "online_public_csr": self.csr("online"),
            "online_public_node_id": self.node_id,
            "offline_public_csr": self.csr("offline"),
            "offline_public_node_id": self.node_id,
            "additional_csrs": [
                {"cert_type": cert_type, "csr": self.csr(cert_type), "node_id": self.node_id}
                for cert_type in ("iam", "sm", "cm")
            ],
        }
        answer = self.cloud.rest("POST", "/units/provisioning/", self.cloud.user_context("oem"), request)
        assert answer["system_uid"] == self.system_id
        self.apply("online", answer["online_certificate"])
        self.apply("offline", answer["offline_certificate"])
        for entry in answer["additional_certs"]:
            assert entry["node_id"] == self.node_id
            self.apply(entry["cert_type"], entry["cert"])

    # Link

    def context(self, cert_type: str = "online") -> ssl.SSLContext:
        """TLS context with one of the Unit's certificates."""
        return client_context(self.cloud.root_file, self.identities[cert_type])

    def discover(self, cert_type: str = "online") -> Message:
        """Service discovery, with the address taken from the online certificate."""
        leaf = x509.load_pem_x509_certificates(self.identities["online"].read_bytes())[0]
        names = leaf.extensions.get_extension_for_class(x509.IssuerAlternativeName).value
        (base,) = names.get_values_for_type(x509.UniformResourceIdentifier)
        return self.discover_at(base, cert_type)

    def discover_at(self, base: str, cert_type: str = "online") -> Message:
        """Service discovery at a base URL."""
        body = {"version": 7, "systemId": self.system_id, "supportedProtocols": ["wss"]}
        request = urllib.request.Request(
            f"{base}/sd/v7/", json.dumps(body).encode(), {"Content-Type": "application/json"}, method="POST"
        )
        with urllib.request.urlopen(request, context=self.context(cert_type), timeout=20) as response:
            answer: Message = json.loads(response.read())
        return answer

    def connect(self, token: str | None = None) -> None:
        """Discovery and WebSocket handshake."""
        found = self.discover_at(f"https://localhost:{self.cloud.ports['discovery_port']}")
        (url,) = found["connectionInfo"]
        self._backlog.clear()
        parts = urlsplit(url)
        assert parts.scheme == "wss" and parts.hostname is not None
        plain = socket.create_connection((parts.hostname, parts.port), timeout=20)
        secure = self.context().wrap_socket(plain, server_hostname=parts.hostname)
        self._socket = WebSocket(secure, url, {"Authorization": f"Bearer {token or found['authToken']}"})

    def disconnect(self) -> None:
        """Close the link."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def __enter__(self) -> Self:
        self.connect()
        return self

    def __exit__(self, *_: object) -> None:
        self.disconnect()

    def send(self, data: Message, txn: str | None = None) -> str:
        """Send a message; its txn."""
        txn = txn or str(uuid.uuid4())
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        header = {"version": 7, "systemId": self.system_id, "createdAt": now, "txn": txn}
        self.send_raw(json.dumps({"header": header, "data": data}).encode())
        return txn

    def send_raw(self, frame: bytes | str) -> None:
        """Send any frame."""
        assert self._socket is not None
        self._socket.send(frame)

    def receive_raw(self, timeout_s: float = 10) -> bytes | str:
        """The next frame as it comes."""
        assert self._socket is not None
        return self._socket.recv(timeout_s)

    def receive(self, message_type: str, timeout_s: float = 10, *, ack: bool = True) -> Message:
        """The next message of this type, acked; header under "header". Others are kept for later calls."""
        for message in self._backlog:
            if message["data"]["messageType"] == message_type:
                self._backlog.remove(message)
                return message
        end = time.monotonic() + timeout_s
        while True:
            frame = self.receive_raw(max(0.0, end - time.monotonic()))
            assert isinstance(frame, bytes), "the cloud sends binary frames"
            message = json.loads(frame)
            assert message["header"]["version"] == 7
            assert message["header"]["systemId"] == self.system_id
            if ack and message["data"]["messageType"] not in ("ack", "nack"):
                self.send({"messageType": "ack"}, message["header"]["txn"])
            if message["data"]["messageType"] == message_type:
                return message
            self._backlog.append(message)

    def acked(self, data: Message, txn: str | None = None) -> None:
        """Send a message and wait for its ack."""
        txn = self.send(data, txn)
        answer = self.receive("ack")
        assert answer["header"]["txn"] == txn
        assert answer["data"] == {"messageType": "ack"}

    def report(self, **changes: Any) -> Message:
        """Send a full unit status; the desired status that follows it."""
        self.acked(self.status(**changes))
        return self.receive("desiredStatus")["data"]

    @staticmethod
    def status(**changes: Any) -> Message:
        """A full unit status of a Unit with one node."""
        node = {
            "identity": {"codename": "main", "title": "main"},
            "nodeGroupSubject": {"codename": "main-type"},
            "maxDmips": 1000,
            "totalRam": 1 << 30,
            "osInfo": {"os": "linux"},
            "state": "provisioned",
            "isConnected": True,
        }
        parts = {"unitConfig": [{"state": "absent"}], "nodes": [node], "items": [], "instances": [], "subjects": []}
        return {"messageType": "unitStatus", "isDeltaInfo": False, **parts, **changes}

    # Blobs

    def blob_info(self, digest: str) -> Message:
        """Ask for the URLs of one blob."""
        correlation = str(uuid.uuid4())
        self.acked({"messageType": "requestBlobUrls", "correlationId": correlation, "digests": [digest]})
        answer = self.receive("blobUrls")["data"]
        assert answer["correlationId"] == correlation
        (info,) = answer["items"]
        assert info["digest"] == digest
        return dict(info)

    def fetch(self, digest: str, desired: Message) -> bytes:
        """Download, decrypt and verify a blob; every check that a Unit makes (cm-cloud.md §5.4, §8)."""
        return self.open_blob(self.blob_info(digest), self.download, desired)

    @staticmethod
    def download(url: str, **headers: str) -> bytes:
        """Content behind a URL."""
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=20) as response:
            content: bytes = response.read()
        return content

    def open_blob(self, info: Message, download: Any, desired: Message) -> bytes:
        """Plain content of a downloaded blob."""
        content = download(info["urls"][0])
        assert hashlib.sha3_256(content).hexdigest() == info["sha256"], "SHA3-256 of the download"
        assert len(content) == info["size"]
        decrypt = info["decryptInfo"]
        assert decrypt["blockAlg"] == "AES256/CBC/pkcs7"
        key, iv = (base64.b64decode(decrypt[name]) for name in ("blockKey", "blockIv"))
        decryptor = Cipher(algorithms.AES256(key), modes.CBC(iv)).decryptor()
        padded = decryptor.update(content) + decryptor.finalize()
        assert 1 <= padded[-1] <= 16 and padded.endswith(bytes([padded[-1]]) * padded[-1]), "PKCS#7 padding"
        plain = padded[: -padded[-1]]
        self._verify(plain, info["signInfo"], desired)
        assert "sha256:" + hashlib.sha256(plain).hexdigest() == info["digest"], "digest of the plain blob"
        return plain

    def _verify(self, plain: bytes, sign: Message, desired: Message) -> None:
        certificates = {
            one["fingerprint"]: x509.load_der_x509_certificate(base64.b64decode(one["certificate"]))
            for one in desired["certificates"]
        }
        (chain,) = [one for one in desired["certificateChains"] if one["name"] == sign["chainName"]]
        path = [certificates[fingerprint] for fingerprint in chain["fingerprints"]] + self.roots
        for certificate, issuer in itertools.pairwise(path):
            certificate.verify_directly_issued_by(issuer)
        moment = datetime.fromisoformat(sign["trustedTimestamp"])
        assert all(one.not_valid_before_utc <= moment <= one.not_valid_after_utc for one in path)
        assert moment <= datetime.now(UTC)
        assert sign["alg"] == "RSA/SHA256"
        public = path[0].public_key()
        assert isinstance(public, rsa.RSAPublicKey)
        public.verify(base64.b64decode(sign["value"]), plain, padding.PKCS1v15(), hashes.SHA256())


def write_service(folder: Path, version: str = "1.0.0", codename: str = "hello", **configuration: Any) -> Path:
    """A folder with config.yaml and a small root file system, for `aos-devcloud upload`."""
    bin_folder = folder / codename / "rootfs" / "bin"
    bin_folder.mkdir(parents=True, exist_ok=True)
    (bin_folder / "app").write_bytes(b"#!/bin/sh\necho " + os.urandom(32).hex().encode() + b"\n")
    (bin_folder / "app").chmod(0o755)
    (folder / "config.yaml").write_text(
        json.dumps(
            {
                "schemaVersion": 2,
                "items": [
                    {
                        "identity": {"type": "service", "codename": codename},
                        "version": version,
                        "sourceFolder": codename,
                        "images": [
                            {"sourceFolder": "rootfs", "archInfo": {"architecture": "amd64"}, "cmd": "/bin/app"}
                        ],
                        "configuration": {"instances": {"minInstances": 1}, **configuration},
                    }
                ],
            }
        )
    )
    return folder
