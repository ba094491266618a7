"""What happens to a Unit in the field, one fault after the other: keys in tokens, MP between the nodes (bed C)."""

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from aoscore.common.errors import AosError
from aoscore.ctl.host import wait
from qemu.bed import BRIDGE, MAIN_IP
from tests.support.nspawn import CLOUD_IP, NspawnUnit
from tests.support.wholeunit import (
    SERVICES,
    check_whole,
    containers,
    instances,
    is_back,
    label_nodes,
    main_pid,
    node_status,
    provision_both,
    run_services,
    silence,
    upload_service,
    wait_active,
)
from tests.system.conftest import all_well, running, running_pair

pytestmark = [pytest.mark.nspawn, pytest.mark.timeout(600)]

# How long a link is cut; longer than every keepalive and retry.
CUT_S = float(os.environ.get("AOSCORE_CUT_S", "75"))
NOTICED_S = 30.0
_HSM = "/usr/lib/softhsm/libsofthsm2.so"
_ONLINE = "Connected to the cloud"


@pytest.fixture(scope="module")
def provisioned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NspawnUnit]:
    with running_pair(tmp_path_factory.mktemp("unit"), with_mp=True) as unit:
        yield unit


@pytest.fixture
def unit(provisioned: NspawnUnit) -> Iterator[NspawnUnit]:
    with all_well(provisioned) as unit:
        yield unit
    assert unit.ask("violations") == []


def is_connected(unit: NspawnUnit, node: str) -> bool:
    """Whether the cloud was told that a node is connected."""
    return bool(node_status(unit, node).get("isConnected"))


def test_half_open_cloud_link_is_noticed(unit: NspawnUnit) -> None:
    """On both sides within 30 s, and what was wanted meanwhile comes once the link is back."""
    main, before = unit.nodes["main"], containers(unit)
    said = main.run("journalctl", "-u", "aos-cm", "-o", "cat").count("pings unanswered")
    began = time.monotonic()
    with silence(main, CLOUD_IP):
        wait(lambda: not unit.is_online(), NOTICED_S, "the cloud to notice")
        left_s = NOTICED_S - (time.monotonic() - began)
        wait(
            lambda: main.run("journalctl", "-u", "aos-cm", "-o", "cat").count("pings unanswered") > said,
            max(left_s, 0.1),
            "CM to notice",
        )
        print(f"noticed on both sides after {time.monotonic() - began:.0f} s")
        upload_service(unit, "main", "1.1.0")
    unit.wait(unit.is_online, 120, "the Unit to be online again")
    unit.wait(lambda: instances(unit)["main"]["version"] == "1.1.0", 90, "what was wanted meanwhile")
    assert containers(unit)["secondary"] == before["secondary"]


def test_link_between_the_nodes_is_cut_for_minutes(unit: NspawnUnit) -> None:
    """Nothing stops, the cloud knows within 30 s, and the node catches up with the newest version wanted."""
    before = containers(unit)
    began = time.monotonic()
    with silence(unit.nodes["secondary"], MAIN_IP):
        wait(lambda: not is_connected(unit, "secondary"), NOTICED_S, "the cloud to be told that the node is away")
        print(f"told after {time.monotonic() - began:.0f} s")
        upload_service(unit, "secondary", "1.1.0")
        upload_service(unit, "secondary", "1.2.0")
        time.sleep(max(0.0, CUT_S - (time.monotonic() - began)))
        assert containers(unit) == before, "services go on"
    unit.wait(lambda: is_connected(unit, "secondary"), 120, "the node to be back")
    unit.wait(lambda: instances(unit)["secondary"]["version"] == "1.2.0", 120, "the newest version on it")
    assert containers(unit)["main"] == before["main"]
    assert "1.1.0" not in unit.nodes["secondary"].run("journalctl", "-o", "cat", "-t", "aos_servicemanager")


