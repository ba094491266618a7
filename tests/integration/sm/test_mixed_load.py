"""32 instances of four services from Debian packages on the real SM: limits, who talks to whom, update, no traces."""

import contextlib
import io
import os
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterable
from pathlib import Path

import msgspec
import pytest

from aoscore._pb.common.v2 import common_pb2 as common
from aoscore._pb.servicemanager.v5 import network_pb2 as net
from aoscore.common import convert
from aoscore.common.types import InstanceInfo
from aoscore.ctl.machine import find_cgroups
from aoscore.sm import cgroups
from aoscore.sm.launcher.runtimes.base import instance_id
from tests.support import bed as namespaces
from tests.support import debian
from tests.support.running import until
from tests.support.smbed import NODE, SmBed
from tests.support.smunit import RUNTIME_ID, SmUnit
from tests.support.traffic import answering, inside

pytestmark = [pytest.mark.container, pytest.mark.net]

MIB = 1 << 20
# Listens on TCP and UDP and sends back what comes; on TCP two words are commands.
ECHO = """
import os, select, socket, threading
tcp = [socket.create_server(("", port), backlog=64) for port in (9000, 9100, 9101, 9102)]
udp = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(5)]
for one, port in zip(udp, (9001, 9002, 9100, 9101, 9102)):
    one.bind(("", port))
def spin():
    while True:
        pass
kept = []
while True:
    for one in select.select(tcp + udp, [], [])[0]:
        if one in udp:
            one.sendto(*one.recvfrom(100))
            continue
        connection, _ = one.accept()
        with connection:
            connection.settimeout(0.3)
            try:
                word = connection.recv(100)
                if word == b"spin":
                    threading.Thread(target=spin, daemon=True).start()
                if word == b"eat":
                    kept.append(bytearray(os.urandom(1 << 20) * 64))
                connection.sendall(word)
            except OSError:
                pass
"""
NGINX = """
worker_processes 1; pid /tmp/nginx.pid; error_log stderr;
events {}
http {
    access_log off;
    client_body_temp_path /tmp/body; proxy_temp_path /tmp/proxy; fastcgi_temp_path /tmp/fastcgi;
    uwsgi_temp_path /tmp/uwsgi; scgi_temp_path /tmp/scgi;
    server { listen 8080; location / { return 200 "VERSION"; } }
}
"""
TALK = "import socket,sys; s=socket.create_connection((sys.argv[1],9000),5); s.sendall(sys.argv[2].encode()); s.recv(9)"


class Service(msgspec.Struct, frozen=True):
    """An item: its package, its program, what it listens on, what it may have."""

    package: str
    command: tuple[str, ...]
    listens: tuple[str, ...]
    exposed: tuple[str, ...] = ()
    ram_limit: int = 64 * MIB
    pids_limit: int = 20
    cpu_limit: int = 2000

    def open_to(self, port: str) -> bool:
        """Whether everybody may reach a port, written as "proto:port"."""
        proto, number = port.split(":")
        for text in self.exposed:
            ports, _, kind = text.partition("/")
            first, _, last = ports.partition("-")
            if kind == proto and int(first) <= int(number) <= int(last or first):
                return True
        return False


SERVICES = {
    "web": Service(
        "nginx-light",
        ("/usr/sbin/nginx", "-e", "stderr", "-c", "/service/nginx.conf", "-g", "daemon off;"),
        ("tcp:8080",),
        ("8080/tcp",),
    ),
    "echo": Service(
        "python3-minimal",
        ("/usr/bin/python3", "/service/echo.py"),
        ("tcp:9000", "tcp:9100", "tcp:9101", "tcp:9102", "udp:9001", "udp:9002", "udp:9100", "udp:9101", "udp:9102"),
        ("9000/tcp", "9001-9002/udp"),
        ram_limit=48 * MIB,
    ),
    "store": Service(
        "redis-server",
        ("/usr/bin/redis-server", "--port", "6379", "--dir", "/tmp", "--save", "", "--protected-mode", "no"),
        ("tcp:6379",),
        pids_limit=30,
    ),
    "box": Service(
        "busybox-static", ("/usr/bin/busybox", "httpd", "-f", "-p", "8081"), ("tcp:8081",), ram_limit=8 * MIB
    ),
}
COUNT = 8


