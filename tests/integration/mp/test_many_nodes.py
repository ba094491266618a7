"""Sixteen nodes at one gateway: each for itself, none in the way of the others."""

import asyncio
import contextlib
import os
import random
from pathlib import Path

import pytest

from aoscore._pb.servicemanager.v5 import servicemanager_pb2 as pb
from aoscore.mp.filechunker.downloads import MAX_REQUESTS
from tests.support.cm import Connection
from tests.support.mpbed import MpBed
from tests.support.mpnodes import NodeEnd, node_end
from tests.support.running import until

pytestmark = pytest.mark.timeout(180)
NODES = 16
BLOB_BYTES = 1_000_000
_GROWTH_MB = 40


def at_cm(bed: MpBed, node: NodeEnd) -> Connection:
    """Its stream as CM sees it."""
    return next(
        one for one in reversed(bed.cm.connections) if one.frames and one.frames[0].sm_info.node_id == node.node_id
    )


async def talk(bed: MpBed, node: NodeEnd, text: str) -> None:
    """CM asks the SM something, the SM answers."""
    stream = at_cm(bed, node)
    stream.outbox.put_nowait(pb.SMIncomingMessages(check_node_config=pb.CheckNodeConfig(version=text)))
    assert (await node.receive()).check_node_config.version == text
    await node.send(node_config_status=pb.NodeConfigStatus(version=text))
    await bed.cm.wait(lambda _: any(frame.node_config_status.version == text for frame in stream.frames), 60)


async def fetch_and_talk(bed: MpBed, node: NodeEnd, content: bytes) -> None:
    digest = bed.blobs.put(content)
    download = asyncio.create_task(node.fetch(digest))
    for number in range(3):
        await talk(bed, node, f"{node.node_id} {number}")
    assert await download == content


async def test_each_gets_its_own(tmp_path: Path) -> None:
    bed = MpBed(tmp_path)
    async with bed.running(), bed.run_gateway() as gateway, contextlib.AsyncExitStack() as stack:
        nodes = await asyncio.gather(
            *(stack.enter_async_context(node_end(bed, f"node-{number}")) for number in range(NODES - 1))
        )
        async with node_end(bed, "last") as last:
            works = (fetch_and_talk(bed, node, os.urandom(BLOB_BYTES)) for node in [*nodes, last])
            async with asyncio.timeout(120):
                await asyncio.gather(*works)
        await until(lambda: at_cm(bed, last).ended.is_set(), 60)
        assert not any(at_cm(bed, node).ended.is_set() for node in nodes)
        await asyncio.gather(*(talk(bed, node, f"{node.node_id} still here") for node in nodes))
        assert gateway.process.returncode is None


async def test_greedy_node_holds_up_nobody(tmp_path: Path) -> None:
    """One node asks for all it may, reads none of it, and sends garbage beside; the memory it takes is bounded."""
    bed = MpBed(tmp_path)
    async with bed.running(), bed.run_gateway() as gateway, contextlib.AsyncExitStack() as stack:
        greedy, *others = [await stack.enter_async_context(node_end(bed, f"node-{number}")) for number in range(4)]
        smaps = Path(f"/proc/{gateway.process.pid}/smaps_rollup")
        before = pss_mb(smaps)
        url = await greedy.url(bed.blobs.put(os.urandom(30_000_000)))
        connection = greedy.link.connection
        assert connection is not None
        proxy = await connection.connect(17)
        await proxy.send(pb.ProxyOutgoingMessages(node_id=greedy.node_id).SerializeToString())
        for number in range(2 * MAX_REQUESTS):
            request = pb.DownloadRequest(url=url, request_id=number + 1, offset=random.Random(number).randrange(1000))
            await proxy.send(pb.ProxyOutgoingMessages(download_request=request).SerializeToString())
        # The channel's buffer at the node is full now, and so is the link: nothing of it is read.
        for number in range(3):
            for node in others:
                await talk(bed, node, f"{node.node_id} {number}")
                content = os.urandom(BLOB_BYTES)
                assert await node.fetch(bed.blobs.put(content)) == content
        assert pss_mb(smaps) - before < _GROWTH_MB


def pss_mb(smaps: Path) -> float:
    """Memory of a process."""
    line = next(line for line in smaps.read_text().splitlines() if line.startswith("Pss:"))
    return int(line.split()[1]) / 1024
