"""A Unit and its cloud in a machine of namespaces, whatever its nodes run in. See `unit.QemuUnit` for one of guests."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from aoscore.common.errors import FailedError
from aoscore.ctl.host import run, wait
from aoscore.ctl.localcloud import LocalCloud
from aoscore.ctl.machine import Machine
from aoscore.ctl.sandbox import Layout, Program
from aoscore.ctl.target import Node

CRUN_STATE_ROOT = Node().crun_state_root
# Of the Main Node, and of the Unit's name server, in the Unit's own network: the generator's default.
MAIN_IP = Node().dns_ip
BRIDGE = "aosbr"


class BedNode(Protocol):
    """A node that runs programs for us."""

    def run(self, *args: str | Path, timeout_s: float = ...) -> str:
        """Output of a program. Raises FailedError with all it said when it fails."""
        ...

    def wait_settled(self, timeout_s: float = ...) -> None:
        """Until systemd has started all that belongs to the boot."""
        ...


class Bed:
    """What Units of all kinds have. `main_address` is the Main Node's address as the cloud's host sees it.

    `patience` is by how much longer than on real hardware everything may take.
    """

    nodes: Mapping[str, BedNode]
    # Between two questions while something is awaited.
    pause_s = 0.3

    def __init__(self, directory: Path, *, domain: str, tools: Path, main_address: str, patience: float = 1.0) -> None:
        self.directory = directory.absolute()
        self.machine = Machine(self.directory)
        self.cloud = LocalCloud(self.directory / "cloud", domain, tools)
        self._main_address = main_address
        self.patience = patience
        self._system_id = ""

    def _start_machine(
        self,
        cloud_ip: str,
        *,
        programs: Sequence[Program] = (),
        setup: Sequence[tuple[str, ...]] = (),
        cgroups: Sequence[str] = (),
    ) -> None:
        """Start the machine with the cloud on the bridge `BRIDGE`; it ends with our process. `setup`: more commands."""
        self.machine.start(
            Layout(
                programs=(self.cloud.program(cloud_ip), *programs),
                hosts={"localhost": "127.0.0.1", self.cloud.domain: cloud_ip},
                state_file=self.directory / "never",
                setup=(
                    ("ip", "link", "add", BRIDGE, "type", "bridge"),
                    ("ip", "address", "add", f"{cloud_ip}/24", "dev", BRIDGE),
                    ("ip", "link", "set", BRIDGE, "up"),
                    *setup,
                ),
            ),
            bound=True,
            cgroups=cgroups,
        )
        self.wait(lambda: self.call("units") is not None, 30, "the cloud to answer")

    def start(self) -> None:
        """Power on; returns when the cloud answers and all nodes have booted."""
        raise NotImplementedError

    def stop(self) -> None:
        """Power off hard; nothing of it is left but its files."""
        raise NotImplementedError

    def inside(self, *args: str | Path, timeout_s: float = 60) -> str:
        """Output of a program that runs beside the cloud."""
        return run(self.machine.enter(*args), timeout_s)

    def wait(self, done: Callable[[], object], timeout_s: float, what: str) -> None:
        """Wait until something is so; see `aoscore.ctl.host.wait`."""
        wait(done, timeout_s * self.patience, what, pause_s=self.pause_s)

    @property
    def system_id(self) -> str:
        """The Unit's system id: the Main Node's machine id."""
        self._system_id = self._system_id or self.nodes["main"].run("cat", "/etc/machine-id").strip()
        return self._system_id

    def call(self, operation: str, **arguments: Any) -> Any:
        """Run an operation of the cloud's admin interface."""
        return self.cloud.call(operation, **arguments)

    def ask(self, operation: str, **arguments: Any) -> Any:
        """The same, about this Unit."""
        return self.cloud.call(operation, unit=self.system_id, **arguments)

    def provision(self, nodes: int = 1) -> None:
        """With the real aos-prov, as a user does; returns when the Unit is online. `nodes`: how many it has to have."""
        self.cloud.provision(self.machine, f"{self._main_address}:8089", nodes=nodes, wait_s=int(60 * self.patience))
        self.wait(self.is_online, 90, "the Unit to come online")

    def is_online(self) -> bool:
        """Whether the cloud has a link to the Unit."""
        return bool(self.ask("unit")["online"])

    def upload(self, project: Path) -> None:
        """Give the item project in a folder to the cloud."""
        self.cloud.command("upload", project, "--user", self.cloud.user("sp"))

    def instance_states(self) -> list[str]:
        """States of all instances, as the cloud knows them."""
        status = self.ask("unit")["status"]
        return [one["state"] for group in status.get("instances", []) for one in group["instances"]]

    def deploy(self, item: str) -> None:
        """Want one item on the Unit; returns when all instances are active."""
        self.call("assign", item=item, target=self.system_id)
        self.wait(self.all_active, 90, f"{item} to be active")

    def label_nodes(self, names: Sequence[str], version: str = "1.0.0", *, ram_percent: float = 0) -> None:
        """Give each node a label with its name; of what a service may have, this share of its RAM is kept for it.

        `version` is that of the unit config that says so; returns when it is installed.
        """
        main_type = Node().node_type
        nodes = [
            {
                "nodeGroupSubject": {"codename": main_type.replace("main", name)},
                "labels": [name],
                "resourceRatios": {"cpu": 0, "ram": ram_percent},
            }
            for name in names
        ]
        self.ask("unit_config", config={"formatVersion": "7", "version": version, "nodes": nodes})
        wanted = {"version": version, "state": "installed"}
        self.wait(
            lambda: wanted in self.ask("unit")["status"].get("unitConfig", []), 60, "the unit config to be installed"
        )

    def all_active(self) -> bool:
        """Whether there are instances and all are active."""
        return set(self.instance_states()) == {"active"}

    def container_pids(self, node: str = "main") -> dict[str, int]:
        """Running containers of a node with the process IDs of their first processes."""
        listed = json.loads(self.nodes[node].run("crun", "--root", CRUN_STATE_ROOT, "list", "-f", "json") or "[]")
        return {entry["id"]: entry["pid"] for entry in listed or [] if entry["status"] == "running"}

    def page(self, host: str, port: int = 8080) -> str:
        """What a service answers over HTTP, asked from the Main Node by the service's name in the Unit."""
        node = self.nodes["main"]
        answer = node.run("busybox", "nslookup", host, MAIN_IP)
        found = [line.split()[-1] for line in answer.splitlines() if line.startswith("Address")]
        addresses = [address for address in found if not address.startswith(MAIN_IP)]
        if not addresses:
            raise FailedError(f"{host} has no address in the Unit: {answer}")
        return node.run("busybox", "wget", "-q", "-O", "-", f"http://{addresses[0]}:{port}/")