def owner(item: str, number: int) -> str:
    """Two owners: web and store have one each, the instances of the others are of both."""
    return {"web": "alpha", "store": "beta"}.get(item, "alpha" if number < COUNT // 2 else "beta")


def top_layer(version: str) -> bytes:
    """What turns packages into an image: the links of a merged /usr, and the services' own files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in ("bin", "sbin", "lib", "lib64"):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.SYMTYPE, f"usr/{name}"
            archive.addfile(link)
        for name, text in (("echo.py", ECHO), ("nginx.conf", NGINX.replace("VERSION", version)), ("version", version)):
            member = tarfile.TarInfo(f"service/{name}")
            member.size, member.mode = len(text), 0o644
            archive.addfile(member, io.BytesIO(text.encode()))
    return buffer.getvalue()


def instances(bed: SmBed, item: str, version: str = "1.0.0") -> list[InstanceInfo]:
    """All instances of a service."""
    service = SERVICES[item]
    digest = bed.blobs.item(
        # The first layer is the top one.
        [top_layer(version), debian.layer(service.package)],
        process={
            "entrypoint": [service.command[0]],
            "cmd": list(service.command[1:]),
            "exposedPorts": {port: {} for port in service.exposed},
        },
        item_config={
            "hostname": item,
            "baseLayerIsNodeRootfs": False,
            "runParameters": {"restartInterval": "100ms"},
            "quotas": {
                "ramLimit": service.ram_limit,
                "pidsLimit": service.pids_limit,
                "cpuDMIPSLimit": service.cpu_limit,
                "tmpLimit": MIB,
            },
        },
    )
    made = []
    for number in range(COUNT):
        uid = namespaces.first_uid() + COUNT * list(SERVICES).index(item) + number
        info = bed.instance(item, version, manifest_digest=digest, runtime_id=RUNTIME_ID, uid=uid, gid=uid)
        ident = msgspec.structs.replace(info.ident, instance=number)
        made.append(msgspec.structs.replace(info, ident=ident, owner_id=owner(item, number)))
    return made


def id_of(info: InstanceInfo) -> str:
    return instance_id(info.ident)


def first_pid(info: InstanceInfo) -> int:
    return int(Path("/run/aos/runtime", id_of(info), "pid").read_text())


def listening(info: InstanceInfo) -> set[str]:
    """What an instance listens on by now, as "proto:port"."""
    found = set()
    for proto, state in (("tcp", "0A"), ("udp", "07")):
        for name in (proto, f"{proto}6"):
            lines = Path(f"/proc/{first_pid(info)}/net/{name}").read_text().splitlines()[1:]
            words = [line.split() for line in lines]
            found |= {f"{proto}:{int(word[1].rpartition(':')[2], 16)}" for word in words if word[3] == state}
    return found


def limit_files(info: InstanceInfo) -> dict[str, str]:
    """What the kernel was told: memory, processes, and CPU time per period, whatever the version of control groups."""
    layout = cgroups.probe()
    group = f"{namespaces.cgroup_parent()}/{id_of(info)}".lstrip("/")
    if layout.version == 2:
        assert layout.unified is not None
        folder = layout.unified / group
        return {name: (folder / name).read_text().split()[0] for name in ("memory.max", "pids.max", "cpu.max")}
    names = {"memory": "memory.limit_in_bytes", "pids": "pids.max", "cpu": "cpu.cfs_quota_us"}
    return {name: (layout.controllers[kind] / group / name).read_text().strip() for kind, name in names.items()}


def cpu_s(info: InstanceInfo) -> float:
    """CPU time that an instance has taken."""
    layout = cgroups.probe()
    group = f"{namespaces.cgroup_parent()}/{id_of(info)}".lstrip("/")
    if layout.version == 2:
        assert layout.unified is not None
        return int((layout.unified / group / "cpu.stat").read_text().split()[1]) / 1e6
    return int((layout.controllers["cpuacct"] / group / "cpuacct.usage").read_text()) / 1e9


class Load:
    """All 32 instances, and CM's word on them."""

    def __init__(self, unit: SmUnit, infos: Iterable[InstanceInfo]) -> None:
        self.cm = unit.cm
        self.directory = unit.bed.root
        self.infos = {(info.ident.item_id, info.ident.instance): info for info in infos}
        self.late: set[tuple[tuple[str, int], tuple[str, int], str]] = set()
        """Sender, receiver, port: what CM allowed after they were started."""

    def ip(self, item: str, number: int) -> str:
        return self.cm.addresses[item, number]

    async def all_active(self) -> None:
        """Until CM knows all of them as wanted, and they have opened their ports."""
        wanted = {key: (info.version, "active") for key, info in self.infos.items()}
        try:
            await self.cm.wait(lambda cm: cm.instance_states() == wanted, 60)
        except TimeoutError:
            for log in self.directory.glob("sm/instancelogs/*/output.log"):
                print(f"{log.parent.name}: {log.read_text()[-500:]}")
            raise
        for (item, _), info in self.infos.items():
            await until(lambda ports=set(SERVICES[item].listens), info=info: ports <= listening(info), 60)

    def allow(self, sender: tuple[str, int], receiver: tuple[str, int], proto: str, ports: str) -> None:
        """CM tells of a connection that became possible."""
        first, _, last = ports.partition("-")
        for number in range(int(first), int(last or first) + 1):
            self.late.add((sender, receiver, f"{proto}:{number}"))
        rule = net.FirewallRule(dst_ip=self.ip(*receiver), dst_port=ports, proto=proto, src_ip=self.ip(*sender))
        self.cm.network_updates.put_nowait(
            net.InstanceNetworkUpdateNotification(
                pending_firewall_update=net.PendingFirewallUpdate(
                    instance=convert.ident_to_pb(self.infos[sender].ident), firewall_rules=[rule]
                )
            )
        )

    def probes(self) -> dict[str, tuple[tuple[str, int], str]]:
        """Everything that listens: "proto:address:port" to receiver and "proto:port"."""
        return {
            f"{proto}:{self.ip(*key)}:{port}": (key, f"{proto}:{port}")
            for key in self.infos
            for proto, port in (text.split(":") for text in SERVICES[key[0]].listens)
        }

    def expected(self, sender: tuple[str, int]) -> set[str]:
        """What must answer to a sender; all else must not."""
        return {
            probe
            for probe, (key, port) in self.probes().items()
            if self.infos[key].owner_id == self.infos[sender].owner_id
            or SERVICES[key[0]].open_to(port)
            or (sender, key, port) in self.late
        }

    def check_traffic(self, *senders: tuple[str, int]) -> None:
        """Real sockets from the namespaces of the senders to everything that listens."""
        for sender in senders:
            answers = answering(id_of(self.infos[sender]), *self.probes())
            wanted = self.expected(sender)
            print(f"{sender}: {len(answers)} of {len(self.probes())} answer")
            assert answers == wanted, f"{sender}: too many {answers - wanted}, missing {wanted - answers}"
            assert answers and len(answers) < len(self.probes())


@pytest.mark.debian("nginx-light", "python3-minimal", "redis-server", "busybox-static")
@pytest.mark.timeout(300)
async def test_mixed_load(tmp_path: Path) -> None:
    traces = Traces()
    async with SmBed(tmp_path).running() as bed:
        unit = SmUnit(bed)
        async with unit.sm(monitoring={"pollPeriod": "10m"}) as sm:
            await unit.cm.connected(1)
            load = Load(unit, (info for item in SERVICES for info in instances(bed, item)))
            unit.cm.update(*load.infos.values())
            await load.all_active()
            check_limits(load)
            await check_traffic(load)
            await check_effect_of_limits(load)
            await check_update(load, bed)

            unit.cm.update(stop=tuple(load.infos.values()))
            await unit.cm.wait(lambda cm: cm.instance_states() == {}, 60)
            with contextlib.suppress(TimeoutError):
                await until(lambda: traces.left() == set(), 20)
            assert traces.left() == set()
            released = {call for call in unit.cm.calls if call.startswith("ReleaseNodeNetwork")}
            assert released == {"ReleaseNodeNetwork alpha", "ReleaseNodeNetwork beta"}
            assert sm.process.returncode is None
        assert list((tmp_path / "sm").glob("runtimes/*")) == []


def check_limits(load: Load) -> None:
    """Each instance has the limits of its item, to the byte."""
    for (item, _), info in load.infos.items():
        service = SERVICES[item]
        cpu_quota = str(service.cpu_limit * 100_000 // NODE.max_dmips)
        assert set(limit_files(info).values()) == {str(service.ram_limit), str(service.pids_limit), cpu_quota}
        assert f"/{id_of(info)}" in Path(f"/proc/{first_pid(info)}/cgroup").read_text()


async def check_traffic(load: Load) -> None:
    """Before and after CM allows more; both directions between the owners, TCP and UDP."""
    senders = [("web", 0), ("box", 1), ("store", 0), ("echo", 5)]
    load.check_traffic(*senders)
    load.allow(("web", 0), ("echo", 5), "tcp", "9100-9101")
    load.allow(("web", 0), ("echo", 5), "udp", "9101-9102")
    load.allow(("web", 0), ("store", 1), "tcp", "6379")
    load.allow(("store", 0), ("echo", 1), "udp", "9100")
    load.allow(("store", 0), ("box", 1), "tcp", "8081")
    table = ["nft", "list", "table", "inet", "aos"]
    await until(lambda: load.ip("box", 1) in rules_with("8081", subprocess.check_output(table, text=True)))
    load.check_traffic(*senders, ("web", 1))


def rules_with(port: str, table: str) -> str:
    return "".join(line for line in table.splitlines() if f"dport {port}" in line)


async def check_effect_of_limits(load: Load) -> None:
    """One eats memory and one spins: they are contained, and nobody else is touched."""
    eater, spinner = ("echo", 2), ("echo", 3)
    others = {key: first_pid(info) for key, info in load.infos.items() if key != eater}
    ends = ends_of(load, eater)
    inside(id_of(load.infos["web", 0]), sys.executable, "-c", TALK, load.ip(*eater), "eat")
    await load.cm.wait(lambda _: ends_of(load, eater)[len(ends) :], 30)
    error = ends_of(load, eater)[len(ends)]
    assert (error.exit_code, "out of memory" in error.message) == (137, True)
    await load.all_active()

    inside(id_of(load.infos["web", 0]), sys.executable, "-c", TALK, load.ip(*spinner), "spin")
    await until(lambda: cpu_s(load.infos[spinner]) > 1)
    began, before = time.monotonic(), cpu_s(load.infos[spinner])
    time.sleep(2)
    share = (cpu_s(load.infos[spinner]) - before) / (time.monotonic() - began)
    allowed = SERVICES["echo"].cpu_limit / NODE.max_dmips
    print(f"the spinning instance takes {share:.0%} of a core, allowed are {allowed:.0%}; the eater: {error.message}")
    assert share < 1.1 * allowed
    assert others == {key: first_pid(info) for key, info in load.infos.items() if key != eater}


def ends_of(load: Load, key: tuple[str, int]) -> list[common.ErrorInfo]:
    """Errors of all failed statuses of an instance."""
    return [
        one.error
        for frame in load.cm.connections[-1].frames
        if frame.WhichOneof("SMOutgoingMessage") == "update_instances_status"
        for one in frame.update_instances_status.instances
        if (one.instance.item_id, one.instance.instance, one.state) == (*key, "failed")
    ]


async def check_update(load: Load, bed: SmBed) -> None:
    """Two of the items get a new version; the instances of the others go on."""
    before = {key: first_pid(info) for key, info in load.infos.items()}
    new = [*instances(bed, "web", "2.0.0"), *instances(bed, "box", "2.0.0")]
    load.infos |= {(info.ident.item_id, info.ident.instance): info for info in new}
    load.cm.update(*new)
    await load.all_active()
    same = {key for key, info in load.infos.items() if first_pid(info) == before[key]}
    assert same == {key for key in load.infos if key[0] in ("echo", "store")}
    fetch = "import urllib.request as u, sys; print(u.urlopen(sys.argv[1], timeout=5).read().decode())"
    page = inside(id_of(load.infos["store", 0]), sys.executable, "-c", fetch, f"http://{load.ip('web', 3)}:8080/")
    assert page.stdout.strip() == "2.0.0"
    load.check_traffic(("web", 0), ("echo", 5))


class Traces:
    """What instances could leave on the machine, compared with what was there before."""

    def __init__(self) -> None:
        self._before = self._found()

    def left(self) -> set[str]:
        """What is there now and was not before."""
        return self._found() - self._before

    def _found(self) -> set[str]:
        found = {f"netns {path}" for path in Path("/run/netns").glob("*")}
        found |= {f"link {name}" for _, name in socket.if_nameindex()}
        found |= {f"bundle {path}" for path in Path("/run/aos/runtime").glob("*")}
        found |= {f"container {path}" for path in Path("/run/crun").glob("*")}
        found |= {f"dns {path}" for path in Path("/run/aos/dns").glob("*")}
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
        found |= {f"mount {line.split()[4]}" for line in mounts if "/run/" in line.split()[4]}
        parent = namespaces.cgroup_parent().lstrip("/")
        for group in find_cgroups(parent):
            found |= {f"cgroup {below}" for below, _, _ in os.walk(group) if below != str(group)}
        own = Path("/proc/self/exe").readlink()
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and (name := (entry / "exe").readlink()) != own:
                    found.add(f"process {name}")
        for kind, table in (("chain", "aos"), ("counter", "aos-traffic")):
            listing = subprocess.run(
                ["nft", "list", "table", "inet", table], capture_output=True, text=True, check=False
            )
            lines = [line.strip() for line in listing.stdout.splitlines()]
            found |= {f"nft {line}" for line in lines if line.startswith((f"{kind} instance_", f"{kind} in_"))}
        # The node's own counter, and the directory of namespaces, which stays a mount as the ip program makes it.
        return found - {"nft counter in_system {", "mount /run/netns"}
