"""A real CM process between a cloud and an SM that the test plays, beside a real IAM process.

As a program it is CM with a death built in: `python -m tests.support.unitbed POINT ARGUMENTS`. POINT is `update N` or
`back N`: SIGKILL right before the N-th persistent step of an update, counted from its acceptance or from the moment
when a version is found not to work; `after PHASE`: when that phase has just been stored; `never`; or `hold`: not to
die, but to check the blobs at the end of an update for ever, until that is broken off. Steps are: begin and end of each
database transaction, and every rename, removal, directory and opening for writing below the directory of the
configuration file.
"""

import asyncio
import contextlib
import json
import os
import signal
import sqlite3
import ssl
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import msgspec

from aoscore._pb.common.v2 import common_pb2 as common
from aoscore._pb.iamanager.v6 import iamanager_pb2 as iam_pb
from aoscore._pb.servicemanager.v5 import servicemanager_pb2 as pb
from aoscore.cm.communication.envelope import to_document
from aoscore.common.tls import TlsIdentity
from tests.support.cloud import Document, FakeCloud
from tests.support.iam import TYPES, Iam, free_port
from tests.support.images import BlobCloud, Image, Signer, desired
from tests.support.pki import TestCa
from tests.support.sm import TestSm, stay_connected

READY_S = 30.0
SYSTEM_ID = "unit-1"
NODE_ID = "node-1"
SUBJECT = "5a9d3c3e-0f6e-4d39-8f0b-7a2f0c6b4e22"


