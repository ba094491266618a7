"""A real CM between a cloud, an IAM process and a node: updates, going back, bad input, kill -9 at random moments."""

import asyncio
import contextlib
import json
import random
import signal
import sys
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from aoscore._pb.common.v2 import common_pb2 as common
from aoscore._pb.servicemanager.v5 import servicemanager_pb2 as pb
from aoscore.common.http import request
from aoscore.common.tls import TlsIdentity
from tests.support.iam import Iam
from tests.support.images import Image
from tests.support.pki import TestCa
from tests.support.sm import TestSm
from tests.support.unitbed import UnitBed, shown_items, unit_bed

pytestmark = pytest.mark.timeout(120)


def image(text: str) -> Image:
    return Image([text.encode() * 50_000, b"shared layer"])


A1, A2, A3, B1 = image("a1"), image("a2"), image("a3"), image("b1")


@pytest.fixture
async def bed(tmp_path: Path, iam: Iam) -> AsyncIterator[UnitBed]:
    async with unit_bed(tmp_path, iam) as opened:
        for each in (A1, A2, A3, B1):
            opened.blobs.publish(each)
        yield opened


async def deploy_first(bed: UnitBed) -> None:
    """Version 1 of item a runs."""
    await bed.cloud.connected()
    await bed.cloud.send_frame(bed.wish(("a", "1.0.0", A1)))
    await bed.full_status(lambda status: shown_items(status) == {"a 1.0.0": "installed"})
    assert bed.running == {"a": "1.0.0"}


async def test_deploy_update_remove(bed: UnitBed) -> None:
    await bed.start()
    await deploy_first(bed)
    status = bed.statuses()[-1]
    (group,) = status["instances"]
    (instance,) = group["instances"]
    assert (group["item"], group["version"]) == ({"id": "a", "type": "service"}, "1.0.0")
    assert (instance["node"], instance["state"]) == ({"codename": "node-1"}, "active")
    assert status["nodes"][0]["isConnected"] and status["subjects"] == [
        {"codename": "subject1"},
        {"codename": "subject2"},
    ]
    await bed.cloud.send_frame(bed.wish(("a", "2.0.0", A2), ("b", "1.0.0", B1)))
    await bed.full_status(lambda status: shown_items(status) == {"a 2.0.0": "installed", "b 1.0.0": "installed"})
    assert bed.running == {"a": "2.0.0", "b": "1.0.0"}
    await bed.cloud.send_frame(bed.wish())
    await bed.until(lambda: bed.items == {"a 2.0.0": "removed", "b 1.0.0": "removed"} and bed.phase == "none")
    await bed.until(lambda: bed.running == {} and bed.statuses()[-1]["items"] == bed.statuses()[-1]["instances"] == [])
    assert await bed.stop() == 0
    assert " [ERR] " not in bed.log().replace("Cloud connection lost", "")


async def test_killed_again_and_again_at_any_moment(bed: UnitBed) -> None:
    rng = random.Random(7)
    await bed.start()
    await deploy_first(bed)
    await bed.cloud.send_frame(bed.wish(("a", "2.0.0", A2), ("b", "1.0.0", B1)))
    for _ in range(6):
        await asyncio.sleep(rng.uniform(0.0, 0.25))
        await bed.kill()
        await bed.start()
        if bed.phase == "none" and "a 2.0.0" not in bed.items:
            await bed.cloud.connected()
            await bed.cloud.send_frame(bed.wish(("a", "2.0.0", A2), ("b", "1.0.0", B1)))
    await bed.until(lambda: bed.phase == "none" and bed.running == {"a": "2.0.0", "b": "1.0.0"})
    assert bed.items == {"a 2.0.0": "installed", "b 1.0.0": "installed"}


async def _hang(bed: UnitBed, phase: str, stack: contextlib.AsyncExitStack) -> dict[str, object]:
    """Have the step of a phase wait for somebody who says nothing; more members for the desired status."""
    if phase in ("pending", "finalizing"):
        await bed.stop()
        bed.extra = {"updateScheduler": {"sota": {"type": "trigger"}}} if phase == "pending" else {}
        await bed.start("hold" if phase == "finalizing" else "never")
        await bed.until(lambda: "Connected to the cloud" in bed.new_log() and "SM connected" in bed.new_log())
    match phase:
        case "downloading":
            server = await asyncio.start_server(_say_nothing, "127.0.0.1", 0)
            await stack.enter_async_context(server)
            port = server.sockets[0].getsockname()[1]
            bed.blobs.change(A2.layers[0], urls=(f"http://127.0.0.1:{port}/x",))
        case "installing":
            bed.sm.silent_about_config = True
            return {"unitConfig": {"version": "1.0.1", "nodes": [{"nodeGroupSubject": {"codename": "main"}}]}}
        case "launching":
            bed.sm.average = None
        case "activating":
            bed.sm.silent = True
    return {}


