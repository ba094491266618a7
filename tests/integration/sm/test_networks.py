"""Instance networks on real links, nftables and dnsmasq: who reaches whom, names, adoption after kill -9."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import apsw
import pytest

from aoscore.common.errors import AlreadyExistsError, AosError
from aoscore.common.types import FirewallRule, InstanceIdent
from aoscore.sm.launcher.runtimes.base import instance_id
from aoscore.sm.networkmanager import netlink, nft
from aoscore.sm.networkmanager.ipv6 import Ipv6
from aoscore.sm.networkmanager.model import NetworkConfig, Ports, bridge_name, netns_path, veth_name
from aoscore.sm.networkmanager.netlink import Message
from aoscore.sm.networkmanager.traffic import PRIVATE, TABLE, Counted, StoredTraffic, Totals, Traffic
from aoscore.sm.smclient.network import FirewallUpdate
from tests.support.networks import FakeCm, ident, manager, name
from tests.support.running import until
from tests.support.traffic import (
    SINK,
    SOURCE,
    UDP_SINK,
    UDP_SOURCE,
    answering,
    inside,
    link_names,
    measured,
    serving,
    serving_here,
    started_inside,
)

pytestmark = pytest.mark.net

CONNECT = "import socket,sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 0.7)"


def chains() -> set[str]:
    """Chains of our firewall table."""
    done = subprocess.run(["nft", "-j", "list", "table", "inet", "aos"], capture_output=True, check=True)
    return {entry["chain"]["name"] for entry in json.loads(done.stdout)["nftables"] if "chain" in entry}


async def test_attach_and_detach(tmp_path: Path) -> None:
    cm = FakeCm()
    async with manager(tmp_path, cm) as networks:
        attached = await networks.attach(name(0), "owner", NetworkConfig(ident(0), hostname="svc"))
        assert netns_path(name(0)).exists()
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
    cm.rules[ident(0)] = (
        FirewallRule("172.31.2.3", "9100-9101", "tcp", "172.31.1.2"),
        FirewallRule("172.31.2.3", "9101-9102", "udp", "172.31.1.2"),
    )
    configs = {
        0: ("alpha", NetworkConfig(ident(0))),
        1: ("beta", NetworkConfig(ident(1), exposed_ports=("9000/tcp", "9050-9051", "9060-9061/udp"))),
        2: ("alpha", NetworkConfig(ident(2))),
    }
    ports = (9000, 9001, 9051, 9060, 9061, 9100, 9101, 9102)
    to_beta = [f"{proto}:172.31.2.3:{port}" for proto in ("tcp", "udp") for port in ports]
    exposed = {f"tcp:172.31.2.3:{port}" for port in (9000, 9051)} | {f"udp:172.31.2.3:{port}" for port in (9060, 9061)}
    allowed = {f"tcp:172.31.2.3:{port}" for port in (9100, 9101)} | {f"udp:172.31.2.3:{port}" for port in (9101, 9102)}
    async with manager(tmp_path, cm) as networks:
        for number in (first, 1 - first, 2):
            await networks.attach(name(number), *configs[number])
        with serving(0, 9000), serving(1, *ports), serving(2, 9000):
            assert answering(0, *to_beta) == exposed | allowed
            assert answering(2, *to_beta) == exposed, "what CM allows one instance is not for its neighbour"
            inward = {f"{proto}:172.31.1.{host}:9000" for proto in ("tcp", "udp") for host in (2, 4)}
            assert answering(1, *inward) == set(), "nobody of another owner gets in where nothing is exposed"
            assert answering(0, *inward) == inward, "instances of one owner talk freely, also to themselves"
            late = FirewallRule("172.31.2.3", "9102", "tcp", "172.31.1.4")
            await networks.update_firewall(FirewallUpdate(ident(2), (late,)))
            assert answering(2, *to_beta) == exposed | {"tcp:172.31.2.3:9102"}
        for number in configs:
            await networks.detach(name(number))


async def test_ipv6_beside_ipv4(tmp_path: Path) -> None:
    """The same rules, word for word (D41)."""
    Path("/proc/sys/net/ipv6/conf/all/forwarding").write_text("1")
    ipv6 = Ipv6("fd12:3456:789a::/96", PRIVATE)
    cm = FakeCm()
    cm.rules[ident(0)] = (FirewallRule("172.31.2.3", "9100", "tcp", "172.31.1.2"),)
    owners = ("alpha", "beta", "alpha")
    serve = "import socket, sys, time; kept = [socket.create_server(('', int(port)), family=socket.AF_INET6)"
    serve += " for port in sys.argv[1:]]; print('up', flush=True); time.sleep(1000)"

    def reached(source: int, target: str, *ports: int) -> list[int]:
        ask = (sys.executable, "-c", CONNECT, ipv6.address(target))
        return [port for port in ports if inside(source, *ask, str(port)).returncode == 0]

    async with manager(tmp_path, cm, ipv6=ipv6, host_ports=()) as networks:
        for number, owner in enumerate(owners):
            ports = ("9000",) if number == 1 else ()
            config = NetworkConfig(ident(number), hostname=f"svc{number}", exposed_ports=ports)
            attached = await networks.attach(name(number), owner, config)
        assert "fd12:3456:789a::ac1f:104\talpha" in attached.hosts
        with started_inside(1, serve, "9000", "9100", "9200"), started_inside(0, serve, "9000"):
            assert reached(0, "172.31.2.3", 9000, 9100, 9200) == [9000, 9100]
            assert reached(2, "172.31.2.3", 9000, 9100, 9200) == [9000]
            assert reached(1, "172.31.1.2", 9000) == []
            assert reached(2, "172.31.1.2", 9000) == [9000], "instances of one owner talk freely"
            with socket.create_server(("", 9300), family=socket.AF_INET6):
                assert reached(0, "172.31.1.1", 9300) == [], "ports of the node are closed by IPv6 too"
        await until(lambda: ipv6.address("172.31.1.4") in Path("/run/aos/dns/alpha/hosts").read_text())
        listed = subprocess.run(["nft", "list", "table", "inet", TABLE.name], capture_output=True, check=True).stdout
        assert listed.count(b"fd12:3456:789a::ac1f:102 : ") == 2, "both directions are counted"
    async with manager(tmp_path, cm) as networks:
        bridge = Path("/proc/sys/net/ipv6/conf") / bridge_name("alpha")
        assert (bridge / "disable_ipv6").read_text() == "1\n"
        assert reached(2, "172.31.1.1", 53) == []
        for number in range(3):
            await networks.detach(name(number))
    assert link_names() == set()


async def test_ports_of_the_node_are_open_only_where_it_says_so(tmp_path: Path) -> None:
    config = NetworkConfig(ident(0))
    node = {f"{proto}:172.31.1.1:{port}" for proto in ("tcp", "udp") for port in (53, 9000, 9001)}
    names = {"tcp:172.31.1.1:53", "udp:172.31.1.1:53"}
    with serving_here(9000, 9001):
        async with manager(tmp_path, FakeCm()) as networks:
            await networks.attach(name(0), "owner", config)
            assert answering(0, *node - names) == node - names
            addresses = subprocess.run(["ip", "-6", "-j", "address"], check=True, capture_output=True).stdout
            links = {one["ifname"] for one in json.loads(addresses) if one.get("addr_info")}
            assert not {link for link in links if link.startswith("br-")}, "no way around by IPv6"
        async with manager(tmp_path, FakeCm(), host_ports=(Ports("tcp", 9001, 9001),)) as networks:
            assert answering(0, *node - names) == {"tcp:172.31.1.1:9001"}
            assert inside(0, "ping", "-c1", "-W1", "172.31.1.1").returncode == 0
            # dnsmasq listens on TCP too.
            await until(lambda: answering(0, "tcp:172.31.1.1:53"))
            await networks.detach(name(0))
            assert chains() == {"forward", "postrouting", "input", "host"}


async def test_rows_that_can_not_be_used_keep_nobody_else_down(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cm = FakeCm()
    async with manager(tmp_path, cm) as networks:
        for number in range(4):
            await networks.attach(name(number), "owner", NetworkConfig(ident(number)))
    with contextlib.closing(apsw.Connection(str(tmp_path / "servicemanager.db"))) as connection:
        change = "UPDATE instancenetwork SET {} WHERE instanceID = ?"
        connection.execute(change.format("networkConfig = '{nonsense'"), (name(0),))
        connection.execute(change.format('allocatedParams = \'{"ip": "nowhere"}\''), (name(1),))
        connection.execute(change.format("networkID = 'other'"), (name(2),))
    async with manager(tmp_path, cm) as networks:
        assert [state.ident for state in networks.states()] == [ident(3)]
        assert netns_path(name(3)).exists() and not netns_path(name(0)).exists()
        assert caplog.text.count("Stored network of instance can't be") == 3
        for number in range(4):
            await networks.attach(name(number), "owner", NetworkConfig(ident(number)))
            await networks.detach(name(number))


async def test_no_thread_is_left_in_a_namespace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor after an error in one (D42): links would be made there from then on."""

    def namespaces() -> set[str]:
        return {(task / "ns" / "net").readlink().name for task in Path("/proc/self/task").iterdir()}

    own = namespaces()
    assert len(own) == 1
    async with manager(tmp_path, FakeCm()) as networks:
        await networks.attach(name(0), "owner", NetworkConfig(ident(0)))
        assert namespaces() == own

        def refuse(gateway: str) -> Message:
            raise OSError(1, "refused")

        monkeypatch.setattr(netlink, "new_default_route", refuse)
        with pytest.raises(AosError, match="refused"):
            await networks.attach(name(1), "owner", NetworkConfig(ident(1)))
        assert namespaces() == own and not netns_path(name(1)).exists()
        await networks.detach(name(0))


