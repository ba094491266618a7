"""A Unit of four nodes with real SMs, a real CM and the local cloud: 40 instances are updated and rolled back."""

import asyncio
import contextlib
import json
import sys
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from aoscore.common.certurls import file_url
from aoscore.common.tls import TlsIdentity
from aoscore.common.types import CertInfo
from tests.support.devcloud import DevcloudProcess, MiniUnit
from tests.support.fleet import FleetIam, SimulatedRuntime, fleet_nodes, simulated_node, with_ports
from tests.support.iam import free_port
from tests.support.smbed import Child, child

pytestmark = pytest.mark.timeout(300)

COUNTS = {"one": 20, "two": 15, "three": 5}
NODES = fleet_nodes(4)


def write_items(folder: Path, apps: dict[str, str], version: str) -> Path:
    """A bundle of services; each has its app's text in `bin/app` and takes a part of a node's CPU."""
    items = []
    for name, text in apps.items():
        app = folder / name / "rootfs" / "bin" / "app"
        app.parent.mkdir(parents=True)
        app.write_text(text)
        items.append(
            {
                "identity": {"type": "service", "codename": name},
                "version": version,
                "sourceFolder": name,
                "images": [{"sourceFolder": "rootfs", "archInfo": {"architecture": "amd64"}, "cmd": "/bin/app"}],
                "configuration": {
                    "instances": {"minInstances": COUNTS[name]},
                    "quotas": {"cpuLimit": 1000},
                },
            }
        )
    (folder / "config.yaml").write_text(json.dumps({"schemaVersion": 2, "items": items}))
    return folder


class Fleet:
    """What the test sees: the nodes' runtimes, the cloud's journal, CM's process."""

    def __init__(self, cloud: DevcloudProcess, cm: Child, runtimes: list[SimulatedRuntime]) -> None:
        self.cloud = cloud
        self.cm = cm
        self.runtimes = runtimes
        self.names: dict[str, str] = {}

    async def call(self, name: str, **arguments: Any) -> Any:
        return await asyncio.to_thread(lambda: self.cloud.client.call(name, **arguments))

    async def learn_names(self) -> None:
        self.names = {one["id"]: one["codename"] for one in await self.call("items")}

    def running(self) -> Counter[str]:
        """`item version` to the number of its instances on all nodes."""
        return Counter(
            f"{self.names[info.ident.item_id]} {info.version}"
            for runtime in self.runtimes
            for info in runtime.instances.values()
        )

    async def statuses(self) -> list[dict[str, Any]]:
        """All unit statuses that the cloud has got."""
        journal = await self.call("messages", unit="unit-1", message_type="unitStatus")
        return [entry["data"] for entry in journal]

    def items(self, status: dict[str, Any]) -> dict[str, str]:
        return {f"{self.names[one['item']['id']]} {one['version']}": one["state"] for one in status["items"]}

    def instances(self, status: dict[str, Any]) -> Counter[tuple[str, str]]:
        """`item version` and state to the number of instances that are told so."""
        return Counter(
            (f"{self.names[group['item']['id']]} {group['version']}", one["state"])
            for group in status["instances"]
            for one in group["instances"]
        )

    async def until_told(self, items: dict[str, str], instances: Counter[tuple[str, str]]) -> None:
        """Wait until the cloud's picture of the Unit is this."""
        status: dict[str, Any] = {}
        try:
            async with asyncio.timeout(60):
                while True:
                    status = (await self.call("unit", unit="unit-1"))["status"]
                    with contextlib.suppress(KeyError):
                        if (self.items(status), self.instances(status)) == (items, instances):
                            return
                    await asyncio.sleep(0.1)
        except TimeoutError:
            told = self.items(status), self.instances(status)
            raise AssertionError(f"the cloud has {told}; CM said:\n{self.cm.text()[-4000:]}") from None


def told_states(statuses: list[dict[str, Any]], item_id: str, version: str) -> list[str]:
    """States of a version in the order in which the cloud heard of them."""
    states: list[str] = []
    for status in statuses:
        for one in status.get("items") or ():
            if (one["item"].get("id"), one["version"]) == (item_id, version) and states[-1:] != [one["state"]]:
                states.append(one["state"])
    return states


def certificate(unit: MiniUnit, cert_type: str) -> CertInfo:
    url = file_url(unit.identities[cert_type])
    return CertInfo(cert_type, url, url)


