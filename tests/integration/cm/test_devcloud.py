"""CM against the local cloud: real discovery, mutual TLS, encrypted and signed blobs, and the cloud's own checks."""

import asyncio
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from aoscore._pb.iamanager.v6 import iamanager_pb2 as iam_pb
from aoscore._pb.servicemanager.v5 import servicemanager_pb2 as pb
from tests.support.devcloud import DevcloudProcess, MiniUnit, write_service
from tests.support.iam import Client, Iam, wait_until
from tests.support.pki import TestCa
from tests.support.unitbed import NODE_ID, UnitBed, unit_bed

pytestmark = pytest.mark.timeout(120)


class _Authority:
    """The cloud's CA as IAM needs it here."""

    def __init__(self, root_pem: bytes) -> None:
        self.root_pem = root_pem


class _ProvisionedByIam(MiniUnit):
    """Registers a Unit whose keys are in an IAM process."""

    node_id = NODE_ID

    def __init__(self, cloud: DevcloudProcess, client: Client) -> None:
        super().__init__(cloud)
        self._client = client

    def csr(self, cert_type: str) -> str:
        return self._client.create_key(cert_type)

    def apply(self, cert_type: str, chain: str) -> str:
        return str(self._client.apply(cert_type, chain).serial)


@pytest.fixture
def iam(tmp_path: Path, cloud: DevcloudProcess) -> Iterator[Iam]:
    (tmp_path / "iam").mkdir()
    unit_iam = Iam(tmp_path / "iam", _Authority(cloud.root_file.read_bytes()))  # type: ignore[arg-type]
    unit_iam.start(provisioning=True)
    with unit_iam.plain() as client:
        client.start_provisioning("password")  # the one MiniUnit gives to the cloud
        _ProvisionedByIam(cloud, client).provision()
        client.finish_provisioning()
    unit_iam.stop()
    unit_iam.start()
    yield unit_iam
    unit_iam.kill()


def settings(cloud: DevcloudProcess) -> dict[str, Any]:
    return {"serviceDiscoveryUrl": f"https://localhost:{cloud.ports['discovery_port']}/sd/v7/"}


async def run(cloud: DevcloudProcess, *arguments: str) -> str:
    return await asyncio.to_thread(cloud.run, *arguments)


async def call(cloud: DevcloudProcess, name: str, **arguments: Any) -> Any:
    return await asyncio.to_thread(lambda: cloud.client.call(name, **arguments))


def versions(bed: UnitBed) -> set[str]:
    return set(bed.running.values())


async def test_deploy_update_and_remove(tmp_path: Path, cloud: DevcloudProcess, iam: Iam) -> None:
    (tmp_path / "unit").mkdir()
    await run(cloud, "user-cert", "--role", "sp")
    await run(cloud, "upload", str(write_service(tmp_path / "service")))
    async with unit_bed(tmp_path / "unit", iam, ca=TestCa(), **settings(cloud)) as bed:
        await bed.start()
        await run(cloud, "assign", "hello", "unit-1")
        await bed.until(lambda: versions(bed) == {"1.0.0"} and bed.phase == "none")
        await run(cloud, "upload", str(write_service(tmp_path / "service", "1.1.0")))
        await bed.until(lambda: versions(bed) == {"1.1.0"} and bed.phase == "none")
        assert list(bed.items.values()) == ["installed"]
        # A cloud that goes away and comes back finds the Unit as it was.
        await asyncio.to_thread(cloud.stop)
        await bed.until(lambda: "Cloud connection lost" in bed.log() or "closed the connection" in bed.log())
        ports = cloud.ports
        fixed = [f"--{name}-port={ports[f'{name}_port']}" for name in ("rest", "discovery", "blob")]
        await asyncio.to_thread(cloud.start, *fixed)
        await bed.until(lambda: bed.new_log().count("Connected to the cloud") == 2)
        await run(cloud, "unassign", "hello", "unit-1")
        await bed.until(lambda: versions(bed) == set() and bed.phase == "none")
        assert await bed.stop() == 0
        assert "not signed" not in bed.log()
    assert await call(cloud, "violations", unit="unit-1") == []