async def test_a_host_name_is_given_once(tmp_path: Path) -> None:
    first, second = (InstanceIdent(item, "subject", 0) for item in ("one", "two"))
    async with manager(tmp_path, FakeCm()) as networks:
        await networks.attach(instance_id(first), "owner", NetworkConfig(first, hostname="web"))
        taken = "host name web is that of instance one:subject:0 in network owner"
        with pytest.raises(AlreadyExistsError, match=taken):
            await networks.attach(instance_id(second), "owner", NetworkConfig(second, hostname="web"))
        assert not netns_path(instance_id(second)).exists() and netns_path(instance_id(first)).exists()
        await networks.detach(instance_id(first))
        await networks.attach(instance_id(second), "owner", NetworkConfig(second, hostname="web"))
        await networks.detach(instance_id(second))


async def test_other_wishes_change_the_network_in_place(tmp_path: Path) -> None:
    """A new version of a service takes over the network of the one before."""
    first, second = (InstanceIdent(item, "subject", 0) for item in ("one", "two"))
    names = [instance_id(ident) for ident in (first, second)]

    def links() -> list[int]:
        return [socket.if_nametoindex(veth_name(name)) for name in names]

    def is_limited() -> bool:
        shown = subprocess.run(["tc", "qdisc", "show", "dev", veth_name(names[0])], capture_output=True, check=True)
        return b"tbf" in shown.stdout

    async with manager(tmp_path, FakeCm()) as networks:
        await networks.attach(names[0], "owner", NetworkConfig(first, hostname="a", download_speed_kbit=1000))
        await networks.attach(names[1], "owner", NetworkConfig(second, hostname="b"))
        before = links()
        assert is_limited()
        # They even swap their names.
        attached, _ = await asyncio.gather(
            networks.attach(names[0], "owner", NetworkConfig(first, hostname="b")),
            networks.attach(names[1], "owner", NetworkConfig(second, hostname="a")),
        )
        assert links() == before and not is_limited()
        assert " b" in attached.hosts
        assert inside(names[0], "ping", "-c1", "-W1", "172.31.1.1").returncode == 0
        for name in names:
            await networks.detach(name)
    assert link_names() == set()


