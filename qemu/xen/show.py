"""`make xen`: a Unit whose nodes are Xen's Dom0 and a guest, from images to a service on the guest, with figures."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from aoscore.common.errors import FailedError
from aoscore.common.files import remove_tree
from aoscore.ctl.host import describe, run, step
from aoscore.ctl.webservice import ITEM, make_project
from qemu.images import DOMAIN
from qemu.xen.images import GUEST, XenImages, build_xen_images
from qemu.xen.unit import XenUnit

_SAYS = "web service starts"
_LOG_S = 300.0


class _Times:
    """Seconds that each step took, in order."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def step(self, what: str) -> Iterator[None]:
        began = time.monotonic()
        with step(what):
            yield
        self.seconds[what] = time.monotonic() - began


def show_xen(directory: Path) -> str:
    """Do all of it in `directory`, which is made anew; the report in Markdown."""
    times = _Times()
    with times.step("Disk images, and what they are made of"):
        images = build_xen_images()
    remove_tree(directory)
    unit = XenUnit(directory, images)
    unit.cloud.check_tools()
    try:
        with times.step("Xen and the Main Node in Dom0 have booted"):
            unit.start()
        with times.step("The guest has booted"):
            unit.start_secondary()
        with times.step("The link of the MPs over vchan is up"):
            unit.wait_linked()
            unit.check_link()
        with times.step("Both nodes are provisioned by aos-prov"):
            unit.provision(nodes=2)
            unit.label_nodes((GUEST,))
        with times.step(f"Service {ITEM} is active on the Secondary Node"):
            project = make_project(directory / "service", user=unit.cloud.user("sp"), domain=DOMAIN, labels=(GUEST,))
            unit.cloud.sign_and_upload(unit.machine, project)
            unit.deploy(ITEM)
        with times.step("The cloud has a log of the service"):
            _check_service(unit)
            unit.check_link()
        return _report(images, unit, times.seconds)
    finally:
        unit.keep_console()
        unit.stop()


def _check_service(unit: XenUnit) -> None:
    """Raises FailedError unless the instance is on the other node and has said what it says."""
    groups = unit.ask("unit")["status"]["instances"]
    nodes = {one["node"]["codename"] for group in groups for one in group["instances"] if one["state"] == "active"}
    if len(nodes) != 1 or unit.container_pids():
        raise FailedError(f"the service is not on the Secondary Node alone: {groups}")
    logs = unit.ask("logs", log_type="instanceLog", item=ITEM, nodes=list(nodes), timeout_s=_LOG_S)
    if set(logs) != nodes or not all(_SAYS in log["text"] for log in logs.values()):
        raise FailedError(f"the log of the service does not say {_SAYS!r} on the Secondary Node: {logs}")


def _report(images: XenImages, unit: XenUnit, times: dict[str, float]) -> str:
    version = run(["qemu-system-x86_64", "--version"]).splitlines()[0]
    info = dict(line.split(":", 1) for line in unit.main.run("xl", "info").splitlines() if ":" in line)
    xen = next(value for key, value in info.items() if key.strip() == "xen_version").strip()
    kernel = unit.main.run("uname", "-r").strip()
    lines = [
        f"Written by `make xen` on {datetime.now(UTC):%Y-%m-%d}: {describe()};",
        f"{version}, one processor, emulated (TCG).",
        f"Xen {xen}, Linux {kernel} in Dom0.",
        "",
        "| step | seconds |",
        "| --- | --- |",
        *(f"| {what} | {seconds:.1f} |" for what, seconds in times.items()),
        "",
        "```",
        *unit.main.run("xl", "list").rstrip().splitlines(),
        "```",
    ]
    return "\n".join(lines) + "\n"
