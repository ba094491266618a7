"""What IAM does in which time, with keys in files and on tokens of SoftHSM (make bench)."""

import asyncio
import contextlib
import os
import socket
import ssl
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import grpc.aio
import msgspec
from google.protobuf.empty_pb2 import Empty

from aoscore._pb.iamanager.v6 import iamanager_pb2 as pb
from aoscore._pb.iamanager.v6 import iamanager_pb2_grpc as stubs
from aoscore.common.keys import private_key_pem
from tests.benchmarks.footprint import ROOT, cpu_s, machine, size_mb
from tests.support.iam import Iam
from tests.support.pki import TestCa
from tests.support.tokeniam import TokenIam

CLIENTS = 8
LOAD_S = 10.0
SUBSCRIBERS = 32
ROUNDS = 7
HANDSHAKES = 50
IDLE_S = 10


class Figures(msgspec.Struct):
    """Of one IAM. Times in ms unless the name says otherwise."""

    calls_per_s: float
    call_p50: float
    call_p99: float
    server_cpu: float
    """Share of one core that IAM took under that load."""
    told_all: float
    """From the answer of ApplyCert until the last subscriber knows; 0 when all knew before."""
    handshake: float
    create_key: float
    apply: float
    ready_s: float
    pss_mb: float


def main() -> int:
    """Measure, print the page, write docs/iam-speed.md."""
    with tempfile.TemporaryDirectory(prefix="aos-iam-") as directory:
        figures = []
        for number, kind in enumerate((Iam, TokenIam)):
            root = Path(directory) / str(number)
            root.mkdir()
            with unit(kind(root, TestCa())) as iam:
                figures.append(measure(iam))
        text = report(*figures)
    print(text)
    (ROOT / "docs" / "iam-speed.md").write_text(text)
    return 0


@contextlib.contextmanager
def unit(iam: Iam) -> Iterator[Iam]:
    """A provisioned one in normal mode, logging as on a device."""
    try:
        iam.provision()
        iam.verbosity = "info"
        iam.start()
        yield iam
    finally:
        iam.kill()


def measure(iam: Iam) -> Figures:
    """All figures; idle memory first, before the load."""
    time.sleep(IDLE_S)
    assert iam.process is not None
    pss = size_mb(Path(f"/proc/{iam.process.pid}/smaps_rollup").read_text(), "Pss")
    before = cpu_s(iam.process.pid)
    latencies = asyncio.run(load(iam))
    busy = (cpu_s(iam.process.pid) - before) / LOAD_S
    quantiles = statistics.quantiles(latencies, n=100)
    told = statistics.median(asyncio.run(tell(iam, 100 + number)) for number in range(ROUNDS))
    created, applied = zip(*(renew(iam, 200 + number) for number in range(ROUNDS)), strict=True)
    handshakes = [handshake(iam) for _ in range(HANDSHAKES)]
    return Figures(
        calls_per_s=len(latencies) / LOAD_S,
        call_p50=quantiles[49] * 1000,
        call_p99=quantiles[98] * 1000,
        server_cpu=busy,
        told_all=told * 1000,
        handshake=statistics.median(handshakes) * 1000,
        create_key=statistics.median(created) * 1000,
        apply=statistics.median(applied) * 1000,
        ready_s=statistics.median(restart(iam) for _ in range(ROUNDS)),
        pss_mb=pss,
    )


def channels(iam: Iam, count: int) -> list[grpc.aio.Channel]:
    """Connections of their own to the protected port."""
    credentials = iam.credentials("cm")
    options = [("grpc.use_local_subchannel_pool", 1)]
    return [grpc.aio.secure_channel(iam.protected, credentials, options) for _ in range(count)]


async def load(iam: Iam) -> list[float]:
    """GetCert as fast as clients get answers; all latencies, seconds."""
    latencies: list[float] = []
    request = pb.GetCertRequest(type="iam")

    async def client(channel: grpc.aio.Channel, end: float) -> None:
        stub = stubs.IAMPublicCertServiceStub(channel)
        while (begin := time.perf_counter()) < end:
            await stub.GetCert(request, timeout=10)
            latencies.append(time.perf_counter() - begin)

    opened = channels(iam, CLIENTS)
    await asyncio.gather(*(stubs.IAMPublicCertServiceStub(one).GetCert(request, timeout=10) for one in opened))
    end = time.perf_counter() + LOAD_S
    await asyncio.gather(*(client(one, end) for one in opened))
    await asyncio.gather(*(one.close() for one in opened))
    return latencies