async def _say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()
    writer.close()


_WAITING = {
    "pending": "Update waits for its start",
    "finalizing": "Held at the end of an update",
}
"""What CM says when the step of a phase has begun to wait; elsewhere its node hears of it."""


@pytest.mark.parametrize("phase", ["downloading", "pending", "installing", "launching", "activating", "finalizing"])
async def test_a_newer_wish_breaks_off_what_waits(bed: UnitBed, phase: str) -> None:
    """Each of these steps would wait for five seconds or more; a newer wish is followed at once."""
    await bed.start()
    await deploy_first(bed)
    loop = asyncio.get_running_loop()
    async with contextlib.AsyncExitStack() as stack:
        more = await _hang(bed, phase, stack)
        frames = len(bed.sm.received)
        await bed.cloud.send_frame(bed.wish(("a", "2.0.0", A2), **more))
        await bed.until(lambda: f"Update: phase={phase}" in bed.new_log().rpartition("Update starts")[2])
        if phase in _WAITING:
            await bed.until(lambda: _WAITING[phase] in bed.new_log())
        elif phase != "downloading":
            await bed.until(lambda: len(bed.sm.received) > frames)
        begin = loop.time()
        await bed.cloud.send_frame(bed.wish(("a", "3.0.0", A3)))
        await bed.until(lambda: "Update: phase=downloading" in bed.new_log().rpartition("Update begins anew")[2])
        assert loop.time() - begin < 3  # a second, and the rest for a busy machine
        bed.sm.silent = bed.sm.silent_about_config = False
        bed.sm.average = pb.AverageMonitoring(node_monitoring=pb.MonitoringData(timestamp={}))
        if phase == "activating":
            bed.sm.send(node_instances_status=bed.sm._full_list())
        if phase == "pending":
            await bed.until(lambda: bed.items == {"a 1.0.0": "installed", "a 3.0.0": "pending"})
            await bed.kill()
            bed.extra = {}
            await bed.start()
        await bed.full_status(lambda status: shown_items(status) == {"a 3.0.0": "installed"})
        await bed.until(lambda: bed.running == {"a": "3.0.0"})


async def test_a_version_that_does_not_run_gives_way(bed: UnitBed) -> None:
    await bed.start()
    await deploy_first(bed)
    bed.sm.broken_versions = {("a", "2.0.0")}
    await bed.cloud.send_frame(bed.wish(("a", "2.0.0", A2), ("b", "1.0.0", B1)))
    status = await bed.full_status(lambda status: len(status["items"]) == 3)
    assert shown_items(status) == {"a 1.0.0": "installed", "a 2.0.0": "failed", "b 1.0.0": "installed"}
    failed = next(entry for entry in status["items"] if entry["state"] == "failed")
    assert failed["errorInfo"]["message"] == "not found"
    assert bed.running == {"a": "1.0.0", "b": "1.0.0"}
    await bed.cloud.send_frame(bed.wish(("a", "3.0.0", A3), ("b", "1.0.0", B1)))
    await bed.full_status(lambda status: shown_items(status) == {"a 3.0.0": "installed", "b 1.0.0": "installed"})
    assert bed.running == {"a": "3.0.0", "b": "1.0.0"}


