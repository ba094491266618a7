"""What the link of two MPs carries, how long what is urgent waits meanwhile, and what both roles weigh (make bench)."""

import asyncio
import contextlib
import hashlib
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TypeVar

import msgspec

from aoscore._pb.servicemanager.v5 import servicemanager_pb2 as pb
from aoscore._speedups.frames import FrameCutter, encode_pieces, encode_records, join_pieces
from aoscore.common.memory import expect_much_through_few_objects
from aoscore.common.tls import TlsIdentity
from aoscore.mp.communication.connection import MOST_QUANTUM_BYTES
from aoscore.mp.communication.frames import Bytes, MessageDecoder
from aoscore.mp.communication.ports import PROXY
from aoscore.mp.communication.tlscore import TlsCore
from aoscore.mp.filechunker.chunker import PIECE_BYTES
from tests.benchmarks import mp_link
from tests.benchmarks.footprint import ROOT, cpu_s, machine, size_mb
from tests.support.mpbed import NODE_ID, MpBed
from tests.support.mpnodes import node_end
from tests.support.pages import goal_rows
from tests.support.running import until
from tests.support.sm import TestSm

BLOB_BYTES = 200_000_000
ROUNDS = 15
NODES = 16
# Memory that the start has left behind is given back within two intervals of 10 s (common.memory).
IDLE_S = 25
ASKED_EVERY_S = 0.02

T = TypeVar("T")

# The other end of plain TLS over TCP: sends so many bytes to whoever connects.
_SENDER = """
import socket, ssl, sys
port, size, ca, cert, key = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(cert, key)
context.load_verify_locations(ca)
context.verify_mode = ssl.CERT_REQUIRED
piece = bytes(65536)
with socket.create_server(("127.0.0.1", port)) as server:
    print("ready", flush=True)
    while True:
        plain, _ = server.accept()
        with context.wrap_socket(plain, server_side=True) as tls:
            rest = size
            while rest:
                rest -= tls.send(piece[:rest])
            tls.recv(1)
"""


class Figures(msgspec.Struct):
    """Rates in MB/s, sizes in MB, times in ms."""

    plain_rates: list[float]
    plain_cpu: tuple[float, float]
    """CPU seconds per 100 MB of the sending and the receiving end, as all that follow."""
    link_cpu: tuple[float, float]
    checksum_rate: float
    steps: dict[str, float]
    """Rates of what both ends do to the bytes, each alone on one core."""
    link_rates: list[float]
    digest_rates: list[float]
    path_rates: list[float]
    gateway_cpu: float
    node_cpu: float
    latencies: list[float]
    idle_latencies: list[float]
    gateway_pss: float
    node_pss: float
    many_pss: float


def main() -> int:
    """Measure, print the page, write docs/mp-speed.md."""
    expect_much_through_few_objects()  # as MP does: one end of the link is in this process
    with tempfile.TemporaryDirectory(prefix="aos-mp-") as directory:
        text = report(asyncio.run(measure(Path(directory))))
    print(text)
    (ROOT / "docs" / "mp-speed.md").write_text(text)
    return 0


