"""Launcher, SM controller, node info, storage and database together, with test SMs on a real gRPC server."""

import asyncio
import contextlib
import grp
import pwd
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest

from aoscore._pb.common.v2 import common_pb2 as common
from aoscore._pb.servicemanager.v5 import servicemanager_pb2 as pb
from aoscore.cm.communication import messages
from aoscore.cm.communication.messages import (
    EnvVar,
    EnvVarOverride,
    Identity,
    NodeConfig,
    OverrideEnvVars,
    UnitConfig,
)
from aoscore.cm.storagestate.manager import StorageState
from aoscore.common import oci
from aoscore.common.types import ItemType, NodeState
from tests.support.nodehalf import FAST, NodeHalf, node_half, request
from tests.support.sm import TestSm


@pytest.fixture
async def half(tmp_path: Path) -> AsyncIterator[NodeHalf]:
    async with node_half(tmp_path) as opened:
        yield opened


@contextlib.asynccontextmanager
async def connected(half: NodeHalf, *sms: TestSm) -> AsyncIterator[None]:
    async with contextlib.AsyncExitStack() as stack:
        for sm in sms:
            await stack.enter_async_context(sm.connected(half.controller.port, None))
        yield


def started(sm: TestSm) -> list[str]:
    return [f"{item}#{index}" for item, _, index, _ in sm.starts]


async def soon(what: Callable[[], object], timeout_s: float = 10) -> None:
    async with asyncio.timeout(timeout_s):
        while not what():
            await asyncio.sleep(0.02)


async def quiet(sm: TestSm, for_s: float = 0.5) -> None:
    """Nothing more is sent to the SM."""
    before = len(sm.updates)
    await asyncio.sleep(for_s)
    assert len(sm.updates) == before


async def test_instances_start_in_order(half: NodeHalf) -> None:
    sm = TestSm("n1")
    half.images.configs["a"] = oci.ItemConfig(quotas=oci.Quotas(storage_limit=1000, state_limit=1000))
    async with connected(half, sm):
        await half.launcher.run_instances([request("b", priority=9), request("a", 2)])
        assert await half.settled() == {"b#0": "active@n1", "a#0": "active@n1", "a#1": "active@n1"}
        (update,) = sm.updates
        assert [info.instance.item_id for info in update.start_instances] == ["b", "a", "a"]
        assert not update.stop_instances
        info = update.start_instances[1]
        assert (info.version, info.owner_id, info.runtime_id) == ("1.0.0", "owner", "crun-n1")
        assert (info.manifest_digest, info.uid, info.gid) == ("sha256:a-1.0.0", 5001, 5001)
        assert (info.storage_path, info.state_path) == ("a/subject/0", "a/subject/0/state.dat")
        assert info.HasField("monitoring_parameters")
        await quiet(sm)


async def test_same_request_again_sends_nothing(half: NodeHalf) -> None:
    sm = TestSm("n1")
    async with connected(half, sm):
        await half.launcher.run_instances([request("a")])
        await half.settled()
        await half.launcher.run_instances([request("a")])
        await quiet(sm)
        assert len(sm.updates) == 1


async def test_new_version_and_removal(half: NodeHalf) -> None:
    sm = TestSm("n1")
    async with connected(half, sm):
        await half.launcher.run_instances([request("a", 2)])
        await half.settled()
        await half.launcher.run_instances([request("a", 2, "2.0.0")])
        assert half.overview() == {"a#0": "activating@n1", "a#1": "activating@n1"}
        await half.settled()
        _, update = sm.updates
        assert [(info.version, info.uid) for info in update.start_instances] == [("2.0.0", 5000), ("2.0.0", 5001)]
        assert [ident.instance for ident in update.stop_instances] == [0, 1]
        await half.launcher.run_instances([])
        await soon(lambda: not sm.instances)
        assert half.overview() == {}