@pytest.mark.parametrize("spoil", ["digest", "truncated", "signature", "unsigned"])
async def test_a_bad_blob_installs_nothing_and_loses_nothing(bed: UnitBed, spoil: str) -> None:
    await bed.start()
    await deploy_first(bed)
    layer = A2.layers[0]
    match spoil:
        case "digest":
            bed.blobs.publish_blob(layer, b"something else")
        case "truncated":
            bed.blobs.file(layer).write_bytes(bed.blobs.file(layer).read_bytes()[:100])
        case "signature":
            bed.blobs.change(layer, sign_info=bed.signer.sign(b"something else"))
        case "unsigned":
            bed.blobs.change(layer, sign_info=None)
    await bed.cloud.send_frame(bed.wish(("a", "2.0.0", A2), ("b", "1.0.0", B1)))
    status = await bed.full_status(lambda status: len(status["items"]) == 3)
    assert shown_items(status) == {"a 1.0.0": "installed", "a 2.0.0": "failed", "b 1.0.0": "installed"}
    failed = next(entry for entry in status["items"] if entry["state"] == "failed")
    assert failed["errorInfo"]["aosCode"] == 10 and failed["errorInfo"]["message"]
    assert bed.running == {"a": "1.0.0", "b": "1.0.0"}
    assert failed["errorInfo"]["message"] in bed.log()
    assert not (bed.directory / "work" / "install" / "blobs" / "sha256" / layer.removeprefix("sha256:")).exists()


@pytest.mark.parametrize("damage", ["noise", "open to others"])
async def test_a_damaged_database_gives_way_to_its_copy_and_services_run_on(bed: UnitBed, damage: str) -> None:
    await bed.start()
    await deploy_first(bed)
    work = bed.directory / "work"
    await bed.until((work / "cm.db.copy1").exists)
    assert await bed.stop() == 0
    if damage == "noise":
        (work / "cm.db").write_bytes(b"noise" * 10_000)
    else:
        (work / "cm.db").chmod(0o666)
    told = len(bed.sm.received)
    for _ in range(2):
        await bed.start()
        await bed.cloud.connected()
        await bed.kill()
    await bed.start()
    alert = (await bed.cloud.next("alerts"))["data"]["items"][0]
    assert "database was damaged" in alert["message"]
    await bed.full_status(lambda status: shown_items(status) == {"a 1.0.0": "installed"})
    assert not [frame for frame in bed.sm.received[told:] if frame.HasField("update_instances")]
    await bed.cloud.send_frame(bed.wish(("a", "1.0.0", A1)))
    await bed.until(lambda: not bed.rows("SELECT 1 FROM sqlite_master WHERE name = 'aoscore_recovered'"))
    await bed.until(lambda: bed.phase == "none")
    assert bed.running == {"a": "1.0.0"}
    assert not [frame for frame in bed.sm.received[told:] if frame.update_instances.stop_instances]


async def test_killed_in_the_middle_of_a_renewal_the_cloud_hears_of_it(bed: UnitBed) -> None:
    await bed.start()
    await bed.cloud.connected()
    node = {"codename": "node-1"}
    renewal = {
        "messageType": "renewCertificatesNotification",
        "certificates": [{"type": "sm", "serial": "1", "node": node, "validTill": "2027-01-01T00:00:00Z"}],
        "unitSecrets": {"version": "2.0.0", "nodes": [{"node": node, "secret": "hidden"}]},
    }
    assert bed.iam.process is not None
    bed.iam.process.send_signal(signal.SIGSTOP)
    try:
        txn = await bed.cloud.send_frame(renewal)

        def is_acknowledged() -> bool:
            return any(frame["header"]["txn"] == txn for frame in bed.cloud.frames)

        await bed.until(is_acknowledged)
        await bed.kill()
    finally:
        bed.iam.process.send_signal(signal.SIGCONT)
    await bed.start()
    (told,) = (await bed.cloud.next("installUnitCertificatesConfirmation"))["data"]["certificates"]
    assert (told["type"], told["node"]) == ("sm", node)
    assert "ask again" in told["errorInfo"]["message"]
    await bed.until(lambda: not bed.rows("SELECT 1 FROM aoscore_inbox"))
    assert "hidden" not in bed.log()
    assert b"hidden" not in b"".join(path.read_bytes() for path in (bed.directory / "work").glob("cm.db*"))


