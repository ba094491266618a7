"""What CM needs for a small Unit and for one of 64 nodes and 4,096 instances (make bench)."""

import asyncio
import contextlib
import json
import os
import ssl
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
from google.protobuf.timestamp_pb2 import Timestamp

from aoscore._pb.common.v2 import common_pb2 as common
from aoscore._pb.servicemanager.v5 import servicemanager_pb2 as pb
from aoscore.cm.communication.envelope import to_document
from aoscore.cm.launcher.balancer import Amounts, Node, Variant, Wanted, place
from aoscore.common.types import CertInfo, InstanceIdent, RuntimeInfo
from tests.benchmarks.footprint import ROOT, cpu_s, machine, size_mb
from tests.support.cloud import FakeCloud
from tests.support.fleet import FleetIam, fleet_nodes, with_ports
from tests.support.iam import free_port
from tests.support.images import BlobCloud, Image, Signer, desired
from tests.support.pages import goal_rows
from tests.support.pki import TestCa
from tests.support.sm import TestSm, stay_connected

NODES = 64
INSTANCES_PER_NODE = 64
BALANCED = 1000
SAMPLE_PERIOD_S = 10.0
LOAD_S = 60.0
IDLE_S = 20.0
ROUNDS = 7
SUBJECT = "5a9d3c3e-0f6e-4d39-8f0b-7a2f0c6b4e22"


class Figures(msgspec.Struct):
    """Times in seconds of wall time, `…_cpu` in seconds of CPU; memory in MB."""

    balance_cpu: float
    large_load: float
    """Share of one core."""
    large_pss: float
    status_cpu: float
    status: float
    status_size: float
    deploy_cpu: float
    small_pss: float
    deployed_pss: float
    ready: float
    ready_cpu: float
    offline_load: float
    """Share of one core."""


def main() -> int:
    """Measure, print the page, write docs/cm-speed.md."""
    text = report(asyncio.run(measure()))
    print(text)
    (ROOT / "docs" / "cm-speed.md").write_text(text)
    return 0


async def measure() -> Figures:
    """All figures, one after the other."""
    balance_cpu = statistics.median(balance() for _ in range(ROUNDS))
    with tempfile.TemporaryDirectory(prefix="aos-cm-") as directory:
        for name in ("large", "small"):
            (Path(directory) / name).mkdir()
        async with Bed(Path(directory) / "large", NODES).running() as bed:
            large = await measure_large(bed)
        async with Bed(Path(directory) / "small", 1).running() as bed:
            small = await measure_small(bed)
    return Figures(balance_cpu=balance_cpu, **large, **small)