async def test_changed_parameter_is_sent(half: NodeHalf) -> None:
    sm = TestSm("n1")
    async with connected(half, sm):
        await half.launcher.run_instances([request("a"), request("b")])
        await half.settled()
        await half.launcher.run_instances([request("a", priority=5), request("b")])
        await soon(lambda: len(sm.updates) == 2)
        await half.settled()
        assert started(sm) == ["a#0", "b#0", "a#0"]


async def test_foreign_instances_are_stopped_preinstalled_ones_are_shown(half: NodeHalf) -> None:
    sm = TestSm("n1")
    for item, preinstalled in (("foreign", False), ("rootfs", True)):
        ident = common.InstanceIdent(item_id=item, subject_id="s", preinstalled=preinstalled)
        sm.instances[item, "s", 0, 0] = pb.InstanceStatus(instance=ident, version="1", state="active")
    async with connected(half, sm):
        await half.launcher.run_instances([request("a")])
        await half.until({"a#0": "active@n1", "rootfs#0": "active@n1"})
        assert [ident.item_id for update in sm.updates for ident in update.stop_instances] == ["foreign"]


async def test_failed_instance_is_tried_again_with_stop_and_start(half: NodeHalf) -> None:
    sm = TestSm("n1")
    sm.broken.add("a")
    async with connected(half, sm):
        await half.launcher.run_instances([request("a"), request("b")])
        assert await half.settled() == {"a#0": "failed@n1", "b#0": "active@n1"}
        status = half.status("a").status
        assert status.error is not None
        assert (status.error.aos_code, status.error.message) == (5, "not found")
        await soon(lambda: len(sm.updates) >= 3)
        assert [ident.item_id for ident in sm.updates[1].stop_instances] == ["a"]
        sm.broken.clear()
        await half.until({"a#0": "active@n1", "b#0": "active@n1"})
        assert started(sm).count("b#0") == 1
        await quiet(sm)
        alerts = [item for one in half.cloud.sent if isinstance(one, messages.Alerts) for item in one.items]
        assert ["fails again and again" in getattr(alert, "message", "") for alert in alerts] == [True]


async def test_crash_is_reported_and_healed(half: NodeHalf) -> None:
    sm = TestSm("n1")
    async with connected(half, sm):
        await half.launcher.run_instances([request("a")])
        await half.settled()
        with half.launcher.changed.subscribe() as changes:
            sm.set_state(("a", "subject", 0, 0), "failed", "exit=1")
            (one,) = await asyncio.wait_for(changes.get(), 5)
            assert one.status.error is not None
            assert (one.status.state, one.status.error.message) == ("failed", "exit=1")
        await half.until({"a#0": "active@n1"})


async def test_instance_that_the_node_forgets_is_sent_again(half: NodeHalf) -> None:
    sm = TestSm("n1")
    async with connected(half, sm):
        await half.launcher.run_instances([request("a")])
        await half.settled()
        sm.instances.clear()
        sm.infos.clear()
        sm.send(node_instances_status=pb.NodeInstancesStatus())
        await soon(lambda: len(sm.starts) == 2)
        assert await half.settled() == {"a#0": "active@n1"}


async def test_silent_node_is_asked_again_with_pauses(half: NodeHalf) -> None:
    sm = TestSm("n1")
    sm.silent = True
    async with connected(half, sm):
        await half.launcher.run_instances([request("a")])
        await half.until({"a#0": "failed@n1"})
        error = half.status("a").status.error
        assert error is not None
        assert error.aos_code == 7
        assert len(sm.updates) == 1
        sm.silent = False
        await half.until({"a#0": "active@n1"})


async def test_disconnect_while_updating(half: NodeHalf) -> None:
    sm = TestSm("n1")
    sm.silent = True
    async with connected(half, sm):
        await half.launcher.run_instances([request("a")])
        await soon(lambda: sm.updates)
    sm.silent = False
    async with connected(half, sm):
        assert await half.settled() == {"a#0": "active@n1"}
        assert len(sm.updates) == 2


