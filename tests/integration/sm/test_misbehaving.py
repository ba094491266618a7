"""Services that misbehave, on the whole SM with real containers: they are contained, CM hears of it, others go on.

How others go on is measured: a neighbour answers over the network all the time. The figures are in the output
(`pytest -rP`); that it answers, and is never restarted, is what is asserted.
"""

import asyncio
import contextlib
import errno
import socket
import statistics
import subprocess
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from aoscore.common import quota
from aoscore.common.errors import NotSupportedError
from aoscore.common.types import (
    AlertRulePercents,
    AlertRules,
    InstanceInfo,
    MonitoringParameters,
    PartitionAlertRule,
    PartitionInfo,
)
from aoscore.sm import cgroups
from aoscore.sm.launcher.runtimes.base import instance_id
from tests.support import bed as namespaces
from tests.support.outside import add_item, make_busybox_layout
from tests.support.running import until
from tests.support.smbed import SmBed
from tests.support.smunit import RUNTIME_ID, SmUnit

pytestmark = [pytest.mark.container, pytest.mark.net, pytest.mark.timeout(180)]

MIB = 1 << 20
OUTPUT_LIMIT = MIB // 2
STORAGE = 8 * MIB
NEIGHBOUR = "exec httpd -f -p 8080 -h /www"
# Whenever it can't fork it begins anew.
FORKS = 'exec sh -c "$BOMB" & exec sleep 100000'
BOMB = 'trap "exec sh -c \\"\\$BOMB\\"" EXIT; while :; do sleep 100000 & done'
# busybox keeps the last line, which does not end.
EATS = "exec tail /dev/zero"
FILLS = "dd if=/dev/zero of=/storage/file bs=64k; exec sleep 100000"
FLOODS = "exec yes flood"
DEAF = "trap '' HUP; trap 'echo no' TERM; while :; do sleep 1; done"


class Rogues:
    """A unit with a neighbour that answers, and services that misbehave."""

    def __init__(self, unit: SmUnit, layout: Path) -> None:
        self.unit = unit
        self.cm = unit.cm
        self._layout = layout
        # The kernel counts a user's processes on the whole machine, other tests included: users of our own.
        self._uid = 100_000 + 10 * int(namespaces.cgroup_parent().rpartition("-")[2])
        self._connection = -1

    def service(self, item: str, command: str, *, env: dict[str, str] | None = None, **changes: Any) -> InstanceInfo:
        """A service; `changes` are those of its item config and instance."""
        self._uid += 1
        quotas = {"pidsLimit": 30, "ramLimit": 32 * MIB, "cpuDMIPSLimit": 3000, **changes.pop("quotas", {})}
        process = {"Env": [f"{name}={value}" for name, value in (env or {}).items()]}
        config = {"hostname": item, "quotas": quotas}
        digest = add_item(self.unit.bed.blobs, self._layout, command, item_config=config, process=process)
        return self.unit.bed.instance(
            item, manifest_digest=digest, runtime_id=RUNTIME_ID, uid=self._uid, gid=self._uid, **changes
        )

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """SM with the neighbour."""
        container = {
            **{f"{name}Dir": str(self.unit.bed.root / path) for name, path in (("runtime", "runtime"), ("state", "s"))},
            "storageDir": str(self.unit.bed.root / "storages"),
            "crunStateRoot": str(self.unit.bed.root / "crun"),
            "cgroupParent": namespaces.cgroup_parent(),
            "output": "files",
            "outputMaxSize": OUTPUT_LIMIT,
            "stopTimeout": "1s",
        }
        runtimes = [{"plugin": "container", "type": "crun", "config": container}]
        async with self.unit.sm(runtimes=runtimes):
            await self.cm.connected(1)
            neighbour = self.service("neighbour", NEIGHBOUR)
            self.cm.update(neighbour)
            await self.active("neighbour")
            self.pid = self.pids(neighbour)[0]
            await until(lambda: _answers("172.31.0.2"))
            print(f"\n{'neighbour alone':34}{await self.measure()}")
            yield
            print(f"{'neighbour afterwards':34}{await self.measure()}")
            # Beside its children, one per connection.
            assert self.pid in self.pids(neighbour), "the neighbour was restarted"

    async def active(self, item: str) -> None:
        await self.cm.wait(lambda cm: cm.states().get(item, ("", ""))[1] == "active", 60)

    def pids(self, info: InstanceInfo) -> list[int]:
        """Processes in the service's control group."""
        return cgroups.probe().processes(f"{namespaces.cgroup_parent()}/{instance_id(info.ident)}")

    def log(self, info: InstanceInfo) -> Path:
        """Where the service's output is kept."""
        return self.unit.bed.root / "sm" / "instancelogs" / instance_id(info.ident)

    async def failure(self, item: str) -> Any:
        """The first failure that CM hears of a service."""

        def find(cm: Any) -> Any:
            return next((one for one in cm.statuses() if one.instance.item_id == item and one.state == "failed"), None)

        return await self.cm.wait(find, 60)

    async def alert(self, kind: str, item: str, parameter: str = "") -> Any:
        """The first alert of a kind about a service."""

        def find(cm: Any) -> Any:
            for frame in cm.connections[-1].frames:
                if frame.alert.WhichOneof("AlertItem") == kind:
                    one = getattr(frame.alert, kind)
                    if one.instance.item_id == item and (not parameter or one.parameter == parameter):
                        return one
            return None

        return await self.cm.wait(find, 60)

    async def measure(self, requests: int = 100) -> str:
        """How the neighbour answers, in words; it must answer all."""
        times = []
        for _ in range(requests):
            began = time.perf_counter()
            assert await asyncio.to_thread(_answers, "172.31.0.2"), "the neighbour does not answer"
            times.append(1000 * (time.perf_counter() - began))
        worst = max(times)
        return f"{requests} answers, median {statistics.median(times):.1f} ms, longest {worst:.1f} ms"