async def test_certificates_are_renewed(tmp_path: Path, cloud: DevcloudProcess, iam: Iam) -> None:
    (tmp_path / "unit").mkdir()
    async with unit_bed(tmp_path / "unit", iam, ca=TestCa(), **settings(cloud)) as bed:
        await bed.start()
        await bed.until(lambda: "Connected to the cloud" in bed.new_log())
        before = await call(cloud, "certificates", unit="unit-1")
        await call(cloud, "renew", unit="unit-1")

        async def renewed() -> bool:
            return any(entry["status"] == "renew_done" for entry in await call(cloud, "certificates", unit="unit-1"))

        async with asyncio.timeout(30):
            while not await renewed():
                await asyncio.sleep(0.2)
        assert before and bed.is_alive
        # SMs come back with the new certificate of CM, the cloud link with the new online certificate.
        await bed.kill()
        await bed.start()
        await bed.until(lambda: "Connected to the cloud" in bed.new_log() and "SM connected" in bed.new_log())
    assert await call(cloud, "violations", unit="unit-1") == []


async def test_a_log_is_uploaded_by_https(tmp_path: Path, cloud: DevcloudProcess, iam: Iam) -> None:
    """By a busy server it is taken at the second try; of a refusal the cloud hears over the link."""
    (tmp_path / "unit").mkdir()
    trust = {"imageManager": {"downloadCaCert": str(cloud.root_file)}}
    async with unit_bed(tmp_path / "unit", iam, ca=TestCa(), **settings(cloud), **trust) as bed:
        await bed.start()
        await bed.until(lambda: "Connected to the cloud" in bed.new_log() and "SM connected" in bed.new_log())

        async def log(number: int, *statuses: int) -> dict[str, Any]:
            for status in statuses:
                await call(cloud, "add_fault", fault={"kind": "http_status", "on": "log", "status": status})
            asking = asyncio.create_task(call(cloud, "logs", unit="unit-1", https=True))
            asked = await bed.sm.wait(
                lambda sm: [one for one in sm.received if one.HasField("system_log_request")][number:], timeout_s=30
            )
            correlation_id = asked[0].system_log_request.correlation_id
            bed.sm.send(log=pb.LogData(correlation_id=correlation_id, part_count=1, part=1, data=b"log", status="ok"))
            return dict((await asking)[NODE_ID])

        taken = await log(0, 503)
        assert (taken["status"], taken["text"], taken["error"]) == ("ok", "log", None)
        assert await call(cloud, "messages", unit="unit-1", message_type="pushLog") != []
        sent = [line for line in bed.new_log().splitlines() if "Upload of a log is tried again" in line]
        assert len(sent) == 1 and "answered 503" in sent[0]
        refused = await log(1, 403)
        assert (refused["status"], refused["text"]) == ("error", "")
        assert "answered 403" in refused["error"]["message"]
        journal = await call(cloud, "messages", unit="unit-1", message_type="requestLog")
        assert len(journal) == 2 and all(one["data"]["uploadOptions"]["bearerToken"] == "***" for one in journal)
    assert await call(cloud, "violations", unit="unit-1") == []


def reaches(main: Iam, node_id: str) -> bool:
    """Whether requests of the Main Node reach another one."""
    with main.secure() as client:
        try:
            client.provisioning.GetCertTypes(iam_pb.GetCertTypesRequest(node_id=node_id))
        except grpc.RpcError:
            return False
    return True


async def test_a_node_is_added_and_removed_by_the_cloud(tmp_path: Path, cloud: DevcloudProcess, iam: Iam) -> None:
    """From the cloud's request through CM and the Main Node's IAM to the IAM of a Secondary Node, and back."""
    (tmp_path / "unit").mkdir()
    (tmp_path / "second").mkdir()
    second = Iam(tmp_path / "second", iam.authority, node_id="node-2", main=iam)

    async def states() -> dict[str, str]:
        status = (await call(cloud, "unit", unit="unit-1"))["status"]
        return {node["identity"]["codename"]: node["state"] for node in status.get("nodes", [])}

    async def until_state(state: str) -> None:
        try:
            async with asyncio.timeout(60):
                while (await states()).get("node-2") != state:
                    await asyncio.sleep(0.2)
        except TimeoutError:
            raise AssertionError(f"node-2 is not {state}; CM said:\n{bed.new_log()[-4000:]}") from None

    async def answer(kind: str) -> dict[str, Any]:
        async with asyncio.timeout(60):
            while not (found := await call(cloud, "messages", unit="unit-1", message_type=kind)):
                await asyncio.sleep(0.2)
        return dict(found[-1]["data"])

    async with unit_bed(tmp_path / "unit", iam, ca=TestCa(), **settings(cloud)) as bed:
        await bed.start()
        await bed.until(lambda: "Connected to the cloud" in bed.new_log())
        try:
            await asyncio.to_thread(second.start, provisioning=True)
            await until_state("unprovisioned")
            await call(cloud, "start_provisioning", unit="unit-1", node="node-2", password="password")
            assert "errorInfo" not in await answer("startProvisioningResponse")
            assert "errorInfo" not in await answer("finishProvisioningResponse")
            assert second.state_file.read_text() == "provisioned"
            await asyncio.to_thread(second.stop)
            await asyncio.to_thread(second.start)
            await asyncio.to_thread(wait_until, lambda: reaches(iam, "node-2"))
            await until_state("provisioned")
            types = {
                one["type"]
                for one in await call(cloud, "certificates", unit="unit-1")
                if one["node_id"] == "node-2" and one["status"] == "issued"
            }
            assert types == {"iam", "sm"}
            await call(cloud, "deprovision", unit="unit-1", node="node-2")
            assert "errorInfo" not in await answer("deprovisioningResponse")
            await until_state("unprovisioned")
        finally:
            await asyncio.to_thread(second.kill)
        assert "password" not in bed.log()
    assert await call(cloud, "violations", unit="unit-1") == []