async def tell(iam: Iam, days: int) -> float:
    """Seconds from the answer of ApplyCert until all subscribers know."""
    opened = channels(iam, SUBSCRIBERS)
    streams = [
        stubs.IAMPublicCertServiceStub(one).SubscribeCertChanged(pb.SubscribeCertChangedRequest(type="cm"))
        for one in opened
    ]

    async def heard(stream: grpc.aio.UnaryStreamCall) -> float:
        await stream.read()
        return time.perf_counter()

    waiting = [asyncio.create_task(heard(stream)) for stream in streams]
    # A stream says nothing about its beginning.
    await asyncio.sleep(1.5)
    issue = stubs.IAMCertificateServiceStub(opened[0])
    csr = (await issue.CreateKey(pb.CreateKeyRequest(type="cm"), timeout=30)).csr
    pem = iam.authority.sign_request(csr, days=days)
    answer = await issue.ApplyCert(pb.ApplyCertRequest(type="cm", cert=pem), timeout=30)
    answered = time.perf_counter()
    if answer.HasField("error"):
        raise RuntimeError(answer.error.message)
    last = max(await asyncio.gather(*waiting))
    await asyncio.gather(*(one.close() for one in opened))
    return max(0.0, last - answered)


def renew(iam: Iam, days: int) -> tuple[float, float]:
    """Seconds for a new key, and for its certificate."""
    with iam.secure() as client:
        client.version.GetAPIVersion(Empty())
        begin = time.perf_counter()
        csr = client.create_key("sm")
        created = time.perf_counter()
        pem = iam.authority.sign_request(csr, days=days)
        signed = time.perf_counter()
        client.apply("sm", pem)
        return created - begin, time.perf_counter() - signed


def handshake(iam: Iam) -> float:
    """Seconds for a TCP connection with mutual TLS to the protected port."""
    issued = iam.authority.issue("cm")
    file = iam.root / "bench.pem"
    file.write_bytes(private_key_pem(issued.key) + issued.pem)
    context = ssl.create_default_context(cafile=str(iam.ca_file))
    context.load_cert_chain(file)
    context.set_alpn_protocols(["h2"])
    host, port = iam.protected.split(":")
    begin = time.perf_counter()
    with socket.create_connection((host, int(port))) as plain:
        with context.wrap_socket(plain, server_hostname="localhost") as tls:
            # The server speaks first, once it has seen our certificate.
            tls.recv(1)
    return time.perf_counter() - begin


def restart(iam: Iam) -> float:
    """Seconds from the start of the process to readiness, after a kill."""
    iam.kill()
    begin = time.perf_counter()
    iam.start()
    return time.perf_counter() - begin


def report(files: Figures, tokens: Figures) -> str:
    """The page."""
    rows = "\n".join(
        f"| {title} | {target} | {form.format(getattr(files, name))} | {form.format(getattr(tokens, name))} |"
        for title, target, name, form in (
            (f"GetCert per second, {CLIENTS} clients", "1,500", "calls_per_s", "{:,.0f}"),
            ("the same, p50 and", "", "call_p50", "{:.1f} ms"),
            ("p99", "20 ms", "call_p99", "{:.1f} ms"),
            ("cores that IAM takes for it", "", "server_cpu", "{:.2f}"),
            (f"new certificate told to {SUBSCRIBERS} subscribers", "100 ms", "told_all", "{:.0f} ms"),
            ("connection with mutual TLS", "", "handshake", "{:.1f} ms"),
            ("CreateKey, EC P-384", "", "create_key", "{:.0f} ms"),
            ("ApplyCert", "", "apply", "{:.0f} ms"),
            ("start to ready", "0.6 s", "ready_s", "{:.2f} s"),
            ("PSS idle, alone on the machine", "32 MB", "pss_mb", "{:.0f} MB"),
        )
    )
    return f"""# Speed of IAM

Written by `make bench` on {datetime.now(UTC):%Y-%m-%d}: {machine()}. Load average of the machine at the end:
{os.getloadavg()[1]:.0f} (more than its cores means that others took part of the time).

| | goal | keys in files | keys on tokens |
| --- | --- | --- | --- |
{rows}

The clients run on the same cores, in one Python process: the rate is that of both together. Tokens are SoftHSM's;
TLS with their keys goes through OpenSSL's pkcs11 provider and the relay of `aoscore/common/relay.py`. Medians of
{ROUNDS} rounds, of {HANDSHAKES} for connections; "told" counts from the answer of ApplyCert to the last subscriber.

PSS counts pages of libraries in full when no other process uses them, as here; in a Unit SM and CM share them
([footprint](footprint.md), which also says what of its code an idle daemon still holds).
"""


if __name__ == "__main__":
    sys.exit(main())
