"""The whole SM as a process: real containers and networks, CM and IAM over mutual TLS, kill -9 and orderly stop."""

import contextlib
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from aoscore.common.types import InstanceInfo
from aoscore.sm.launcher.runtimes.base import instance_id, runtime_id
from tests.support import bed as namespaces
from tests.support.items import tar
from tests.support.running import until
from tests.support.smbed import NODE, Child, SmBed, child

pytestmark = [pytest.mark.container, pytest.mark.net]

PROGRAM = "from aoscore.sm.app import main; main()"


class Unit:
    """An SM's surroundings, with services that are one busybox."""

    def __init__(self, bed: SmBed) -> None:
        self.bed = bed
        self.cm = bed.cm

    def service(self, item: str, version: str = "1.0.0", **changes: Any) -> InstanceInfo:
        """A service whose process can be found by item and version."""
        digest = self.bed.blobs.item(
            [tar({"bin/busybox": Path("/bin/busybox").read_bytes()}, mode=0o755)],
            process={
                "entrypoint": ["/bin/busybox", "sh", "-c"],
                "cmd": [f": {item}-{version}-marker; trap 'exit 0' TERM; while true; do /bin/busybox sleep 0.2; done"],
            },
            item_config={"hostname": item, "baseLayerIsNodeRootfs": False, "quotas": {"pidsLimit": 20}},
        )
        return self.bed.instance(
            item,
            version,
            manifest_digest=digest,
            runtime_id=runtime_id("crun", NODE.node_id),
            uid=5000,
            gid=5000,
            **changes,
        )

    @contextlib.asynccontextmanager
    async def sm(self) -> AsyncIterator[Child]:
        """The process; each has a log of its own."""
        container = {
            "runtimeDir": str(self.bed.root / "runtime"),
            "storageDir": str(self.bed.root / "storages"),
            "stateDir": str(self.bed.root / "states"),
            "crunStateRoot": str(self.bed.root / "crun"),
            "cgroupParent": namespaces.cgroup_parent(),
            "output": "files",
        }
        path = self.bed.write_config(
            runtimes=[{"plugin": "container", "type": "crun", "config": container}], monitoring={"pollPeriod": "1s"}
        )
        log = self.bed.root / f"sm-{len(list(self.bed.root.glob('sm-*.log')))}.log"
        async with child(sys.executable, "-c", PROGRAM, "-c", str(path), "-v", "debug", log=log) as one:
            try:
                yield one
            except BaseException:
                print(one.text()[-10000:])
                raise


def pids(item: str, version: str = "1.0.0") -> list[int]:
    """First processes of a service's containers."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().split(b"\0")
            if words[:3] == [b"/bin/busybox", b"sh", b"-c"] and f"{item}-{version}-marker".encode() in words[3]:
                found.append(int(path.parent.name))
    return found


@pytest.fixture
async def unit(tmp_path: Path) -> AsyncIterator[Unit]:
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    async with SmBed(tmp_path).running() as bed:
        yield Unit(bed)


async def test_kill_adopt_update_stop_and_cold_start(unit: Unit) -> None:
    first, second = unit.service("first"), unit.service("second")
    both = {"first": ("1.0.0", "active"), "second": ("1.0.0", "active")}
    async with unit.sm() as sm:
        connection = await unit.cm.connected(1)
        (runtime,) = connection.frames[0].sm_info.runtimes
        assert (runtime.type, runtime.arch_info.architecture) == ("crun", "amd64")
        unit.cm.update(first, second)
        await unit.cm.wait(lambda cm: cm.states() == both)
        before = pids("first") + pids("second")
        assert len(before) == 2
        sample = await unit.cm.frame("instant_monitoring")
        assert sample.node_monitoring.ram > 0
        sm.kill()
        await sm.wait()
    assert pids("first") + pids("second") == before
    calls = len(unit.cm.calls)

    async with unit.sm():
        connection = await unit.cm.connected(2)
        assert connection.kinds()[:2] == ["sm_info", "node_instances_status"]
        assert unit.cm.states() == both
        assert pids("first") + pids("second") == before, "adopted, not restarted"
        told = await unit.cm.wait(lambda cm: [call for call in cm.calls[calls:] if call.startswith("SyncNetworkState")])
        assert sorted(told[0].split()[1:]) == ["first", "second"]
        assert not any(call.startswith(("Allocate", "GetNode", "GetBlobs")) for call in unit.cm.calls[calls:])

        unit.cm.update(unit.service("first", "2.0.0"), stop=(second,))
        await unit.cm.wait(lambda cm: cm.states() == {"first": ("2.0.0", "active")})
        await until(lambda: not pids("first") and not pids("second"))
        assert len(pids("first", "2.0.0")) == 1
        await unit.cm.wait(lambda cm: "ReleaseInstanceNetwork second" in cm.calls)
        name = instance_id(first.ident)
        assert Path("/run/netns", name).exists()
    # Orderly stop: nothing is left.
    assert pids("first", "2.0.0") == []
    assert not Path("/run/netns", name).exists()
    assert "veth" not in subprocess.run(["ip", "link"], check=True, capture_output=True, text=True).stdout
    assert list((unit.bed.root / "runtime").iterdir()) == []


async def test_cold_start_without_cm(unit: Unit) -> None:
    async with unit.sm():
        await unit.cm.connected(1)
        unit.cm.update(unit.service("first"))
        await unit.cm.wait(lambda cm: cm.states() == {"first": ("1.0.0", "active")})
    assert pids("first") == []
    unit.cm.port = 1  # where nobody listens
    async with unit.sm():
        await until(lambda: len(pids("first")) == 1)


async def test_killed_while_starting_leaves_one_container_of_each(unit: Unit) -> None:
    services = [unit.service(f"svc{number}") for number in range(4)]
    expected = {info.ident.item_id: ("1.0.0", "active") for info in services}
    async with unit.sm() as sm:
        await unit.cm.connected(1)
        unit.cm.update(*services)
        await until(lambda: any(pids(info.ident.item_id) for info in services))
        sm.kill()
        await sm.wait()
    async with unit.sm():
        await unit.cm.connected(2)
        await unit.cm.wait(lambda cm: cm.states() == expected)
        assert [len(pids(info.ident.item_id)) for info in services] == [1] * 4