async def test_reconnect_sends_nothing(half: NodeHalf) -> None:
    sm = TestSm("n1")
    async with connected(half, sm):
        await half.launcher.run_instances([request("a", 3)])
        await half.settled()
    async with connected(half, sm):
        await soon(lambda: half.nodes.nodes()[0].is_usable)
        await quiet(sm)
        assert len(sm.updates) == 1


async def test_request_waits_for_a_node_that_should_be_there(tmp_path: Path) -> None:
    async with node_half(tmp_path, sm_timeout_s=5) as half:
        sm = TestSm("n1")
        running = asyncio.create_task(half.launcher.run_instances([request("a")]))
        await asyncio.sleep(0.2)
        assert not running.done()
        async with connected(half, sm):
            await running
            assert await half.settled() == {"a#0": "active@n1"}


async def test_request_that_is_not_wanted_any_more_changes_nothing(half: NodeHalf) -> None:
    """Neither while nodes are awaited nor while one does not tell how busy it is."""
    sm = TestSm("n1")
    sm.average = None
    unplaced = asyncio.create_task(half.launcher.run_instances([request("b")]))
    await asyncio.sleep(0)
    unplaced.cancel()
    async with connected(half, sm):
        running = asyncio.create_task(half.launcher.run_instances([request("a")]))
        await sm.wait(lambda sm: [one for one in sm.received if one.HasField("get_average_monitoring")])
        running.cancel()
        await asyncio.wait({running, unplaced})
        assert running.cancelled() and unplaced.cancelled()
        assert half.launcher.requests() == [] and half.overview() == {}
        assert await half.db.select("SELECT * FROM launcher_run_requests") == []
        assert await half.db.select("SELECT * FROM launcher_instances") == []


async def test_defect_8_request_does_not_wait_for_a_missing_node(tmp_path: Path) -> None:
    """A node that is long gone blocks every update of AosCore 9.1 (observed.md, defect 8)."""
    async with node_half(tmp_path, node_ids=("n1", "n2"), sm_timeout_s=0.3) as half:
        async with connected(half, TestSm("n1")):
            await half.launcher.run_instances([request("a", 2)])
            assert await half.settled() == {"a#0": "active@n1", "a#1": "active@n1"}


async def test_lost_node_gives_its_instances_to_others_and_stops_them_when_it_is_back(tmp_path: Path) -> None:
    async with node_half(tmp_path, node_ids=("n1", "n2"), sm_timeout_s=0.5) as half:
        half.images.configs["a"] = oci.ItemConfig(requested_resources=oci.RequestedResources(cpu=600))
        first, second = TestSm("n1"), TestSm("n2")
        async with connected(half, second):
            async with connected(half, first):
                await half.launcher.run_instances([request("a"), request("b")])
                assert await half.settled() == {"a#0": "active@n1", "b#0": "active@n2"}
            await half.until({"a#0": "active@n2", "b#0": "active@n2"})
            async with connected(half, first):
                await soon(lambda: not first.instances)
                await quiet(second)
                assert half.overview() == {"a#0": "active@n2", "b#0": "active@n2"}


async def test_lost_node_whose_instances_fit_nowhere_keeps_them(tmp_path: Path) -> None:
    async with node_half(tmp_path, node_ids=("n1", "n2"), sm_timeout_s=0.3) as half:
        half.images.configs["a"] = oci.ItemConfig(runtimes=(oci.RuntimeRef("runx"),))
        runx = pb.RuntimeInfo(runtime_id="rt", type="runx")
        first, second = TestSm("n1", (runx,)), TestSm("n2")
        async with connected(half, second):
            async with connected(half, first):
                await half.launcher.run_instances([request("a")])
                assert await half.settled() == {"a#0": "active@n1"}
            await half.until({"a#0": "failed@n1"})
            error = half.status("a").status.error
            assert error is not None
            assert "node n1 is not available" in error.message
            async with connected(half, first):
                await half.until({"a#0": "active@n1"})
                assert started(first) == ["a#0"]