class UnitBed:
    """IAM (started once), CM (comes and goes), cloud and SM (in the test). Make it with `unit_bed`."""

    def __init__(self, directory: Path, iam: Iam, *, ca: TestCa | None, node_id: str, **config: Any) -> None:
        """`ca` issues the certificates of cloud and signers; by default IAM's own."""
        self.directory = directory
        self.iam = iam
        self.ca = ca or iam.authority
        self.signer = Signer(self.ca)
        (directory / "blobs").mkdir()
        self.blobs = BlobCloud(directory / "blobs", self.signer)
        self.cloud = FakeCloud(SYSTEM_ID, self._cloud_tls(self.ca))
        self.cloud.answers["requestBlobUrls"] = self._blob_urls
        platform = {"arch_info": common.ArchInfo(architecture="amd64"), "os_info": common.OSInfo(os="linux")}
        self.sm = TestSm(node_id, (pb.RuntimeInfo(runtime_id="crun-1", type="crun", **platform),))
        self.port = free_port()
        self.file_port = free_port()
        self.process: asyncio.subprocess.Process | None = None
        self.node: Callable[[], Coroutine[Any, Any, None]]
        """What the node does as long as it is there."""
        self._presence: asyncio.Task[None] | None = None
        self.config_file = directory / "cm.cfg"
        self.extra = config

    def _cloud_tls(self, ca: TestCa) -> Any:
        ca.issue("cloud").write(self.directory, "cloud")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.directory / "cloud.pem", self.directory / "cloud.key")
        context.load_verify_locations(cadata=self.ca.root_pem.decode())
        context.verify_mode = ssl.CERT_REQUIRED
        return context

    async def _blob_urls(self, data: Document) -> Document:
        answer = await self.blobs.blob_urls(data["digests"])
        return {"messageType": "blobUrls", "items": [_json(item) for item in answer.items]}

    def write_config(self) -> None:
        """The configuration file, with the addresses of everybody."""
        document = {
            "workingDir": str(self.directory / "work"),
            "caCert": str(self.iam.ca_file),
            "certStorage": "cm",
            "iamProtectedServerUrl": self.iam.protected,
            "iamPublicServerUrl": self.iam.public,
            "cmServerUrl": f"127.0.0.1:{self.port}",
            "fileServerUrl": f"http://127.0.0.1:{self.file_port}",
            "serviceDiscoveryUrl": self.cloud.discovery_url,
            "unitStatusSendTimeout": "200ms",
            "dnsStoragePath": str(self.directory / "dns"),
            "nodeInfoProvider": {"smConnectionTimeout": "10s"},
            "updateManager": {"activatingTimeout": "30s"},
        }
        self.config_file.write_text(json.dumps({**document, **self.extra}))

    # ---- the process

    async def start(self, point: str = "never") -> None:
        """Start CM; returns when it says that it is ready, or has died where it was told to."""
        self.write_config()
        lives = self.log().count("Init CM") if (self.directory / "cm.log").exists() else 0
        command = ["setpriv", "--pdeathsig", "KILL", sys.executable, "-m", "tests.support.unitbed", point]
        with (self.directory / "cm.log").open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                *command, "-c", str(self.config_file), "-v", "debug", stdout=log, stderr=log
            )
        async with asyncio.timeout(READY_S):
            while self.process.returncode is None and (
                self.log().count("Init CM") == lives or "CM is ready" not in self.new_log()
            ):
                await asyncio.sleep(0.02)

    def log(self) -> str:
        """All that CM has logged, in all its lives."""
        return (self.directory / "cm.log").read_text()

    def new_log(self) -> str:
        """What the present process has logged."""
        return self.log().rpartition("Init CM")[2]

    async def died(self) -> None:
        """Wait until the process has killed itself."""
        assert self.process is not None
        async with asyncio.timeout(30):
            assert await self.process.wait() == -signal.SIGKILL, self.new_log()
        self.process = None

    async def kill(self) -> None:
        """kill -9."""
        if self.process is not None and self.process.returncode is None:
            self.process.kill()
            await self.process.wait()
        self.process = None

    async def stop(self) -> int:
        """Orderly stop; the exit code."""
        assert self.process is not None
        self.process.terminate()
        async with asyncio.timeout(20):
            code = await self.process.wait()
        self.process = None
        return code

    @property
    def is_alive(self) -> bool:
        return self.process is not None and self.process.returncode is None

    # ---- the node

    async def bring_node(self) -> None:
        """The node connects, and again whenever CM was gone."""
        self._presence = asyncio.create_task(self.node())

    async def take_node_away(self) -> None:
        """The node's connection ends, and does not come again by itself."""
        if self._presence is not None:
            self._presence.cancel()
            await asyncio.gather(self._presence, return_exceptions=True)

    # ---- wishes and what becomes of them

    def wish(self, *versions: tuple[str, str, Image], **more: Any) -> Document:
        """A desired status: items with their versions and images, one instance each."""
        document: Document = {
            "messageType": "desiredStatus",
            "items": [_json(desired(item_id, version, image)) for item_id, version, image in versions],
            "instances": [
                {"item": {"id": item_id}, "subject": {"id": SUBJECT}, "priority": 0, "numInstances": 1}
                for item_id, _, _ in versions
            ],
            "subjects": [{"identity": {"id": SUBJECT}, "type": "group"}],
            "certificates": [_json(entry) for entry in self.signer.certificates],
            "certificateChains": [_json(entry) for entry in self.signer.chains],
        }
        return document | more

    @property
    def running(self) -> dict[str, str]:
        """What the node runs: item to version."""
        return {key[0]: status.version for key, status in self.sm.instances.items() if status.state == "active"}

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        """Rows of CM's database, read beside CM."""
        with contextlib.closing(sqlite3.connect(self.directory / "work" / "cm.db")) as connection:
            return connection.execute(query).fetchall()

    @property
    def phase(self) -> str:
        return str(self.rows("SELECT updateState FROM updatemanager")[0][0])

    @property
    def items(self) -> dict[str, str]:
        """Versions in the database: `item version` to state."""
        return {f"{row[0]} {row[1]}": row[2] for row in self.rows("SELECT itemID, version, state FROM imagemanager")}

    async def until(self, condition: Callable[[], Any], timeout_s: float = 30) -> None:
        """Wait until something is so."""
        try:
            async with asyncio.timeout(timeout_s):
                while not condition():
                    await asyncio.sleep(0.03)
        except TimeoutError:
            raise AssertionError(f"not reached; CM said:\n{self.new_log()[-4000:]}") from None

    def statuses(self, *, full: bool = True) -> list[Document]:
        """Unit statuses so far."""
        frames = [frame["data"] for frame in self.cloud.frames if frame["data"]["messageType"] == "unitStatus"]
        return [data for data in frames if data["isDeltaInfo"] is not full]

    async def full_status(self, condition: Callable[[Document], Any]) -> Document:
        """Wait for a full status that is so."""
        await self.until(lambda: any(condition(status) for status in self.statuses()))
        return next(status for status in reversed(self.statuses()) if condition(status))


def shown_items(status: Document) -> dict[str, str]:
    """Items of a unit status: `item version` to state."""
    return {f"{entry['item'].get('id')} {entry['version']}": entry["state"] for entry in status["items"]}


def _json(value: Any) -> Any:
    return json.loads(msgspec.json.encode(to_document(value)))


@contextlib.asynccontextmanager
async def unit_bed(
    directory: Path,
    iam: Iam,
    *,
    ca: TestCa | None = None,
    node_id: str = NODE_ID,
    sm_port: int | None = None,
    **config: Any,
) -> AsyncIterator[UnitBed]:
    """A Unit without CM running yet; everything is stopped at the end. `config`: more keys for CM's configuration.

    `sm_port`: where the SM finds CM, when not at CM itself.
    """
    bed = UnitBed(directory, iam, ca=ca, node_id=node_id, **config)
    identity = await asyncio.to_thread(_sm_identity, iam)
    try:
        async with bed.cloud.running(), bed.blobs.running():
            bed.node = lambda: stay_connected(bed.sm, sm_port or bed.port, identity)
            await bed.bring_node()
            try:
                yield bed
            finally:
                await bed.take_node_away()
    finally:
        await bed.kill()


