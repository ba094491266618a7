"""A peer of the older kind at a gateway: the sequence of the Zephyr application, a CM and an IAM of its time behind."""

import asyncio
import contextlib
import gzip
import hashlib
import ssl
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from aoscore._pb.iamanager.v5 import iamanager_pb2 as iam
from aoscore._pb.iamanager.v5 import iamanager_pb2_grpc as iam_stubs
from aoscore._pb.iamanager.v6 import iamanager_pb2 as v6
from aoscore._pb.servicemanager.v4 import servicemanager_pb2 as pb
from aoscore._pb.servicemanager.v4 import servicemanager_pb2_grpc as sm_stubs
from aoscore._pb.transport.v1 import transport_pb2 as transport_pb
from aoscore.common.fileserver import FileServer
from aoscore.common.tls import grpc_server_credentials
from aoscore.mp.communication.frames import encode_frame, encode_message
from tests.support.mpbed import MainNodes, MpBed, Registration
from tests.support.oldimages import ServiceImage
from tests.support.oldpeer import OldChannel, OldPeer, old_peer
from tests.support.running import running, until

NODE = "zephyr"
CLOCK = pb.SMOutgoingMessages(clock_sync_request=pb.ClockSyncRequest()).SerializeToString()
STATUS = pb.NodeConfigStatus(node_id=NODE, node_type="dom0", version="1.0.0")


Registered = tuple[OldChannel, Registration]


class OldUnit:
    """A gateway between main IAM and CM of the older kind, in this process, and whoever connects to it."""

    def __init__(self, bed: MpBed) -> None:
        self.bed = bed
        server = bed.identity("old-server")
        add_iam = iam_stubs.add_IAMPublicNodesServiceServicer_to_server
        self.open_nodes = MainNodes(partial(grpc_server_credentials, lambda: server, require_client=False), add_iam)
        self.plain_nodes = MainNodes(None, add_iam)
        self.secure_nodes = MainNodes(partial(grpc_server_credentials, lambda: server), add_iam)
        self.cm = MainNodes(partial(grpc_server_credentials, lambda: server), sm_stubs.add_SMServiceServicer_to_server)
        self.files = FileServer("127.0.0.1:0", lambda path: bed.root / "archives" / path.rpartition("/")[2])
        (bed.root / "archives").mkdir()

    @contextlib.asynccontextmanager
    async def running(self, *, provisioning: bool = False, **changes: Any) -> AsyncIterator["OldUnit"]:
        servers = [one.server for one in (self.open_nodes, self.plain_nodes, self.secure_nodes, self.cm)]
        async with self.bed.main_iam.running(), running(*servers, self.files):
            public = self.plain_nodes if provisioning else self.open_nodes
            settings = {
                "iamConfig": {
                    "iamPublicServerUrl": f"127.0.0.1:{self.bed.main_iam.public_port}",
                    "iamMainPublicServerUrl": f"127.0.0.1:{public.server.port}",
                    "iamMainProtectedServerUrl": f"127.0.0.1:{self.secure_nodes.server.port}",
                },
                "cmConfig": {"cmServerUrl": f"127.0.0.1:{self.cm.server.port}"},
                "images": {"minFreeSpace": 0},
                **changes,
            }
            async with self.bed.run_gateway(provisioning=provisioning, **settings):
                yield self

    def peer(self) -> contextlib.AbstractAsyncContextManager[OldPeer]:
        """A node connects."""
        return old_peer(self.bed.gateway_port)

    @contextlib.asynccontextmanager
    async def sm(
        self, version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_2
    ) -> AsyncIterator[tuple[OldChannel, Registration]]:
        """A node whose clock is set and whose SM is registered, and its stream at CM."""
        async with self.peer() as peer:
            await clock(peer)
            before = len(self.cm.streams)
            channel = await secure(peer, self.bed, 4, version)
            channel.send(pb.SMOutgoingMessages(node_config_status=STATUS).SerializeToString())
            await until(lambda: len(self.cm.streams) > before and self.cm.streams[-1].messages, 30)
            yield channel, self.cm.streams[-1]

    def offer(self, name: str, archive: bytes) -> pb.ServiceInfo:
        """CM has an archive to offer."""
        (self.bed.root / "archives" / name).write_bytes(archive)
        url = f"http://127.0.0.1:{self.files.port}/{name}"
        return pb.ServiceInfo(service_id=name, url=url, sha256=hashlib.sha256(archive).digest(), size=len(archive))