async def test_paused_node_gets_nothing(tmp_path: Path) -> None:
    async with node_half(tmp_path, node_ids=("n1", "n2")) as half:
        first, second = TestSm("n1"), TestSm("n2")
        half.iam.set_node("n1", state=NodeState.PAUSED)
        async with connected(half, first, second):
            await half.launcher.run_instances([request("a")])
            assert await half.settled() == {"a#0": "active@n2"}
            assert first.updates == []


async def test_paused_node_stops_what_no_other_can_run(tmp_path: Path) -> None:
    async with node_half(tmp_path, node_ids=("n1",)) as half:
        sm = TestSm("n1")
        async with connected(half, sm):
            await half.launcher.run_instances([request("a")])
            assert await half.settled() == {"a#0": "active@n1"}
            half.iam.set_node("n1", state=NodeState.PAUSED)
            await half.launcher.run_instances([request("a")])
            await soon(lambda: sm.updates and len(sm.updates[-1].stop_instances) == 1)
            half.iam.set_node("n1", state=NodeState.PROVISIONED)
            await half.until({"a#0": "active@n1"})
            assert started(sm) == ["a#0", "a#0"]


async def test_instance_without_place_is_placed_when_a_node_can(half: NodeHalf) -> None:
    half.images.configs["a"] = oci.ItemConfig(resources=(oci.ResourceRef("gpu"),))
    sm = TestSm("n1")
    async with connected(half, sm):
        await half.launcher.run_instances([request("a")])
        assert half.overview() == {"a#0": "failed@"}
        error = half.status("a").status.error
        assert error is not None
        assert (error.aos_code, error.message) == (5, "no nodes with service resources")
        sm.info.resources.append(pb.ResourceInfo(name="gpu", shared_count=1))
        sm.send(sm_info=sm.info)
        await half.until({"a#0": "active@n1"})


async def test_missing_image_heals_by_itself(half: NodeHalf) -> None:
    half.images.missing.add("a")
    async with connected(half, TestSm("n1")):
        await soon(lambda: half.nodes.nodes()[0].is_usable)
        await asyncio.sleep(0.3)  # nothing else must be what starts the next try
        await half.launcher.run_instances([request("a")])
        assert half.overview() == {"a#0": "failed@"}
        half.images.missing.clear()
        await half.until({"a#0": "active@n1"})


async def test_overloaded_node_gives_work_away(tmp_path: Path) -> None:
    async with node_half(tmp_path, node_ids=("n1", "n2")) as half:
        rules = messages.AlertRules(cpu=messages.PercentRule(min_threshold=75, max_threshold=75))
        part = NodeConfig(node_group_subject=Identity(codename="main"), node=Identity(codename="n1"))
        first, second = TestSm("n1"), TestSm("n2")
        async with connected(half, first, second):
            await soon(lambda: all(node.is_usable for node in half.nodes.nodes()))
            await half.unit_config.update(
                UnitConfig(version="1.0.0", nodes=(msgspec.structs.replace(part, priority=9, alert_rules=rules),))
            )
            half.images.configs = {
                item: oci.ItemConfig(requested_resources=oci.RequestedResources(cpu=500)) for item in "ab"
            }
            await half.launcher.run_instances([request("a", priority=9), request("b", priority=1)])
            assert await half.settled() == {"a#0": "active@n1", "b#0": "active@n1"}
            assert first.average is not None
            first.average.node_monitoring.cpu = 1000
            for item in "ab":
                sample = first.average.instances_monitoring.add()
                sample.instance.CopyFrom(common.InstanceIdent(item_id=item, subject_id="subject"))
                sample.monitoring_data.cpu = 500
            alert = pb.SystemQuotaAlert(parameter="cpu", value=1000, status="raise")
            first.send(alert=pb.Alert(timestamp={"seconds": 5}, system_quota_alert=alert))
            await half.until({"a#0": "active@n1", "b#0": "active@n2"})
            assert started(first).count("a#0") == 1


