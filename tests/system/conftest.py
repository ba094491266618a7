"""Bed C of the system tests: a cloud and a Unit in systemd-nspawn, inside one machine of namespaces (testbed.md §6)."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from aoscore.ctl import target
from aoscore.ctl.machine import Machine, remove_cgroups
from aoscore.ctl.sandbox import Layout, Program
from tests.system import guest

ROOT = guest.ROOT
HERE = Path(__file__).resolve().parent
SCRIPTS = Path(sysconfig.get_path("scripts"))
DOMAIN = "aoscloud.test"
BRIDGE_IP = "172.31.9.1"
GUEST_IP = "172.31.9.2"
DNS_IP = "10.0.0.100"
SYSTEM_ID = "test-unit"


class Bed:
    """A cloud and one Main Node that boots the installed product under systemd."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.machine = Machine(directory)
        self.cloud = directory / "cloud"
        self.guest = directory / "node"
        self.name = f"main{os.getpid()}"

    def start(self) -> None:
        """Boot; returns when the cloud answers and systemd runs in the node."""
        lower = guest.lower_layers()
        root_file = Path(self.devcloud("ca", "--domain", DOMAIN).strip().splitlines()[-1])
        for role in ("oem", "sp"):
            self.devcloud("user-cert", "--domain", DOMAIN, "--role", role)
        self._fill_node(root_file.read_bytes())
        cloud = ("serve", "--dir", str(self.cloud), "--domain", DOMAIN, "--host", BRIDGE_IP)
        boot = (str(HERE / "boot-node.sh"), self.name, str(self.guest), "aosbr", ":".join(map(str, lower)))
        self.machine.start(
            Layout(
                programs=(
                    Program("cloud", (str(SCRIPTS / "aos-devcloud"), *cloud), notifies=False),
                    Program("node", boot, notifies=False),
                ),
                hosts={"localhost": "127.0.0.1", DOMAIN: BRIDGE_IP},
                state_file=self.directory / "never",
                setup=(
                    ("ip", "link", "add", "aosbr", "type", "bridge"),
                    ("ip", "address", "add", f"{BRIDGE_IP}/24", "dev", "aosbr"),
                    ("ip", "link", "set", "aosbr", "up"),
                ),
            )
        )
        wait(lambda: self.call("units") is not None, 30, "the cloud answers")
        self.wait_booted()

    def stop(self) -> None:
        """Power off hard: everything of the bed ends with the machine."""
        self.machine.stop()
        remove_cgroups(f"aos-test-{self.name}")

    def _fill_node(self, root_ca: bytes) -> None:
        for name in ("upper", "work", "root"):
            (self.guest / name).mkdir(parents=True)
        upper = self.guest / "upper"
        node = target.Node(
            ip=f"{GUEST_IP}/24",
            gateway=BRIDGE_IP,
            dns_ip=DNS_IP,
            system_id=SYSTEM_ID,
            node_id="main",
            discovery_url=f"https://{DOMAIN}:9000/sd/v7/",
            keys="file",
            data_disk=False,
            nfs=False,
            runtimes=("container",),
            status_period="1s",
            monitoring_period="5s",
            log_level="debug",
            bin="/opt/aoscore/bin",
            root_ca=root_ca.decode(),
        )
        target.write(target.tree(node), upper)
        with (upper / "etc" / "hosts").open("a") as hosts:
            hosts.write(f"{BRIDGE_IP} {DOMAIN}\n")
        units = upper / "etc" / "systemd" / "system"
        (units / "multi-user.target.wants").mkdir(parents=True)
        networkd = "/usr/lib/systemd/system/systemd-networkd.service"
        (units / "multi-user.target.wants" / "systemd-networkd.service").symlink_to(networkd)
        for name in (
            "apt-daily.timer",
            "apt-daily-upgrade.timer",
            "e2scrub_all.timer",
            "systemd-networkd-wait-online.service",
        ):
            (units / name).symlink_to("/dev/null")

    # Talking to the parts

    def devcloud(self, command: str, *args: str) -> str:
        """Run a command of the cloud; its output."""
        return run([SCRIPTS / "aos-devcloud", command, "--dir", self.cloud, *args])

    def call(self, operation: str, **arguments: Any) -> Any:
        """Run an operation of the cloud's admin interface."""
        answer = self.devcloud("call", operation, json.dumps(arguments))
        return json.loads(answer) if answer.strip() else None

    def inside(self, *args: str | Path, timeout_s: float = 60) -> str:
        """Run a command beside the cloud."""
        return run(self.machine.enter(*args), timeout_s)

    @property
    def leader(self) -> str:
        """Process ID, as the bed sees it, of systemd in the node."""
        outer = self.inside("pgrep", "-x", "systemd-nspawn").split()
        return self.inside("pgrep", "-P", outer[0]).split()[0]

    def node(self, *args: str, timeout_s: float = 60) -> str:
        """Run a command in the node."""
        return self.inside("nsenter", "-t", self.leader, "-a", *args, timeout_s=timeout_s)

    def wait_booted(self) -> None:
        """Until systemd in the node says that it runs."""
        wait(
            lambda: self.node("sh", "-c", "systemctl is-system-running || true").strip() in ("running", "degraded"),
            60,
            "the node has booted",
        )

    def status(self) -> dict[str, Any]:
        """The Unit's merged status at the cloud."""
        status: dict[str, Any] = self.call("unit", unit=SYSTEM_ID)["status"]
        return status

    def instance_states(self) -> list[str]:
        """States of all instances the cloud knows."""
        return [one["state"] for group in self.status().get("instances", []) for one in group["instances"]]

    def container_pids(self) -> dict[str, int]:
        """Running containers of the node with the process IDs of their first processes."""
        listed = json.loads(self.node("crun", "--root", "/run/crun", "list", "-f", "json") or "[]") or []
        return {entry["id"]: entry["pid"] for entry in listed if entry["status"] == "running"}


