"""Faults that need a kernel of its own: disk, memory, clock and power of a Main Node in a QEMU guest (bed D)."""

import os
import random
import time
from collections.abc import Iterator

import pytest

from qemu.images import build_images
from qemu.unit import QemuUnit, saved_unit
from tests.support.idle import go_idle, what_was_written, written_sectors
from tests.support.wholeunit import (
    check_whole,
    containers,
    instances,
    is_back,
    label_nodes,
    main_pid,
    run_services,
    upload_service,
    wait_active,
)
from tests.system.conftest import all_well, running

pytestmark = [pytest.mark.vm, pytest.mark.timeout(1800)]

IDLE_S = float(os.environ.get("AOSCORE_IDLE_S", "600"))
CUTS = int(os.environ.get("AOSCORE_GUEST_POWER_CUTS", "2"))
SEED = int(os.environ.get("AOSCORE_SEED", "9"))
DAEMONS = ("aos-iam", "aos-cm", "aos-sm")


@pytest.fixture(scope="module")
def provisioned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[QemuUnit]:
    saved = saved_unit(build_images())
    directory = tmp_path_factory.mktemp("unit")
    with running(QemuUnit(directory, saved.images, states=saved.states, names=("main",))) as unit:
        unit.provision()
        label_nodes(unit)
        run_services(unit)
        yield unit


@pytest.fixture
def unit(provisioned: QemuUnit) -> Iterator[QemuUnit]:
    with all_well(provisioned) as unit:
        yield unit


def power_cycle(unit: QemuUnit, clock: str = "") -> None:
    """Cut the guest's power and boot it again."""
    unit.main.kill()
    unit.main.start(clock=clock)
    unit.main.wait_settled()


def set_clock(unit: QemuUnit, shift_s: float = 0.0) -> None:
    """Set the guest's clock to the time, and so many seconds more."""
    unit.main.run("date", "-u", "-s", f"@{time.time() + shift_s:.3f}")


def test_nothing_is_written_when_idle(unit: QemuUnit) -> None:
    """With the log level of devices, and a service that runs; neither the data disk nor the root disk."""
    main = unit.main
    go_idle(unit)
    before = written_sectors(main)
    began = time.monotonic()
    time.sleep(IDLE_S)
    after = written_sectors(main)
    written = {disk: after[disk] - before[disk] for disk in after}
    recent = what_was_written(main, IDLE_S)
    print(f"sectors written in {time.monotonic() - began:.0f} s: {written}\n{recent}")
    assert written == {"vda": 0, "vdb": 0}, recent


def test_each_daemon_is_killed_for_memory(unit: QemuUnit) -> None:
    """By the kernel, at a limit that it does not fit into; it comes back, and services never notice."""
    before = containers(unit)
    for daemon in DAEMONS:
        pid = main_pid(unit.main, daemon)
        unit.main.run("systemctl", "set-property", "--runtime", daemon, "MemoryMax=2M", "MemorySwapMax=0")
        killed = f"Killed process {pid} "
        unit.wait(lambda killed=killed: killed in unit.main.run("dmesg"), 60, f"{daemon} to be killed by the kernel")
        unit.main.run("systemctl", "set-property", "--runtime", daemon, "MemoryMax=infinity")
        unit.wait(lambda daemon=daemon, pid=pid: is_back(unit.main, daemon, pid), 90, f"{daemon} to be back")
    assert containers(unit) == before


def test_full_data_disk_heals(unit: QemuUnit) -> None:
    """An update that has no room waits, and the old version runs; with room it comes by itself."""
    main, before = unit.main, containers(unit)
    main.shell(
        "fallocate -l $(df -B1 --output=avail /var/aos | tail -n1) /var/aos/filler;"
        "dd if=/dev/zero of=/var/aos/filler2 bs=64k 2>/dev/null || true; sync"
    )
    upload_service(unit, "main", "1.0.1")
    said = ("journalctl", "-u", "aos-cm", "-o", "cat", "-n", "50")
    unit.wait(lambda: "no space left" in main.run(*said), 60, "CM to say that there is no room")
    assert containers(unit) == before, "the old version runs on"
    main.shell("rm /var/aos/filler /var/aos/filler2")
    wait_active(unit, "1.0.1", timeout_s=240)