async def test_subjects(half: NodeHalf) -> None:
    sm = TestSm("n1")
    async with connected(half, sm):
        await half.launcher.run_instances([request("a", is_unit_subject=True), request("b")])
        assert await half.settled() == {"b#0": "active@n1"}
        half.iam.set_subjects("subject")
        await half.until({"a#0": "active@n1", "b#0": "active@n1"})
        half.iam.set_subjects()
        await soon(lambda: list(sm.instances) == [("b", "subject", 0, 0)])


async def test_component_everywhere(tmp_path: Path) -> None:
    async with node_half(tmp_path, node_ids=("n1", "n2", "n3")) as half:
        half.images.configs["c"] = oci.ItemConfig(runtimes=(oci.RuntimeRef("rootfs"),))
        rootfs = tuple(pb.RuntimeInfo(runtime_id=f"rootfs-{node}", type="rootfs") for node in ("n1", "n2"))
        first, second, third = TestSm("n1", rootfs[:1]), TestSm("n2", rootfs[1:]), TestSm("n3")
        async with connected(half, first, second, third):
            await half.launcher.run_instances([request("c", 0, item_type=ItemType.COMPONENT)])
            assert await half.settled() == {"c#0": "active@n1", "c#1": "active@n2"}
            info = second.updates[0].start_instances[0]
            assert (info.uid, info.instance.type, info.HasField("monitoring_parameters")) == (
                0,
                common.COMPONENT,
                False,
            )
            assert third.updates == []


async def test_overridden_variables_restart_only_whom_they_concern(half: NodeHalf) -> None:
    sm = TestSm("n1")
    async with connected(half, sm):
        await half.launcher.run_instances([request("a"), request("b")])
        await half.settled()
        later = datetime.now(UTC) + timedelta(seconds=0.6)
        past = datetime.now(UTC) - timedelta(seconds=1)
        variables = (
            EnvVar(name="FIRST", value="1", ttl=later),
            EnvVar(name="SECOND", value="2"),
            EnvVar(name="THIRD", value="3", ttl=past),
        )
        override = OverrideEnvVars(items=(EnvVarOverride(item=Identity(id="a"), variables=variables),))
        await half.launcher.override_env_vars(msgspec.structs.replace(override, correlation_id="c1"))
        await soon(lambda: started(sm).count("a#0") == 2)
        sent = {
            info.instance.item_id: [(v.name, v.value) for v in info.env_vars] for info in sm.updates[1].start_instances
        }
        assert sent == {"a": [("FIRST", "1"), ("SECOND", "2")], "b": []}
        await soon(lambda: started(sm).count("a#0") == 3)
        assert [v.name for v in sm.updates[2].start_instances[0].env_vars] == ["SECOND"]
        assert started(sm).count("b#0") == 1

        def reports() -> list[tuple[str, list[str]]]:
            return [
                (one.correlation_id, [status.name for status in one.statuses])
                for one in half.cloud.sent
                if isinstance(one, messages.OverrideEnvVarsStatus)
            ]

        await soon(lambda: reports() == [("c1", ["FIRST", "SECOND"]), ("c1", ["SECOND"])])
        # Asked for again, nothing changes, and the cloud hears that it is so.
        again = EnvVarOverride(item=Identity(id="a"), variables=variables[1:2])
        await half.launcher.override_env_vars(OverrideEnvVars(items=(again,), correlation_id="c2"))
        await soon(lambda: reports()[2:] == [("c2", ["SECOND"])])
        await quiet(sm)
        # Another value, the same result: told once the node has said so.
        sm.silent = True
        other = msgspec.structs.replace(again, variables=(EnvVar(name="SECOND", value="other"),))
        await half.launcher.override_env_vars(OverrideEnvVars(items=(other,), correlation_id="c3"))
        await soon(lambda: len(sm.updates) == 4)
        assert len(reports()) == 3
        sm.silent = False
        sm._update(sm.updates[-1])
        sm.send(node_instances_status=sm._full_list())
        await soon(lambda: reports()[3:] == [("c3", ["SECOND"])])