async def test_clean_up_leaves_what_a_node_that_is_away_needs(tmp_path: Path, iam: Iam) -> None:
    """Beside an item that goes, and over a new start of CM: the node that comes back with nothing gets all of it."""
    images = {"updateItemTtl": "1s", "removeOutdatedPeriod": "1s"}
    timeouts = {"nodeInfoProvider": {"smConnectionTimeout": "1s"}}
    async with unit_bed(tmp_path, iam, imageManager=images, **timeouts) as bed:
        bed.blobs.publish(A1)
        bed.blobs.publish(B1)
        await bed.start()
        await bed.cloud.connected()
        await bed.cloud.send_frame(bed.wish(("a", "1.0.0", A1), ("b", "1.0.0", B1)))
        await bed.full_status(lambda status: shown_items(status) == dict.fromkeys(("a 1.0.0", "b 1.0.0"), "installed"))
        await bed.take_node_away()
        await bed.until(lambda: "node node-1 is not available" in str(bed.statuses(full=False)))
        await bed.cloud.send_frame(bed.wish(("a", "1.0.0", A1)))
        await bed.until(lambda: bed.items == {"a 1.0.0": "installed"})
        await bed.kill()
        await bed.start()
        await bed.cloud.connected()
        asked = len(bed.blobs.asked)
        bed.sm.instances.clear()
        await bed.bring_node()
        await bed.until(lambda: bed.running == {"a": "1.0.0"})
        for digest, blob in A1.blobs.items():
            answer = await bed.sm.blobs.GetBlobsInfos(pb.BlobsInfosRequest(digests=[digest]))
            assert (await request("GET", answer.urls[0])).body == blob
        assert len(bed.blobs.asked) == asked, "from its own store"


async def test_after_a_reconnect_the_cloud_gets_what_is_so_now(bed: UnitBed) -> None:
    """Of all that was so while there was no link nothing is told: the first status is whole, and the last there is."""
    await bed.start()
    await deploy_first(bed)
    bed.cloud.token, bed.cloud.discovery_status = "token-2", 503
    await bed.cloud.sockets[-1].close()
    await bed.until(lambda: "Next attempt to connect" in bed.new_log())
    for _ in range(2):
        for change, is_there in ((bed.take_node_away, False), (bed.bring_node, True)):
            changes = bed.new_log().count(words := f"state=provisioned, isConnected={is_there}")
            await change()
            await bed.until(lambda w=words, c=changes: bed.new_log().count(w) > c)
    told = len(bed.cloud.frames)
    bed.cloud.discovery_status = 200

    def statuses() -> list[dict[str, Any]]:
        return [one["data"] for one in bed.cloud.frames[told:] if one["data"]["messageType"] == "unitStatus"]

    await bed.until(statuses)
    first = statuses()[0]
    assert first["isDeltaInfo"] is False
    assert [one["state"] for group in first["instances"] for one in group["instances"]] == ["active"]
    assert first["nodes"][0]["isConnected"]
    # Every later one is told in its order.
    await bed.sm.wait(lambda sm: sm.received)
    bed.sm.set_state(next(iter(bed.sm.instances)), "failed", "the last one")
    await bed.until(lambda: "the last one" in str(statuses()))
    assert "'isConnected': False" not in str(statuses())


async def test_nonsense_from_the_cloud(bed: UnitBed) -> None:
    await bed.start()
    await deploy_first(bed)
    for raw in (b"{", b"\xff", b"[]", b'{"header": 1, "data": 2}', b'{"header": {"version": 7}}'):
        await bed.cloud.sockets[-1].send_bytes(raw)
    await bed.cloud.send_frame({"messageType": "desiredStatus", "items": 7})
    wish = bed.wish(("a", "2.0.0", A2))
    wish["items"].append({"item": {"id": "b", "type": "gadget"}, "version": 1})
    wish["unitConfig"] = {"version": {"major": 1}, "nodes": "many"}
    await bed.cloud.send_frame(wish)
    status = await bed.full_status(lambda status: shown_items(status) == {"a 2.0.0": "installed"})
    assert bed.is_alive and bed.running == {"a": "2.0.0"}
    config = [entry for full in bed.statuses() for entry in full["unitConfig"] if entry["state"] == "failed"]
    assert config and "unitConfig" in config[0]["errorInfo"]["message"]
    assert status["isDeltaInfo"] is False
    alerts = [item["message"] for item in (await bed.cloud.next("alerts"))["data"]["items"] if "message" in item]
    assert any("not JSON" in message for message in alerts)
    assert any("items[1]" in message for message in alerts)


