"""The beds themselves: two nodes, and nothing left behind by a test run that was killed."""

import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from aoscore.ctl.host import wait
from qemu.bed import MAIN_IP
from qemu.images import SECONDARY_IP, Images, build_images
from qemu.unit import QemuUnit
from tests import beds
from tests.conftest import ROOT
from tests.support.nspawn import NspawnUnit
from tests.support.traces import traces
from tests.system.conftest import running

# A test run, as far as the bed is concerned: boots it, says so, and would go on for ever.
RUN = """
import sys, time
from pathlib import Path
from tests.system.conftest import running, saved_qemu_unit
from tests.support.nspawn import NspawnUnit
directory = Path(sys.argv[1])
unit = NspawnUnit(directory) if sys.argv[2] == "nspawn" else saved_qemu_unit(directory)
with running(unit):
    print("up", flush=True)
    time.sleep(3600)
"""


@pytest.mark.nspawn
@pytest.mark.timeout(300)
@pytest.mark.parametrize("nspawn_unit", [("main", "secondary")], indirect=True)
def test_two_nodes_boot_and_reach_each_other(nspawn_unit: NspawnUnit) -> None:
    main, secondary = nspawn_unit.nodes["main"], nspawn_unit.nodes["secondary"]
    assert "1 received" in main.run("ping", "-c", "1", "-W", "10", SECONDARY_IP)
    assert "1 received" in secondary.run("ping", "-c", "1", "-W", "10", MAIN_IP)
    assert secondary.run("getent", "ahostsv4", "main").startswith(MAIN_IP)
    nspawn_unit.wait(lambda: main.run("systemctl", "is-active", "aos-iam-prov"), 60, "IAM of the Main Node")
    secondary.run("systemctl", "unmask", "aos-iam-prov")
    secondary.run("systemctl", "start", "--no-block", "aos-iam-prov")
    log = ("journalctl", "-u", "aos-iam-prov", "-o", "cat")
    nspawn_unit.wait(
        lambda: "Node connected" in main.run(*log), 60, "the Secondary Node to register with the Main Node"
    )
    for node in (main, secondary):
        units = node.run("systemctl", "list-unit-files", "--no-legend", "aos-*").split()
        assert "aos-sm.service" in units
    assert "aos-cm.service" not in secondary.run("systemctl", "list-unit-files", "--no-legend", "aos-*")


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    "kind", [pytest.param("nspawn", marks=pytest.mark.nspawn), pytest.param("vm", marks=pytest.mark.vm)]
)
def test_a_killed_run_leaves_nothing(kind: str, tmp_path: Path) -> None:
    directory = tmp_path / "unit"
    group = "aos-test-*"
    before = traces(directory, group)
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, str(directory), kind], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "up\n"
        # It is there, so that its absence means something.
        there = {trace.split()[0] for trace in traces(directory, group) - before}
        assert {"process", "files"} | ({"cgroup"} if kind == "nspawn" else set()) <= there
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()

    def left() -> set[str]:
        return traces(directory, group) - before - {f"files {directory}"}

    wait(lambda: not left(), 60, f"everything of the bed to be gone; there are {left()}")


def test_the_probe_knows_every_marker_of_a_bed(pytestconfig: pytest.Config) -> None:
    named = {line.partition(":")[0] for line in pytestconfig.getini("markers") if "(bed " in line}
    assert named == {bed.marker for bed in beds.BEDS}


def test_the_probe_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    beds.missing.cache_clear()
    try:
        assert "not installed" in (beds.lacking(["vm", "timeout"]) or "")
        assert beds.lacking(["timeout"]) is None
    finally:
        beds.missing.cache_clear()


@pytest.mark.vm
@pytest.mark.timeout(1800)
def test_a_disk_of_somebody_else_gets_the_agent_over_its_console(tmp_path: Path) -> None:
    """Such as a Yocto-built one: nothing in it knows of us."""
    images = build_images()
    boot = msgspec.structs.replace(
        images.boots["main"], append=f"{images.boots['main'].append} systemd.mask=aos-agent.service", agent=False
    )
    unit = QemuUnit(tmp_path / "unit", Images({"main": boot}, images.cloud), names=("main",))
    with running(unit):
        assert unit.main.execute("systemctl", "is-active", "aos-agent").stdout.strip() == "inactive"
        assert unit.main.run("hostname").strip() == "main"
        # And it ends as a guest does.
        unit.main.run("systemctl", "poweroff", "--no-block")
        unit.main.wait_ended(300)
        assert "Power down" in unit.main.serial_log.read_text(errors="replace")
