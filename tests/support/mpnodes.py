"""Many nodes at one gateway: the node's end of the link, without servers for a local SM and IAM, in this process."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from functools import partial

from aoscore._pb.servicemanager.v5 import servicemanager_pb2 as pb
from aoscore.mp.clock import ClockSync
from aoscore.mp.cmclient.calls import GET_BLOBS_INFOS
from aoscore.mp.communication.connection import ChannelClosedError, LinkSettings, Stream
from aoscore.mp.communication.connector import Connector
from aoscore.mp.communication.sockets import connected
from aoscore.mp.config import ClockSyncConfig
from aoscore.mp.node import Node
from aoscore.mp.nodeserver.calls import CallClient
from aoscore.mp.nodeserver.downloads import DownloadClient
from aoscore.mp.nodeserver.link import NodeLink
from aoscore.mp.status import Status
from tests.support.links import PORTS, contexts
from tests.support.mpbed import MpBed
from tests.support.running import running


class NodeEnd:
    """One node of `bed`. Make it with `node_end`."""

    def __init__(self, bed: MpBed, node_id: str) -> None:
        self.node_id = node_id
        self.link = NodeLink()
        self.link.node_id = node_id
        self.calls, self.downloads = CallClient(self.link), DownloadClient(self.link)
        clock = ClockSync(ClockSyncConfig(enabled=False), self.link, PORTS.cm_open)
        settings = LinkSettings(role="node", ports=PORTS)
        certificates = contexts("node", bed.identity(f"{node_id}-sm"))
        end = Node(settings, certificates, self.link, clock, (self.calls, self.downloads), Status())
        address = f"127.0.0.1:{bed.gateway_port}"
        self.connector = Connector("main", partial(connected, address), end.serve)
        self.sm: Stream | None = None
        """The channel of its SM, registered."""

    async def send(self, **member: object) -> None:
        """A message of its SM."""
        assert self.sm is not None
        await self.sm.send(pb.SMOutgoingMessages(**member).SerializeToString())

    async def receive(self) -> pb.SMIncomingMessages:
        """The next message to its SM."""
        assert self.sm is not None
        return pb.SMIncomingMessages.FromString(await self.sm.receive())

    async def url(self, digest: str) -> str:
        """Where CM offers a blob."""
        request = pb.BlobsInfosRequest(digests=[digest]).SerializeToString()
        return str(pb.BlobsInfos.FromString(await self.calls.call(GET_BLOBS_INFOS, request)).urls[0])

    async def fetch(self, digest: str) -> bytes:
        """Content of a blob, through the link."""
        content = bytearray()
        async with contextlib.aclosing(self.downloads.fetch(await self.url(digest), 0)) as pieces:
            async for piece in pieces:
                content += piece
        return bytes(content)


async def _sm_channel(link: NodeLink) -> Stream:
    """Tries until the link is up and the gateway has its certificate, as an SM does."""
    async with asyncio.timeout(30):
        while True:
            try:
                return await link.connect(PORTS.cm_secure)
            except ChannelClosedError:
                await asyncio.sleep(0.1)


@contextlib.asynccontextmanager
async def node_end(bed: MpBed, node_id: str) -> AsyncIterator[NodeEnd]:
    """A node whose SM is registered at CM, for the length of the block."""
    end = NodeEnd(bed, node_id)
    async with running(end.connector):
        async with await _sm_channel(end.link) as end.sm:
            await end.send(sm_info=pb.SMInfo(node_id=node_id))
            await end.send(node_instances_status=pb.NodeInstancesStatus())
            async with asyncio.timeout(30):
                while not any(
                    one.frames and one.frames[0].sm_info.node_id == node_id and not one.ended.is_set()
                    for one in bed.cm.connections
                ):
                    await asyncio.sleep(0.01)
            yield end