@contextlib.asynccontextmanager
async def running_fleet(tmp_path: Path, cloud: DevcloudProcess) -> AsyncIterator[Fleet]:
    unit = MiniUnit(cloud)
    unit.node_id = NODES[0].node_id
    await asyncio.to_thread(unit.provision)
    certs = {cert_type: certificate(unit, cert_type) for cert_type in ("online", "cm", "sm", "iam")}
    iam_identity = TlsIdentity(cloud.root_file, certs["iam"].cert_url, certs["iam"].key_url)
    cm_port = free_port()
    async with contextlib.AsyncExitStack() as stack:
        iam = await stack.enter_async_context(FleetIam(iam_identity, NODES, certs, "unit-1").running())
        config = {
            "workingDir": str(tmp_path / "cm"),
            "caCert": str(cloud.root_file),
            "cmServerUrl": f"127.0.0.1:{cm_port}",
            "fileServerUrl": f"127.0.0.1:{free_port()}",
            "serviceDiscoveryUrl": f"https://localhost:{cloud.ports['discovery_port']}/sd/v7/",
            "unitStatusSendTimeout": 0,  # so that no step hides behind the next one
        }
        (tmp_path / "cm.cfg").write_text(json.dumps(with_ports(config, iam)))
        command = [sys.executable, "-m", "aoscore.cm.app", "-c", str(tmp_path / "cm.cfg"), "-v", "debug"]
        cm = await stack.enter_async_context(child(*command, log=tmp_path / "cm.log"))
        runtimes = [
            await stack.enter_async_context(
                simulated_node(
                    tmp_path / node.node_id,
                    node,
                    iam=iam_identity,
                    sm=certs["sm"],
                    ca_file=cloud.root_file,
                    cm_port=cm_port,
                )
            )
            for node in NODES
        ]
        yield Fleet(cloud, cm, runtimes)


async def test_forty_instances_are_deployed_updated_and_rolled_back(tmp_path: Path, cloud: DevcloudProcess) -> None:
    async def upload(folder: str, apps: dict[str, str], version: str) -> None:
        path = await asyncio.to_thread(write_items, tmp_path / folder, apps, version)
        await asyncio.to_thread(cloud.run, "upload", str(path))

    await asyncio.to_thread(cloud.run, "user-cert", "--role", "sp")
    await upload("first", dict.fromkeys(COUNTS, "good 1"), "1.0.0")
    async with running_fleet(tmp_path, cloud) as fleet:
        await fleet.learn_names()
        ids = {name: item_id for item_id, name in fleet.names.items()}
        for name in COUNTS:
            await fleet.call("assign", item=name, target="unit-1")
        first = {f"{name} 1.0.0": "installed" for name in COUNTS}
        active = Counter({(f"{name} 1.0.0", "active"): count for name, count in COUNTS.items()})
        await fleet.until_told(first, active)
        assert fleet.running() == {f"{name} 1.0.0": count for name, count in COUNTS.items()}
        assert [len(runtime.instances) for runtime in fleet.runtimes] == [10, 10, 10, 10]

        places = [set(runtime.instances) for runtime in fleet.runtimes]
        await upload("second", {"one": "good 2", "two": "good 2"}, "2.0.0")
        second = {"one 2.0.0": "installed", "two 2.0.0": "installed", "three 1.0.0": "installed"}
        counts = Counter({(version, "active"): COUNTS[version.split()[0]] for version in second})
        await fleet.until_told(second, counts)
        assert [set(runtime.instances) for runtime in fleet.runtimes] == places  # nothing moved
        three = [start for runtime in fleet.runtimes for start in runtime.starts if start[0].item_id == ids["three"]]
        assert len(three) == COUNTS["three"]  # nothing that stays the same was started again

        await upload("third", {"one": "good 3", "two": "bad 3"}, "3.0.0")
        third = {
            "one 3.0.0": "installed",
            "two 2.0.0": "installed",
            "two 3.0.0": "failed",
            "three 1.0.0": "installed",
        }
        counts = Counter(
            {(version, "active"): COUNTS[version.split()[0]] for version in third if "two 3" not in version}
        )
        await fleet.until_told(third, counts)
        assert fleet.running() == {version: count for (version, _), count in counts.items()}

        statuses = await fleet.statuses()
        assert told_states(statuses, ids["one"], "2.0.0") == ["downloading", "pending", "installed", "removed"]
        assert told_states(statuses, ids["two"], "2.0.0") == ["downloading", "pending", "installed"]
        assert told_states(statuses, ids["two"], "3.0.0") == ["downloading", "pending", "failed"]
        (failed,) = [
            one for one in (await fleet.call("unit", unit="unit-1"))["status"]["items"] if one["state"] == "failed"
        ]
        assert failed["errorInfo"]["message"].endswith("the app is bad")
        assert any(fleet.instances(status)["two 3.0.0", "failed"] for status in statuses if "instances" in status)
        assert await fleet.call("violations", unit="unit-1") == []