async def test_nothing_starts_with_a_variable_that_expired_while_cm_was_away(tmp_path: Path) -> None:
    sm = TestSm("n1")
    async with node_half(tmp_path) as half, connected(half, sm):
        await half.launcher.run_instances([request("a")])
        await half.settled()
        soon_over = datetime.now(UTC) + timedelta(seconds=0.3)
        variables = (EnvVar(name="FIRST", value="1", ttl=soon_over), EnvVar(name="SECOND", value="2"))
        await half.launcher.override_env_vars(OverrideEnvVars(items=(EnvVarOverride(variables=variables),)))
        await soon(lambda: len(sm.starts) == 2)
    await asyncio.sleep(0.3)
    slow = msgspec.structs.replace(FAST, check_env_vars_period_s=60.0)
    sm.instances.clear()
    sm.infos.clear()
    async with node_half(tmp_path, settings=slow) as half, connected(half, sm):
        await soon(lambda: len(sm.starts) == 3)
        assert [one.name for one in sm.updates[-1].start_instances[0].env_vars] == ["SECOND"]
        rows = await half.db.select("SELECT variables FROM launcher_override_envvars")
        assert rows == [('[{"name":"SECOND","value":"2"}]',)]


async def test_restart_touches_nothing(tmp_path: Path) -> None:
    sm = TestSm("n1")
    configs = {"a": oci.ItemConfig(quotas=oci.Quotas(storage_limit=10))}
    async with node_half(tmp_path, configs=configs) as half, connected(half, sm):
        await half.launcher.run_instances([request("a", 3), request("b", priority=2)])
        before = await half.settled()
        rows = await half.db.select("SELECT * FROM launcher_instances ORDER BY itemID, instance")
    async with node_half(tmp_path, configs=configs) as half:
        assert set(half.overview().values()) == {"activating@n1"}
        async with connected(half, sm):
            await half.until(before)
            await quiet(sm)
            assert len(sm.updates) == 1
            assert await half.db.select("SELECT * FROM launcher_instances ORDER BY itemID, instance") == rows


async def test_node_that_stays_away_after_a_restart_is_given_up_and_its_instances_keep_their_place(
    tmp_path: Path,
) -> None:
    """AosCore 9.1 takes the place away and tells nobody (cm-orchestration §10.2, item 16)."""
    sm = TestSm("n1")
    async with node_half(tmp_path) as half, connected(half, sm):
        await half.launcher.run_instances([request("a")])
        await half.settled()
    settings = msgspec.structs.replace(FAST, nodes_connection_timeout_s=0.3)
    async with node_half(tmp_path, settings=settings, sm_timeout_s=60) as half:
        with half.launcher.changed.subscribe() as changes:
            await half.until({"a#0": "failed@n1"})
            told = await asyncio.wait_for(changes.get(), 5)
        error = told[0].status.error
        assert error is not None and (error.aos_code, error.message) == (7, "node n1 did not connect")
        async with connected(half, sm):
            await half.until({"a#0": "active@n1"})
            assert started(sm) == ["a#0"]


async def test_data_go_with_the_last_version_of_an_instance(tmp_path: Path) -> None:
    """AosCore 9.1 removes them with the first outdated one (cm-orchestration §10.2, item 9)."""
    sm = TestSm("n1")
    configs = {"a": oci.ItemConfig(quotas=oci.Quotas(storage_limit=10))}
    settings = msgspec.structs.replace(FAST, instance_ttl_s=0.0)
    async with node_half(tmp_path, settings=settings, configs=configs) as half, connected(half, sm):
        await half.launcher.run_instances([request("a")])
        await half.settled()
        file = tmp_path / "storages" / "a" / "subject" / "0" / "file"
        file.touch()
        await half.launcher.run_instances([request("a", version="2.0.0")])
        assert await half.db.select("SELECT version FROM launcher_instances") == [("2.0.0",)]
        assert file.exists()
        await half.launcher.run_instances([])
        assert await half.db.select("SELECT version FROM launcher_instances") == []
        assert not file.exists()


