"""Beds C and D as fixtures. Each test gets a bed of its own, which on a failure says what it knows before it goes."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from aoscore.common.errors import AosError
from qemu.bed import Bed
from qemu.images import build_images
from qemu.unit import QemuUnit, saved_unit
from tests.support.nspawn import NspawnUnit
from tests.support.wholeunit import check_whole, label_nodes, provision_both, run_services, wait_active

Unit = TypeVar("Unit", bound=Bed)


@pytest.fixture
def nspawn_unit(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[NspawnUnit]:
    """Bed C: a booted Unit that is not provisioned; one node, or those that the test's parameter names."""
    with running(NspawnUnit(tmp_path, getattr(request, "param", ("main",)))) as unit:
        yield unit


@pytest.fixture
def qemu_unit(tmp_path: Path) -> Iterator[QemuUnit]:
    """Bed D: a Unit of two guests that goes on from its saved state: booted, not provisioned."""
    with running(saved_qemu_unit(tmp_path)) as unit:
        yield unit


def saved_qemu_unit(directory: Path) -> QemuUnit:
    """A Unit of two guests that will go on from its saved state; the first time this takes minutes."""
    saved = saved_unit(build_images())
    return QemuUnit(directory, saved.images, states=saved.states)


@contextlib.contextmanager
def running(unit: Unit) -> Iterator[Unit]:
    """A Unit that runs for the length of the block."""
    try:
        unit.start()
        yield unit
    except BaseException:
        _show(unit)
        raise
    finally:
        unit.stop()


@contextlib.contextmanager
def running_pair(
    directory: Path, *, with_mp: bool = False, with_disks: bool = False, later: tuple[str, ...] = ()
) -> Iterator[NspawnUnit]:
    """A provisioned Unit of two nodes with their keys in tokens, which runs a service on each (bed C)."""
    pair = NspawnUnit(
        directory, ("main", "secondary"), keys="softhsm", with_mp=with_mp, with_disks=with_disks, later=later
    )
    with running(pair) as unit:
        provision_both(unit)
        label_nodes(unit)
        run_services(unit)
        yield unit


@contextlib.contextmanager
def all_well(unit: Unit) -> Iterator[Unit]:
    """A provisioned Unit that is online, with its services active and its files whole, after the block as before."""
    wait_active(unit)
    yield unit
    unit.wait(unit.is_online, 120, "the Unit to be online again")
    wait_active(unit)
    check_whole(unit)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """On a failed test print what its bed has to say before it goes away."""
    yield
    if call.when == "call" and call.excinfo is not None:
        for value in getattr(item, "funcargs", {}).values():
            if isinstance(value, Bed):
                _show(value)


def _show(unit: Bed) -> None:
    for log in sorted({*unit.directory.glob("log/*.log"), *unit.directory.glob("*.log")}):
        print(f"--- {log.name}\n" + "\n".join(log.read_text(errors="replace").splitlines()[-40:]), file=sys.stderr)
    for name, node in unit.nodes.items():
        try:
            journal = node.run("journalctl", "--no-pager", "-n", "400", "-o", "short-monotonic")
        except AosError as error:
            journal = f"no journal: {error}"
        print(f"--- journal of {name}\n{journal}", file=sys.stderr)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line for each case: what it is about, how it ended, and how long it took."""
    results: dict[str, str] = {}
    times_s: dict[str, float] = {}
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            # The beginning and end of a test are its own only where they go wrong.
            if report.when == "call" or outcome != "passed":
                results[report.nodeid] = outcome
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                times_s[report.nodeid] = times_s.get(report.nodeid, 0.0) + report.duration
    if not results:
        return
    terminalreporter.section("cases")
    width = max(map(len, map(_case, results)))
    for nodeid, outcome in sorted(results.items()):
        terminalreporter.line(f"{_case(nodeid):{width}}  {outcome:7}  {times_s.get(nodeid, 0.0):5.0f} s")
    terminalreporter.line(f"{'all':{width}}  {len(results):7}  {sum(times_s.values()):5.0f} s")


def _case(nodeid: str) -> str:
    path, _, name = nodeid.partition("::")
    group = Path(path).stem.removeprefix("test_").replace("_", " ")
    return f"{group}: {name.removeprefix('test_').replace('_', ' ')}"