async def measure(directory: Path) -> Figures:
    """All figures, from two MP processes; idle memory first, before the load."""
    bed = MpBed(directory)
    bed.verbosity = "info"
    # Not through the bed's wire, which is there to be cut.
    transport = {"listen": f"127.0.0.1:{bed.gateway_port}", "connect": f"127.0.0.1:{bed.gateway_port}"}
    async with bed.both(transport=transport), _sm(bed) as sm:
        assert bed.gateway and bed.node
        pids = bed.gateway.process.pid, bed.node.process.pid
        await asyncio.sleep(IDLE_S)
        gateway_pss, node_pss = map(pss_mb, pids)
        idle = await ask(bed, 50)
        digest = bed.blobs.put(os.urandom(BLOB_BYTES))
        await sm.blobs.GetBlobsInfos(pb.BlobsInfosRequest(digests=[digest]), timeout=10)
        rates: list[list[float]] = [[], [], [], []]
        before = [cpu_s(pid) for pid in pids]
        ends, link_ends = bed.identity("plain-server"), bed.identity("link-ends")
        plain_cpu, link_cpu = Cpu(), Cpu()
        gateway_end = mp_link.gateway_end(link_ends, BLOB_BYTES)
        with plain_sender(ends) as (plain, plain_pid), gateway_end as (gateway, link_pid):
            async with mp_link.node_end(gateway, link_ends) as downloads:
                # In turn, so that whatever else runs on this machine falls on all.
                for _ in range(ROUNDS):
                    with plain_cpu.of(plain_pid):
                        rates[0].append(await plain_rate(plain, bed.identity("plain-client")))
                    with link_cpu.of(link_pid):
                        rates[1].append(await mp_link.link_rate(downloads, BLOB_BYTES, digest=False))
                    rates[2].append(await mp_link.link_rate(downloads, BLOB_BYTES, digest=True))
                    rates[3].append(await path_rate(bed, digest))
        per_100_mb = [(cpu_s(pid) - was) / (ROUNDS * BLOB_BYTES / 1e8) for pid, was in zip(pids, before, strict=True)]
        forget(bed, digest)
        latencies = []
        bulk = asyncio.create_task(asyncio.to_thread(fetch, bed.blob_url(digest)))
        while not bulk.done():
            latencies += await ask(bed, 1)
        await bulk
    many_pss = await weigh_many(directory / "many")
    return Figures(
        plain_rates=rates[0],
        plain_cpu=plain_cpu.per_100_mb,
        link_cpu=link_cpu.per_100_mb,
        checksum_rate=checksum_rate(),
        steps=steps(link_ends),
        link_rates=rates[1],
        digest_rates=rates[2],
        path_rates=rates[3],
        gateway_cpu=per_100_mb[0],
        node_cpu=per_100_mb[1],
        latencies=latencies,
        idle_latencies=idle,
        gateway_pss=gateway_pss,
        node_pss=node_pss,
        many_pss=many_pss,
    )


class Cpu:
    """What the two ends of transfers have used, another process and this one."""

    def __init__(self) -> None:
        self._used = [0.0, 0.0]

    @contextlib.contextmanager
    def of(self, sender: int) -> Iterator[None]:
        """Count the block, one of the rounds."""
        before = cpu_s(sender), cpu_s(os.getpid())
        yield
        self._used[0] += cpu_s(sender) - before[0]
        self._used[1] += cpu_s(os.getpid()) - before[1]

    @property
    def per_100_mb(self) -> tuple[float, float]:
        """Seconds of the sender and of this process."""
        sender, receiver = (used / (ROUNDS * BLOB_BYTES / 1e8) for used in self._used)
        return sender, receiver


@contextlib.asynccontextmanager
async def _sm(bed: MpBed) -> AsyncIterator[TestSm]:
    """The node's SM, registered at CM."""
    sm = TestSm(NODE_ID)
    while True:
        async with sm.connected(bed.sm_port, bed.identity("second-sm")):
            with contextlib.suppress(TimeoutError):
                await bed.cm.connected(len(bed.cm.connections) or 1, 5)
                yield sm
                return


async def ask(bed: MpBed, count: int) -> list[float]:
    """Milliseconds from a request of CM to the answer of SM, through the link and back, one after the other."""
    found = []
    for _ in range(count):
        connection = bed.cm.connections[-1]
        seen = len(connection.frames)
        begin = time.perf_counter()
        bed.cm.send(get_average_monitoring=pb.GetAverageMonitoring())
        await bed.cm.frame("average_monitoring", after=seen)
        found.append((time.perf_counter() - begin) * 1000)
        await asyncio.sleep(ASKED_EVERY_S)
    return found