def test_cold_boot_without_cloud(unit: NspawnUnit) -> None:
    """Both nodes start while the cloud can't be reached: what was installed runs, and the link comes by itself."""
    begun = ("awk", "{print $22}", "/proc/1/stat")
    boots = {name: node.run(*begun) for name, node in unit.nodes.items()}
    unit.inside("ip", "address", "del", f"{CLOUD_IP}/24", "dev", BRIDGE)
    try:
        for node in unit.nodes.values():
            node.run("systemctl", "reboot", "--no-block")
        for name, node in unit.nodes.items():
            unit.wait(lambda node=node, name=name: node.run(*begun) != boots[name], 60, "another systemd in the node")
            node.wait_settled()
        for name in unit.nodes:
            unit.wait(lambda name=name: len(unit.container_pids(name)) == 1, 60, f"the service of {name} to run")
    finally:
        unit.inside("ip", "address", "add", f"{CLOUD_IP}/24", "dev", BRIDGE)


def test_token_library_is_gone_and_comes_back(unit: NspawnUnit) -> None:
    """On both nodes, with all daemons started anew meanwhile: services run on, and all is well when it is back."""
    before = containers(unit)
    for node in unit.nodes.values():
        node.run("sh", "-c", f"mv $(realpath {_HSM}) /root/hsm.so")
    for node in unit.nodes.values():
        node.run("systemctl", "kill", "--signal=KILL", "aos-iam", "aos-sm", "aos-mp")
    unit.nodes["main"].run("systemctl", "kill", "--signal=KILL", "aos-cm")
    unit.wait(lambda: not unit.is_online(), 60, "the cloud to miss the Unit")
    for name, node in unit.nodes.items():
        unit.wait(
            lambda node=node: "libsofthsm2.so" in node.run("journalctl", "-u", "aos-iam", "-o", "cat", "-n", "200"),
            60,
            f"IAM of {name} to say what it misses",
        )
    assert containers(unit) == before, "services go on"
    for node in unit.nodes.values():
        node.run("sh", "-c", f"mv /root/hsm.so $(readlink -m {_HSM})")
    unit.wait(unit.is_online, 120, "the Unit to be online again")
    wait_active(unit)
    assert containers(unit) == before, "adopted, not started again"


def test_flood_of_log_and_alerts_is_bounded(unit: NspawnUnit) -> None:
    """The cloud hears of a flood in a few alerts, one of which counts the rest; others' alerts and logs get through."""
    node, seen = unit.nodes["secondary"], len(unit.ask("alerts", limit=10_000))
    node.run("sh", "-c", "seq 20000 | systemd-cat -p err -t flooder")
    node.run("systemd-cat", "-p", "err", "-t", "aos-test", "echo", "a quiet word")
    for text in ("a quiet word", "more alerts of flooder were held back"):
        unit.wait(lambda text=text: text in str(unit.ask("alerts", limit=10_000)), 90, text)
    came = unit.ask("alerts", limit=10_000)[: -seen or None]
    assert len(came) < 100, len(came)
    assert unit.is_online() and instances(unit)["secondary"]["state"] == "active"


def test_daemons_are_killed_one_after_the_other(unit: NspawnUnit) -> None:
    before = containers(unit)
    for name, daemons in (("main", ("iam", "cm", "sm", "mp")), ("secondary", ("iam", "sm", "mp"))):
        for daemon in daemons:
            node, service = unit.nodes[name], f"aos-{daemon}"
            pid = main_pid(node, service)
            node.run("systemctl", "kill", "--signal=KILL", service)
            unit.wait(lambda n=node, s=service, p=pid: is_back(n, s, p), 60, f"{service} to be back")
    assert containers(unit) == before


@pytest.mark.parametrize("name", ["main", "secondary"])
def test_mp_is_killed_for_memory(unit: NspawnUnit, name: str) -> None:
    """By the kernel, as soon as a download needs some; it comes back, and the download goes on."""
    node, before = unit.nodes[name], containers(unit)
    pid = main_pid(node, "aos-mp")
    limit_memory(unit, name, "aos_messageproxy")
    version = f"1.3.{len(name)}"
    upload_service(unit, "secondary", version)
    unit.wait(lambda: is_back(node, "aos-mp", pid), 90, "MP to be killed and back")
    assert "aos-mp.service: Main process exited, code=killed, status=9/KILL" in node.run("journalctl", "-o", "cat")
    unit.wait(lambda: instances(unit).get("secondary", {}).get("version") == version, 120, "what was wanted")
    assert containers(unit)["main"] == before["main"]