@pytest.fixture
def unit(tmp_path: Path) -> OldUnit:
    return OldUnit(MpBed(tmp_path))


async def clock(peer: OldPeer) -> None:
    """Ask for the time, as the node does first."""
    peer.send(3, CLOCK)
    answer = pb.SMIncomingMessages.FromString(await peer.receive(3))
    assert answer.clock_sync.current_time.seconds > 1_700_000_000


async def secure(peer: OldPeer, bed: MpBed, port: int, version: ssl.TLSVersion) -> OldChannel:
    """Open a secure channel; the gateway may not have its own certificate yet."""
    async with asyncio.timeout(30):
        while True:
            try:
                return await peer.secure(port, bed.identity(f"{NODE}-node"), version=version)
            except ssl.SSLError as error:
                assert "INTERNAL_ERROR" in str(error), error
                await asyncio.sleep(0.1)


async def received(channel: OldChannel) -> pb.SMIncomingMessages:
    """The next message for the SM."""
    return pb.SMIncomingMessages.FromString(await channel.receive())


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_sm_talks_both_ways(unit: OldUnit, version: ssl.TLSVersion) -> None:
    async with unit.running(), unit.sm(version) as (channel, stream):
        status = pb.SMOutgoingMessages(run_instances_status=pb.RunInstancesStatus())
        channel.send(status.SerializeToString())
        await until(lambda: len(stream.messages) == 2)
        assert stream.messages == [pb.SMOutgoingMessages(node_config_status=STATUS), status]
        order = pb.SMIncomingMessages(set_node_config=pb.SetNodeConfig(node_config="{}", version="2.0.0"))
        # Longer than the node can read in one go: told of and not sent; what comes after it is.
        stream.outbox.put_nowait(pb.SMIncomingMessages(set_node_config=pb.SetNodeConfig(node_config="x" * 17_000)))
        stream.outbox.put_nowait(order)
        assert await received(channel) == order
        await until(lambda: "is most" in unit.bed.logs())


async def test_lost_cm_ends_the_channel_and_the_node_begins_again(unit: OldUnit) -> None:
    async with unit.running(), unit.peer() as peer:
        await clock(peer)
        for count in (1, 2):
            channel = await secure(peer, unit.bed, 4, ssl.TLSVersion.TLSv1_2)
            channel.send(pb.SMOutgoingMessages(node_config_status=STATUS).SerializeToString())
            await until(lambda count=count: len(unit.cm.streams) == count, 30)
            unit.cm.streams[-1].outbox.put_nowait(None)
            assert await channel.receive() == b""
        assert not peer.is_over.is_set()


async def test_provisioning(unit: OldUnit) -> None:
    async with unit.running(provisioning=True), unit.peer() as peer:
        await clock(peer)
        info = iam.NodeInfo(node_id=NODE, status="unprovisioned")
        peer.send(1, iam.IAMOutgoingMessages(node_info=info).SerializeToString())
        await until(lambda: unit.plain_nodes.streams and unit.plain_nodes.streams[0].messages, 30)
        stream = unit.plain_nodes.streams[0]
        question = iam.IAMIncomingMessages(get_cert_types_request=iam.GetCertTypesRequest(node_id=NODE))
        stream.outbox.put_nowait(question)
        assert iam.IAMIncomingMessages.FromString(await peer.receive(1)) == question
        answer = iam.IAMOutgoingMessages(cert_types_response=iam.CertTypes(types=["iam", "sm"]))
        peer.send(1, answer.SerializeToString())
        # What has no business on the open channel stays there.
        peer.send(
            1, iam.IAMOutgoingMessages(node_info=iam.NodeInfo(node_id=NODE, status="provisioned")).SerializeToString()
        )
        peer.send(1, iam.IAMOutgoingMessages(pause_node_response=iam.PauseNodeResponse()).SerializeToString())
        peer.send(1, answer.SerializeToString())
        await until(lambda: len(stream.messages) == 3)
        assert stream.messages[1:] == [answer, answer]
        # IAM restarts: the node says only once who it is, so it has to connect anew.
        stream.outbox.put_nowait(None)
        await asyncio.wait_for(peer.is_over.wait(), 20)


