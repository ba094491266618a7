"""The gRPC server for SMs, over mutual TLS, against a test SM that plays the recorded one."""

import asyncio
import socket
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest

from aoscore._pb.common.v2 import common_pb2 as common
from aoscore._pb.servicemanager.v5 import network_pb2 as net
from aoscore._pb.servicemanager.v5 import servicemanager_pb2 as pb
from aoscore.cm import database
from aoscore.cm.networkmanager.manager import NetworkManager
from aoscore.cm.networkmanager.store import NetworkStore
from aoscore.cm.smcontroller import link as sm_link
from aoscore.cm.smcontroller.controller import Receivers, SmController
from aoscore.common.db import Database, Schema
from aoscore.common.errors import DeadlineError, NotFoundError, SignatureError
from aoscore.common.tls import TlsIdentity, grpc_server_credentials
from aoscore.common.types import (
    AlertStatus,
    ConfigState,
    InstanceFilter,
    InstanceIdent,
    InstanceInfo,
    InstanceState,
    LogData,
    LogKind,
    LogRequest,
    LogStatus,
    NodeConfigStatus,
    SystemQuotaAlert,
)
from tests.support.pki import TestCa
from tests.support.running import running, until
from tests.support.sm import TestSm
from tests.unit.cm.fakes import FakeLink

IDENT = InstanceIdent("svc1", "subj1", 0)
INFO = InstanceInfo(IDENT, "1.0.0", "sha256:" + "0" * 64, "owner", "crun-n1")


class Heard:
    """Everything the controller hands on, in order."""

    def __init__(self) -> None:
        self.events: list[tuple[str, Any]] = []
        self._news = asyncio.Condition()

    def receivers(self) -> Receivers:
        def keep(kind: str) -> Any:
            return lambda *values: self.events.append((kind, values[0] if len(values) == 1 else values))

        async def keep_log(node_id: str, log: LogData) -> None:
            self.events.append(("log", (node_id, log)))

        return Receivers(
            sm_info=keep("info"),
            sm_lost=keep("lost"),
            node_statuses=keep("all"),
            statuses=keep("some"),
            monitoring=keep("monitoring"),
            alert=keep("alert"),
            log=keep_log,
        )

    async def get(self, kind: str, count: int = 1) -> list[Any]:
        """Wait for events of a kind."""
        async with asyncio.timeout(10):
            while len(found := [value for name, value in self.events if name == kind]) < count:
                await asyncio.sleep(0.01)
            return found


class FakeDns:
    servers = ("10.0.0.100",)

    def write(self, text: str) -> None:
        self.text = text


class Bed:
    def __init__(self, directory: Path, db: Database) -> None:
        self.ca = TestCa()
        self.directory = directory
        self.server_identity = self.ca.identity(directory, "cm")
        self.heard = Heard()
        self.cloud = FakeLink()
        self.networks = NetworkManager(NetworkStore(db), FakeDns(), routes=list)
        self.controller = SmController(
            "127.0.0.1:0",
            lambda: grpc_server_credentials(lambda: self.server_identity),
            cloud=self.cloud,
            networks=self.networks,
            blob_url=self._blob_url,
            receivers=self.heard.receivers(),
            admit=self._admit,
        )
        self.strangers: set[str] = set()
        """Node ids that nobody may speak for."""

    async def _admit(self, node_id: str, context: Any) -> None:
        if node_id in self.strangers:
            raise SignatureError("a stranger")

    @staticmethod
    def _blob_url(digest: str) -> str:
        if not digest.endswith("1"):
            raise NotFoundError(f"blob {digest} not found")
        return f"http://main:8094/blobs/{digest.replace(':', '/')}"

    def sm(self, name: str = "n1") -> TestSm:
        return TestSm(name)

    def identity(self, name: str = "sm") -> TlsIdentity:
        return self.ca.identity(self.directory, name)

    @property
    def port(self) -> int:
        return self.controller.port


@pytest.fixture
async def bed(tmp_path: Path) -> AsyncIterator[Bed]:
    tables = (*database.NETWORK_MANAGER_TABLES, *database.OWN_TABLES)
    async with Database(tmp_path / "cm.db", Schema(create=tables, foreign_keys=True)) as db:
        opened = Bed(tmp_path, db)
        await opened.networks.load()
        async with running(opened.controller):
            yield opened


def kinds(frames: Sequence[pb.SMIncomingMessages]) -> list[str | None]:
    return [frame.WhichOneof("SMIncomingMessage") for frame in frames]


