"""What only a kernel of its own can show: limits, quotas and the journal of a Unit of QEMU guests (bed D)."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from aoscore.ctl.target import Node
from qemu.bed import MAIN_IP
from qemu.images import DOMAIN
from qemu.unit import QemuUnit
from tests.support.bundles import make_item
from tests.system.conftest import running, saved_qemu_unit

pytestmark = [pytest.mark.vm, pytest.mark.timeout(1800)]

MIB = 1 << 20
# What each service does, and the limit that it does not keep by itself.
HUNGRY = {
    "burner": ("while :; do :; done", "cpuLimit: 1000"),
    "eater": (
        "while :; do dd if=/dev/zero of=/dev/null bs=100M count=1; echo ended with $?; sleep 10; done",
        "ramLimit: 32MiB",
    ),
    # A shell that may not fork ends: it is another than the service's first.
    "filler": ("dd if=/dev/zero of=/storage/filled bs=64k count=400; exec sleep 5001", "storageLimit: 2MiB"),
    "breeder": ("(for i in $(seq 40); do sleep 5000 & done); exec sleep 5000", "pidsLimit: 16"),
}


@pytest.fixture(scope="module")
def unit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[QemuUnit]:
    """A provisioned Unit whose services want more than they may have."""
    unit = saved_qemu_unit(tmp_path_factory.mktemp("unit"))
    with running(unit):
        unit.provision()
        reserve_nothing(unit)
        for name, (start, limit) in HUNGRY.items():
            user = unit.cloud.user("sp")
            quotas = f"quotas:\n  {limit}\n"
            folder = unit.directory / "items" / name
            make_item(folder, user=user, domain=DOMAIN, codename=name, start=start, configuration=quotas)
            unit.upload(folder)
        for name in HUNGRY:
            unit.call("assign", item=name, target=unit.system_id)
        unit.wait(lambda: unit.instance_states() == ["active"] * len(HUNGRY), 120, "all services to be active")
        yield unit


def reserve_nothing(unit: QemuUnit) -> None:
    """An emulated node may be too busy at any moment to promise half of a limit, which is the usual share."""
    node = {"nodeGroupSubject": {"codename": Node().node_type}, "resourceRatios": {"cpu": 0, "ram": 0}}
    unit.ask("unit_config", config={"formatVersion": "7", "version": "1.0.0", "nodes": [node]})
    wanted = {"version": "1.0.0", "state": "installed"}
    unit.wait(lambda: wanted in unit.ask("unit")["status"].get("unitConfig", []), 60, "the unit config to be installed")


class Group:
    """The control group of the only instance of a service."""

    def __init__(self, unit: QemuUnit, item: str) -> None:
        self._guest = unit.main
        start = HUNGRY[item][0]
        (pid,) = (
            pid
            for pid in unit.container_pids().values()
            if start in self._guest.run("cat", f"/proc/{pid}/root/bin/start")
        )
        path = self._guest.run("cat", f"/proc/{pid}/cgroup").strip().removeprefix("0::/")
        self.directory = Path("/sys/fs/cgroup") / path

    def read(self, name: str) -> str:
        return self._guest.run("cat", self.directory / name).strip()

    def count(self, name: str, key: str) -> int:
        """One figure of a file with a key and a number a line."""
        return next(int(line.split()[1]) for line in self.read(name).splitlines() if line.split()[0] == key)


def test_cpu_limit_holds(unit: QemuUnit) -> None:
    """1000 of the node's 10000 DMIPS are a tenth of its only processor."""
    group = Group(unit, "burner")
    assert group.read("cpu.max") == "10000 100000"

    def sample() -> tuple[float, int, int]:
        # Both in one program: the guest may be stopped for long between two.
        uptime, stat = unit.main.shell(f"cat /proc/uptime; cat {group.directory}/cpu.stat").split("\n", 1)
        figures = dict(line.split() for line in stat.splitlines())
        return float(uptime.split()[0]), int(figures["usage_usec"]), int(figures["nr_throttled"])

    before = sample()
    unit.wait(lambda: sample()[0] - before[0] > 10, 30, "ten seconds of the guest")
    after = sample()
    share = (after[1] - before[1]) / 1e6 / (after[0] - before[0])
    assert share < 0.12, f"takes {share:.1%} of the processor"
    assert after[2] > before[2], "is held back"