def _sm_identity(iam: Iam) -> TlsIdentity:
    with iam.open() as client:
        info = client.certs.GetCert(iam_pb.GetCertRequest(type=TYPES[3]))
    return TlsIdentity(iam.ca_file, info.cert_url, info.key_url)


_FILE_EVENTS = frozenset({"os.rename", "os.remove", "os.mkdir", "os.rmdir", "open"})


def _die_at(point: str, root: Path) -> None:
    """See the module text. Number, phase of the update and name of each step are appended to `<root>/steps`."""
    from aoscore.cm.imagemanager.manager import ImageManager
    from aoscore.cm.updatemanager.store import UpdateStore
    from aoscore.common.db import Database

    begin, _, number = point.partition(" ")
    count, counting, lock = 0, False, threading.Lock()
    phase = "downloading" if begin == "update" else "activating"
    names = os.open(root / "steps", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    def note(name: str) -> None:
        nonlocal count
        if not counting:
            return
        with lock:
            count += 1
            os.write(names, f"{count} {phase} {name}\n".encode())
            if count == int(number):
                os.kill(os.getpid(), signal.SIGKILL)

    watched = f"{root / 'work'}{os.sep}"

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in _FILE_EVENTS or not str(arguments[0]).startswith(watched):
            return
        if event != "open" or (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR):
            note(f"{event} {Path(str(arguments[0])).name}")

    transaction: Callable[..., Any] = Database.write

    async def write(self: Database, function: Callable[..., Any]) -> Any:
        note(f"before {function.__qualname__}")
        result = await transaction(self, function)
        note(f"after {function.__qualname__}")
        return result

    owner: Any = UpdateStore if begin == "update" else ImageManager
    method = "save" if begin == "update" else "fail"
    original = getattr(owner, method)

    async def counted(*arguments: Any) -> Any:
        nonlocal counting
        counting = True
        return await original(*arguments)

    save_phase: Callable[..., Any] = UpdateStore.save_phase

    async def noted(self: UpdateStore, present: str) -> None:
        nonlocal phase
        await save_phase(self, present)
        if counting:
            phase = present

    setattr(owner, method, counted)
    UpdateStore.save_phase = noted  # type: ignore[method-assign, assignment]
    Database.write = write  # type: ignore[method-assign]
    sys.addaudithook(audit)


def _die_after(phase: str) -> None:
    from aoscore.cm.updatemanager.store import UpdateStore

    original: Callable[..., Any] = UpdateStore.save_phase

    async def save_phase(self: UpdateStore, present: str) -> None:
        await original(self, present)
        if present == phase:
            os.kill(os.getpid(), signal.SIGKILL)

    UpdateStore.save_phase = save_phase  # type: ignore[method-assign, assignment]


def _hold() -> None:
    """See the module text; as with blobs so large that their check takes long."""
    from aoscore.cm.updatemanager.store import UpdateStore
    from aoscore.common.aio import raise_if_abandoned
    from aoscore.common.blobstore import BlobStore

    finalizing = threading.Event()
    save_phase: Callable[..., Any] = UpdateStore.save_phase
    verify: Callable[..., None] = BlobStore.verify

    async def noted(self: UpdateStore, present: str) -> None:
        await save_phase(self, present)
        if present == "finalizing":
            finalizing.set()

    def held(self: BlobStore, digest: str, *, again: bool = False) -> None:
        if finalizing.is_set():
            print("Held at the end of an update", flush=True)
            try:
                while True:
                    raise_if_abandoned()
                    time.sleep(0.01)
            finally:
                finalizing.clear()
                BlobStore.verify = verify  # type: ignore[method-assign]
        verify(self, digest, again=again)

    UpdateStore.save_phase = noted  # type: ignore[method-assign, assignment]
    BlobStore.verify = held  # type: ignore[method-assign, assignment]


def _main(point: str, arguments: list[str]) -> int:
    from aoscore.cm.app import PROGRAM
    from aoscore.common.daemon import run_daemon

    if point.startswith("after "):
        _die_after(point.removeprefix("after "))
    elif point == "hold":
        _hold()
    elif point != "never":
        _die_at(point, Path(arguments[arguments.index("-c") + 1]).parent)
    return run_daemon(PROGRAM, arguments)


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1], sys.argv[2:]))