async def test_states_variables_and_unit_config(tmp_path: Path, cloud: DevcloudProcess, iam: Iam) -> None:
    (tmp_path / "unit").mkdir()
    folder = write_service(tmp_path / "service", quotas={"stateLimit": "1KiB"}, state={"required": True})
    (folder / "hello" / "default_state.dat").write_text("counter=0")
    await run(cloud, "user-cert", "--role", "sp")
    await run(cloud, "upload", str(folder))

    async def said(kind: str, count: int = 1) -> list[dict[str, Any]]:
        """So many messages of a type, of the Unit or of the cloud."""
        async with asyncio.timeout(60):
            while len(found := await call(cloud, "messages", unit="unit-1", message_type=kind)) < count:
                await asyncio.sleep(0.2)
        return [entry["data"] for entry in found]

    async def until_status(condition: Callable[[dict[str, Any]], object]) -> None:
        async with asyncio.timeout(60):
            while not condition((await call(cloud, "unit", unit="unit-1"))["status"]):
                await asyncio.sleep(0.2)

    async with unit_bed(tmp_path / "unit", iam, ca=TestCa(), **settings(cloud)) as bed:
        await bed.start()
        await run(cloud, "assign", "hello", "unit-1")
        await bed.until(lambda: versions(bed) == {"1.0.0"} and bed.phase == "none")
        (state,) = (tmp_path / "unit" / "work" / "states").rglob("state.dat")
        await bed.until(lambda: state.read_text() == "counter=0")  # that of the bundle
        state.write_text("counter=7")
        (new,) = await said("newState")
        (accepted,) = await said("stateAcceptance")
        checksum = hashlib.sha3_224(b"counter=7").hexdigest()
        assert (new["state"], new["stateChecksum"]) == ("counter=7", checksum)
        assert (accepted["result"], accepted["checksum"]) == ("accepted", checksum)

        await call(cloud, "override_env", unit="unit-1", items=[{"variables": [{"name": "A", "value": "1"}]}])
        (result,) = await said("overrideEnvVarsStatus")
        assert [(one["name"], one.get("errorInfo")) for one in result["statuses"]] == [("A", None)]
        (info,) = bed.sm.infos.values()
        assert [(one.name, one.value) for one in info.env_vars] == [("A", "1")]

        part = {"nodeGroupSubject": {"codename": "main-type"}, "priority": 5}
        await call(
            cloud, "unit_config", unit="unit-1", config={"formatVersion": "7", "version": "1.0.0", "nodes": [part]}
        )
        installed = [{"version": "1.0.0", "state": "installed"}]
        await until_status(lambda status: status["unitConfig"] == installed)
        assert bed.sm.config[0] == "1.0.0" and '"priority":5' in bed.sm.config[1]

        # The next process has all of it, and asks for nothing.
        await bed.kill()
        await bed.start()
        await until_status(
            lambda status: (
                [one.get("stateChecksum") for group in status["instances"] for one in group["instances"]] == [checksum]
            )
        )
        assert len(await said("newState")) == 1 and len(await said("stateRequest")) == 1
        assert state.read_text() == "counter=7" and len(bed.sm.starts) == 2
    assert await call(cloud, "violations", unit="unit-1") == []
