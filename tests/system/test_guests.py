"""What only a kernel of its own can show, in a Unit of two QEMU guests (bed D).

Limits, quotas, the journal; between the two nodes storages and states over NFS, networks of instances, the load.
"""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from qemu.bed import MAIN_IP
from qemu.images import DOMAIN
from qemu.unit import QemuUnit
from tests.support.bundles import make_item
from tests.support.wholeunit import label_nodes, node_ids, places, provision_both
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
        provision_both(unit)
        # An emulated node may be too busy at any moment to promise half of a limit, which is the usual share.
        label_nodes(unit)
        for name, (start, limit) in HUNGRY.items():
            upload(unit, name, start, f"quotas:\n  {limit}\n", node="main")
        for name in HUNGRY:
            unit.call("assign", item=name, target=unit.system_id)
        unit.wait(lambda: unit.instance_states() == ["active"] * len(HUNGRY), 120, "all services to be active")
        yield unit


def upload(
    unit: QemuUnit, name: str, start: str, configuration: str = "", *, node: str = "", provider: str = "sp"
) -> None:
    """Give the cloud a service of a provider, for a node or for any."""
    make_item(
        unit.directory / "items" / name,
        user=unit.cloud.user("sp", provider),
        domain=DOMAIN,
        codename=name,
        start=start,
        configuration=configuration,
        labels=(node,) if node else (),
    )
    unit.cloud.command("upload", unit.directory / "items" / name, "--user", unit.cloud.user("sp", provider))


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


def test_storages_and_states_of_both_nodes_are_the_main_nodes(unit: QemuUnit) -> None:
    """Over NFS: what a service of the Secondary Node stores is there, no more than it may, and the cloud has its state.

    25 MiB do not fit into its quota, which the Main Node's file system keeps for both together.
    """
    start = "echo kept > /state.dat; dd if=/dev/zero of=/storage/stored bs=64k count=400; exec sleep 5002"
    quotas = "quotas:\n  storageLimit: 2MiB\n  stateLimit: 64KiB\nstate:\n  filename: state.dat\n"
    upload(unit, "keeper", start, quotas, node="secondary")
    assert "nfs4" in unit.secondary.run("findmnt", "-no", "FSTYPE", "/var/aos/storages")
    unit.call("assign", item="keeper", target=unit.system_id)
    unit.wait(lambda: places(unit, "keeper") == ["secondary"], 120, "the service to be active")
    unit.wait(lambda: "kept" in str(unit.ask("messages", message_type="newState")), 120, "its state at the cloud")
    said = ("journalctl", "-o", "cat", "--no-pager", "-g", "/storage/stored.*quota exceeded")
    unit.wait(lambda: unit.secondary.run(*said), 120, "the service to have stored what it may")
    # Blocks, since what did not fit may have left a hole.
    [blocks] = unit.main.shell("find /var/aos/storages -name stored -exec stat -c %b {} +").split()
    print(f"written: {blocks} blocks")
    assert MIB < int(blocks) * 512 <= 2 * MIB + 64 * 1024
    unit.call("unassign", item="keeper", target=unit.system_id)


