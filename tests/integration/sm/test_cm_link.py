"""SM's core against a test CM and a test IAM over mutual TLS, in this process."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from aoscore._pb.common.v2 import common_pb2 as common
from aoscore._pb.servicemanager.v5 import network_pb2 as net
from aoscore._pb.servicemanager.v5 import servicemanager_pb2 as pb
from aoscore.common.errors import AosError, FailedError, OutOfRangeError
from aoscore.common.types import (
    InstanceIdent,
    InstanceNetworkState,
    InstanceState,
    InstanceStatus,
    LogRequest,
    MonitoringData,
    NetworkWishes,
    NodeMonitoring,
    SystemAlert,
)
from aoscore.sm import app
from tests.support.items import packed, sha256, tar
from tests.support.processes import NoMonitoring, NoNetworks, ProcessRuntime, empty_log
from tests.support.running import running
from tests.support.smbed import NODE, SmBed


class Sm:
    """One SM in this process."""

    def __init__(self, core: app.Core, runtime: ProcessRuntime, networks: NoNetworks, monitoring: NoMonitoring) -> None:
        self.core = core
        self.runtime = runtime
        self.networks = networks
        self.monitoring = monitoring


@contextlib.asynccontextmanager
async def sm(bed: SmBed) -> AsyncIterator[Sm]:
    async with contextlib.AsyncExitStack() as stack:
        core = await app.build_core(bed.config(), stack)
        one = Sm(core, ProcessRuntime(bed.root / "notes", NODE.node_id), NoNetworks(), NoMonitoring())

        async def request_log(request: LogRequest) -> None:
            await core.client.send(empty_log(request))

        services = app.assemble(
            core,
            runtimes=[one.runtime],
            networks=one.networks,
            monitoring=one.monitoring,
            request_log=request_log,
        )
        await stack.enter_async_context(running(*services))
        yield one


@pytest.fixture
async def bed(tmp_path: Path) -> AsyncIterator[SmBed]:
    async with SmBed(tmp_path).running() as bed:
        yield bed


async def test_order_of_registration(bed: SmBed) -> None:
    async with sm(bed):
        connection = await bed.cm.connected(1)
        assert connection.kinds()[:2] == ["sm_info", "node_instances_status"]
        info = connection.frames[0].sm_info
        assert info.node_id == "node-main-0001"
        assert [(one.type, one.max_instances) for one in info.runtimes] == [("test", 256)]
        assert connection.frames[1].node_instances_status == pb.NodeInstancesStatus()
        await bed.cm.wait(lambda cm: "SyncNetworkState" in cm.calls)
        await bed.cm.wait(lambda cm: "SubscribeInstanceNetworkUpdates node-main-0001" in cm.calls)


async def test_a_damaged_database_is_told(bed: SmBed) -> None:
    path = bed.config().database_path
    async with sm(bed):
        await bed.cm.connected(1)
    path.write_bytes(b"not a database" * 1000)
    async with sm(bed):
        alert = (await bed.cm.frame("alert")).core_alert
        (broken,) = path.parent.glob(f"{path.name}.broken-*")
        assert alert.core_component == "SM"
        assert broken.name in alert.message
    told = len(bed.cm.connections)
    async with sm(bed) as one:
        await bed.cm.connected(told + 1)
        assert one.core.database.recovered is None


async def test_recorded_conversation(bed: SmBed) -> None:
    """The questions of recorded/sm-against-test-cm.txt and their answers."""
    async with sm(bed):
        connection = await bed.cm.connected(1)

        async def ask(kind: str, **member: object) -> object:
            seen = len(connection.frames)
            bed.cm.send(**member)
            return await bed.cm.frame(kind, after=seen)

        config = '{"nodeGroupSubject":{"codename":"aos-core-main"},"priority":1}'
        bed.cm.send(connection_status=pb.ConnectionStatus(cloud_status=pb.CONNECTED))
        none = common.ErrorInfo()
        get = pb.GetNodeConfigStatus()
        check, change = (
            pb.CheckNodeConfig(node_config=config, version="1.0.0"),
            pb.SetNodeConfig(node_config=config, version="1.0.0"),
        )
        assert await ask("node_config_status", get_node_config_status=get) == pb.NodeConfigStatus(
            state="absent", error=none
        )
        expected = pb.NodeConfigStatus(state="absent", version="1.0.0", error=none)
        assert await ask("node_config_status", check_node_config=check) == expected
        assert await ask("node_config_status", set_node_config=change) == expected
        assert await ask("node_config_status", get_node_config_status=get) == pb.NodeConfigStatus(
            state="installed", version="1.0.0", error=none
        )
        # AosCore 9.1 leaves a broken document unanswered; we answer.
        broken = pb.SetNodeConfig(node_config="{bad json", version="1.0.1")
        bad = await ask("node_config_status", set_node_config=broken)
        assert (bad.state, bad.version, bad.error.aos_code) == ("installed", "1.0.1", 6)  # type: ignore[attr-defined]
        average = await ask("average_monitoring", get_average_monitoring=pb.GetAverageMonitoring())
        assert average == pb.AverageMonitoring(node_monitoring=pb.MonitoringData(ram=5))
        assert await ask("node_instances_status", update_instances=pb.UpdateInstances()) == pb.NodeInstancesStatus()
        log = await ask("log", system_log_request=pb.SystemLogRequest(correlation_id="log1"))
        assert log == pb.LogData(correlation_id="log1", part_count=1, part=1, status="empty", error=none)


async def test_service_from_image_to_process_and_away(bed: SmBed) -> None:
    async with sm(bed) as one:
        await bed.cm.connected(1)
        info = bed.instance("svc")
        seen = len(bed.cm.connections[0].frames)
        bed.cm.update(info)
        complete = await bed.cm.frame("node_instances_status", after=seen)
        (status,) = complete.instances
        assert (status.instance.item_id, status.version, status.state) == ("svc", "1.0.0", "active")
        assert (status.runtime_id, status.manifest_digest) == (info.runtime_id, info.manifest_digest)
        assert status.error == common.ErrorInfo()
        # The list may hold what no frame of its own has told.
        assert list(dict.fromkeys(one.state for one in bed.cm.statuses())) == ["activating", "active"]
        (running_one,) = one.runtime.running()
        # The same again changes nothing.
        seen = len(bed.cm.connections[0].frames)
        bed.cm.update(info)
        await bed.cm.frame("node_instances_status", after=seen)
        assert one.runtime.running() == [running_one]
        seen = len(bed.cm.connections[0].frames)
        bed.cm.update(stop=(info,))
        assert await bed.cm.frame("node_instances_status", after=seen) == pb.NodeInstancesStatus()
        assert one.networks.released == [info.ident]
        assert one.runtime.running() == []


@pytest.mark.parametrize(
    ("spoil", "code", "text"),
    [
        ("content", 10, "content of blob"),
        ("cut", 10, "content of blob"),
        ("unknown", 1, "GetBlobsInfos"),
        ("missing", 2, "404"),
        ("escape", 6, "escape"),
    ],
)
async def test_bad_image_is_a_clear_status_and_nothing_is_lost(
    bed: SmBed, caplog: pytest.LogCaptureFixture, spoil: str, code: int, text: str
) -> None:
    async with sm(bed) as one:
        await bed.cm.connected(1)
        good = bed.instance("svc")
        bed.cm.update(good)
        await bed.cm.wait(lambda cm: cm.states() == {"svc": ("1.0.0", "active")})
        before = one.runtime.running()
        layer = os.urandom(5000)
        if spoil == "escape":
            bad = bed.instance("svc", "2.0.0", manifest_digest=bed.blobs.item([tar({"../escape": layer})]))
        else:
            bad = bed.instance("svc", "2.0.0", manifest_digest=bed.blobs.item([tar({"app": layer})]))
        blob = max(bed.blobs.directory.iterdir(), key=lambda path: path.stat().st_size)
        match spoil:
            case "content":
                blob.write_bytes(os.urandom(blob.stat().st_size))
            case "cut":
                bed.blobs.path(bad.manifest_digest).write_bytes(bed.blobs.path(bad.manifest_digest).read_bytes()[:-3])
            case "unknown":
                bed.cm.unknown.add(bad.manifest_digest)
            case "missing":
                blob.unlink()
        bed.cm.update(bad)
        await bed.cm.wait(lambda cm: cm.states() == {"svc": ("2.0.0", "failed")})
        *_, status = bed.cm.statuses()
        assert status.error.aos_code == code
        assert text in status.error.message
        assert "Can't install item" in caplog.text
        assert one.runtime.running() == before
        assert not list(bed.root.rglob("escape"))
        # Back to the good one without any download.
        calls = len(bed.cm.calls)
        bed.cm.update(good)
        await bed.cm.wait(lambda cm: cm.states() == {"svc": ("1.0.0", "active")})
        assert one.runtime.running() == before
        assert not any("GetBlobsInfos" in call for call in bed.cm.calls[calls:])


async def test_download_goes_on_where_an_earlier_process_stopped(bed: SmBed) -> None:
    layer = tar({"app": os.urandom(100_000).hex().encode()})
    info = bed.instance("svc", manifest_digest=bed.blobs.item([layer]))
    digest = sha256(packed(layer))
    bed.cm.unknown.add(digest)
    async with sm(bed):
        await bed.cm.connected(1)
        bed.cm.update(info)
        await bed.cm.wait(lambda cm: cm.states() == {"svc": ("1.0.0", "failed")})
    bed.cm.unknown.clear()
    blob = bed.blobs.path(digest)
    half = blob.stat().st_size // 2
    downloads = bed.root / "sm" / "images" / "downloads"
    (downloads / digest.replace(":", "-")).write_bytes(blob.read_bytes()[:half])
    # Only who asks for the rest alone gets the right content.
    blob.write_bytes(bytes(half) + blob.read_bytes()[half:])
    calls = len(bed.cm.calls)
    async with sm(bed):
        await bed.cm.connected(2)
        await bed.cm.wait(lambda cm: cm.states() == {"svc": ("1.0.0", "active")})
    assert [call for call in bed.cm.calls[calls:] if "GetBlobs" in call] == [f"GetBlobsInfos {digest}"]
    assert list(downloads.iterdir()) == []


async def test_statuses_that_change_together_share_a_frame(bed: SmBed) -> None:
    async with sm(bed) as one:
        connection = await bed.cm.connected(1)
        await bed.cm.frame("node_instances_status")
        for number in range(5):
            ident = InstanceIdent("item", "subject", number)
            await one.core.client.send(InstanceStatus(ident, "1.0.0", InstanceState.ACTIVE))
            if number == 0:
                # The first does not wait for others.
                await bed.cm.frame("update_instances_status")
            # The writer has its turn.
            for _ in range(5):
                await asyncio.sleep(0)
        await bed.cm.wait(lambda cm: len(cm.instance_states()) == 5)
        told = [frame.update_instances_status.instances for frame in connection.frames[2:]]
        assert [[status.instance.instance for status in one] for one in told if one] == [[0], [1, 2, 3, 4]]


async def test_bad_instance_does_not_stop_good_ones(bed: SmBed) -> None:
    async with sm(bed):
        await bed.cm.connected(1)
        bed.cm.update(bed.instance("bad", manifest_digest="sha256:../../etc/passwd"), bed.instance("good"))
        await bed.cm.wait(lambda cm: cm.states() == {"bad": ("1.0.0", "failed"), "good": ("1.0.0", "active")})


async def test_nothing_is_lost_while_cm_is_away(bed: SmBed) -> None:
    async with sm(bed) as one:
        await bed.cm.connected(1)
        info = bed.instance("svc")
        bed.cm.update(info)
        await bed.cm.wait(lambda cm: cm.states() == {"svc": ("1.0.0", "active")})
        bed.cm.drop()
        await asyncio.sleep(0.05)
        await one.core.client.send(SystemAlert(datetime.now(UTC), "while away"))
        one.monitoring.samples.publish(NodeMonitoring(MonitoringData(ram=7)))
        connection = await bed.cm.connected(2)
        assert connection.kinds()[:2] == ["sm_info", "node_instances_status"]
        assert [status.state for status in connection.frames[1].node_instances_status.instances] == ["active"]
        assert (await bed.cm.frame("alert")).system_alert.message == "while away"
        assert (await bed.cm.frame("instant_monitoring")).node_monitoring.ram == 7


async def test_cm_restarts(tmp_path: Path) -> None:
    bed = SmBed(tmp_path)
    async with bed.iam.running():
        async with bed.cm.running():
            bed.write_config()
            info = bed.instance("svc")
        # CM is not there yet: SM starts all the same.
        async with sm(bed) as one:
            async with bed.cm.running():
                await bed.cm.connected(1)
            with pytest.raises(FailedError, match="CM"):
                await one.core.client.blob_urls(["sha256:0"])
            before = len(bed.cm.connections)
            async with bed.cm.running():
                await bed.cm.connected(before + 1)
                bed.cm.update(info)
                await bed.cm.wait(lambda cm: cm.states() == {"svc": ("1.0.0", "active")})


async def test_new_certificate_means_a_new_connection(bed: SmBed) -> None:
    async with sm(bed):
        await bed.cm.connected(1)
        bed.iam.renew(bed.certificate("renewed"))
        connection = await bed.cm.connected(2)
        assert connection.kinds()[:2] == ["sm_info", "node_instances_status"]


async def test_network_service(bed: SmBed) -> None:
    ident = InstanceIdent("svc", "subject", 0)
    async with sm(bed) as one:
        await bed.cm.connected(1)
        networks = one.core.client.networks
        assert (await networks.get_node_network_params("owner")).vlan_id == 5
        wishes = NetworkWishes(("host",), ("other/80/tcp",), ("8080",))
        assert (await networks.allocate_instance_network(ident, "owner", wishes)).dns_servers == ("172.31.0.100",)
        with pytest.raises(OutOfRangeError, match="no address left"):
            await networks.allocate_instance_network(InstanceIdent("refused", "s", 0), "owner", wishes)
        await networks.release_instance_network(ident)
        await networks.release_node_network("owner")
        await networks.sync_network_state([InstanceNetworkState(ident, "owner", "172.31.0.2")])
        assert bed.cm.calls[-1] == "SyncNetworkState svc"
        await bed.cm.network_updates.put(
            net.InstanceNetworkUpdateNotification(
                pending_firewall_update=net.PendingFirewallUpdate(
                    instance=common.InstanceIdent(item_id="svc", subject_id="subject"),
                    firewall_rules=[net.FirewallRule(dst_ip="172.31.0.3", dst_port="80", proto="tcp")],
                )
            )
        )
        async with asyncio.timeout(5):
            while not one.networks.updates:
                await asyncio.sleep(0.01)
        assert one.networks.updates[0].ident == ident
        assert one.networks.updates[0].rules[0].dst_ip == "172.31.0.3"


async def test_secrets_of_instances(bed: SmBed) -> None:
    ident = InstanceIdent("svc", "subject", 0)
    async with sm(bed) as one:
        rights = {"vis": {"*": "r"}}
        assert await one.core.permissions.register_instance(ident, rights) == "secret-svc"
        assert bed.iam.registered == {"svc": rights}
        bed.iam.renew(bed.certificate("renewed"))
        await bed.cm.connected(2)
        await one.core.permissions.unregister_instance(ident)
        assert bed.iam.registered == {}


async def test_two_sms_cannot_share_a_working_directory(bed: SmBed) -> None:
    async with sm(bed):
        with pytest.raises(AosError, match="in use"):
            async with sm(bed):
                pass


async def test_message_that_cannot_be_read_costs_only_itself(bed: SmBed, caplog: pytest.LogCaptureFixture) -> None:
    async with sm(bed):
        await bed.cm.connected(1)
        bed.cm.connections[-1].outbox.put_nowait(pb.SMIncomingMessages())
        odd = pb.InstanceInfo(instance=common.InstanceIdent(item_id="odd"), version="1.0.0")
        odd.instance.type = 77  # type: ignore[assignment]
        bed.cm.send(update_instances=pb.UpdateInstances(start_instances=[odd]))
        bed.cm.update(bed.instance("svc"))
        await bed.cm.wait(lambda cm: cm.states() == {"svc": ("1.0.0", "active")})
        assert "77 is no item type" in caplog.text
        assert len(bed.cm.connections) == 1