async def test_bandwidth(tmp_path: Path) -> None:
    """Downloads and uploads stay below their limits; a limit can change and go while the instance is up."""
    kbit = 4000
    slack_bytes = 4 * 12800
    limited = NetworkConfig(ident(0), download_speed_kbit=kbit, upload_speed_kbit=2 * kbit)
    size = str(1_000_000)
    async with manager(tmp_path, FakeCm()) as networks:
        await networks.attach(name(0), "owner", limited)
        await networks.attach(name(1), "owner", NetworkConfig(ident(1)))
        figures = {
            "download": (kbit, measured(0, SINK, 1, SOURCE, size)),
            "upload": (2 * kbit, measured(1, SINK, 0, SOURCE, size)),
            "UDP download": (kbit, measured(0, UDP_SINK, 1, UDP_SOURCE)),
            "UDP upload": (2 * kbit, measured(1, UDP_SINK, 0, UDP_SOURCE)),
        }
        for what, (limit, (total, duration_s)) in figures.items():
            rate = (total - slack_bytes) * 8 / 1000 / duration_s
            print(f"{what}: {rate:.0f} of {limit} kbit/s, {total} bytes in {duration_s:.2f} s")
            assert limit / 4 < rate < limit * 1.05, what
        changed = NetworkConfig(ident(0), download_speed_kbit=10 * kbit)
        await networks.attach(name(0), "owner", changed)
        for script, source, sink in ((SOURCE, 1, 0), (SOURCE, 0, 1)):
            total, duration_s = measured(sink, SINK, source, script, size)
            assert (total - slack_bytes) * 8 / 1000 / duration_s > 2.5 * kbit
        for number in (0, 1):
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