async def test_ids_of_system_accounts_are_not_given_out(half: NodeHalf, monkeypatch: pytest.MonkeyPatch) -> None:
    """AosCore 9.1 asks for groups where users are meant, and the reverse (cm-orchestration §10.3, item 24)."""

    def only(known: int) -> Callable[[int], object]:
        def look_up(number: int) -> object:
            if number != known:
                raise KeyError(number)
            return number

        return look_up

    monkeypatch.setattr(pwd, "getpwuid", only(5000))
    monkeypatch.setattr(grp, "getgrgid", only(5001))
    sm = TestSm("n1")
    async with connected(half, sm):
        await half.launcher.run_instances([request("a"), request("b")])
        await half.settled()
        (update,) = sm.updates
        assert [(info.uid, info.gid) for info in update.start_instances] == [(5001, 5000), (5002, 5002)]


async def test_running_instance_whose_image_is_gone_is_left_alone(tmp_path: Path) -> None:
    sm = TestSm("n1")
    configs = {"a": oci.ItemConfig(quotas=oci.Quotas(storage_limit=10))}
    async with node_half(tmp_path, configs=configs) as half, connected(half, sm):
        await half.launcher.run_instances([request("a")])
        await half.settled()
    async with node_half(tmp_path, configs=configs, missing=["a"]) as half, connected(half, sm):
        await half.until({"a#0": "failed@n1"})
        await half.launcher.run_instances([request("a"), request("b")])
        await half.until({"a#0": "failed@n1", "b#0": "active@n1"})
        assert started(sm) == ["a#0", "b#0"]
        assert ("a", "subject", 0, 0) in sm.instances
        assert (tmp_path / "storages" / "a").is_dir()
        half.images.missing.clear()
        await half.until({"a#0": "active@n1", "b#0": "active@n1"})
        assert started(sm) == ["a#0", "b#0"]


async def test_trouble_with_data_stops_nothing_that_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    sm = TestSm("n1")
    configs = {item: oci.ItemConfig(quotas=oci.Quotas(state_limit=10)) for item in "ab"}
    async with node_half(tmp_path, configs=configs) as half, connected(half, sm):
        await half.launcher.run_instances([request("a")])
        await half.settled()
    with monkeypatch.context() as patch:
        patch.setattr(StorageState, "setup", fail)
        async with node_half(tmp_path, configs=configs) as half, connected(half, sm):
            await half.launcher.run_instances([request("a"), request("b")])
            await half.until({"a#0": "failed@n1", "b#0": "failed@"})
            await quiet(sm)
            assert started(sm) == ["a#0"]
            assert len(sm.updates) == 1


async def test_lost_database_stops_nothing_before_the_cloud_has_spoken(tmp_path: Path) -> None:
    sm = TestSm("n1")
    async with node_half(tmp_path) as half, connected(half, sm):
        await half.launcher.run_instances([request("a")])
        await half.settled()
    for file in tmp_path.glob("cm.db*"):
        file.unlink()
    async with node_half(tmp_path, hold=True) as half, connected(half, sm):
        await quiet(sm)
        await half.launcher.run_instances([request("a")])
        await half.until({"a#0": "active@n1"})
        assert started(sm) == ["a#0"]


async def test_monitoring_tells_states_of_instances(half: NodeHalf) -> None:
    async with connected(half, TestSm("n1")):
        await half.launcher.run_instances([request("a")])
        await half.settled()

        def states() -> list[str]:
            return [
                change.state
                for one in half.cloud.sent
                if isinstance(one, messages.MonitoringData)
                for instance in one.instances
                for change in instance.item_states
            ]

        await soon(lambda: states() == ["activating", "active"])
