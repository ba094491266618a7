"""The demo: a cloud and a Unit on this machine, from nothing to a page of a running service.

Every step asks first whether its result is there already, so a second run is quick and an interrupted one goes on.
What the user of an AosEdge cloud does by hand is done by the same public tools: `aos-prov` provisions the Unit,
`aos-signer` packs, signs and uploads the service.
"""

import json
import os
import sysconfig
import textwrap
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from aoscore.common.errors import FailedError, NotFoundError
from aoscore.common.files import remove_tree
from aoscore.ctl import target
from aoscore.ctl.host import run, step, wait, which
from aoscore.ctl.localcloud import LocalCloud
from aoscore.ctl.machine import Machine, last_lines, remove_cgroups
from aoscore.ctl.sandbox import Layout, Program
from aoscore.ctl.webservice import ITEM, PORT, VERSION, make_project

_DOMAIN = "aoscloud.demo"
_SYSTEM_ID = "demo-unit"
_DNS_IP = "10.0.0.100"
_DEPLOY_TIMEOUT_S = 120.0
_HOST_PROGRAMS = {
    "nsenter": "util-linux",
    "ip": "iproute2",
    "nft": "nftables",
    "crun": "crun",
    "conmon": "conmon",
    "umoci": "umoci",
    "busybox": "busybox-static",
    "dnsmasq": "dnsmasq-base",
}


