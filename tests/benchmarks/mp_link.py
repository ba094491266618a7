"""The two ends of a link and nothing else: a blob out of memory, through TLS in frames, to its pieces and their digest.

As a program it is the gateway's end: `python -m tests.benchmarks.mp_link PORT SIZE CA CERT KEY`. It sends a blob of
SIZE bytes to whoever asks on the channel for downloads.
"""

import asyncio
import contextlib
import hashlib
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path

from aoscore._pb.servicemanager.v5 import servicemanager_pb2 as pb
from aoscore.common.aio import Worker
from aoscore.common.memory import expect_much_through_few_objects
from aoscore.common.tls import TlsIdentity
from aoscore.mp.clock import ClockSync
from aoscore.mp.communication.connection import Connection, LinkSettings
from aoscore.mp.communication.connector import Connector
from aoscore.mp.communication.ports import PROXY
from aoscore.mp.communication.sockets import Listener, connected
from aoscore.mp.config import ClockSyncConfig
from aoscore.mp.filechunker.chunker import Chunker
from aoscore.mp.filechunker.downloads import send_pieces
from aoscore.mp.node import Node
from aoscore.mp.nodeserver.downloads import DownloadClient
from aoscore.mp.nodeserver.link import NodeLink
from aoscore.mp.status import Status
from tests.support.iam import free_port
from tests.support.links import PORTS, contexts
from tests.support.running import running, until

_CHUNK = bytes(range(256)) * 1024
_TOGETHER_BYTES = 1024 * 1024


async def chunks(size: int) -> AsyncIterator[bytes]:
    """A blob, as an HTTP client gives it."""
    for begin in range(0, size, len(_CHUNK)):
        yield _CHUNK[: size - begin]


async def serve(port: int, size: int, identity: TlsIdentity) -> None:
    """The gateway's end, until it is killed."""
    settings = LinkSettings(role="gateway", ports=PORTS)

    async def serve_channels(connection: Connection) -> None:
        while True:
            async with await connection.accept(PROXY) as stream:
                with contextlib.suppress(Exception):
                    while True:
                        request = pb.ProxyOutgoingMessages.FromString(await stream.receive()).download_request
                        if request.request_id:
                            chunker = Chunker(request.request_id, request.offset, skip=request.offset)
                            await send_pieces(stream, chunker, chunks(size))

    async def on_link(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, peer: str) -> None:
        await Connection(reader, writer, settings, contexts("gateway", identity), peer=peer).run(serve_channels)

    async with running(Listener(f"127.0.0.1:{port}", on_link)):
        print("ready", flush=True)
        await asyncio.get_running_loop().create_future()


@contextlib.contextmanager
def gateway_end(identity: TlsIdentity, size: int) -> Iterator[tuple[int, int]]:
    """The process; its port and its number."""
    port = free_port()
    files = [str(identity.ca_file), identity.cert_url, identity.key_url]
    command = [sys.executable, "-m", "tests.benchmarks.mp_link", str(port), str(size), *files]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout and process.stdout.readline() == "ready\n"
            yield port, process.pid
        finally:
            process.kill()


@contextlib.asynccontextmanager
async def node_end(port: int, identity: TlsIdentity) -> AsyncIterator[DownloadClient]:
    """The node's end, connected."""
    link = NodeLink()
    link.node_id = "node"
    downloads = DownloadClient(link)
    clock = ClockSync(ClockSyncConfig(enabled=False), link, PORTS.cm_open)
    node = Node(LinkSettings(role="node", ports=PORTS), contexts("node", identity), link, clock, (downloads,), Status())
    async with running(Connector("gateway", partial(connected, f"127.0.0.1:{port}"), node.serve)):
        await until(lambda: link.is_up)
        yield downloads


async def link_rate(downloads: DownloadClient, size: int, *, digest: bool) -> float:
    """MB/s of a blob over the link; with `digest` it is hashed as it comes, in a thread, as the store does."""
    begin = time.perf_counter()
    hasher = hashlib.sha256()
    count = 0
    waiting: list[bytes] = []

    def add() -> None:
        for one in waiting:
            hasher.update(one)
        waiting.clear()

    async with Worker("hash") as worker, contextlib.aclosing(downloads.fetch("blob", 0)) as pieces:
        async for piece in pieces:
            count += len(piece)
            if digest:
                waiting.append(piece)
                if sum(map(len, waiting)) >= _TOGETHER_BYTES:
                    await worker.run(add)
        add()
    if count != size or (digest and hasher.hexdigest() != _digest(size)):
        raise RuntimeError(f"{count} bytes came, not the ones that were sent")
    return size / 1e6 / (time.perf_counter() - begin)


_digests: dict[int, str] = {}


def _digest(size: int) -> str:
    if size not in _digests:
        hasher = hashlib.sha256()
        for begin in range(0, size, len(_CHUNK)):
            hasher.update(_CHUNK[: size - begin])
        _digests[size] = hasher.hexdigest()
    return _digests[size]


if __name__ == "__main__":
    expect_much_through_few_objects()
    number, length, ca, cert, key = sys.argv[1:]
    asyncio.run(serve(int(number), int(length), TlsIdentity(Path(ca), cert, key)))
