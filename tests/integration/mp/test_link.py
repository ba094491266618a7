"""A Secondary Node's SM and IAM reach CM and main IAM through two MP processes: over one TCP port, or over Xen vchan.

vchan is the real libxenvchan over stand-ins for the devices of Xen.
"""

import asyncio
import contextlib
import gzip
import hashlib
import os
import random
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from aoscore._pb.common.v2 import common_pb2 as common
from aoscore._pb.iamanager.v6 import iamanager_pb2 as iam_pb
from aoscore._pb.iamanager.v6 import iamanager_pb2_grpc as iam_stubs
from aoscore._pb.servicemanager.v5 import network_pb2 as net
from aoscore._pb.servicemanager.v5 import servicemanager_pb2 as pb
from aoscore._pb.transport.v1 import transport_pb2 as transport_pb
from aoscore.common.aio import Backoff, Worker
from aoscore.common.download import Downloader
from aoscore.common.http import open_stream
from aoscore.mp.communication.frames import encode_frame, encode_message
from tests.support.mpbed import NODE_ID, MpBed
from tests.support.running import until
from tests.support.sm import TestSm

KILLS = int(os.environ.get("AOSCORE_MP_KILLS", "6"))
"""How often an MP is killed under traffic: 100 take two minutes."""


@pytest.fixture
def tcp_bed(tmp_path: Path) -> MpBed:
    return MpBed(tmp_path)


@pytest.fixture(params=["tcp", "vchan"])
def bed(request: pytest.FixtureRequest, tmp_path: Path) -> MpBed:
    return MpBed(tmp_path, request.getfixturevalue("xen") if request.param == "vchan" else None)


@contextlib.asynccontextmanager
async def sm_on(bed: MpBed, sm: TestSm | None = None) -> AsyncIterator[TestSm]:
    """The node's SM, registered at CM; tries until it is, as an SM does.

    The limit is longer than the longest pause between two attempts of a node to reach its gateway: after several
    in vain, while a machine under load starts a process, it waits for half a minute.
    """
    sm = sm or TestSm(NODE_ID)
    end = asyncio.get_running_loop().time() + 90
    while True:
        before = len(bed.cm.connections)
        async with sm.connected(bed.sm_port, bed.identity("second-sm")):
            ended = asyncio.create_task(sm.ended.wait())
            registered = asyncio.create_task(
                bed.cm.wait(
                    # Any of them: a stream that broke after its first message is not the one.
                    lambda cm, before=before: any(
                        len(one.frames) >= 2 and not one.ended.is_set() for one in cm.connections[before:]
                    ),
                    30,
                )
            )
            await asyncio.wait({ended, registered}, return_when=asyncio.FIRST_COMPLETED)
            # A stream that has ended on this side may not have ended at CM yet.
            if not sm.ended.is_set():
                ended.cancel()
                await registered
                yield sm
                return
            registered.cancel()
            await asyncio.gather(registered, return_exceptions=True)
        assert asyncio.get_running_loop().time() < end, bed.logs()
        await asyncio.sleep(0.2)


async def stay_registered(bed: MpBed, sm: TestSm) -> None:
    """As an SM does: again whenever it is cut off."""
    while True:
        async with sm.connected(bed.sm_port, bed.identity("second-sm")):
            await sm.ended.wait()
        await asyncio.sleep(0.1)


async def heard(bed: MpBed, sm: TestSm) -> None:
    """CM hears of the SM what it says from now on."""
    alert = pb.Alert(core_alert=pb.CoreAlert(core_component="SM", message="still here"))
    async with asyncio.timeout(60):
        while not any("alert" in one.kinds() for one in bed.cm.connections):
            sm.send(alert=alert)
            await asyncio.sleep(0.2)


async def get(url: str, *, timeout_s: float = 30, headers: dict[str, str] | None = None) -> tuple[int, bytes]:
    """Fetch a blob as an SM does."""
    body = bytearray()
    async with open_stream("GET", url, timeout_s=timeout_s, headers=headers) as stream:
        async for chunk in stream.chunks(timeout_s):
            body += chunk
        return stream.status, bytes(body)


def put(bed: MpBed, size: int) -> tuple[str, bytes]:
    """A blob that CM offers; its digest and content."""
    content = os.urandom(size)
    return bed.blobs.put(content), content