async def test_registration_as_recorded(bed: Bed) -> None:
    sm = bed.sm()
    async with sm.connected(bed.port, bed.identity()):
        (info,) = await bed.heard.get("info")
        assert (info.node_id, info.runtimes[0].type) == ("n1", "crun")
        assert await bed.heard.get("all") == [("n1", [])]
        await sm.wait(lambda one: one.received)
        assert sm.received[0].connection_status.cloud_status == pb.CONNECTED
    assert await bed.heard.get("lost") == ["n1"]


async def test_where_an_sm_has_come_from_is_a_node_of_the_unit_also_while_it_is_away(bed: Bed) -> None:
    assert not bed.controller.is_node("127.0.0.1")
    async with bed.sm().connected(bed.port, bed.identity()):
        await until(lambda: bed.controller.is_node("127.0.0.1"))
    assert bed.controller.is_node("127.0.0.1")
    assert not bed.controller.is_node("127.0.0.2")


async def test_cloud_state_goes_to_every_sm(bed: Bed) -> None:
    first, second = bed.sm("n1"), bed.sm("n2")
    async with first.connected(bed.port, bed.identity()), second.connected(bed.port, bed.identity()):
        await bed.heard.get("all", 2)
        bed.cloud.connected = False
        bed.cloud.connection.publish(False)
        for sm in (first, second):
            await sm.wait(lambda one: len(one.received) == 2)
            states = [frame.connection_status.cloud_status for frame in sm.received]
            assert states == [pb.CONNECTED, pb.DISCONNECTED]


async def test_update_is_answered_by_the_full_list(bed: Bed) -> None:
    sm = bed.sm()
    async with sm.connected(bed.port, bed.identity()):
        await bed.heard.get("all")
        await bed.controller.update_instances("n1", [INFO], [InstanceIdent("old", "s", 3)])
        _, (node_id, statuses) = await bed.heard.get("all", 2)
        assert node_id == "n1"
        assert [(one.ident, one.state, one.error) for one in statuses] == [(IDENT, InstanceState.ACTIVE, None)]
        assert sm.updates[0].stop_instances[0].item_id == "old"
        sm.set_state(("svc1", "subj1", 0, common.SERVICE), "failed", "exit=1")
        ((_, (changed,)),) = await bed.heard.get("some")
        assert (changed.state, changed.error.message) == (InstanceState.FAILED, "exit=1")


async def test_node_config_as_recorded(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sm_link, "REPLY_TIMEOUT_S", 0.2)
    async with bed.sm().connected(bed.port, bed.identity()):
        await bed.heard.get("all")
        controller = bed.controller
        assert await controller.get_node_config_status("n1") == NodeConfigStatus(ConfigState.ABSENT)
        checked = await controller.check_node_config("n1", '{"priority":1}', "1.0.0")
        assert checked == NodeConfigStatus(ConfigState.ABSENT, "1.0.0")
        assert await controller.set_node_config("n1", '{"priority":1}', "1.0.0") == checked
        with pytest.raises(DeadlineError, match="did not answer check_node_config"):
            await controller.check_node_config("n1", "{bad json", "1.0.1-bad")
        assert await controller.get_node_config_status("n1") == NodeConfigStatus(ConfigState.INSTALLED, "1.0.0")


async def test_average_monitoring_and_requests_side_by_side(bed: Bed) -> None:
    sm = bed.sm()
    async with sm.connected(bed.port, bed.identity()):
        await bed.heard.get("all")
        sm.average.node_monitoring.cpu = 42
        results = await asyncio.gather(*(bed.controller.get_average_monitoring("n1") for _ in range(5)))
        assert [result.node.cpu for result in results] == [42] * 5


async def test_alerts_monitoring_and_logs_are_handed_on(bed: Bed) -> None:
    sm = bed.sm()
    async with sm.connected(bed.port, bed.identity()):
        quota = pb.SystemQuotaAlert(parameter="cpu", value=7, status="raise")
        sm.send(alert=pb.Alert(timestamp={"seconds": 5}, system_quota_alert=quota))
        ((node_id, alert),) = await bed.heard.get("alert")
        assert node_id == "n1"
        assert isinstance(alert, SystemQuotaAlert)
        assert (alert.parameter, alert.value, alert.status) == ("cpu", 7, AlertStatus.RAISE)
        sample = pb.MonitoringData(timestamp={"seconds": 5}, ram=1000000, cpu=55)
        sm.send(instant_monitoring=pb.InstantMonitoring(node_monitoring=sample))
        ((_, monitoring),) = await bed.heard.get("monitoring")
        assert (monitoring.node.ram, monitoring.node.cpu) == (1000000, 55)
        request = LogRequest(LogKind.INSTANCE, "log2", InstanceFilter("nope", "s"))
        await bed.controller.request_log("n1", request)
        frame = await sm.wait(lambda one: [f for f in one.received if f.HasField("instance_log_request")])
        assert frame[0].instance_log_request.filter.instance == -1
        assert not frame[0].instance_log_request.HasField("from")
        sm.send(log=pb.LogData(correlation_id="log2", part_count=1, part=1, status="absent", error=common.ErrorInfo()))
        ((_, log),) = await bed.heard.get("log")
        assert (log.correlation_id, log.status, log.error) == ("log2", LogStatus.ABSENT, None)