async def test_counters_are_those_that_nft_lists() -> None:
    table = nft.Table("counted")
    assert await nft.counters(table) == {}, "no table, no counters"
    # More than one message of the kernel's holds.
    wanted = {f"in_{number:032x}": number * 1_000_003 for number in range(600)}
    await nft.apply(
        [*table.begin(), *(table.add("counter", name, packets=1, bytes=size) for name, size in wanted.items())]
    )
    await nft.apply([*nft.Table("other").begin(), nft.Table("other").add("counter", "foreign", packets=0, bytes=7)])
    listed = subprocess.run(
        ["nft", "-j", "list", "counters", "table", "inet", "counted"], check=True, capture_output=True
    )
    entries = [entry["counter"] for entry in json.loads(listed.stdout)["nftables"] if "counter" in entry]
    assert await nft.counters(table) == wanted == {entry["name"]: entry["bytes"] for entry in entries}


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
    assert store.totals["in_id"] == StoredTraffic("in_id", noon + timedelta(days=1), 0)
    # What was counted since then is not lost with SM: the first save told the day.
    await nft.apply([TABLE.delete_elements("in_bytes", [["172.31.1.2", "in_id"]]), TABLE.delete("counter", "in_id")])
    await nft.apply([TABLE.add("counter", "in_id", packets=1, bytes=77)])
    traffic = await started(noon + timedelta(days=1, minutes=5), counted)
    assert traffic.totals("id") == Totals(77, 0)
    await traffic.change([], ["id"])
    await traffic.forget("id")
    assert "in_id" not in store.totals
    store.totals = {"in_id": StoredTraffic("in_id", noon, 100)}
    assert (await started(noon + timedelta(days=2), counted)).totals("id") == Totals(0, 0)