def limit_memory(unit: NspawnUnit, name: str, program: str) -> None:
    """Let a program of a node have no more memory than it has.

    From outside: a node in nspawn has no controller of memory. The group goes with the node's others.
    """
    top, limit = Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"
    if not top.exists():
        top, limit = top.parent, "memory.max"
    group = top / unit.cgroups[name] / "limited"
    unit.inside("sh", "-c", f"mkdir -p {group} && echo 4096 > {group / limit}")
    [pid] = unit.inside("pgrep", "--ns", unit.nodes[name].leader, "--nslist", "pid", "-f", program).split()
    unit.inside("sh", "-c", f"echo {pid} > {group}/cgroup.procs")


def test_control_group_of_a_container_is_left(unit: NspawnUnit) -> None:
    """By a crun that was killed after it had ended the container and before it had removed the rest."""
    node = unit.nodes["secondary"]
    [pid] = unit.container_pids("secondary").values()
    [path] = [line[3:] for line in node.run("cat", f"/proc/{pid}/cgroup").splitlines() if line.startswith("0::")]
    group = f"/sys/fs/cgroup{path}"
    unit.call("unassign", item=SERVICES["secondary"], target=unit.system_id)
    unit.wait(lambda: unit.container_pids("secondary") == {}, 60, "the service to be gone")
    node.run("sh", "-c", f"mkdir -p {group} && echo 1 > {group}/cgroup.kill")
    unit.call("assign", item=SERVICES["secondary"], target=unit.system_id)
    wait_active(unit)


# Where IAM is killed, one after the other: node, and what its journal says then.
_KILLS = (
    ("main", "Start provisioning"),
    ("main", "Create key"),
    ("secondary", "Start provisioning"),
    ("main", "Apply certificate"),
)


class _Killer(threading.Thread):
    """Kills IAM in the middle of provisioning."""

    def __init__(self, unit: NspawnUnit) -> None:
        super().__init__()
        self._unit = unit
        self._over = threading.Event()
        self.done: list[tuple[str, str]] = []

    def run(self) -> None:
        for name, words in _KILLS:
            node = self._unit.nodes[name]
            before = self._count(name, words)
            while self._count(name, words) <= before:
                if self._over.wait(0.05):
                    return
            node.run("systemctl", "kill", "--signal=KILL", "aos-iam-prov")
            self.done.append((name, words))

    def _count(self, name: str, words: str) -> int:
        return self._unit.nodes[name].run("journalctl", "-u", "aos-iam-prov", "-o", "cat").count(words)

    def end(self) -> None:
        self._over.set()
        self.join()


def test_iam_is_killed_during_provisioning(tmp_path: Path) -> None:
    """At several steps: provisioning is repeated until it is through, and the Unit works."""
    with running(NspawnUnit(tmp_path, ("main", "secondary"), keys="softhsm")) as unit:
        killer = _Killer(unit)
        killer.start()
        tries = 0
        try:
            while True:
                tries += 1
                try:
                    provision_both(unit)
                    break
                except AosError as error:
                    print(f"try {tries}, killed {len(killer.done)} times: {error}")
                    assert tries <= 2 * len(_KILLS)
                    if "do deprovisioning first" in " ".join(str(error).split()):
                        # As its user does, who was told so.
                        unit.call("forget_unit", unit=unit.system_id)
                for node in unit.nodes.values():
                    is_active = ("sh", "-c", "systemctl is-active aos-iam-prov || true")
                    unit.wait(lambda node=node, c=is_active: node.run(*c) == "active\n", 60, "IAM to be back")
        finally:
            killer.end()
        assert killer.done == list(_KILLS)
        label_nodes(unit)
        run_services(unit)
        check_whole(unit)
