"""CM against the local cloud: real discovery, mutual TLS, encrypted and signed blobs, and the cloud's own checks."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from aoscore._pb.servicemanager.v5 import servicemanager_pb2 as pb
from tests.support.devcloud import DevcloudProcess, MiniUnit, write_service
from tests.support.iam import Client, Iam
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