def test_memory_limit_holds(unit: QemuUnit) -> None:
    """100 MB do not fit into 32 MiB: the kernel ends who asks for them, and nobody else."""
    group = Group(unit, "eater")
    assert int(group.read("memory.max")) == 32 * MIB
    unit.wait(lambda: group.count("memory.events", "oom_kill") > 0, 60, "the kernel to end a greedy process")
    assert int(group.read("memory.peak")) <= 32 * MIB
    kills = unit.main.shell("dmesg | grep 'Killed process'").splitlines()
    assert all("(dd)" in line for line in kills), kills
    unit.wait(lambda: told(unit, "the limit of memory was reached: "), 120, "the cloud to hear of it")


def test_pids_limit_holds(unit: QemuUnit) -> None:
    group = Group(unit, "breeder")
    assert group.read("pids.max") == "16"
    unit.wait(lambda: group.read("pids.peak") == "16", 60, "as many processes as there may be")
    # The shell that wanted more has ended by now, or does so before it has more.
    assert int(group.read("pids.current")) <= 16
    assert group.read("pids.peak") == "16"
    unit.wait(lambda: told(unit, "the limit of processes was reached: "), 120, "the cloud to hear of it")


def test_storage_limit_holds(unit: QemuUnit) -> None:
    """25 MiB do not fit into 2 MiB: the quota that SM set on the service's storage ends it, and nobody else."""

    def has_ended() -> bool:
        commands = [unit.main.run("cat", f"/proc/{pid}/cmdline") for pid in unit.container_pids().values()]
        return any("5001" in command and "sleep" in command and "dd" not in command for command in commands)

    unit.wait(has_ended, 120, "the service to have written what it may")
    [size] = unit.main.shell("find /var/aos/storages -name filled -exec stat -c %s {} +").split()
    print(f"written: {size} bytes")
    assert MIB < int(size) <= 2 * MIB


def told(unit: QemuUnit, text: str) -> bool:
    """Whether the cloud has an alert with that text."""
    return any(text in str(alert) for alert in unit.ask("alerts"))


def test_quota_of_a_user_holds(unit: QemuUnit) -> None:
    """The file system with storages and states keeps a user within what setquota gave it.

    What SM relies on where the file system has no project quotas.
    """
    guest = unit.main
    # A user that no service has: what those store counts too.
    guest.shell("setquota -u 64001 1024 1024 0 0 /var/aos; install -d -o 64001 /var/aos/storages/quota-test")
    write = "dd if=/dev/zero of=/var/aos/storages/quota-test/file bs=64k count=64"
    done = guest.execute("setpriv", "--reuid=64001", "--regid=64001", "--clear-groups", "sh", "-c", write)
    assert done.code != 0 and "quota exceeded" in done.stderr.lower(), done.stderr
    size = int(guest.run("stat", "-c", "%s", "/var/aos/storages/quota-test/file"))
    assert 0 < size <= 1024 * 1024
    # Others still can.
    guest.shell("cd /var/aos/storages; dd if=/dev/zero of=quota-test/other bs=64k count=64; rm -r quota-test")


def test_journal_alerts_reach_the_cloud(unit: QemuUnit) -> None:
    """One of the system, and one of a core component that dies."""
    unit.main.run("systemd-run", "--unit=burning", "sh", "-c", "echo '<2>the disk is on fire'")
    unit.wait(lambda: "the disk is on fire" in str(unit.ask("alerts")), 60, "the alert")
    alert = next(one for one in unit.ask("alerts") if "the disk is on fire" in str(one))
    assert alert["tag"] == "systemAlert", alert
    unit.main.run("systemctl", "kill", "--signal=KILL", "aos-iam")
    unit.wait(
        lambda: any(one["tag"] == "coreAlert" and one["coreComponent"] == "IAM" for one in unit.ask("alerts")),
        60,
        "the alert of IAM's end",
    )
    unit.wait(lambda: unit.main.run("systemctl", "is-active", "aos-iam"), 60, "IAM to be back")


def test_the_nodes_reach_each_other_and_only_main_the_cloud(unit: QemuUnit) -> None:
    assert "1 received" in unit.secondary.run("ping", "-c", "1", "-W", "20", MAIN_IP)
    assert "1 received" in unit.main.run("ping", "-c", "1", "-W", "20", "172.31.9.1")
    assert unit.secondary.execute("ping", "-c", "1", "-W", "2", "172.31.9.1").code != 0


def test_a_resumed_guest_knows_the_time(unit: QemuUnit) -> None:
    for guest in unit.nodes.values():
        began = time.time()
        assert began - 1 <= float(guest.run("date", "+%s.%N")) <= time.time() + 1