async def test_sm_registers_and_talks_both_ways(bed: MpBed) -> None:
    async with bed.both(), sm_on(bed) as sm:
        connection = bed.cm.connections[-1]
        assert connection.kinds()[:2] == ["sm_info", "node_instances_status"]
        assert connection.frames[0].sm_info.node_id == NODE_ID
        bed.cm.send(get_node_config_status=pb.GetNodeConfigStatus())
        await bed.cm.frame("node_config_status")
        sm.send(alert=pb.Alert(core_alert=pb.CoreAlert(core_component="SM", message="hello")))
        assert (await bed.cm.frame("alert")).core_alert.message == "hello"
        packed = gzip.compress(os.urandom(256 * 1024))
        sm.send(log=pb.LogData(correlation_id="1", data=packed, part=1, part_count=1, status="ok"))
        assert (await bed.cm.frame("log")).data == packed
        sm.send(log=pb.LogData(correlation_id="2", data=b"text", part=1, part_count=1, status="ok"))
        await bed.cm.wait(lambda cm: cm.connections[-1].kinds().count("log") == 2)
        assert gzip.decompress(bed.cm.connections[-1].frames[-1].log.data) == b"text"


async def test_calls_beside_the_stream(bed: MpBed) -> None:
    async with bed.both(), sm_on(bed) as sm:
        await bed.cm.wait(lambda cm: f"SubscribeInstanceNetworkUpdates {NODE_ID}" in cm.calls)
        assert "SyncNetworkState" in bed.cm.calls
        answer = await sm.networks.GetNodeNetworkParams(
            net.GetNodeNetworkParamsRequest(network_id="n", node_id=NODE_ID), timeout=10
        )
        assert (answer.ip, answer.vlan_id) == ("172.31.0.1", 5)
        refused = await sm.networks.AllocateInstanceNetwork(
            net.AllocateInstanceNetworkRequest(
                instance=common.InstanceIdent(item_id="refused"), network_id="n", node_id=NODE_ID
            ),
            timeout=10,
        )
        assert refused.error.message == "no address left"
        update = net.InstanceNetworkUpdateNotification(pending_firewall_update=net.PendingFirewallUpdate())
        bed.cm.network_updates.put_nowait(update)
        await sm.wait(lambda one: one.network_updates)
        assert sm.network_updates == [update]
        bed.cm.unknown.add("sha256:" + "0" * 64)
        with pytest.raises(grpc.aio.AioRpcError, match="not found"):
            await sm.blobs.GetBlobsInfos(pb.BlobsInfosRequest(digests=["sha256:" + "0" * 64]), timeout=10)


async def test_a_node_speaks_for_itself_only(bed: MpBed) -> None:
    async with bed.both(), sm_on(bed) as sm:
        request = net.GetNodeNetworkParamsRequest(network_id="n", node_id="other")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await sm.networks.GetNodeNetworkParams(request, timeout=10)
        assert caught.value.code() == grpc.StatusCode.PERMISSION_DENIED
        assert not [call for call in bed.cm.calls if call.startswith("GetNodeNetworkParams")]


@pytest.mark.parametrize("size", [0, 1, 15_360, 15_361, 5_000_000])
async def test_blob_comes_through_the_link(bed: MpBed, size: int) -> None:
    async with bed.both(), sm_on(bed) as sm:
        digest, content = put(bed, size)
        answer = await sm.blobs.GetBlobsInfos(pb.BlobsInfosRequest(digests=[digest]), timeout=10)
        assert list(answer.urls) == [bed.blob_url(digest)]
        assert await get(answer.urls[0]) == (200, content)
        # Now it is in the store, and parts of it can be had.
        if size > 1:
            assert await get(answer.urls[0], headers={"Range": "bytes=1-"}) == (206, content[1:])
        assert (bed.root / "node/images/blobs/sha256" / digest.removeprefix("sha256:")).read_bytes() == content


async def test_status_is_told_to_whoever_asks(bed: MpBed) -> None:
    async def ask() -> tuple[int | None, str]:
        words = [sys.executable, "-c", "from aoscore.mp.app import main; main()", "-c", str(bed.root / "gateway.cfg")]
        one = await asyncio.create_subprocess_exec(*words, "--status", "-v", "error", stdout=asyncio.subprocess.PIPE)
        output, _ = await one.communicate()
        return one.returncode, output.decode()

    async with bed.both(), sm_on(bed):
        code, output = await ask()
        assert code == 0
        (line,) = output.splitlines()
        assert f"nodeID={NODE_ID}" in line and "refused=0" in line
    code, output = await ask()
    assert code == 70 and "no MP answers" in output