def balance() -> float:
    """CPU seconds to place `BALANCED` new instances on `NODES` nodes."""
    nodes = [
        Node(
            node_id=f"n{n:02}", max_dmips=10_000, total_ram_bytes=1 << 32, runtimes=(RuntimeInfo(f"crun-{n}", "crun"),)
        )
        for n in range(NODES)
    ]
    variants = [
        (Variant(manifest_digest=f"m{item}", requested=Amounts(cpu=100 + item, ram=1 << 20)),) for item in range(40)
    ]
    wanted = [
        Wanted(ident=InstanceIdent(f"i{n % 40}", "s", n // 40), variants=variants[n % 40], priority=n % 5)
        for n in range(BALANCED)
    ]
    begin = time.process_time()
    decisions = place(nodes, wanted, {})
    used = time.process_time() - begin
    if any(decision.site is None for decision in decisions.values()):
        raise RuntimeError("not all instances found a place")
    return used


class Bed:
    """A CM process; IAM, cloud and SMs in this one."""

    def __init__(self, directory: Path, nodes: int) -> None:
        self.directory = directory
        self.ca = TestCa()
        self.nodes = fleet_nodes(nodes)
        self._identity = self.ca.identity(directory, "all")
        certs = {
            name: CertInfo(name, self._identity.cert_url, self._identity.key_url)
            for name in ("online", "cm", "sm", "iam")
        }
        self.iam = FleetIam(self._identity, self.nodes, certs, "unit-1")
        self.cloud = FakeCloud("unit-1", self._cloud_tls())
        self.cloud.answers["requestBlobUrls"] = self._blob_urls
        self.signer = Signer(self.ca)
        (directory / "blobs").mkdir()
        self.blobs = BlobCloud(directory / "blobs", self.signer)
        self.sms: list[TestSm] = []
        self.port = free_port()
        self.process: asyncio.subprocess.Process | None = None

    def _cloud_tls(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.directory / "all.pem", self.directory / "all.key")
        context.load_verify_locations(cadata=self.ca.root_pem.decode())
        context.verify_mode = ssl.CERT_REQUIRED
        return context

    async def _blob_urls(self, data: dict[str, Any]) -> dict[str, Any]:
        answer = await self.blobs.blob_urls(data["digests"])
        return {"messageType": "blobUrls", "items": [as_json(item) for item in answer.items]}

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator["Bed"]:
        """Everything runs, all SMs are connected."""
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(self.cloud.running())
            await stack.enter_async_context(self.blobs.running())
            await stack.enter_async_context(self.iam.running())
            config = {
                "workingDir": str(self.directory / "work"),
                "caCert": str(self._identity.ca_file),
                "cmServerUrl": f"127.0.0.1:{self.port}",
                "fileServerUrl": f"127.0.0.1:{free_port()}",
                "serviceDiscoveryUrl": self.cloud.discovery_url,
                "unitStatusSendTimeout": "1s",
            }
            (self.directory / "cm.cfg").write_text(json.dumps(with_ports(config, self.iam)))
            stack.push_async_callback(self.kill)
            await self.start()
            platform = {"arch_info": common.ArchInfo(architecture="amd64"), "os_info": common.OSInfo(os="linux")}
            for node in self.nodes:
                sm = TestSm(node.node_id, (pb.RuntimeInfo(runtime_id=f"crun-{node.node_id}", type="crun", **platform),))
                self.sms.append(sm)
                node_task = asyncio.create_task(stay_connected(sm, self.port, self._identity))
                stack.callback(node_task.cancel)
            await self.cloud.connected()
            await self.nodes_connected()
            yield self

    async def start(self) -> float:
        """Start CM; seconds until it is ready."""
        log = self.directory / "cm.log"
        command = ["setpriv", "--pdeathsig", "KILL", sys.executable, "-m", "aoscore.cm.app", "-c", "cm.cfg"]
        begin = time.perf_counter()
        with log.open("wb") as output:
            self.process = await asyncio.create_subprocess_exec(
                *command, cwd=self.directory, stdout=output, stderr=output, env={**os.environ, "PYTHONPATH": str(ROOT)}
            )
        while "CM is ready" not in log.read_text():
            if self.process.returncode is not None or time.perf_counter() - begin > 60:
                raise RuntimeError(log.read_text())
            await asyncio.sleep(0.005)
        return time.perf_counter() - begin

    async def nodes_connected(self) -> None:
        """Until the SMs of all nodes are connected to this CM process."""
        while (self.directory / "cm.log").read_text().count("SM connected") < len(self.nodes):
            await asyncio.sleep(0.05)

    async def kill(self) -> None:
        """kill -9."""
        if self.process is not None and self.process.returncode is None:
            self.process.kill()
            await self.process.wait()

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def cpu(self) -> float:
        return cpu_s(self.pid)

    @property
    def pss_mb(self) -> float:
        return size_mb(Path(f"/proc/{self.pid}/smaps_rollup").read_text(), "Pss")

    async def deploy(self, items: int, instances: int) -> None:
        """So many instances of so many items, on all nodes."""
        configured = {"requestedResources": {"cpu": 100}}
        images = {f"item-{n:02}": Image([f"layer {n}".encode()], **configured) for n in range(items)}
        for image in images.values():
            self.blobs.publish(image)
        await self.cloud.send_frame(
            {
                "messageType": "desiredStatus",
                "items": [as_json(desired(name, "1.0.0", image)) for name, image in images.items()],
                "instances": [
                    {"item": {"id": name}, "subject": {"id": SUBJECT}, "numInstances": instances // items}
                    for name in images
                ],
                "subjects": [{"identity": {"id": SUBJECT}, "type": "group"}],
                "certificates": [as_json(entry) for entry in self.signer.certificates],
                "certificateChains": [as_json(entry) for entry in self.signer.chains],
            }
        )
        async with asyncio.timeout(300):
            while len(self.last_status().get("items", [])) != items or self.active() != instances:
                await asyncio.sleep(0.1)

    def last_status(self) -> dict[str, Any]:
        """The newest full unit status."""
        for frame in reversed(self.cloud.frames):
            if frame["data"]["messageType"] == "unitStatus" and not frame["data"]["isDeltaInfo"]:
                return dict(frame["data"])
        return {}

    def active(self) -> int:
        """Instances that it shows as active."""
        groups = self.last_status().get("instances", [])
        return sum(one["state"] == "active" for group in groups for one in group["instances"])

    def check_monitoring(self) -> None:
        """The cloud has got what the SMs have sent: the newest message has samples of all instances."""
        told = [frame["data"] for frame in self.cloud.frames if frame["data"]["messageType"] == "monitoringData"]
        sampled = sum(bool(one["items"]) for one in told[-1]["instances"]) if told else 0
        if sampled != len(self.nodes) * INSTANCES_PER_NODE:
            raise RuntimeError(f"the cloud got samples of {sampled} instances")

    async def reconnect(self) -> tuple[float, float, int]:
        """A new connection: seconds from its handshake to the full status, CPU seconds of CM, bytes of the status."""
        count = len(self.cloud.frames)
        shaken = len(self.cloud.handshakes)
        before = self.cpu
        await self.cloud.sockets[-1].close()
        while len(self.cloud.handshakes) == shaken:
            await asyncio.sleep(0.002)
        begin = time.perf_counter()
        while True:
            for frame in self.cloud.frames[count:]:
                if frame["data"]["messageType"] == "unitStatus" and not frame["data"]["isDeltaInfo"]:
                    return time.perf_counter() - begin, self.cpu - before, len(json.dumps(frame))
            await asyncio.sleep(0.002)


def as_json(value: Any) -> Any:
    return json.loads(msgspec.json.encode(to_document(value)))


async def measure_large(bed: Bed) -> dict[str, float]:
    """64 nodes, 4,096 instances."""
    before = bed.cpu
    await bed.deploy(NODES, NODES * INSTANCES_PER_NODE)
    deploy_cpu = bed.cpu - before
    await asyncio.sleep(5)
    rounds = [await bed.reconnect() for _ in range(ROUNDS)]
    senders = [asyncio.create_task(send_samples(sm, number)) for number, sm in enumerate(bed.sms)]
    # The first samples, and then periods in which monitoring data is sent as well.
    await asyncio.sleep(SAMPLE_PERIOD_S)
    before = bed.cpu
    await asyncio.sleep(LOAD_S)
    load = (bed.cpu - before) / LOAD_S
    pss = bed.pss_mb
    for sender in senders:
        sender.cancel()
    bed.check_monitoring()
    walls, cpus, sizes = zip(*rounds, strict=True)
    return {
        "large_load": load,
        "large_pss": pss,
        "status": statistics.median(walls),
        "status_cpu": statistics.median(cpus),
        "status_size": statistics.median(sizes) / 1e6,
        "deploy_cpu": deploy_cpu,
    }


async def send_samples(sm: TestSm, number: int) -> None:
    """Monitoring of a node, as an SM sends it."""
    await asyncio.sleep(SAMPLE_PERIOD_S * number / NODES)
    while True:
        now = Timestamp()
        now.FromDatetime(datetime.now(UTC))

        def figures(cpu: int, now: Timestamp = now) -> pb.MonitoringData:
            usage = [pb.PartitionUsage(name="storages", used_size=123_456_789)]
            return pb.MonitoringData(
                timestamp=now, ram=50_000_000 + cpu, cpu=cpu, download=1, upload=2, partitions=usage
            )

        instances = [
            pb.InstanceMonitoring(
                instance=status.instance, monitoring_data=figures(index), runtime_id=status.runtime_id
            )
            for index, status in enumerate(sm.instances.values())
        ]
        sm.send(instant_monitoring=pb.InstantMonitoring(node_monitoring=figures(5000), instances_monitoring=instances))
        await asyncio.sleep(SAMPLE_PERIOD_S)


async def measure_small(bed: Bed) -> dict[str, float]:
    """One node, four instances; then without its cloud, with all the logs that the queue takes."""
    await bed.deploy(2, 4)
    await asyncio.sleep(IDLE_S)
    deployed = bed.pss_mb
    shaken = len(bed.cloud.handshakes)
    await bed.kill()
    await bed.start()
    await bed.nodes_connected()
    while len(bed.cloud.handshakes) == shaken:
        await asyncio.sleep(0.1)
    await asyncio.sleep(IDLE_S)
    pss = bed.pss_mb
    bed.cloud.discovery_status = 503
    await bed.cloud.sockets[-1].close()
    for number in range(300):
        part = pb.LogData(correlation_id="c", part_count=300, part=number + 1, data=os.urandom(10_000), status="ok")
        part.error.CopyFrom(common.ErrorInfo())
        bed.sms[0].send(log=part)
    await asyncio.sleep(IDLE_S)
    before = bed.cpu
    await asyncio.sleep(IDLE_S)
    offline = (bed.cpu - before) / IDLE_S
    starts, cpus = [], []
    for _ in range(ROUNDS):
        await bed.kill()
        starts.append(await bed.start())
        cpus.append(bed.cpu)
    return {
        "small_pss": pss,
        "deployed_pss": deployed,
        "offline_load": offline,
        "ready": statistics.median(starts),
        "ready_cpu": statistics.median(cpus),
    }


def report(figures: Figures) -> str:
    """The page."""
    rows = goal_rows(
        (
            (f"placing {BALANCED:,} instances on {NODES} nodes, CPU", "200 ms", f"{figures.balance_cpu * 1000:.0f} ms"),
            ("**64 nodes, 4,096 instances**", "", ""),
            ("load with samples of all every 10 s, of one core", "25 %", f"{figures.large_load * 100:.1f} %"),
            ("PSS under that load", "120 MB", f"{figures.large_pss:.0f} MB"),
            ("connection and full unit status, CPU", "300 ms", f"{figures.status_cpu * 1000:.0f} ms"),
            ("from handshake to the cloud's last byte", "", f"{figures.status * 1000:.0f} ms"),
            ("size of that status", "", f"{figures.status_size:.1f} MB"),
            ("deployment of all from nothing, CPU", "", f"{figures.deploy_cpu:.1f} s"),
            ("**one node, four instances**", "", ""),
            ("PSS idle, as after a boot", "36 MB", f"{figures.small_pss:.0f} MB"),
            ("PSS idle in the process that has done the deployment", "", f"{figures.deployed_pss:.0f} MB"),
            ("start to ready", "0.6 s", f"{figures.ready:.2f} s"),
            ("the same in CPU", "", f"{figures.ready_cpu:.2f} s"),
            ("load without cloud, queue full, of one core", "0.1 %", f"{figures.offline_load * 100:.2f} %"),
        )
    )
    return f"""# Speed of CM

Written by `make bench` on {datetime.now(UTC):%Y-%m-%d}: {machine()}. Load average of the machine at the end:
{os.getloadavg()[1]:.0f} (more than its cores means that others took part of the time).

| | goal | |
| --- | --- | --- |
{rows}

CM is a process of its own; cloud, IAM and the SMs of all nodes are in another one on the same cores, over mutual TLS.
PSS counts all pages of libraries that no other process of the machine uses now; on a device IAM and SM share them.
Medians of {ROUNDS} rounds. The load is an average over {LOAD_S:.0f} s, in which monitoring data goes to the cloud, too.
"""


if __name__ == "__main__":
    sys.exit(main())