def test_networks_of_providers_between_the_nodes(unit: QemuUnit) -> None:
    """Instances of one provider reach each other; those of another what they ask for and the other exposes."""
    upload(unit, "server", "httpd -p 9090 -h /www; exec httpd -f -p 8080 -h /www", node="main")
    unit.call("assign", item="server", target=unit.system_id)
    unit.wait(lambda: "hello" in unit.page("server"), 120, "the service to answer on its node")
    answer = unit.main.run("busybox", "nslookup", "server", MAIN_IP)
    address = [line.split()[-1] for line in answer.splitlines() if line.startswith("Address")][-1]
    for name, provider, more in (
        ("neighbour", "sp", ""),
        ("guest", "other", "allowedConnections:\n  - server/8080/tcp\n"),
        ("stranger", "other", ""),
    ):
        asks = f"echo | nc -w 5 {address} $p > /dev/null 2>&1 && echo {name} reaches $p || echo {name} misses $p"
        start = f"while :; do for p in 8080 9090; do {asks}; done; sleep 3; done"
        upload(unit, name, start, more, node="secondary", provider=provider)
        unit.call("assign", item=name, target=unit.system_id)
    wanted = {"neighbour": {"8080", "9090"}, "guest": {"8080"}, "stranger": set[str]()}

    def heard(name: str) -> list[str]:
        said = unit.secondary.run("journalctl", "-o", "cat", "--no-pager").splitlines()
        return [line for line in said if line.startswith((f"{name} reaches ", f"{name} misses "))]

    for name, ports in wanted.items():
        unit.wait(
            lambda name=name, ports=ports: ports <= {line.split()[-1] for line in heard(name) if "reaches" in line},
            120,
            f"{name} to reach {ports}",
        )
    # And twice more what they may not.
    counts = {name: len(heard(name)) for name in wanted}
    unit.wait(lambda: all(len(heard(name)) >= counts[name] + 4 for name in wanted), 120, "them to try again")
    for name, ports in wanted.items():
        assert {line.split()[-1] for line in heard(name) if "reaches" in line} == ports, (name, heard(name))
    # Not before: once the neighbour's network has left the node, the way to the server leads outside, and what a server
    # exposes is open to whoever comes from there.
    for name in (*wanted, "server"):
        unit.call("unassign", item=name, target=unit.system_id)


def samples(unit: QemuUnit, node: str) -> int:
    """How many monitoring samples of a node the cloud has."""
    source = f"node {node_ids(unit)[node]}"
    return sum(one["source"] == source for one in unit.ask("monitoring", limit=100_000))


def test_services_are_placed_by_what_is_left_of_the_nodes(unit: QemuUnit) -> None:
    """Two that do not fit on one node come to both; one goes where the memory is not taken by somebody else."""
    label_nodes(unit, "1.1.0", ram_percent=100)
    upload(unit, "large", "exec sleep 5003", "quotas:\n  ramLimit: 500MiB\n")
    unit.call("assign", item="large", target=unit.system_id, instances=2)
    unit.wait(lambda: places(unit, "large") == ["main", "secondary"], 120, "an instance on each node")
    unit.call("unassign", item="large", target=unit.system_id)
    for loaded, free in (("main", "secondary"), ("secondary", "main")):
        unit.wait(lambda: places(unit, "large") == [], 60, "the instances to be gone")
        guest = unit.nodes[loaded]
        taken = "import time; taken = b'x' * (350 << 20); time.sleep(9999)"
        guest.run("systemd-run", "--unit=taker", "--collect", "python3", "-c", taken)
        began = samples(unit, loaded)
        unit.wait(lambda n=loaded, began=began: samples(unit, n) >= began + 3, 60, "the node's load to be known")
        unit.call("assign", item="large", target=unit.system_id, instances=1)
        unit.wait(lambda free=free: places(unit, "large") == [free], 120, f"the instance on {free}")
        guest.run("systemctl", "stop", "taker")
        unit.call("unassign", item="large", target=unit.system_id)
    label_nodes(unit, "1.2.0")


def test_secondary_node_boots_long_before_the_main_node(unit: QemuUnit) -> None:
    """It has nothing to mount then, and starts its services when there is."""
    upload(unit, "late", "exec sleep 5004", "quotas:\n  storageLimit: 2MiB\n", node="secondary")
    unit.call("assign", item="late", target=unit.system_id)
    unit.wait(lambda: places(unit, "late") == ["secondary"], 120, "the service to be active")
    for guest in unit.nodes.values():
        guest.kill()
    unit.secondary.start()
    unit.secondary.wait_settled()
    state = ("systemctl", "show", "-P", "ActiveState", "var-aos-storages.mount")
    assert unit.secondary.run(*state).strip() == "failed"
    unit.main.start()
    unit.main.wait_settled()
    unit.wait(lambda: len(unit.container_pids("secondary")) == 1, 120, "the service to run")
    unit.wait(unit.is_online, 120, "the Unit to be online")
    unit.wait(lambda: places(unit, "late") == ["secondary"], 120, "the cloud to know")