def _answers(ip: str) -> bool:
    """Whether a web server gives its page, on a connection of its own."""
    answer = b""
    with contextlib.suppress(ConnectionRefusedError), socket.create_connection((ip, 8080), timeout=20) as connection:
        connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
        while data := connection.recv(4096):
            answer += data
    return answer.endswith(b"hello\n")


@pytest.fixture
async def rogues(tmp_path: Path) -> AsyncIterator[Rogues]:
    storages = tmp_path / "storages"
    storages.mkdir()
    layout = make_busybox_layout(tmp_path)
    with _storage_partition(storages):
        async with SmBed(tmp_path).running() as bed:
            partition = PartitionInfo("storages", ("storages",), STORAGE, str(storages))
            bed.iam.node = msgspec.structs.replace(bed.iam.node, partitions=(partition,))
            yield Rogues(SmUnit(bed), layout)


@contextlib.contextmanager
def _storage_partition(path: Path) -> Any:
    """As on a node: storages have a file system of their own, with project quotas where this kernel has them."""
    image = path.with_name("storages.ext4")
    with image.open("wb") as file:
        file.truncate(64 * MIB)
    mke2fs = ["mke2fs", "-q", "-t", "ext4", "-O", "quota,project", "-E", "quotatype=usrquota:grpquota:prjquota", image]
    subprocess.run(mke2fs, check=True)
    done = subprocess.run(["mount", "-o", "loop,prjquota", image, path], check=False, capture_output=True)
    if done.returncode:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={STORAGE}", "storages", path], check=True)
    path.chmod(0o755)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", path], check=True)


async def test_forks_without_end(rogues: Rogues) -> None:
    async with rogues.running():
        rules = MonitoringParameters(AlertRules(cpu=AlertRulePercents(5, 10)))
        rogue = rogues.service("forks", FORKS, env={"BOMB": BOMB}, monitoring_parameters=rules)
        rogues.cm.update(rogue)
        await rogues.active("forks")
        # The others are about to be or no more.
        await until(lambda: len(rogues.pids(rogue)) >= 25, 60)
        print(f"{'beside one that forks':34}{await rogues.measure()}")
        assert len(rogues.pids(rogue)) <= 30
        refused = await rogues.alert("instance_alert", "forks")
        print(f"{'':34}CM hears: {refused.message}")
        assert refused.message.startswith("the limit of processes was reached: ")
        alert = await rogues.alert("instance_quota_alert", "forks", "cpu")
        print(f"{'':34}CM hears: cpu {alert.value} DMIPS of 3000, {alert.status}")
        rogues.cm.update(stop=(rogue,))
        await until(lambda: not rogues.pids(rogue), 60)