async def test_bad_frames_do_not_end_the_stream(bed: Bed) -> None:
    sm = bed.sm()
    async with sm.connected(bed.port, bed.identity()):
        sm.send()
        sm.send(alert=pb.Alert())
        sm.send(log=pb.LogData(status="nonsense"))
        sm.send(node_config_status=pb.NodeConfigStatus(state="absent"))
        bad = pb.InstanceStatus(instance=common.InstanceIdent(item_id="x"), state="nonsense")
        good = pb.InstanceStatus(instance=common.InstanceIdent(item_id="y"), state="active")
        sm.send(update_instances_status=pb.UpdateInstancesStatus(instances=[bad, good]))
        ((_, statuses),) = await bed.heard.get("some")
        assert [one.ident.item_id for one in statuses] == ["y"]


async def test_unknown_node(bed: Bed) -> None:
    for call in (
        bed.controller.update_instances("nobody", [], []),
        bed.controller.get_node_config_status("nobody"),
        bed.controller.request_log("nobody", LogRequest(LogKind.SYSTEM, "c")),
    ):
        with pytest.raises(NotFoundError, match="node nobody is not connected"):
            await call


async def test_newest_stream_of_a_node_wins(bed: Bed) -> None:
    older, newer = bed.sm(), bed.sm()
    async with older.connected(bed.port, bed.identity()):
        await bed.heard.get("all")
        async with newer.connected(bed.port, bed.identity()):
            await asyncio.wait_for(older.ended.wait(), 10)
            await bed.heard.get("all", 2)
            await bed.controller.update_instances("n1", [INFO], [])
            await newer.wait(lambda one: one.updates)
            assert older.updates == []
            order = [kind for kind, _ in bed.heard.events if kind in ("info", "lost")]
            assert order == ["info", "lost", "info"]
        await bed.heard.get("lost", 2)


async def test_disconnect_ends_a_waiting_request_at_once(bed: Bed) -> None:
    sm = bed.sm()
    async with sm.connected(bed.port, bed.identity()):
        await bed.heard.get("all")
        sm._answer = lambda frame: None  # type: ignore[method-assign]
        waiting = asyncio.create_task(bed.controller.get_average_monitoring("n1"))
        await sm.wait(lambda one: [f for f in one.received if f.HasField("get_average_monitoring")])
    with pytest.raises(Exception, match="node n1 disconnected"):
        await asyncio.wait_for(waiting, 2)


async def test_blobs(bed: Bed) -> None:
    async with bed.sm().connected(bed.port, bed.identity()) as sm:
        digests = ["sha256:01", "sha256:11"]
        answer = await sm.blobs.GetBlobsInfos(pb.BlobsInfosRequest(digests=digests))
        assert list(answer.urls) == ["http://main:8094/blobs/sha256/01", "http://main:8094/blobs/sha256/11"]
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await sm.blobs.GetBlobsInfos(pb.BlobsInfosRequest(digests=["sha256:01", "sha256:00"]))
        assert error.value.code() is grpc.StatusCode.INTERNAL
        assert "sha256:00" in (error.value.details() or "")