def test_data_becomes_read_only(unit: QemuUnit) -> None:
    """As after an error of the medium: services run on, and after the next boot all is well."""
    before = containers(unit)
    unit.main.run("mount", "-o", "remount,abort", "/var/aos")
    assert unit.main.execute("touch", "/var/aos/can-write").code != 0
    upload_service(unit, "main", "1.0.2")
    unit.main.run("systemctl", "kill", "--signal=KILL", *DAEMONS)
    for daemon in DAEMONS:
        restarts = ("systemctl", "show", "--value", "--property=NRestarts", daemon)
        unit.wait(
            lambda restarts=restarts: unit.main.run(*restarts).strip() != "0", 60, f"{daemon} to be started again"
        )
    assert containers(unit) == before, "services run on"
    power_cycle(unit)
    wait_active(unit, "1.0.2")


def test_clock_is_1970_at_boot(unit: QemuUnit) -> None:
    """And the cloud is away: what was installed runs all the same. When the clock is right the Unit comes online."""
    unit.cut_uplink()
    power_cycle(unit, clock="1970-01-01T00:00:00")
    print("the node believes: " + unit.main.run("date", "-u"))
    assert float(unit.main.run("date", "+%s")) < time.time() - 30 * 86400
    unit.wait(lambda: len(unit.container_pids()) == 1, 60, "the service to run")
    unit.cut_uplink(cut=False)
    set_clock(unit)
    unit.wait(unit.is_online, 60, "the Unit to be online")


def test_clock_jumps_past_renewal(unit: QemuUnit) -> None:
    """The cloud is told before certificates end, renews them, and the Unit stays online."""
    serials = {one["serial"] for one in unit.ask("certificates")}
    set_clock(unit, 800 * 86400)
    # It looks once an hour, and at its start.
    unit.main.run("systemctl", "kill", "--signal=KILL", "aos-iam")
    try:
        unit.wait(lambda: "will expire soon" in str(unit.ask("alerts")), 120, "the alert")
        # IAM says so before it listens: CM has to wait for it.
        unit.ask("renew")
        unit.wait(
            lambda: not serials & {one["serial"] for one in unit.ask("certificates")}, 120, "all certificates to be new"
        )
    finally:
        set_clock(unit)


def test_certificates_expired_while_offline(unit: QemuUnit) -> None:
    """After a long time without the cloud the node starts with all its services, and once online it is renewed."""
    serials = {one["serial"] for one in unit.ask("certificates")}
    before = instances(unit)
    unit.cut_uplink()
    power_cycle(unit)
    set_clock(unit, 10 * 365 * 86400)
    unit.main.run("systemctl", "restart", "aos.target")
    unit.wait(lambda: len(unit.container_pids()) == 1, 60, "the service to run")
    unit.wait(
        lambda: "has expired" in unit.main.run("journalctl", "-u", "aos-iam", "-o", "cat", "-b"), 60, "IAM to say it"
    )
    assert len(unit.container_pids()) == 1
    unit.cut_uplink(cut=False)
    set_clock(unit)
    unit.wait(unit.is_online, 60, "the Unit to be online")
    unit.ask("renew")
    unit.wait(lambda: not serials & {one["serial"] for one in unit.ask("certificates")}, 120, "new certificates")
    assert instances(unit)["main"]["version"] == before["main"]["version"]


def test_power_cuts_of_a_guest(unit: QemuUnit) -> None:
    """At random moments of an update; QEMU is killed, and its disk keeps what the guest has flushed."""
    chance = random.Random(SEED)
    for number in range(1, CUTS + 1):
        version = f"1.1.{number}"
        after_s = chance.uniform(0, 20)
        upload_service(unit, "main", version)
        time.sleep(after_s)
        power_cycle(unit)
        print(f"cut {number} of {CUTS} (seed {SEED}): {after_s:.1f} s after the wish for {version}")
        unit.wait(unit.is_online, 120, "the Unit to be online")
        wait_active(unit, version)
        check_whole(unit)