async def test_provisioned_node_registers(unit: OldUnit) -> None:
    async with unit.running(), unit.peer() as peer:
        await clock(peer)
        channel = await secure(peer, unit.bed, 2, ssl.TLSVersion.TLSv1_2)
        info = iam.IAMOutgoingMessages(node_info=iam.NodeInfo(node_id=NODE, status="provisioned"))
        channel.send(info.SerializeToString())
        await until(lambda: unit.secure_nodes.streams and unit.secure_nodes.streams[0].messages, 30)
        assert unit.secure_nodes.streams[0].messages == [info]


async def test_image_of_a_service(unit: OldUnit) -> None:
    files = {"bin/app": bytes(range(256)) * 20, "empty": b"", "whole": bytes(2048)}
    async with unit.running(), unit.sm() as (channel, stream):
        service = unit.offer("service", ServiceImage(files).pack())
        run = pb.SMIncomingMessages(run_instances=pb.RunInstances(services=[service]))
        stream.outbox.put_nowait(run)
        assert await received(channel) == run
        request = pb.ImageContentRequest(url=service.url, request_id=7, content_type="service")
        channel.send(pb.SMOutgoingMessages(image_content_request=request).SerializeToString())
        info = (await received(channel)).image_content_info
        assert (info.request_id, info.error.message) == (7, "")
        contents: dict[str, bytes] = {}
        for file in info.image_files:
            parts = max(1, -(-file.size // 1024))
            contents[file.relative_path] = b""
            for part in range(1, parts + 1):
                content = (await received(channel)).image_content
                assert (content.relative_path, content.part, content.parts_count) == (file.relative_path, part, parts)
                contents[file.relative_path] += content.data
            assert hashlib.sha256(contents[file.relative_path]).digest() == file.sha256
        assert {path.rpartition("/")[2] for path in contents} >= {"manifest.json", "app", "empty", "whole"}
        assert next(text for path, text in contents.items() if path.endswith("bin/app")) == files["bin/app"]
        # Nothing of it stays.
        for directory in ("downloads", "images"):
            await until(lambda directory=directory: not list((unit.bed.root / "gateway" / directory).glob("request-*")))
        assert len(stream.messages) == 1


async def test_images_that_are_refused(unit: OldUnit) -> None:
    async with unit.running(), unit.sm() as (channel, stream):
        good = ServiceImage({"app": b"x"}).pack()
        wrong, large = unit.offer("wrong", good), unit.offer("large", good)
        (unit.bed.root / "archives" / "wrong").write_bytes(good[:-1] + b"?")
        (unit.bed.root / "archives" / "large").write_bytes(good + b"more")
        many = unit.offer("many", ServiceImage({f"file{number}": b"" for number in range(33)}).pack())
        absent = pb.ServiceInfo(url=f"http://127.0.0.1:{unit.files.port}/absent", sha256=bytes(32), size=5)
        run = pb.SMIncomingMessages(run_instances=pb.RunInstances(services=[wrong, large, many, absent]))
        stream.outbox.put_nowait(run)
        assert await received(channel) == run
        for number, (url, kind, text) in enumerate(
            [
                (wrong.url, "layer", "content type 'layer'"),
                ("file:///etc/passwd", "service", "was not offered"),
                (wrong.url, "service", "content of the archive is"),
                (large.url, "service", "were announced"),
                (many.url, "service", "files, 32 is most"),
                (absent.url, "service", "404"),
            ],
            1,
        ):
            request = pb.ImageContentRequest(url=url, request_id=number, content_type=kind)
            channel.send(pb.SMOutgoingMessages(image_content_request=request).SerializeToString())
            info = (await received(channel)).image_content_info
            assert info.request_id == number and info.error.aos_code
            assert text in info.error.message


async def test_logs_are_packed(unit: OldUnit) -> None:
    limits = {"logProvider": {"maxPartSize": 100, "maxPartCount": 3}}
    async with unit.running(**limits), unit.sm() as (channel, stream):
        for text in ("a" * 60, "b" * 60):
            channel.send(
                pb.SMOutgoingMessages(log=pb.LogData(log_id="1", data=text.encode(), status="ok")).SerializeToString()
            )
        channel.send(pb.SMOutgoingMessages(log=pb.LogData(log_id="1", status="empty")).SerializeToString())
        channel.send(pb.SMOutgoingMessages(log=pb.LogData(log_id="2", status="absent")).SerializeToString())
        await until(lambda: len(stream.messages) == 4)
        first, second, other = (message.log for message in stream.messages[1:])
        assert [gzip.decompress(one.data) for one in (first, second)] == [b"a" * 60, b"b" * 60]
        assert [(one.part, one.part_count, one.status) for one in (first, second)] == [(1, 2, "ok"), (2, 2, "ok")]
        assert (other.log_id, other.part, other.part_count, other.status) == ("2", 1, 1, "absent")


async def test_only_its_own_profile_gets_in(unit: OldUnit) -> None:
    hello = transport_pb.Control(hello=transport_pb.Hello(protocol=1, role="node", max_frame=65536, ports=[16, 3]))
    async with unit.running(profile="v5"), unit.peer() as peer:
        peer.send(3, CLOCK)
        await asyncio.wait_for(peer.is_over.wait(), 20)
    async with unit.running(profile="legacy"), unit.peer() as peer:
        # A newer node hears nothing on its control channel, and goes by itself.
        peer.writer.write(encode_frame(16, encode_message(hello.SerializeToString())))
        await clock(peer)


async def test_peer_that_mixes_the_interfaces_is_cut_off(unit: OldUnit) -> None:
    async with unit.running():
        async with unit.peer() as peer:
            peer.send(3, b"\x22\x00")
            await asyncio.wait_for(peer.is_over.wait(), 20)
        async with unit.peer() as peer:
            await clock(peer)
            channel = await secure(peer, unit.bed, 4, ssl.TLSVersion.TLSv1_2)
            channel.send(b"\x0a\x08\x0a\x06zephyr")
            await asyncio.wait_for(peer.is_over.wait(), 20)
        async with unit.peer() as peer:
            await clock(peer)
            channel = await secure(peer, unit.bed, 2, ssl.TLSVersion.TLSv1_2)
            info = v6.NodeInfo(node_id=NODE, max_dmips=1000, state="provisioned")
            channel.send(v6.IAMOutgoingMessages(node_info=info).SerializeToString())
            await asyncio.wait_for(peer.is_over.wait(), 20)
        assert not unit.cm.streams and not any(stream.messages for stream in unit.secure_nodes.streams)


async def test_rest_of_an_earlier_session_is_not_taken_for_a_new_one(unit: OldUnit) -> None:
    """What a node leaves in a ring that it attaches to again: the middle of a frame, then its first message."""
    frame = encode_frame(4, bytes(3000))
    async with unit.running():
        for rest in (frame[10:], frame[39:], frame[41:], frame[2000:]):
            async with unit.peer() as peer:
                peer.writer.write(rest)
                for _ in range(50):
                    peer.send(3, CLOCK)
                await asyncio.wait_for(peer.is_over.wait(), 40)
        async with unit.peer() as peer:
            await clock(peer)
