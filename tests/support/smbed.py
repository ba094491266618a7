"""Everything around an SM in a test: certificates, IAM, CM, a working directory, items."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from aoscore.common.types import ArchInfo, CertInfo, CPUInfo, InstanceIdent, InstanceInfo, NodeInfo, OSInfo
from aoscore.sm.config import Config, load
from aoscore.sm.launcher.runtimes.base import runtime_id
from tests.support.cm import TestCm
from tests.support.fakeiam import TestIam
from tests.support.items import Blobs, tar
from tests.support.pki import TestCa

NODE = NodeInfo(
    "node-main-0001",
    "main",
    max_dmips=10000,
    total_ram=1 << 30,
    os_info=OSInfo("linux"),
    cpus=(CPUInfo(arch_info=ArchInfo("amd64")),),
    attrs={"MainNode": "", "AosComponents": "sm"},
)


class SmBed:
    """IAM and CM for one SM whose files are below `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.ca = TestCa()
        self.blobs = Blobs(root / "blobs")
        pki = root / "pki"
        pki.mkdir()
        self.pki = pki
        self.ca.write_root(pki)
        # CM's certificate does not name the host of its URL: peers are known by chain, not by name.
        self.cm = TestCm(self.ca.identity(pki, "cm", ("aosmain",)), self.blobs)
        self.iam = TestIam(self.ca.identity(pki, "iam", ("aosmain",)), NODE, {"sm": self.certificate("sm")})

    def certificate(self, name: str) -> CertInfo:
        """A new certificate for the SM."""
        identity = self.ca.identity(self.pki, name)
        return CertInfo("sm", identity.cert_url, identity.key_url)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator["SmBed"]:
        """IAM and CM for the length of the block."""
        async with self.iam.running(), self.cm.running():
            yield self

    def write_config(self, **changes: Any) -> Path:
        """The SM's configuration file; call it while IAM and CM run."""
        document = {
            "workingDir": str(self.root / "sm"),
            "caCert": str(self.pki / "root.pem"),
            "certStorage": "sm",
            "cmServerURL": f"127.0.0.1:{self.cm.port}",
            "iamPublicServerURL": f"127.0.0.1:{self.iam.public_port}",
            "iamProtectedServerURL": f"127.0.0.1:{self.iam.protected_port}",
            "cmReconnectTimeout": "200ms",
            "resourcesConfigFile": str(self.root / "resources.cfg"),
            **changes,
        }
        path = self.root / "sm.cfg"
        path.write_text(json.dumps(document))
        return path

    def config(self, **changes: Any) -> Config:
        """The same, loaded."""
        return load(self.write_config(**changes))

    def instance(self, item: str, version: str = "1.0.0", *, app: str | None = None, **changes: Any) -> InstanceInfo:
        """An instance of an item whose only layer holds the file `app`."""
        digest = changes.pop("manifest_digest", None) or self.blobs.item(
            [tar({"app": (app or f"{item} {version}").encode()})], item_config={"author": f"{item} {version}"}
        )
        ident = InstanceIdent(item, "subject", 0)
        runtime = changes.pop("runtime_id", None) or runtime_id("test", NODE.node_id)
        return InstanceInfo(ident, version, digest, "owner", runtime, **changes)


class Child:
    """A process of the test, ended with the block."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path) -> None:
        self.process = process
        self.log = log

    def text(self) -> str:
        """All it has written."""
        return self.log.read_text()

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()

    async def wait(self, timeout_s: float = 30) -> int:
        """Wait for its end; the exit code, negative for a signal."""
        return await asyncio.wait_for(self.process.wait(), timeout_s)


@contextlib.asynccontextmanager
async def child(*args: str, log: Path, env: dict[str, str] | None = None) -> AsyncIterator[Child]:
    """Run a program for the length of the block; SIGTERM at the end, then SIGKILL."""
    with log.open("ab") as output:
        process = await asyncio.create_subprocess_exec(
            *args, stdin=asyncio.subprocess.DEVNULL, stdout=output, stderr=output, env=env
        )
    one = Child(process, log)
    try:
        yield one
    finally:
        if process.returncode is None:
            process.terminate()
            try:
                await one.wait(20)
            except TimeoutError:
                process.kill()
                await one.wait()
