"""Instance networks on real links, nftables and dnsmasq: who reaches whom, names, adoption after kill -9."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from aoscore.common.errors import AosError, NotSupportedError
from aoscore.common.types import FirewallRule
from aoscore.sm.networkmanager.model import NetworkConfig, netns_path, veth_name
from aoscore.sm.networkmanager.traffic import Counted, StoredTraffic, Totals, Traffic
from aoscore.sm.smclient.network import FirewallUpdate
from tests.support.networks import FakeCm, ident, manager, name

pytestmark = pytest.mark.net

CONNECT = "import socket,sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 0.7)"
SERVE = (
    "import socket,sys,time\n"
    "socks=[socket.create_server(('', int(p))) for p in sys.argv[1:]]\n"
    "print('up', flush=True)\n"
    "time.sleep(60)"
)


def inside(number: int, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command in an instance's namespace."""
    return subprocess.run(
        ["ip", "netns", "exec", name(number), *command], capture_output=True, text=True, check=False, timeout=20
    )


def reaches(number: int, address: str, port: int) -> bool:
    """Whether a TCP connection from the instance succeeds."""
    return inside(number, sys.executable, "-c", CONNECT, address, str(port)).returncode == 0


@contextlib.contextmanager
def serving(number: int, *ports: int) -> Iterator[None]:
    """Listen on ports inside an instance."""
    command = ["ip", "netns", "exec", name(number), sys.executable, "-c", SERVE, *map(str, ports)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as server:
        assert server.stdout is not None and server.stdout.readline() == b"up\n"
        try:
            yield
        finally:
            server.kill()


def link_names() -> set[str]:
    """Links of the node."""
    listing = json.loads(subprocess.run(["ip", "-j", "link"], capture_output=True, check=True).stdout)
    return {link["ifname"] for link in listing} - {"lo"}


def chains() -> set[str]:
    """Chains of our firewall table."""
    done = subprocess.run(["nft", "-j", "list", "table", "inet", "aos"], capture_output=True, check=True)
    return {entry["chain"]["name"] for entry in json.loads(done.stdout)["nftables"] if "chain" in entry}


async def test_attach_and_detach(tmp_path: Path) -> None:
    cm = FakeCm()
    async with manager(tmp_path, cm) as networks:
        attached = await networks.attach(name(0), "owner", NetworkConfig(ident(0), hostname="svc"))
        assert attached.netns == netns_path(name(0))
        assert attached.hosts.splitlines()[2] == "172.31.1.2\towner svc"
        assert attached.resolv_conf == "nameserver\t172.31.1.1\nnameserver\t172.31.0.53\n"
        routes = inside(0, "ip", "-j", "route").stdout
        assert json.loads(routes)[0]["gateway"] == "172.31.1.1"
        again = await networks.attach(name(0), "owner", NetworkConfig(ident(0), hostname="svc"))
        assert again == attached and cm.calls == ["join owner", "allocate 0"]
        assert inside(0, "ping", "-c1", "-W1", "172.31.1.1").returncode == 0
        await networks.detach(name(0))
        assert link_names() == set() and not netns_path(name(0)).exists()
        assert chains() == {"forward", "postrouting"}
        assert [state.ip for state in networks.states()] == ["172.31.1.2"]
        await networks.detach(name(0))
        await networks.release_instance(ident(0))
        assert cm.calls[2:] == ["release 0", "leave owner"] and networks.states() == []
        await networks.release_instance(ident(0))
    assert not Path("/run/aos/dns/owner").exists()


@pytest.mark.parametrize("first", [0, 1])
async def test_who_reaches_whom(tmp_path: Path, first: int) -> None:
    """Whoever was started first: the receiver's exposed ports and CM's rules decide (D35)."""
    cm = FakeCm()
    cm.networks = {"alpha": 1, "beta": 2}
    cm.allocated = {ident(0): "172.31.1.2", ident(1): "172.31.2.3", ident(2): "172.31.1.4"}
    cm.rules[ident(0)] = (FirewallRule("172.31.2.3", "9100-9101", "tcp", "172.31.1.2"),)
    configs = {
        0: ("alpha", NetworkConfig(ident(0))),
        1: ("beta", NetworkConfig(ident(1), exposed_ports=("9000/tcp", "9050-9051"))),
        2: ("alpha", NetworkConfig(ident(2))),
    }
    async with manager(tmp_path, cm) as networks:
        for number in (first, 1 - first, 2):
            await networks.attach(name(number), *configs[number])
        with serving(1, 9000, 9001, 9051, 9100, 9101, 9102), serving(2, 9000):
            verdicts = {port: reaches(0, "172.31.2.3", port) for port in (9000, 9001, 9051, 9100, 9101, 9102)}
            assert verdicts == {9000: True, 9001: False, 9051: True, 9100: True, 9101: True, 9102: False}
            assert reaches(2, "172.31.2.3", 9000) and not reaches(2, "172.31.2.3", 9100)
            assert reaches(0, "172.31.1.4", 9000), "instances of one owner talk freely"
            late = FirewallRule("172.31.2.3", "9102", "tcp", "172.31.1.4")
            await networks.update_firewall(FirewallUpdate(ident(2), (late,)))
            assert reaches(2, "172.31.2.3", 9102)
        for number in configs:
            await networks.detach(name(number))


async def test_outside_world(tmp_path: Path) -> None:
    """Instances get out with the node's address, only exposed ports let in; traffic is counted and limited."""
    for command in (
        "ip netns add world",
        "ip link add up0 type veth peer name eth0 netns world",
        "ip addr add 203.0.113.1/24 dev up0",
        "ip link set up0 up",
        "ip -n world addr add 203.0.113.2/24 dev eth0",
        "ip -n world link set eth0 up",
        "ip -n world route add 172.31.0.0/16 via 203.0.113.1",
    ):
        subprocess.run(command.split(), check=True)
    script = (
        "import socket\n"
        "server=socket.create_server(('', 80)); print('up', flush=True)\n"
        "while True:\n c, a = server.accept(); c.sendall((a[0] + chr(10)).encode() + bytes(200000)); c.close()"
    )
    fetch = "import socket; s=socket.create_connection(('203.0.113.2', 80), 1); s.settimeout(2); d=b''\n"
    fetch += "while (c := s.recv(65536)): d += c\nprint(d.split(chr(10).encode())[0].decode(), len(d))"
    command = ["ip", "netns", "exec", "world", sys.executable, "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as world:
        assert world.stdout is not None and world.stdout.readline() == b"up\n"
        async with manager(tmp_path, FakeCm()) as networks:
            config = NetworkConfig(ident(0), exposed_ports=("9000",), download_limit_bytes=300_000)
            await networks.attach(name(0), "owner", config)
            assert inside(0, sys.executable, "-c", fetch).stdout.split() == ["203.0.113.1", "200012"]
            with serving(0, 9000, 9001):
                for port, expected in ((9000, 0), (9001, 1)):
                    args = ["ip", "netns", "exec", "world", sys.executable, "-c", CONNECT, "172.31.1.2", str(port)]
                    code = subprocess.run(args, stderr=subprocess.DEVNULL, check=False).returncode
                    assert code == expected
            await networks.refresh_traffic()
            totals = networks.traffic(name(0))
            assert 200_000 < totals.download < 250_000 and 0 < totals.upload < 50_000
            assert inside(0, sys.executable, "-c", fetch).returncode == 0
            await networks.refresh_traffic()
            assert inside(0, sys.executable, "-c", fetch).returncode != 0, "the day's limit is used up"
            total = networks.traffic(name(0)).download
            await networks.detach(name(0))
        async with manager(tmp_path, FakeCm()) as networks:
            await networks.attach(name(0), "owner", config)
            await networks.refresh_traffic()
            assert networks.traffic(name(0)).download >= total, "totals of the day survive a restart"
            await networks.detach(name(0))
        world.kill()


class MemoryStore:
    """Traffic totals in memory."""

    def __init__(self) -> None:
        self.totals: dict[str, StoredTraffic] = {}

    async def load_traffic(self) -> list[StoredTraffic]:
        return list(self.totals.values())

    async def save_traffic(self, totals: Iterable[StoredTraffic]) -> None:
        self.totals |= {total.chain: total for total in totals}

    async def remove_traffic(self, chains: Iterable[str]) -> None:
        for chain in chains:
            self.totals.pop(chain, None)


async def test_traffic_totals_over_restarts_and_days() -> None:
    store = MemoryStore()
    noon = datetime(2026, 1, 1, 12, tzinfo=UTC)
    counted = Counted("id", "172.31.1.2")
    store.totals = {"in_id": StoredTraffic("in_id", noon, 100), "out_id": StoredTraffic("out_id", noon, 200)}

    async def started(at: datetime, *adopted: Counted) -> Traffic:
        traffic = Traffic(store)
        await traffic.start(adopted, at)
        return traffic

    # After a reboot the database has the totals; after kill -9 the kernel has newer ones.
    assert (await started(noon, counted)).totals("id") == Totals(100, 200)
    store.totals["in_id"] = StoredTraffic("in_id", noon, 1)
    traffic = await started(noon, counted)
    assert traffic.totals("id") == Totals(100, 200)
    # A new day, with SM running or not.
    await traffic.refresh(noon + timedelta(days=1))
    assert traffic.totals("id") == Totals(0, 0)
    await traffic.remove("id")
    await traffic.forget("id")
    assert "in_id" not in store.totals
    store.totals = {"in_id": StoredTraffic("in_id", noon, 100)}
    assert (await started(noon + timedelta(days=2), counted)).totals("id") == Totals(0, 0)


async def test_names(tmp_path: Path) -> None:
    """Equal host names: both run, both can be found (D10)."""
    async with manager(tmp_path, FakeCm()) as networks:
        for number in (0, 1):
            await networks.attach(name(number), "owner", NetworkConfig(ident(number), hostname="svc"))
        expected = {
            "svc": "172.31.1.2",
            "svc-1": "172.31.1.3",
            "1.subject.item": "172.31.1.3",
            "subject.item": "172.31.1.2",
            "svc.owner": "172.31.1.2",
        }
        await asyncio.sleep(0.3)
        for host, address in expected.items():
            answer = inside(0, "busybox", "nslookup", host, "172.31.1.1").stdout
            assert address in answer, answer
        await networks.detach(name(1))
        await asyncio.sleep(0.2)
        assert "172.31.1.3" not in inside(0, "busybox", "nslookup", "svc-1", "172.31.1.1").stdout
        # dnsmasq is started again when it dies.
        pid = int(Path("/run/aos/dns/owner/pid").read_text())
        os.kill(pid, signal.SIGKILL)
        async with asyncio.timeout(5):
            while "172.31.1.2" not in inside(0, "busybox", "nslookup", "svc", "172.31.1.1").stdout:
                await asyncio.sleep(0.1)
        await networks.detach(name(0))
    assert "dnsmasq" not in subprocess.run(["ps", "-eo", "comm,stat"], capture_output=True, text=True).stdout.replace(
        "dnsmasq         Z", ""
    )


def start_manager(directory: Path, *numbers: int) -> "subprocess.Popen[bytes]":
    """A process that has attached these instances."""
    made = subprocess.Popen(
        [sys.executable, "-m", "tests.support.networks", directory, *map(str, numbers)], stdout=subprocess.PIPE
    )
    assert made.stdout is not None and made.stdout.readline() == b"ready\n"
    return made


async def test_killed_manager_leaves_networks_that_the_next_one_adopts(tmp_path: Path) -> None:
    killed = await asyncio.to_thread(start_manager, tmp_path, 0, 1)
    links = link_names()
    dns = Path("/run/aos/dns/owner/pid").read_text()
    killed.kill()
    killed.wait()
    assert inside(0, "ping", "-c1", "-W1", "172.31.1.3").returncode == 0
    # Somebody breaks one of them, and there are leftovers of an instance that nobody knows.
    subprocess.run(["ip", "link", "delete", veth_name(name(1))], check=True)
    subprocess.run(["ip", "netns", "add", name(7)], check=True)
    subprocess.run(["ip", "netns", "add", "foreign"], check=True)
    subprocess.run(["nft", "add", "chain", "inet", "aos", "instance_stale"], check=True)
    cm = FakeCm()
    async with manager(tmp_path, cm) as networks:
        assert link_names() == links - {veth_name(name(1))}
        assert not netns_path(name(7)).exists() and netns_path("foreign").exists()
        assert chains() == {"forward", "postrouting", f"instance_{name(0).replace('-', '_')}"}
        assert Path("/run/aos/dns/owner/pid").read_text() == dns, "dnsmasq was adopted"
        for number in (0, 1):
            await networks.attach(name(number), "owner", NetworkConfig(ident(number), hostname="svc"))
        assert inside(0, "ping", "-c1", "-W1", "172.31.1.3").returncode == 0
        assert link_names() == links and cm.calls == [], "CM is not asked again"
        for number in (0, 1):
            await networks.detach(name(number))


@pytest.mark.parametrize("delay_s", [0.0, 0.03, 0.06, 0.1, 0.2])
async def test_killed_in_the_middle(tmp_path: Path, delay_s: float) -> None:
    killed = subprocess.Popen([sys.executable, "-m", "tests.support.networks", tmp_path, "0", "1", "2"])
    while not (tmp_path / "servicemanager.db").exists():
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.2 + delay_s)
    killed.kill()
    killed.wait()
    cm = FakeCm()
    cm.networks["owner"] = 1
    cm.allocated = {ident(number): f"172.31.1.{number + 2}" for number in range(3)}
    async with manager(tmp_path, cm) as networks:
        for number in range(3):
            await networks.attach(name(number), "owner", NetworkConfig(ident(number), hostname="svc"))
        assert len(link_names()) == 4
        assert inside(0, "ping", "-c1", "-W1", "172.31.1.4").returncode == 0
        for number in range(3):
            await networks.release_instance(ident(number))
        assert link_names() == set() and chains() == {"forward", "postrouting"}


async def test_what_is_not_supported_yet_says_so(tmp_path: Path) -> None:
    async with manager(tmp_path, FakeCm()) as networks:
        with pytest.raises(NotSupportedError, match="bandwidth"):
            await networks.attach(name(0), "owner", NetworkConfig(ident(0), upload_speed_kbit=100))
        with pytest.raises(AosError, match="can't be a network id"):
            await networks.attach(name(0), "x/../y", NetworkConfig(ident(0)))
        with pytest.raises(AosError, match="is no port"):
            await networks.attach(name(0), "owner", NetworkConfig(ident(0), exposed_ports=("70000",)))
        assert link_names() == set()


async def test_other_tables_are_left_alone(tmp_path: Path) -> None:
    subprocess.run("nft add table inet other; nft add chain inet other c", shell=True, check=True)
    before = subprocess.run(["nft", "list", "table", "inet", "other"], capture_output=True, check=True).stdout
    async with manager(tmp_path, FakeCm()) as networks:
        await networks.attach(name(0), "owner", NetworkConfig(ident(0)))
        await networks.detach(name(0))
    after = subprocess.run(["nft", "list", "table", "inet", "other"], capture_output=True, check=True).stdout
    assert before == after