def run(args: list[Any], timeout_s: float = 60) -> str:
    """Run a command; its output. Fails with all it said."""
    done = subprocess.run([str(arg) for arg in args], capture_output=True, text=True, timeout=timeout_s)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, args))}: code {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def wait(done: Callable[[], bool], timeout_s: float, what: str) -> None:
    """Poll until true; RuntimeErrors count as "not yet"."""
    deadline = time.monotonic() + timeout_s
    last = ""
    while True:
        try:
            if done():
                return
        except RuntimeError as error:
            last = str(error)
        assert time.monotonic() < deadline, f"waited {timeout_s:g} s until {what}; {last}"
        time.sleep(0.3)


@pytest.fixture
def bed(tmp_path: Path) -> Iterator[Bed]:
    """A booted bed; on a failure its log files and the node's journal are printed."""
    missing = [name for name in ("systemd-nspawn", "mmdebstrap", "unshare", "script") if shutil.which(name) is None]
    if os.geteuid() != 0 or missing:
        reason = f"needs root and {', '.join(missing) or 'nothing else'}"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    bed = Bed(tmp_path)
    try:
        bed.start()
        yield bed
    except BaseException:
        _show(bed)
        raise
    finally:
        bed.stop()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """On a failed test print what the bed has to say before it goes away."""
    yield
    if call.when == "call" and call.excinfo is not None and "bed" in getattr(item, "funcargs", {}):
        _show(item.funcargs["bed"])  # type: ignore[attr-defined]


def _show(bed: Bed) -> None:
    for log in sorted((bed.directory / "log").glob("*.log")):
        print(f"--- {log.name}\n" + "\n".join(log.read_text(errors="replace").splitlines()[-40:]), file=sys.stderr)
    try:
        print(bed.node("journalctl", "--no-pager", "-n", "400", "-o", "cat"), file=sys.stderr)
    except (RuntimeError, AssertionError, subprocess.TimeoutExpired) as error:
        print(f"no journal: {error}", file=sys.stderr)
