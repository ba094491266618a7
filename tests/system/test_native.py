"""The native runtime under a real systemd: a node that boots in systemd-nspawn (bed C), without a cloud."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from aoscore.ctl.machine import Machine, remove_cgroups
from aoscore.ctl.sandbox import Layout, Program
from tests.system import guest

HERE = Path(__file__).resolve().parent
PYTHON = "/opt/aoscore/bin/python"

pytestmark = [pytest.mark.nspawn, pytest.mark.timeout(600)]


class Node:
    """A guest that systemd runs."""

    def __init__(self, directory: Path) -> None:
        self.machine = Machine(directory)
        self.name = f"native{os.getpid()}"
        self.guest = directory / "node"
        for name in ("upper", "work", "root"):
            (self.guest / name).mkdir(parents=True)
        shutil.copy(HERE / "native_in_guest.py", self.guest / "upper")

    def start(self) -> None:
        """Boot; returns when systemd has started what it was to start."""
        lower = ":".join(map(str, guest.lower_layers()))
        boot = (str(HERE / "boot-node.sh"), self.name, str(self.guest), "aosbr", lower)
        self.machine.start(
            Layout(
                programs=(Program("node", boot, notifies=False),),
                hosts={"localhost": "127.0.0.1"},
                state_file=self.machine.directory / "never",
                setup=(("ip", "link", "add", "aosbr", "type", "bridge"), ("ip", "link", "set", "aosbr", "up")),
            )
        )
        self.run("sh", "-c", "systemctl is-system-running --wait || true")

    def run(self, *args: str) -> str:
        """Run a command in the node, as soon as there is a systemd to run it beside; its output."""
        leader = "until pid=$(pgrep -P $(pgrep -o -x systemd-nspawn)); do sleep 0.2; done; "
        ready = "until nsenter -t $pid -a test -S /run/systemd/private; do sleep 0.2; done; "
        command = ("sh", "-c", f'{leader}{ready}exec nsenter -t $pid -a "$@"', "sh", *args)
        done = subprocess.run(self.machine.enter(*command), capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, f"{args}:\n{done.stdout}{done.stderr}"
        return done.stdout

    def stop(self) -> None:
        """Power off hard."""
        self.machine.stop()
        remove_cgroups(f"aos-test-{self.name}")


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    missing = [name for name in ("systemd-nspawn", "mmdebstrap", "unshare", "script") if shutil.which(name) is None]
    if os.geteuid() != 0 or missing:
        reason = f"needs root and {', '.join(missing) or 'nothing else'}"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    node = Node(tmp_path)
    try:
        node.start()
        yield node
    finally:
        node.stop()


def test_services_as_units(node: Node) -> None:
    said = node.run(PYTHON, "/native_in_guest.py")
    assert [line for line in said.splitlines() if line.startswith("kept: ")][-1] == "kept: nothing is left at the end"