async def test_totals_of_an_idle_node_are_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its links never rest; what a service sends is written every ten minutes, whatever it is."""
    store, noon = MemoryStore(), datetime(2026, 1, 1, 12, tzinfo=UTC)
    traffic = Traffic(store)
    await traffic.start([Counted("id", "172.31.1.2")], noon)
    kernel = {"in_system": 1, "out_system": 1, "in_id": 0, "out_id": 0}

    async def counters(_: object) -> dict[str, int]:
        return dict(kernel)

    async def written(monotonic_s: float, **changes: int) -> set[str]:
        kernel.update(changes)
        before = dict(store.totals)
        await traffic.refresh(noon)
        await traffic.save_if_due(noon, monotonic_s)
        return {name for name, total in store.totals.items() if before.get(name) != total}

    monkeypatch.setattr(nft, "counters", counters)
    assert await written(1000) == {"in_id", "out_id"}
    assert await written(1600, in_system=500_000, out_system=600_000) == set()
    assert await written(2200, in_system=1_100_000, in_id=1) == {"in_system", "in_id"}
    assert await written(2799, in_id=2, out_system=2_000_000) == set()
    assert await written(2800) == {"in_id", "out_system"}
    assert await written(3400, in_system=2_100_000) == set()


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
        assert link_names() == links, "the namespace was there, so the link was made again"
        assert not netns_path(name(7)).exists() and netns_path("foreign").exists()
        assert chains() == {"forward", "postrouting", *(f"instance_{name(n).replace('-', '_')}" for n in (0, 1))}
        assert inside(0, "ping", "-c1", "-W1", "172.31.1.3").returncode == 0
        assert Path("/run/aos/dns/owner/pid").read_text() == dns, "dnsmasq was adopted"
        for number in (0, 1):
            await networks.attach(name(number), "owner", NetworkConfig(ident(number), hostname="svc"))
        assert inside(0, "ping", "-c1", "-W1", "172.31.1.3").returncode == 0
        assert link_names() == links and cm.calls == [], "CM is not asked again"
        for number in (0, 1):
            await networks.detach(name(number))


def run(commands: str) -> None:
    """Commands, one a line."""
    for command in filter(None, map(str.strip, commands.splitlines())):
        subprocess.run(command.split(), check=True)


async def test_everything_broken_is_mended(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Check and repair at start; the namespace is kept, since a container may be running in it."""
    config = NetworkConfig(ident(0), download_speed_kbit=4000, upload_speed_kbit=8000)
    async with manager(tmp_path, FakeCm()) as networks:
        await networks.attach(name(0), "owner", config)
        await networks.attach(name(1), "owner", NetworkConfig(ident(1)))
    namespace, veth = netns_path(name(0)).stat().st_ino, veth_name(name(0))
    bridge = next(link for link in link_names() if link.startswith("br-"))
    run(f"""
        ip link set {bridge} down
        ip addr flush dev {bridge}
        ip addr add 172.31.1.99/24 dev {bridge}
        ip link set {veth} nomaster
        ip link set {veth} down
        tc qdisc del dev {veth} root
        tc qdisc add dev {veth} ingress
        ip -n {name(0)} addr flush dev eth0
        ip -n {name(0)} addr add 172.31.1.77/24 dev eth0
        ip -n {name(0)} route add default via 172.31.1.99
        ip -n {name(0)} link set lo down
        tc -n {name(0)} qdisc del dev eth0 root
        nft delete table inet aos
        nft add rule inet aos-traffic forward drop
        ip link add br-0a0b0c0d type bridge
        ip link add veth0a0b0c0d type veth peer name former
        ip link set veth0a0b0c0d master br-0a0b0c0d
        ip link add ifb-0a0b0c0d type ifb
        ip link add br-0123456789ab type bridge
        ip link add veth1a1b1c1d type veth peer name foreign
    """)
    caplog.set_level("INFO")
    async with manager(tmp_path, FakeCm()) as networks:
        said = [record.message for record in caplog.records if "mended" in record.message]
        assert said == [
            "Network mended: network=owner, what=address, bridge up",
            f"Network of instance mended: id={name(0)}, what=place on bridge, link up, address, lo up, default route",
        ]
        assert link_names() == {bridge, veth, veth_name(name(1)), "br-0123456789ab", "veth1a1b1c1d", "foreign"}
        assert netns_path(name(0)).stat().st_ino == namespace
        addresses = json.loads(inside(0, "ip", "-j", "-4", "addr", "show", "eth0").stdout)[0]["addr_info"]
        assert [(one["local"], one["prefixlen"]) for one in addresses] == [("172.31.1.2", 24)]
        assert json.loads(inside(0, "ip", "-j", "route", "show", "default").stdout)[0]["gateway"] == "172.31.1.1"
        rates = [
            [queue["options"]["rate"] for queue in json.loads(text) if queue["kind"] == "tbf"]
            for text in (
                subprocess.run(["tc", "-j", "qdisc", "show", "dev", veth], capture_output=True, check=True).stdout,
                inside(0, "tc", "-j", "qdisc", "show", "dev", "eth0").stdout,
            )
        ]
        assert rates == [[500_000], [1_000_000]]
        with serving(0, 9000), serving(1, 9000):
            assert answering(0, "tcp:172.31.1.3:9000") and answering(1, "udp:172.31.1.2:9000")
            assert answering(0, "tcp:172.31.1.2:9000"), "also itself: hairpin"
    caplog.clear()
    async with manager(tmp_path, FakeCm()) as networks:
        assert not [record for record in caplog.records if "mended" in record.message], "nothing is left to mend"
        for number in (0, 1):
            await networks.detach(name(number))