async def test_eats_memory(rogues: Rogues) -> None:
    async with rogues.running():
        rogues.cm.update(rogues.service("eats", EATS))
        status = await rogues.failure("eats")
        print(f"{'beside one that eats memory':34}{await rogues.measure()}")
        print(f"{'':34}CM hears: {status.error.message}")
        assert status.error.exit_code == 137 and "out of memory" in status.error.message


async def test_fills_its_storage(rogues: Rogues) -> None:
    async with rogues.running():
        rules = MonitoringParameters(AlertRules(partitions=(PartitionAlertRule("storages", 10, 20),)))
        storages = rogues.unit.bed.root / "storages"
        rogue = rogues.service(
            "fills", FILLS, quotas={"storageLimit": 2 * MIB}, storage_path="fills", monitoring_parameters=rules
        )
        rogues.cm.update(rogue)
        await rogues.active("fills")
        log = rogues.log(rogue) / "output.log"
        await until(lambda: log.exists() and "error writing" in log.read_text(), 60)
        said = log.read_text().splitlines()[0].partition("dd: ")[2]
        used = (storages / "fills/file").stat().st_size
        has_quotas = _has_projects(storages)
        how = "a project quota of 2 MiB" if has_quotas else "the size of the partition, for this kernel has no quotas,"
        print(f"{'beside one that fills its storage':34}{await rogues.measure()}")
        print(f"{'':34}stopped by {how} at {used} bytes: {said}")
        assert used <= (2 * MIB if has_quotas else STORAGE)
        alert = await rogues.alert("instance_quota_alert", "fills", "storages")
        print(f"{'':34}CM hears: storages {alert.value} bytes, {alert.status}")
        # SM's own files are elsewhere: it takes an update as ever.
        rogues.cm.update(rogues.service("other", "exec sleep 100000"), stop=(rogue,))
        await rogues.active("other")


def _has_projects(path: Path) -> bool:
    try:
        quota.usage(path, quota.Kind.PROJECT, 0)
    except NotSupportedError:
        return False
    except OSError as error:
        assert error.errno == errno.ENOENT
    return True


async def test_floods_its_log(rogues: Rogues) -> None:
    async with rogues.running():
        rogue = rogues.service("floods", FLOODS)
        rogues.cm.update(rogue)
        await rogues.active("floods")
        folder = rogues.log(rogue)
        await until(lambda: _size(folder) > OUTPUT_LIMIT // 2, 60)
        sizes = []
        for _ in range(3):
            text = await rogues.measure()
            sizes.append(_size(folder))
        print(f"{'beside one that floods its log':34}{text}")
        print(f"{'':34}its files: {', '.join(map(str, sizes))} bytes, limit {OUTPUT_LIMIT}")
        assert max(sizes) <= 2 * OUTPUT_LIMIT
        alert = await rogues.alert("instance_alert", "floods")
        print(f"{'':34}CM hears: {alert.message}")
        assert alert.message.startswith("its log is flooded")


def _size(folder: Path) -> int:
    total = 0
    for path in folder.glob("output.log*"):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


async def test_ignores_sigterm(rogues: Rogues) -> None:
    async with rogues.running():
        rogue = rogues.service("deaf", DEAF)
        rogues.cm.update(rogue)
        await rogues.active("deaf")
        began = time.monotonic()
        rogues.cm.update(stop=(rogue,))
        await rogues.cm.wait(lambda cm: "deaf" not in cm.states(), 60)
        print(f"{'beside one that will not end':34}{await rogues.measure()}")
        print(f"{'':34}gone after {time.monotonic() - began:.1f} s; it was asked and given 1 s")
        assert rogues.pids(rogue) == []