async def test_monitoring_alerts_and_logs_are_forwarded(tmp_path: Path, iam: Iam) -> None:
    now = Timestamp()
    now.FromDatetime(datetime.now(UTC))
    periods = {"monitoring": {"sendPeriod": "200ms"}, "alerts": {"sendPeriod": "100ms"}}
    async with unit_bed(tmp_path, iam, **periods) as bed:
        await bed.start()
        await bed.cloud.connected()
        await bed.until(lambda: bed.sm.received)
        sample = pb.MonitoringData(timestamp=now, ram=1000, cpu=50)
        bed.sm.send(instant_monitoring=pb.InstantMonitoring(node_monitoring=sample))
        monitoring = (await bed.cloud.next("monitoringData"))["data"]
        while not monitoring["nodes"][0]["items"]:
            monitoring = (await bed.cloud.next("monitoringData"))["data"]
        assert monitoring["nodes"][0]["items"][0]["ram"] == 1000
        bed.sm.send(alert=pb.Alert(timestamp=now, system_alert=pb.SystemAlert(message="smoke")))
        alert = (await bed.cloud.next("alerts"))["data"]["items"][0]
        assert (alert["tag"], alert["message"], alert["node"]) == ("systemAlert", "smoke", {"codename": "node-1"})
        request = {"messageType": "requestLog", "correlationId": "c7", "logType": "systemLog", "filter": {}}
        await bed.cloud.send_frame(request)
        asked = await bed.sm.wait(lambda sm: [f for f in sm.received if f.HasField("system_log_request")])
        bed.sm.send(
            log=pb.LogData(
                correlation_id=asked[0].system_log_request.correlation_id,
                part_count=1,
                part=1,
                data=b"log",
                status="ok",
                error=common.ErrorInfo(),
            )
        )
        log = (await bed.cloud.next("pushLog"))["data"]
        assert (log["correlationId"], log["content"], log["status"]) == ("c7", "bG9n", "ok")


async def test_blobs_go_to_the_node_by_http(bed: UnitBed) -> None:
    await bed.start()
    await deploy_first(bed)
    answer = await bed.sm.blobs.GetBlobsInfos(pb.BlobsInfosRequest(digests=[A1.index, *A1.layers]))
    for digest, url in zip([A1.index, *A1.layers], answer.urls, strict=True):
        assert (await request("GET", url)).body == A1.blobs[digest]


async def test_a_foreign_cloud_gets_nothing_and_the_unit_lives_on(tmp_path: Path, iam: Iam) -> None:
    async with unit_bed(tmp_path, iam) as bed:
        bed.blobs.publish(A1)
        await bed.start()
        await deploy_first(bed)
        await bed.stop()
    (tmp_path / "again").mkdir()
    async with unit_bed(tmp_path / "again", iam) as bed:
        foreign = TestCa("Foreign").issue("cloud")
        foreign.write(tmp_path, "foreign")
        assert bed.cloud._ssl is not None
        bed.cloud._ssl.load_cert_chain(tmp_path / "foreign.pem", tmp_path / "foreign.key")
        await bed.start()
        await bed.until(lambda: bed.new_log().count("Can't connect to the cloud") >= 2)
        assert "CERTIFICATE_VERIFY_FAILED" in bed.new_log()
        assert bed.is_alive and not bed.cloud.frames and not bed.cloud.discoveries


async def test_a_node_with_a_foreign_certificate_gets_nothing(tmp_path: Path, iam: Iam) -> None:
    async with unit_bed(tmp_path, iam) as bed:
        await bed.start()
        await bed.until(lambda: bed.sm.received)
        stranger = TestSm("node-2")
        foreign = TestCa("Foreign").identity(tmp_path, "sm")
        trusting = TlsIdentity(iam.ca_file, foreign.cert_url, foreign.key_url)
        async with stranger.connected(bed.port, trusting):
            async with asyncio.timeout(20):
                await stranger.ended.wait()
        assert not stranger.received and "node-2" not in bed.log() and bed.is_alive


async def test_defect_8_a_node_with_the_certificate_of_another_gets_nothing(tmp_path: Path, iam: Iam) -> None:
    """In AosCore 9.1 it gets all of that node (observed.md, defect 8)."""
    async with unit_bed(tmp_path, iam, alerts={"sendPeriod": "100ms"}) as bed:
        await bed.start()
        await bed.until(lambda: bed.sm.received)
        identity = iam.authority.identity(tmp_path, "unit-1")
        async with TestSm("node-2").connected(bed.port, identity) as second:
            await bed.until(lambda: "SM connected: nodeID=node-2" in bed.new_log() and second.received)
        async with TestSm("node-1").connected(bed.port, identity) as thief:
            async with asyncio.timeout(20):
                await thief.ended.wait()
        assert bed.new_log().count("SM connected: nodeID=node-1") == 1
        await bed.until(lambda: any("claims to be node 'node-1'" in str(frame) for frame in bed.cloud.frames))


