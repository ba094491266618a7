"""`make qemu`: a Unit of guests from images to a service that survives a power cut without its cloud, with figures."""

import os
from datetime import UTC, datetime
from pathlib import Path

from aoscore.common.errors import FailedError
from aoscore.common.files import remove_tree
from aoscore.ctl.host import describe, run, step
from aoscore.ctl.webservice import ITEM, PORT, make_project
from qemu.guest import Guest
from qemu.images import CLOUD_IP, DOMAIN, Images
from qemu.unit import QemuUnit

# The Secondary Node is not provisioned.
DAEMONS: dict[str, tuple[str, ...]] = {"main": ("aos-iam", "aos-cm", "aos-sm"), "secondary": ()}
_MIB = 1 << 20


def show(directory: Path, images: Images) -> str:
    """Do all of it in `directory`, which is made anew; the report in Markdown."""
    remove_tree(directory)
    unit = QemuUnit(directory, images)
    unit.cloud.check_tools()
    try:
        with step("Boot Main and Secondary Node, with a cloud on this machine"):
            unit.start()
        with step("Provision the Unit with aos-prov"):
            unit.provision()
        with step(f"Service {ITEM}: image by umoci, bundle by aos-signer"):
            project = make_project(directory / "service", user=unit.cloud.user("sp"), domain=DOMAIN)
            unit.cloud.sign_and_upload(unit.machine, project)
        with step("Deploy the service"):
            unit.deploy(ITEM)
            unit.wait(lambda: "Hello" in unit.page(ITEM, PORT), 60, "the service to answer")
        with step("Cut the way to the cloud and the power; boot again"):
            unit.cut_uplink()
            unit.main.kill()
            unit.main.start()
            unit.main.wait_settled()
        with step("The service runs again, without cloud"):
            unit.wait(lambda: "Hello" in unit.page(ITEM, PORT), 120, "the service to answer again")
            if unit.main.execute("ping", "-c", "1", "-W", "5", CLOUD_IP).code == 0:
                raise FailedError("the Main Node reaches the cloud, but the cable is pulled")
        ready = {name: _ready(guest, DAEMONS[name]) for name, guest in unit.nodes.items()}
        memory = {name: _memory(guest, DAEMONS[name]) for name, guest in unit.nodes.items()}
        with step("Plug the cloud in: it hears from the Unit again"):
            heard = _last_status(unit)
            unit.cut_uplink(cut=False)
            unit.wait(lambda: _last_status(unit) > heard, 120, "a status of the Unit")
            unit.wait(unit.all_active, 60, "the cloud to know that the service runs")
        return _report(images, ready, memory)
    finally:
        unit.stop()


def _last_status(unit: QemuUnit) -> int:
    """Number of the newest status that the cloud has of the Unit."""
    return max(int(message["number"]) for message in unit.ask("messages", message_type="unitStatus"))


def _ready(guest: Guest, units: tuple[str, ...]) -> dict[str, float]:
    """Seconds from the start of the guest's kernel until systemd knew each unit as ready."""
    key = "ActiveEnterTimestampMonotonic"
    return {name: int(guest.run("systemctl", "show", "-P", key, name)) / 1e6 for name in units}


def _memory(guest: Guest, units: tuple[str, ...]) -> dict[str, float]:
    """PSS of each unit's main process, MiB."""
    found = {}
    for name in units:
        pid = guest.run("systemctl", "show", "-P", "MainPID", name).strip()
        lines = guest.run("cat", f"/proc/{pid}/smaps_rollup").splitlines()
        found[name] = next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024
    return found


def _report(images: Images, ready: dict[str, dict[str, float]], memory: dict[str, dict[str, float]]) -> str:
    version = run(["qemu-system-x86_64", "--version"]).splitlines()[0]
    lines = [
        f"Written by `make qemu` on {datetime.now(UTC):%Y-%m-%d}: {describe()}; {version}, processor emulated (TCG).",
        f"Load of the machine when it was written: {os.getloadavg()[0]:.0f}; the two guests alone make about 2.",
        "",
        "| node | unit | boot to ready, s | PSS, MiB |",
        "| --- | --- | --- | --- |",
    ]
    for node, units in ready.items():
        lines += [f"| {node} | {name} | {at_s:.1f} | {memory[node][name]:.0f} |" for name, at_s in units.items()]
    lines += ["", "| image | size, MiB | of these used, MiB |", "| --- | --- | --- |"]
    for node, boot in images.boots.items():
        for disk in boot.disks:
            status = disk.stat()
            lines.append(f"| {node} {disk.name} | {status.st_size // _MIB} | {status.st_blocks * 512 // _MIB} |")
        for name, file in (("kernel", boot.kernel), ("initial RAM disk", boot.initrd)):
            if file is not None:
                lines.append(f"| {node} {name} | {file.stat().st_size / _MIB:.0f} | |")
    lines += [
        "",
        "Boot to ready: from the start of the guest's kernel until systemd knew the unit as ready, in the boot after a",
        "power cut, without a link to the cloud. PSS: `/proc/PID/smaps_rollup` of the unit's main process.",
    ]
    return "\n".join(lines) + "\n"