class Demo:
    """The demo below one directory. `tools` is the virtual environment of aos-prov and aos-signer."""

    def __init__(self, directory: Path, tools: Path) -> None:
        self._dir = directory.absolute()
        self._machine = Machine(self._dir)
        self._cloud = LocalCloud(self._dir / "cloud", _DOMAIN, tools)
        # Control groups are the host's, so each demo has its own.
        self.cgroup = f"aos-demo-{zlib.crc32(bytes(self._dir)):08x}"
        scripts = Path(sysconfig.get_path("scripts"))
        unit = self._dir / "unit"
        self._node = target.Node(
            etc=str(unit / "etc"),
            var=str(unit / "var"),
            run="/run/aos",
            ca_file=str(unit / "etc" / "AosRootCA.crt"),
            hostname="localhost",
            system_id=_SYSTEM_ID,
            node_id="main",
            discovery_url=f"https://{_DOMAIN}:9000/sd/v7/",
            keys="file",
            data_disk=False,
            runtimes=("container",),
            # Nothing to do: the machine itself watches the state file, as systemd's conditions do on a device.
            hooks=False,
            dns_ip=_DNS_IP,
            dns_by_cm=True,
            status_period="100ms",
            monitoring_period="5s",
            cgroup_parent=f"/{self.cgroup}",
            crun_state_root="/run/aos/crun",
            output="files",
        )
        self._state_file = Path(self._node.state_file)
        self._scripts = scripts

    def up(self) -> None:
        """Bring everything up and end with a page of the service; Ctrl-C takes all of it down again."""
        self._check_host()
        try:
            with step("Cloud and Unit"):
                self._start_machine()
            with step("Provision the Unit with aos-prov"):
                self._provision()
            with step("Unit online"):
                self._wait(lambda: self._cloud.call("unit", unit=_SYSTEM_ID)["online"], 60, "the Unit to come online")
            with step(f"Service {ITEM} {VERSION}: image by umoci, bundle by aos-signer"):
                self._upload()
            self._deploy()
            page = self._fetch()
            self._report(page)
        except KeyboardInterrupt:
            print("\nInterrupted: taking the demo down")
            self.down()
            raise

    def down(self) -> None:
        """End all of it and remove its files."""
        ran = self._machine.stop()
        remove_cgroups(self.cgroup)
        remove_tree(self._dir)
        print("The demo is gone." if ran else "The demo was not running; its files are gone.")

    # Steps

    def _check_host(self) -> None:
        missing = [f"{name} (package {package})" for name, package in _HOST_PROGRAMS.items() if not which(name)]
        if missing:
            raise NotFoundError(f"not installed: {', '.join(missing)}; run make packages")
        self._cloud.check_tools()
        if os.geteuid() != 0:
            raise FailedError("the demo makes namespaces and containers: run it as root")

    def _start_machine(self) -> None:
        if self._machine.pid is not None:
            return
        # Of the node's files those that lie in its own directories: everything else is this machine's.
        parts = ("iam", "cm", "sm", "network", "data")
        own = [entry for entry in target.tree(self._node, parts) if Path(entry.path).is_relative_to(self._dir)]
        target.write(own, Path("/"))
        Path(self._node.ca_file).write_bytes(self._cloud.root_file().read_bytes())
        daemons = {"iam": "aos_iamanager", "cm": "aos_communicationmanager", "sm": "aos_servicemanager"}
        command = {
            name: (str(self._scripts / program), "-c", f"{self._node.etc}/{name}.cfg", "-v", "debug")
            for name, program in daemons.items()
        }
        self._machine.start(
            Layout(
                programs=(
                    self._cloud.program("127.0.0.1"),
                    Program("iam-prov", (*command["iam"], "--provisioning"), when="unprovisioned"),
                    *(Program(name, command[name], when="provisioned") for name in ("iam", "cm", "sm")),
                ),
                hosts={"localhost": "127.0.0.1", "main": "127.0.0.1", _DOMAIN: "127.0.0.1"},
                state_file=self._state_file,
                setup=(("ip", "address", "add", f"{_DNS_IP}/32", "dev", "lo"),),
            )
        )
        self._wait(lambda: self._cloud.call("units") is not None, 30, "the cloud to answer")

    def _provision(self) -> None:
        if self._state_file.exists():
            return
        self._cloud.provision(self._machine, "localhost:8089", wait_s=20)
        self._wait(self._state_file.exists, 10, "the node to be provisioned")

    def _upload(self) -> None:
        if any(item["codename"] == ITEM and item["version"] == VERSION for item in self._cloud.call("items")):
            return
        project = make_project(self._dir / "service", user=self._cloud.user("sp"), domain=_DOMAIN)
        self._cloud.sign_and_upload(self._machine, project)

    def _deploy(self) -> None:
        with step("Assign the service to the Unit"):
            heard = self._cloud.call("messages", unit=_SYSTEM_ID, message_type="unitStatus")
            after = max((message["number"] for message in heard), default=0)
            self._cloud.call("assign", item=ITEM, target=_SYSTEM_ID)
        began = time.monotonic()
        names = self._names()
        shown: set[str] = set()

        def active() -> bool:
            nonlocal after
            for message in self._cloud.call("messages", unit=_SYSTEM_ID, message_type="unitStatus", after=after):
                after = message["number"]
                for line in _lines(message["data"], names):
                    if line not in shown:
                        shown.add(line)
                        print(f"    {time.monotonic() - began:5.1f} s  {line}", flush=True)
            status = self._cloud.call("unit", unit=_SYSTEM_ID)["status"]
            states = [one["state"] for group in status.get("instances", []) for one in group["instances"]]
            items = [item["state"] for item in status.get("items", [])]
            return bool(states) and set(states) == {"active"} and "installed" in items

        self._wait(active, _DEPLOY_TIMEOUT_S, "the service to be active")

    def _fetch(self) -> str:
        """A page from the service, found by its name in the Unit's DNS."""

        def answer() -> str:
            looked_up = self._inside(["busybox", "nslookup", ITEM, _DNS_IP], timeout_s=10)
            addresses = [line.split()[-1] for line in looked_up.splitlines() if line.startswith("Address")]
            found = [address for address in addresses if not address.startswith(_DNS_IP)]
            if not found:
                raise FailedError(f"{ITEM} has no address in the Unit's DNS: {looked_up}")
            url = f"http://{found[0]}:{PORT}/"
            return f"{url} answers: {self._inside(['busybox', 'wget', '-q', '-O', '-', url], timeout_s=10).strip()}"

        with step("Fetch a page from the service"):
            deadline = time.monotonic() + 20
            while True:
                try:
                    return answer()
                except FailedError:
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(0.5)

    def _report(self, page: str) -> None:
        print(f"\n{page}\n\nStatus of the Unit")
        for line in _lines(self._cloud.call("unit", unit=_SYSTEM_ID)["status"], self._names()):
            print(f"    {line}")
        self._wait(lambda: bool(self._samples()), _DEPLOY_TIMEOUT_S, "a monitoring sample")
        print("\nA monitoring sample")
        print(textwrap.indent(json.dumps(self._samples()[0]), "    "))
        print("\nLast log lines of the service")
        for node, answer in self._cloud.call("logs", unit=_SYSTEM_ID, log_type="instanceLog", item=ITEM).items():
            for line in answer["text"].splitlines()[-5:]:
                print(f"    {node}: {line}")
        watch = f"aos-devcloud watch {_SYSTEM_ID} --dir {self._cloud.directory}"
        print(f"\nThe Unit goes on running. Look at it with:  {watch}")
        print(f"Log files: {self._dir / 'log'}.  End it with:  make demo-down")

    # What the steps are made of

    def _names(self) -> dict[str, str]:
        return {item["id"]: item["codename"] for item in self._cloud.call("items")}

    def _samples(self) -> list[dict[str, Any]]:
        newest: list[dict[str, Any]] = self._cloud.call("monitoring", unit=_SYSTEM_ID, limit=1)
        return newest

    def _inside(self, args: list[str], timeout_s: float) -> str:
        return run(self._machine.enter(*args), timeout_s)

    def _wait(self, done: Callable[[], bool], timeout_s: float, what: str) -> None:
        def check_machine() -> None:
            if self._machine.pid is None:
                last = "\n".join(last_lines(self._dir / "log" / "sandbox.log", 5))
                raise FailedError(f"the machine has ended while waiting for {what}:\n{last}")

        wait(done, timeout_s, f"{what}; log files: {self._dir / 'log'}", on_poll=check_machine)


def _lines(status: dict[str, Any], names: dict[str, str]) -> Iterator[str]:
    """A unit status in lines; `names` are the items' names for people, by their ids."""

    def name(identity: dict[str, Any]) -> str:
        return str(identity.get("codename") or names.get(identity["id"], identity["id"]))

    def error(entry: dict[str, Any]) -> str:
        return f": {entry['errorInfo']['message']}" if entry.get("errorInfo") else ""

    for node in status.get("nodes", []):
        yield f"node {name(node['identity'])}: {node['state']}{error(node)}"
    for item in status.get("items", []):
        yield f"item {name(item['item'])} {item['version']}: {item['state']}{error(item)}"
    for group in status.get("instances", []):
        for one in group["instances"]:
            number = f"instance {name(group['item'])}/{one['instance']} {group['version']}"
            yield f"{number}: {one['state']}{error(one)}"