async def test_start_without_cloud_and_wrong_configurations(tmp_path: Path, iam: Iam) -> None:
    async with unit_bed(tmp_path, iam) as bed:
        bed.extra = {"serviceDiscoveryUrl": "https://127.0.0.1:1/sd/v7/"}
        await bed.start()
        await bed.until(lambda: bed.sm.received)  # nodes are served
        assert await bed.stop() == 0
        for wrong in (
            {"cmServer": "x"},
            {"alerts": {"sendPeriod": []}},
            {"imageManager": {"parallelDownloads": "many"}},
        ):
            bed.extra = wrong
            await bed.start()
            assert bed.process is not None and await bed.process.wait() == 78
            assert next(iter(wrong)) in bed.log().splitlines()[-1]


async def test_reset_removes_everything(bed: UnitBed) -> None:
    await bed.start()
    await deploy_first(bed)
    assert bed.process is not None
    first, bed.process = bed.process, None
    command = ["-c", str(bed.config_file), "--reset"]

    async def reset() -> int:
        process = await asyncio.create_subprocess_exec(sys.executable, "-m", "aoscore.cm.app", *command)
        return await process.wait()

    assert await reset() == 0
    async with asyncio.timeout(20):
        assert await first.wait() == 0  # stopped in order, and first of all
    assert await reset() == 0
    left = [path.name for path in (bed.directory / "work").rglob("*") if path.is_file()]
    assert set(left) <= {".lock"}


async def test_killed_without_a_connection_its_monitoring_data_arrive_once_and_are_bounded(bed: UnitBed) -> None:
    """What is on disk when CM is killed, however often it is killed; with a connection nothing goes to disk."""
    bed.extra = {"monitoring": {"sendPeriod": "100ms"}, "alerts": {"sendPeriod": "100ms"}}

    def sampled(seconds: range) -> None:
        for second in seconds:
            data = pb.MonitoringData(timestamp=Timestamp(seconds=1_700_000_000 + second), ram=second)
            bed.sm.send(instant_monitoring=pb.InstantMonitoring(node_monitoring=data))

    def told() -> list[int]:
        by_txn = {frame["header"]["txn"]: frame["data"] for frame in bed.cloud.frames}
        messages = [data for data in by_txn.values() if data["messageType"] == "monitoringData"]
        return [item["ram"] for data in messages for node in data["nodes"] for item in node["items"]]

    def stored() -> list[int]:
        rows = bed.rows("SELECT entries FROM aoscore_monitoring_rings WHERE itemID = ''")
        return [item["ram"] for (text,) in rows for item in json.loads(text)["items"]]

    async def start() -> None:
        await bed.start()
        await bed.until(lambda: "SM connected" in bed.new_log())

    await start()
    await bed.cloud.connected()
    sampled(range(1, 4))
    await bed.until(lambda: told() == [1, 2, 3])
    assert stored() == [] == bed.rows("SELECT * FROM aoscore_outbox WHERE type = 'monitoringData'")
    bed.cloud.discovery_status = 500
    for cloud in bed.cloud.sockets:
        await cloud.close()
    await bed.until(lambda: "Next attempt to connect" in bed.new_log())
    for seconds in (range(4, 8), range(8, 30)):
        sampled(seconds)
        expected = [*range(4, 30)][: seconds.stop - 4][-16:]
        await bed.until(lambda expected=expected: stored() == expected)  # type: ignore[misc]
        await bed.kill()
        await start()
    assert told() == [1, 2, 3]
    bed.cloud.discovery_status = 200
    await bed.until(lambda: len(told()) > 3)
    assert told() == [1, 2, 3, *range(14, 30)]
    await bed.until(lambda: not bed.rows("SELECT * FROM aoscore_outbox WHERE type = 'monitoringData'"))
    assert stored() == []
    await bed.until(lambda: "10 entries of monitoring data were dropped" in json.dumps(bed.cloud.frames))
    await bed.kill()
    await start()
    await bed.cloud.connected()
    sampled(range(30, 31))
    await bed.until(lambda: told()[-1:] == [30])
    assert told() == [1, 2, 3, *range(14, 31)]
