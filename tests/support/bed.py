"""Bed B: tests marked `net` or `container` run in namespaces of their own.

The test process that collected such a test does not run it: it starts another pytest for this one test in fresh PID,
mount, network, IPC and UTS namespaces and reports its result. Whatever the test starts or mounts ends with it, however
it ends. Only control groups are outside of namespaces; those below `cgroup_parent()` are removed afterwards.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from aoscore.common.errors import DeadlineError
from aoscore.ctl.machine import remove_cgroups
from tests import beds
from tests.support import debian

MARKERS = frozenset(("net", "container"))
INSIDE = "AOSCORE_TEST_INSIDE"
"""Set inside, to the name of the control group."""
UNSHARE = ("unshare", "--mount", "--net", "--pid", "--ipc", "--uts", "--fork", "--kill-child")
_TIMEOUT_S = 120.0
_GRACE_S = 30.0


def is_inside() -> bool:
    """Whether this process runs in the namespaces of one test."""
    return INSIDE in os.environ


def cgroup_parent() -> str:
    """Control group for everything the test starts, below the mounts."""
    return f"/aoscore-test-{os.environ[INSIDE]}"


def first_uid() -> int:
    """User of the test's first instance, with 299 after it for others.

    The kernel counts a user's processes on the whole machine, other tests included.
    """
    return 100_000 + 300 * int(os.environ[INSIDE])


def run_inside(item: pytest.Item) -> list[pytest.TestReport]:
    """Run one test in namespaces; its reports."""
    lacks = beds.lacking(mark.name for mark in item.iter_markers())
    # Inside there is no network to fetch anything from.
    lacks = lacks or debian.fetch(name for mark in item.iter_markers("debian") for name in mark.args)
    if lacks:
        if "CI" in os.environ:
            return [_report(item, "failed", lacks)]
        return [_report(item, "skipped", (str(item.path), item.location[1] or 0, f"Skipped: {lacks}"))]
    name = str(os.getpid())
    # A test with a time limit of its own is ended by that; here it is only made sure of.
    marker = item.get_closest_marker("timeout")
    limit_s = _TIMEOUT_S if marker is None else max(_TIMEOUT_S, marker.args[0] + _GRACE_S)
    directory = tempfile.mkdtemp(prefix="aoscore-test-")
    args = [*UNSHARE, sys.executable, "-m", "pytest"]
    # "-rPs": what a test that passes has printed, for who asks for it here, and why one is skipped.
    args += ["-q", "-rPs", "-p", "no:cacheprovider", "-p", "no:xdist", f"--basetemp={directory}/t", item.nodeid]
    try:
        done = subprocess.run(
            args,
            cwd=item.config.rootpath,
            env={key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")} | {INSIDE: name},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=limit_s,
            check=False,
        )
        code, output = done.returncode, done.stdout
    except subprocess.TimeoutExpired as error:
        code, output = -1, (error.stdout or b"") + f"\nkilled after {limit_s:g} s".encode()
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    try:
        remove_cgroups(f"aoscore-test-{name}")
    except DeadlineError as error:
        code, output = -1, output + f"\n{error}".encode()
    text = output.decode(errors="replace")
    if code == 0 and " skipped" in text.splitlines()[-1]:
        why = text.partition("SKIPPED [1] ")[2].partition("\n")[0]
        return [_report(item, "skipped", (str(item.path), item.location[1] or 0, f"Skipped: {why}"))]
    report = _report(item, "passed" if code == 0 else "failed", None if code == 0 else text)
    if code == 0:
        report.sections.append(("Captured stdout inside", text))
    return [report]


def enter() -> None:
    """Make the namespaces usable; called once, inside."""
    for command in (
        ("mount", "--make-rprivate", "/"),
        ("mount", "-t", "proc", "proc", "/proc"),
        ("mount", "-t", "tmpfs", "tmpfs", "/run"),
        ("ip", "link", "set", "lo", "up"),
    ):
        subprocess.run(command, check=True)
    Path("/run/netns").mkdir()
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")


def _report(item: pytest.Item, outcome: str, detail: object) -> pytest.TestReport:
    return pytest.TestReport(
        item.nodeid,
        item.location,
        dict.fromkeys(item.keywords, 1),
        outcome,  # type: ignore[arg-type]
        detail,  # type: ignore[arg-type]
        "call",
    )
