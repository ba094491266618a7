"""The whole SM as a process: real containers and networks, CM and IAM over mutual TLS, kill -9 and orderly stop."""

import contextlib
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from aoscore.sm.launcher.runtimes.base import instance_id
from tests.support.running import until
from tests.support.smbed import SmBed
from tests.support.smunit import SmUnit

pytestmark = [pytest.mark.container, pytest.mark.net]


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
async def unit(tmp_path: Path) -> AsyncIterator[SmUnit]:
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    async with SmBed(tmp_path).running() as bed:
        yield SmUnit(bed)


async def test_kill_adopt_update_stop_and_cold_start(unit: SmUnit) -> None:
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
    assert list(Path("/run/aos/runtime").iterdir()) == []


async def test_stop_while_iam_is_away_ends_what_runs(unit: SmUnit) -> None:
    services = [unit.service(item, priority=priority) for item, priority in (("b", 2), ("c", 0), ("a", 1))]
    up = dict.fromkeys("abc", ("1.0.0", "active"))
    async with unit.sm() as sm:
        await unit.cm.connected(1)
        unit.cm.update(*services)
        await unit.cm.wait(lambda cm: cm.states() == up)
        sm.kill()
        await sm.wait()
    address = unit.bed.iam.public_port
    unit.bed.iam.public_port = 1  # where nobody listens
    async with unit.sm() as sm:
        await until(lambda: "IAM does not answer yet" in sm.text())
        assert all(len(pids(item)) == 1 for item in "abc")
        sm.process.terminate()
        assert await sm.wait() == 0
    assert not any(pids(item) for item in "abc")
    assert list(Path("/run/aos/runtime").iterdir()) == []
    lowest_first = sorted(services, key=lambda service: service.priority)
    ended = [line for line in sm.text().splitlines() if "Instance ended" in line]
    assert [instance_id(service.ident) in line for service, line in zip(lowest_first, ended, strict=True)] == [True] * 3
    unit.bed.iam.public_port = address
    async with unit.sm():
        await unit.cm.connected(2)
        await unit.cm.wait(lambda cm: cm.states() == up)


async def test_cold_start_without_cm(unit: SmUnit) -> None:
    async with unit.sm():
        await unit.cm.connected(1)
        unit.cm.update(unit.service("first"))
        await unit.cm.wait(lambda cm: cm.states() == {"first": ("1.0.0", "active")})
    assert pids("first") == []
    unit.cm.port = 1  # where nobody listens
    async with unit.sm():
        await until(lambda: len(pids("first")) == 1)


async def test_cold_start_without_cm_from_the_copy_of_a_damaged_database(unit: SmUnit) -> None:
    database = unit.bed.root / "sm" / "servicemanager.db"
    async with unit.sm():
        await unit.cm.connected(1)
        unit.cm.update(unit.service("first"), unit.service("second"))
        await unit.cm.wait(lambda cm: cm.states() == dict.fromkeys(("first", "second"), ("1.0.0", "active")))
        await until(database.with_name(f"{database.name}.copy1").exists)
    database.write_bytes(b"noise" * 10_000)
    unit.cm.port = 1  # where nobody listens
    async with unit.sm():
        await until(lambda: len(pids("first")) == len(pids("second")) == 1)
    assert list(database.parent.glob(f"{database.name}.broken-*"))


async def test_killed_while_starting_leaves_one_container_of_each(unit: SmUnit) -> None:
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
