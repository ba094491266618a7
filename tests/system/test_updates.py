"""Updates of a Unit of two nodes with its keys in tokens: ones that fail, wait, or are overtaken (bed C)."""

import json
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

import pytest

from tests.support.nspawn import NspawnUnit
from tests.support.wholeunit import (
    containers,
    instances,
    upload_service,
    wait_active,
)
from tests.system.conftest import all_well, running_pair

pytestmark = [pytest.mark.nspawn, pytest.mark.timeout(600)]

PYTHON = "/opt/aoscore/bin/python"
# As a program of the Unit's maker on the Main Node, with the certificate of SM: IAM tells where its key is.
_TRIGGER = """
import asyncio, os, sys
from pathlib import Path
from google.protobuf.empty_pb2 import Empty
from aoscore._pb.communicationmanager.v3 import updatescheduler_pb2_grpc as cm
from aoscore._pb.iamanager.v6 import iamanager_pb2 as iam_pb, iamanager_pb2_grpc as iam
from aoscore.common.rpc import open_tls_channel
from aoscore.common.tls import TlsIdentity, TlsRoots

async def main():
    roots = Path("/usr/share/ca-certificates/aos/AosRootCA.crt")
    async with await open_tls_channel("main:8090", TlsRoots(roots)) as channel:
        info = await iam.IAMPublicCertServiceStub(channel).GetCert(iam_pb.GetCertRequest(type="sm"), timeout=20)
    async with await open_tls_channel("main:8096", TlsIdentity(roots, info.cert_url, info.key_url)) as channel:
        await cm.UpdateSchedulerServiceStub(channel).StartSOTAUpdate(Empty(), timeout=20)

asyncio.run(main())
sys.stdout.flush()
# As the daemons do: SoftHSM and OpenSSL's provider do not always agree on who goes first.
os._exit(0)
"""


@pytest.fixture(scope="module")
def provisioned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NspawnUnit]:
    with running_pair(tmp_path_factory.mktemp("unit")) as unit:
        yield unit


@pytest.fixture
def unit(provisioned: NspawnUnit) -> Iterator[NspawnUnit]:
    with all_well(provisioned) as unit:
        yield unit
    assert unit.ask("violations") == []


def set_schedule(unit: NspawnUnit, rule: dict[str, Any]) -> None:
    """Give CM a rule for when updates of services may start."""
    main = unit.nodes["main"]
    config = json.loads(main.run("cat", "/etc/aos/cm.cfg"))
    config["updateScheduler"] = {"serverUrl": ":8096", "sota": rule}
    main.run("sh", "-c", f"cat > /etc/aos/cm.cfg <<'END'\n{json.dumps(config)}\nEND\nsystemctl restart aos-cm")
    unit.wait(unit.is_online, 60, "the Unit to be online again")


def item_state(unit: NspawnUnit, version: str) -> str:
    """What the cloud knows about a version of the Main Node's service."""
    found = unit.ask("unit")["status"].get("items", [])
    return str([one["state"] for one in found if one["version"] == version])


def test_a_version_that_fails_gives_way_on_both_nodes(unit: NspawnUnit) -> None:
    for node in unit.nodes:
        upload_service(unit, node, "1.0.1", start="echo this one fails; exit 3")
    for node in unit.nodes.values():
        unit.wait(lambda node=node: "this one fails" in node.run("journalctl", "-o", "cat"), 120, "the new version")
    wait_active(unit, "1.0.0", timeout_s=240)
    assert "failed" in item_state(unit, "1.0.1"), unit.ask("unit")["status"]["items"]


def test_newest_of_many_wishes_wins(unit: NspawnUnit) -> None:
    for version in ("1.1.0", "1.1.1", "1.1.2", "1.1.3"):
        for node in unit.nodes:
            upload_service(unit, node, version)
    wait_active(unit, "1.1.3")


def test_update_waits_for_its_timetable(unit: NspawnUnit) -> None:
    main = unit.nodes["main"]
    now = datetime.fromisoformat(main.run("date", "-Iseconds").strip())
    opens = now + timedelta(seconds=45)
    slot = {"start": f"{opens:%H:%M:%S}", "end": f"{max(opens, opens.replace(hour=23, minute=59, second=59)):%H:%M:%S}"}
    days = [{"dayOfWeek": opens.isoweekday(), "timeSlots": [slot]}]
    set_schedule(unit, {"type": "timetable", "timetable": days})
    before = containers(unit)
    for node in unit.nodes:
        upload_service(unit, node, "1.2.0")
    unit.wait(lambda: "pending" in item_state(unit, "1.2.0"), 30, "the update to wait")
    assert containers(unit) == before
    wait_active(unit, "1.2.0")
    for node in unit.nodes.values():
        started = node.run("journalctl", "-o", "short-unix", "-g", "1.2.0 starts", "-n", "1").split()[0]
        assert float(started) >= opens.timestamp()
    assert instances(unit)["main"]["version"] == "1.2.0"


def test_update_waits_for_its_trigger(unit: NspawnUnit) -> None:
    set_schedule(unit, {"type": "trigger"})
    before = containers(unit)
    for node in unit.nodes:
        upload_service(unit, node, "1.3.0")
    unit.wait(lambda: "pending" in item_state(unit, "1.3.0"), 60, "the update to wait")
    assert containers(unit) == before
    unit.nodes["main"].run("env", "OPENSSL_CONF=/etc/ssl/openssl-aos.cnf", PYTHON, "-c", _TRIGGER)
    wait_active(unit, "1.3.0")