async def test_wrong_content_is_never_whole(bed: MpBed) -> None:
    async with bed.both(), sm_on(bed):
        digest, _ = put(bed, 100_000)
        (bed.blobs.directory / digest.removeprefix("sha256:")).write_bytes(os.urandom(100_000))
        with pytest.raises(Exception, match="cut"):
            await get(bed.blob_url(digest))
        assert list((bed.root / "node/images/tmp").iterdir()) == []
        status, _ = await get(f"http://127.0.0.1:{bed.blob_port}/etc/passwd")
        assert status == 404


async def test_cut_link_is_seen_by_both_sides_and_heals(tcp_bed: MpBed) -> None:
    sm = TestSm(NODE_ID)
    async with tcp_bed.both():
        async with sm_on(tcp_bed, sm):
            ended = asyncio.create_task(tcp_bed.cm.connections[-1].ended.wait())
            tcp_bed.wire.cut()
            await asyncio.wait_for(sm.ended.wait(), 10)
            await asyncio.wait_for(ended, 10)
        async with sm_on(tcp_bed, sm):
            tcp_bed.cm.send(get_node_config_status=pb.GetNodeConfigStatus())
            await tcp_bed.cm.frame("node_config_status")


async def test_download_goes_on_after_a_cut(tcp_bed: MpBed) -> None:
    size = 30_000_000
    async with tcp_bed.both():
        sm = TestSm(NODE_ID)
        async with sm_on(tcp_bed, sm):
            digest, content = put(tcp_bed, size)
            url = tcp_bed.blob_url(digest)
            download = asyncio.create_task(get(url, timeout_s=60))
            before = tcp_bed.wire.passed_bytes
            await until(lambda: tcp_bed.wire.passed_bytes - before > size // 3)
            tcp_bed.wire.cut()
        async with sm_on(tcp_bed, sm):
            status, body = await download
        assert status == 200
        assert hashlib.sha256(body).digest() == hashlib.sha256(content).digest()
        # What had come before the cut did not come again: less than a third more than the file.
        assert tcp_bed.wire.passed_bytes - before < size * 4 // 3


async def test_damage_on_the_way_is_caught(tcp_bed: MpBed) -> None:
    size = 10_000_000
    async with tcp_bed.both():
        sm = TestSm(NODE_ID)
        async with sm_on(tcp_bed, sm):
            digest, content = put(tcp_bed, size)
            url = tcp_bed.blob_url(digest)
            tcp_bed.wire.spoil_after_bytes = tcp_bed.wire.passed_bytes + size // 2
            status, body = await get(url, timeout_s=60)
            assert (status, body == content) == (200, True)
            assert tcp_bed.wire.spoil_after_bytes is None
    assert "Frame is damaged" in tcp_bed.logs()


@pytest.mark.timeout(180)
async def test_blob_comes_over_a_bad_wire(tcp_bed: MpBed) -> None:
    """Slow, cut again and again, with a bit flipped now and then: all at once, and the SM is still heard."""
    chance = random.Random(5)
    bed, sm = tcp_bed, TestSm(NODE_ID)
    digest, content = put(bed, 12_000_000)
    target = bed.root / "downloaded"
    async with bed.both(), Worker("download") as worker:
        registered = asyncio.create_task(stay_registered(bed, sm))
        await until(lambda: bed.cm.connections and bed.cm.connections[-1].frames, 40)
        bed.wire.delay_s = 0.01
        bed.wire.spoil_every_bytes = 3_000_000
        bed.wire.spoil_after_bytes = bed.wire.passed_bytes + 1_000_000
        downloader = Downloader(worker, attempts=1000, backoff=lambda: Backoff(0.2, 0.5))
        download = asyncio.create_task(downloader.download(bed.blob_url(digest), target))
        for _ in range(3):
            before = bed.wire.passed_bytes
            await until(lambda before=before: download.done() or bed.wire.passed_bytes - before > 2_000_000, 60)
            await asyncio.sleep(chance.uniform(0, 0.1))
            bed.wire.cut()
        await asyncio.wait_for(download, 120)
        assert await worker.run(target.read_bytes) == content
        assert bed.wire.spoiled >= 2 and bed.wire.connections >= 4
        await heard(bed, sm)
        registered.cancel()
        await asyncio.gather(registered, return_exceptions=True)
    assert "Frame is damaged" in bed.logs()


async def test_flood_of_strangers_holds_up_nobody(tcp_bed: MpBed) -> None:
    """Garbage, halves of frames, frames for unknown channels, questions without end: beside a node at work."""
    bed = tcp_bed
    async with bed.both(), sm_on(bed) as sm:
        digest, content = put(bed, 8_000_000)
        strangers = [asyncio.create_task(stranger(bed.gateway_port, kind)) for kind in range(4) for _ in range(3)]
        assert await get(bed.blob_url(digest), timeout_s=60) == (200, content)
        for number in range(5):
            sm.send(alert=pb.Alert(core_alert=pb.CoreAlert(core_component="SM", message=f"hello {number}")))
            await bed.cm.wait(lambda cm, text=f"hello {number}": text in str(cm.connections[-1].frames[-1]), 30)
        for task in strangers:
            task.cancel()
        await asyncio.gather(*strangers, return_exceptions=True)
        assert len(bed.cm.connections) == 1
        assert bed.gateway is not None and bed.gateway.process.returncode is None


async def stranger(port: int, kind: int) -> None:
    """Somebody who has no certificate and much to say, until the gateway has enough, and again."""
    rng = random.Random(kind)
    hello = transport_pb.Control(
        hello=transport_pb.Hello(protocol=1, role="node", max_frame=65536, ports=[16, 3, 1, 2, 4, 17, 18])
    )
    ask = pb.ProxyOutgoingMessages(clock_sync_request=pb.ClockSyncRequest()).SerializeToString()
    talk = [
        lambda: rng.randbytes(4096),
        lambda: encode_frame(3, bytes(1000))[:500],
        lambda: encode_frame(77, bytes(60_000)),
        lambda: encode_frame(3, encode_message(ask)) * 50,
    ][kind]
    while True:
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                if kind >= 2:
                    writer.write(encode_frame(16, encode_message(hello.SerializeToString())))
                while not writer.transport.is_closing():
                    writer.write(talk())
                    await writer.drain()
                    await asyncio.sleep(0.001)
            finally:
                writer.transport.abort()
        await asyncio.sleep(0.05)


@pytest.mark.parametrize("victim", ["gateway", "node"])
async def test_killed_mp_comes_back(bed: MpBed, victim: str) -> None:
    sm = TestSm(NODE_ID)
    async with bed.running(), contextlib.AsyncExitStack() as stack:
        runs: dict[str, Any] = {"gateway": bed.run_gateway, "node": bed.run_node}
        processes = {name: await stack.enter_async_context(run()) for name, run in runs.items()}
        async with sm_on(bed, sm):
            await bed.kill(processes[victim])
            await asyncio.wait_for(sm.ended.wait(), 20)
        await stack.enter_async_context(runs[victim]())
        async with sm_on(bed, sm):
            digest, content = put(bed, 100_000)
            url = bed.blob_url(digest)
            assert await get(url) == (200, content)


@pytest.mark.timeout(180 + 10 * KILLS)
async def test_killed_again_and_again_under_traffic(bed: MpBed) -> None:
    """Either MP dies at any moment while a blob is on its way; the SM and its download come through."""
    chance = random.Random(7)
    sm = TestSm(NODE_ID)
    digest, content = put(bed, 40_000_000)
    target = bed.root / "downloaded"
    url = bed.blob_url(digest)

    async with bed.running(), contextlib.AsyncExitStack() as stack:
        runs: dict[str, Any] = {"gateway": bed.run_gateway, "node": bed.run_node}
        processes = {name: await stack.enter_async_context(run()) for name, run in runs.items()}
        registered = asyncio.create_task(stay_registered(bed, sm))
        worker = await stack.enter_async_context(Worker("download"))
        # As an SM does: until it has it.
        downloader = Downloader(worker, attempts=1000, backoff=lambda: Backoff(0.2, 0.5))
        download = asyncio.create_task(downloader.download(url, target))
        for _ in range(KILLS):
            await asyncio.sleep(chance.uniform(0.2, 1.5))
            victim = chance.choice(["gateway", "node"])
            await bed.kill(processes[victim])
            processes[victim] = await stack.enter_async_context(runs[victim]())
            if download.done():
                # Killed at every stage: then the same once more.
                await download
                assert await worker.run(target.read_bytes) == content
                digest, content = put(bed, 40_000_000)
                download = asyncio.create_task(downloader.download(bed.blob_url(digest), target))
        await asyncio.wait_for(download, 90)
        assert await worker.run(target.read_bytes) == content
        await heard(bed, sm)
        registered.cancel()
        await asyncio.gather(registered, return_exceptions=True)


async def test_cm_restarts(bed: MpBed) -> None:
    sm = TestSm(NODE_ID)
    async with bed.both():
        async with sm_on(bed, sm):
            bed.cm.drop()
            await asyncio.wait_for(sm.ended.wait(), 10)
        async with sm_on(bed, sm):
            pass


async def test_renewed_certificates_are_used(tcp_bed: MpBed, monkeypatch: pytest.MonkeyPatch) -> None:
    sm = TestSm(NODE_ID)
    async with tcp_bed.both():
        async with sm_on(tcp_bed, sm):
            tcp_bed.node_iam.renew(tcp_bed.certificate("sm", "second-sm-renewed"))
            # Ten seconds later, so that the answer to "apply certificate" gets through first.
            await asyncio.wait_for(sm.ended.wait(), 25)
        async with sm_on(tcp_bed, sm):
            assert "the certificate was renewed" in tcp_bed.logs()
            assert "second-sm-renewed" in tcp_bed.logs()


async def test_iam_registers_while_provisioning(bed: MpBed) -> None:
    async with bed.both(provisioning=True), bed.iam_channel(bed.iam_open_port, secure=False) as channel:
        await _register(channel, bed.plain_nodes, "unprovisioned", bed)


async def test_iam_registers_when_provisioned(bed: MpBed) -> None:
    async with bed.both(), bed.iam_channel(bed.iam_secure_port, secure=True) as channel:
        await _register(channel, bed.secure_nodes, "provisioned", bed)


async def test_new_node_joins_a_provisioned_unit(bed: MpBed) -> None:
    """The gateway is in normal mode; the new node is not."""
    async with bed.running(), bed.run_gateway(), bed.run_node(provisioning=True):
        await until(lambda: "Link is up" in bed.logs())
        async with bed.iam_channel(bed.iam_open_port, secure=False) as channel:
            await _register(channel, bed.open_nodes, "unprovisioned", bed)


async def test_open_channel_takes_no_provisioned_node(bed: MpBed) -> None:
    async with bed.both(provisioning=True), bed.iam_channel(bed.iam_open_port, secure=False) as channel:
        call: Any = iam_stubs.IAMPublicNodesServiceStub(channel).RegisterNode()
        info = iam_pb.NodeInfo(node_id=NODE_ID, state="provisioned")
        await call.write(iam_pb.IAMOutgoingMessages(node_info=info))
        await until(lambda: "Not allowed on the open channel" in bed.logs())
        assert bed.plain_nodes.streams == []


async def _register(channel: grpc.aio.Channel, nodes: Any, state: str, bed: MpBed) -> None:
    """Register as a node's IAM does, be asked something, answer it, leave."""
    info = iam_pb.NodeInfo(node_id=NODE_ID, state=state)
    call: Any = iam_stubs.IAMPublicNodesServiceStub(channel).RegisterNode(wait_for_ready=True)
    await call.write(iam_pb.IAMOutgoingMessages(node_info=info))
    try:
        await until(lambda: nodes.streams and nodes.streams[-1].messages, 30)
    except TimeoutError:
        raise AssertionError(bed.logs()) from None
    (stream,) = nodes.streams
    assert stream.messages[0].node_info == info
    stream.outbox.put_nowait(iam_pb.IAMIncomingMessages(get_cert_types_request=iam_pb.GetCertTypesRequest()))
    request = await call.read()
    assert request.WhichOneof("IAMIncomingMessage") == "get_cert_types_request"
    answer = iam_pb.IAMOutgoingMessages(cert_types_response=iam_pb.CertTypes(types=["iam", "sm"]))
    await call.write(answer)
    await until(lambda: len(stream.messages) == 2)
    assert stream.messages[1] == answer
    call.cancel()
    await until(lambda: stream.is_over)