def fetch(url: str) -> float:
    """Seconds until a blob is here, as fast as a client can take it."""
    host, _, path = url.removeprefix("http://").partition("/")
    name, _, port = host.partition(":")
    begin = time.perf_counter()
    count = 0
    buffer = bytearray(1 << 20)
    with socket.create_connection((name, int(port))) as one:
        one.sendall(f"GET /{path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        while size := one.recv_into(buffer):
            count += size
    if count < BLOB_BYTES:
        raise RuntimeError(f"only {count} bytes came")
    return time.perf_counter() - begin


def checksum_rate() -> float:
    """SHA-256 of one core, of payloads as they are in frames."""
    payload = bytes(16 * 1024)
    begin = time.perf_counter()
    for _ in range(20_000):
        hashlib.sha256(payload).digest()
    return len(payload) * 20_000 / 1e6 / (time.perf_counter() - begin)


def steps(identity: TlsIdentity) -> dict[str, float]:
    """What both ends do to the bytes of a download, step by step in one thread, as much at a time as the link has."""
    server = TlsCore(identity.ssl_server_context(), server_side=True)
    client = TlsCore(identity.ssl_client_context(check_hostname=False), server_side=False)
    client.feed(())
    while not (server.is_ready and client.is_ready):
        server.feed([client.output()])
        client.feed([server.output()])
    client.feed([server.output() or b""])
    data, room = memoryview(bytes(MOST_QUANTUM_BYTES)), memoryview(bytearray(2 * MOST_QUANTUM_BYTES))
    cutter, messages = FrameCutter(), MessageDecoder(1 << 20)
    spent: dict[str, list[float]] = {}

    def step(name: str, work: Callable[[], T]) -> T:
        begin = time.perf_counter()
        result = work()
        spent.setdefault(name, []).append(time.perf_counter() - begin)
        return result

    def records() -> bytes:
        server.write(encoded)
        return server.output()

    def joined(plain: Bytes) -> None:
        join_pieces([*messages.feed(plain)], MOST_QUANTUM_BYTES)

    def received() -> memoryview:
        room[: len(frames)] = frames
        return room[: len(frames)]

    for _ in range(1000):
        encoded = encode_pieces(1, 0, data, PIECE_BYTES)
        written = step("TLS records written", records)
        ((frames, _),) = step("frames made of them", partial(encode_records, PROXY, written, 2 * MOST_QUANTUM_BYTES))
        ((_, payloads),) = step("frames cut and checked", partial(cutter.feed, received()))
        plain = step("TLS records read", partial(client.feed, payloads))
        step("pieces joined", partial(joined, plain))
    return {name: MOST_QUANTUM_BYTES / 1e6 / statistics.median(times) for name, times in spent.items()}


async def path_rate(bed: MpBed, digest: str) -> float:
    """A blob from CM's file server through both MPs to SM: HTTP, TLS, frames, checksum, store, HTTP."""
    forget(bed, digest)
    return BLOB_BYTES / 1e6 / await asyncio.to_thread(fetch, bed.blob_url(digest))


def forget(bed: MpBed, digest: str) -> None:
    """The node has it no longer."""
    (bed.root / "node/images/blobs/sha256" / digest.removeprefix("sha256:")).unlink(missing_ok=True)


async def plain_rate(port: int, identity: TlsIdentity) -> float:
    """As many bytes over TLS over TCP, by Python's ssl alone, between two processes."""

    def receive() -> float:
        context = identity.ssl_client_context(check_hostname=False)
        buffer = bytearray(1 << 20)
        begin = time.perf_counter()
        rest = BLOB_BYTES
        with socket.create_connection(("127.0.0.1", port)) as one, context.wrap_socket(one) as tls:
            while rest:
                rest -= tls.recv_into(buffer)
            tls.send(b"!")
        return time.perf_counter() - begin

    return BLOB_BYTES / 1e6 / await asyncio.to_thread(receive)


@contextlib.contextmanager
def plain_sender(identity: TlsIdentity) -> Iterator[tuple[int, int]]:
    """The process at the other end of `plain_rate`; its port and its number."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
    files = [str(identity.ca_file), *(url.removeprefix("file://") for url in (identity.cert_url, identity.key_url))]
    command = [sys.executable, "-c", _SENDER, str(port), str(BLOB_BYTES), *files]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout and process.stdout.readline() == "ready\n"
            yield port, process.pid
        finally:
            process.kill()


async def weigh_many(directory: Path) -> float:
    """PSS of a gateway with many nodes whose SMs are registered."""
    directory.mkdir()
    bed = MpBed(directory)
    bed.verbosity = "info"
    async with bed.running(), bed.run_gateway() as gateway, contextlib.AsyncExitStack() as stack:
        for number in range(NODES):
            await stack.enter_async_context(node_end(bed, f"node-{number}"))
        await until(lambda: len(bed.cm.connections) == NODES, 30)
        await asyncio.sleep(IDLE_S)
        return pss_mb(gateway.process.pid)


def pss_mb(pid: int) -> float:
    """Memory of a process."""
    return size_mb(Path(f"/proc/{pid}/smaps_rollup").read_text(), "Pss")


def report(found: Figures) -> str:
    """The page."""

    def rate(rates: list[float]) -> str:
        return f"{statistics.median(rates):.0f} MB/s"

    def ratio(rates: list[float]) -> str:
        return f"{statistics.median(one / plain for one, plain in zip(rates, found.plain_rates, strict=True)):.2f}"

    def cpu(ends: tuple[float, float]) -> str:
        return f"{ends[0]:.3f} s, {ends[1]:.3f} s"

    quantiles = statistics.quantiles(found.latencies, n=100)
    rows = goal_rows(
        (
            ("plain TLS over TCP, Python's ssl", "", rate(found.plain_rates)),
            ("CPU of its two ends per 100 MB, sending and receiving", "", cpu(found.plain_cpu)),
            ("SHA-256 by hashlib of what a frame carries, one core", "", f"{found.checksum_rate:.0f} MB/s"),
            *((f"{name}, one core", "", f"{rate:.0f} MB/s") for name, rate in found.steps.items()),
            ("a blob through TLS in frames, and out of them", "", rate(found.link_rates)),
            ("its part of plain TLS, median of pairs", "0.70", ratio(found.link_rates)),
            ("CPU of its two ends per 100 MB, sending and receiving", "", cpu(found.link_cpu)),
            ("the same with the digest of the blob", "", rate(found.digest_rates)),
            ("its part of plain TLS", "", ratio(found.digest_rates)),
            ("a blob from CM's file server to SM, through both MPs", "", rate(found.path_rates)),
            ("its part of plain TLS", "", ratio(found.path_rates)),
            ("CPU of the gateway per 100 MB of that", "", f"{found.gateway_cpu:.2f} s"),
            ("CPU of the node per 100 MB of that", "", f"{found.node_cpu:.2f} s"),
            ("CM asks SM, idle, median", "", f"{statistics.median(found.idle_latencies):.1f} ms"),
            ("the same during a download, median", "", f"{quantiles[49]:.1f} ms"),
            ("the same, p99", "", f"{quantiles[98]:.1f} ms"),
            ("the same, longest", "250 ms", f"{max(found.latencies):.0f} ms"),
            ("PSS of the gateway, idle, one node", "30 MB", f"{found.gateway_pss:.0f} MB"),
            ("PSS of the node, idle", "30 MB", f"{found.node_pss:.0f} MB"),
            (f"PSS of a gateway with {NODES} nodes", "45 MB", f"{found.many_pss:.0f} MB"),
        )
    )
    return f"""# Speed of MP's link

Written by `make bench` on {datetime.now(UTC):%Y-%m-%d}: {machine()}. Load average of the machine at the end:
{os.getloadavg()[1]:.0f} (more than its cores means that others took part of the time).

| | goal | |
| --- | --- | --- |
{rows}

Plain TLS sends {BLOB_BYTES // 1_000_000} MB from one process to another, and nothing else. "Through TLS in frames, and
out of them": a blob of that size goes from the memory of one end of a link to the other end, cut into pieces,
encrypted, each record in a frame with its checksum, over TCP, and back to its bytes in their order; with its digest it
is also hashed as a whole, as the store does. Each end has a process and with that one core; frames and their SHA-256
are work that plain TLS does not have: how much one core does of each step is in the rows before. "From CM's file server
to SM": HTTP to the gateway, the link, the node's store and its digest, HTTP to the client. {ROUNDS} rounds, in turn.
"CM asks SM": a request on the stream of RegisterSM and its answer, {len(found.latencies)} times one after the other
while a blob is on its way; CM, SM and the clients share one Python process on the same cores.
"""


if __name__ == "__main__":
    sys.exit(main())