async def test_network_calls(bed: Bed) -> None:
    def instance(item: str) -> common.InstanceIdent:
        return common.InstanceIdent(item_id=item, subject_id="s")

    async with bed.sm().connected(bed.port, bed.identity()) as sm:
        await sm.wait(lambda one: one.received)
        for network in ("o1", "o2"):
            joined = await sm.networks.GetNodeNetworkParams(
                net.GetNodeNetworkParamsRequest(network_id=network, node_id="n1")
            )
            assert not joined.HasField("error")
        wishes = net.UpdateItemNetworkParams(hosts=["client"], allowed_connections=["server/80"])
        allocate = net.AllocateInstanceNetworkRequest
        client = await sm.networks.AllocateInstanceNetwork(
            allocate(instance=instance("client"), network_id="o2", node_id="n1", service_data=wishes)
        )
        assert not client.HasField("error")
        assert (client.ip, list(client.dns_servers), list(client.firewall_rules)) == ("172.18.0.3", ["10.0.0.100"], [])
        wishes = net.UpdateItemNetworkParams(hosts=["server"], exposed_ports=["80"])
        server = await sm.networks.AllocateInstanceNetwork(
            allocate(instance=instance("server"), network_id="o1", node_id="n1", service_data=wishes)
        )
        (update,) = await sm.wait(lambda one: one.network_updates)
        assert update.pending_firewall_update.instance.item_id == "client"
        (rule,) = update.pending_firewall_update.firewall_rules
        assert (rule.dst_ip, rule.dst_port, rule.proto, rule.src_ip) == (server.ip, "80", "tcp", client.ip)
        refused = await sm.networks.AllocateInstanceNetwork(
            allocate(instance=instance("x"), network_id="nowhere", node_id="n1")
        )
        assert refused.error.aos_code == 5
        released = await sm.networks.ReleaseInstanceNetwork(
            net.ReleaseInstanceNetworkRequest(instance=instance("client"), node_id="n1")
        )
        assert not released.HasField("error")
        left = await sm.networks.ReleaseNodeNetwork(net.ReleaseNodeNetworkRequest(network_id="o1", node_id="n1"))
        assert not left.HasField("error")
        empty = await sm.networks.SyncNetworkState(net.SyncNetworkStateRequest())
        assert empty.error.aos_code == 6


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_a_port_alone_is_served_on_addresses_of_both_kinds(bed: Bed, host: str) -> None:
    try:
        with socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
            pass
    except OSError as error:
        pytest.skip(f"this machine has no address {host}: {error}")
    controller = SmController(
        ":0",
        None,
        cloud=bed.cloud,
        networks=bed.networks,
        blob_url=str,
        receivers=bed.heard.receivers(),
        admit=None,
    )
    async with running(controller):
        _, writer = await asyncio.open_connection(host, controller.port)
        writer.close()


async def test_client_without_our_certificate_is_refused(bed: Bed, tmp_path: Path) -> None:
    (tmp_path / "foreign").mkdir()
    foreign = TestCa("Foreign").identity(tmp_path / "foreign", "sm")
    identity = TlsIdentity(bed.server_identity.ca_file, foreign.cert_url, foreign.key_url)
    sm = bed.sm()
    async with sm.connected(bed.port, identity):
        await asyncio.wait_for(sm.ended.wait(), 10)
    assert bed.heard.events == []


async def test_renewed_certificate_is_used_without_losing_sms(bed: Bed) -> None:
    first, second = bed.sm("n1"), bed.sm("n2")
    async with first.connected(bed.port, bed.identity()):
        await bed.heard.get("all")
        (bed.directory / "renewed").mkdir()
        renewed = TestCa("Renewed")
        bed.server_identity = renewed.identity(bed.directory / "renewed", "cm")
        async with second.connected(bed.port, renewed.identity(bed.directory / "renewed", "sm")):
            await bed.heard.get("all", 2)
            await bed.controller.update_instances("n1", [], [])
            await bed.controller.update_instances("n2", [], [])
            await bed.heard.get("all", 4)
    assert [value for kind, value in bed.heard.events[:6] if kind == "lost"] == []


async def test_defect_8_a_stranger_is_refused_on_every_way(bed: Bed) -> None:
    """AosCore 9.1 lets any certificate of the Unit's CA speak for any node (observed.md, defect 8)."""
    bed.strangers.add("n1")
    sm = bed.sm()
    async with sm.connected(bed.port, bed.identity()):
        async with asyncio.timeout(10):
            await sm.ended.wait()
        answer = await sm.networks.GetNodeNetworkParams(
            net.GetNodeNetworkParamsRequest(node_id="n1", network_id="network")
        )
        assert answer.error.message == "a stranger"
        with pytest.raises(grpc.aio.AioRpcError, match="a stranger"):
            async for _ in sm.networks.SubscribeInstanceNetworkUpdates(
                net.SubscribeInstanceNetworkUpdatesRequest(node_id="n1")
            ):
                pass
    assert not [frame for frame in sm.received if not frame.HasField("connection_status")]
    assert not bed.controller.is_node("127.0.0.1")