async def test_what_can_not_be_mended_is_removed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """SM comes up all the same, and the instance can be attached again."""
    async with manager(tmp_path, FakeCm()) as networks:
        await networks.attach(name(0), "owner", NetworkConfig(ident(0)))
    bridge = next(link for link in link_names() if link.startswith("br-"))
    run(f"""
        ip link del {bridge}
        ip link add {bridge} type ifb
    """)
    async with manager(tmp_path, FakeCm()) as networks:
        assert f"link {bridge} is in the way, it is no bridge" in caplog.text
        assert not netns_path(name(0)).exists()
        with pytest.raises(AosError, match="is in the way"):
            await networks.attach(name(0), "owner", NetworkConfig(ident(0)))
        # The failed attempt has taken down all of the network, and with it what was in the way.
        await networks.attach(name(0), "owner", NetworkConfig(ident(0)))
        assert inside(0, "ping", "-c1", "-W5", "172.31.1.1").returncode == 0
        await networks.detach(name(0))


def kernel_has_vlans() -> bool:
    """Whether the kernel can make one on the test's uplink."""
    command = ["ip", "link", "add", "link", "up0", "name", "probe", "type", "vlan", "id", "5"]
    return subprocess.run(command, check=False).returncode == 0


async def test_nodes_are_joined_by_a_vlan_as_soon_as_there_is_a_default_route(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run("""
        ip netns add far
        ip link add up0 type veth peer name eth0 netns far
        ip addr add 203.0.113.1/24 dev up0
        ip link set up0 up
        ip -n far link set eth0 up
    """)
    has_vlans = kernel_has_vlans()
    if has_vlans:
        run("""
            ip link del probe
            ip -n far link add link eth0 name other type vlan id 1001
            ip -n far addr add 172.31.1.200/24 dev other
            ip -n far link set other up
        """)

    def reasons() -> list[str]:
        messages = [record.message for record in caplog.records if "joined" in record.message]
        return [message.partition("=")[2].partition(", ")[2] for message in messages]

    caplog.set_level("INFO")
    no_route = "reason=there is no default route, whose link would carry the VLAN"
    async with manager(tmp_path, FakeCm()) as networks:
        await networks.attach(name(0), "owner", NetworkConfig(ident(0)))
        await networks.attach(name(1), "owner", NetworkConfig(ident(1)))
        assert reasons() == [no_route], "said once, and the instances are up"
        run("ip route add default via 203.0.113.2")
        async with asyncio.timeout(10):
            while len(reasons()) < 2:
                await asyncio.sleep(0.02)
        if not has_vlans:
            assert reasons()[1:] == ["reason=link up0 can carry no VLAN, or the kernel has none (8021q)"]
        else:
            assert reasons()[1:] == ["vlan=1001"]
            assert inside(0, "ping", "-c1", "-W5", "172.31.1.200").returncode == 0
        for number in (0, 1):
            await networks.detach(name(number))
        assert link_names() == {"up0"}
    if not has_vlans:
        pytest.skip("this kernel has no VLANs (8021q): only the refusal was tested")


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


async def test_bad_wishes_are_refused(tmp_path: Path) -> None:
    async with manager(tmp_path, FakeCm()) as networks:
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
