"""Fixtures for all tests."""

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from tests import beds
from tests.support import bed

# Some helpers fork in the test process; gRPC's fork handlers then crash the child when a server ran here before.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("AOSCORE_SHARED", ROOT.parent / "shared"))

# A loaded machine, and Hypothesis filling its cache of character tables on a fresh clone, are not findings.
settings.register_profile("aoscore", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("aoscore")


@pytest.fixture(scope="session")
def repository() -> Path:
    """Top of the checkout."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """The directory of facts and recordings; tests that need it are skipped with a reason where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is not here (set AOSCORE_SHARED)")
    return SHARED


@pytest.fixture(autouse=True)
def _nothing_blocks_the_loop(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """In unit tests a call that waits for disk, time or a program inside the event loop is an error (design rule 5)."""
    if "unit" not in request.path.relative_to(ROOT).parts:
        return

    def guard(owner: Any, name: str) -> None:
        original: Callable[..., Any] = getattr(owner, name)

        def checked(*args: Any, **kwargs: Any) -> Any:
            assert asyncio._get_running_loop() is None, f"{name} blocks the event loop: use a Worker"
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, checked)

    guard(time, "sleep")
    guard(os, "fsync")
    guard(subprocess, "run")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    """Tests that need namespaces run in a pytest of their own inside some."""
    if bed.is_inside() or not bed.MARKERS & {mark.name for mark in item.iter_markers()}:
        return None
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in bed.run_inside(item):
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    # As after any item: end the fixtures that the next one does not share. The item before this one kept those of its
    # module when this one is of the same.
    item.session._setupstate.teardown_exact(nextitem)
    return True


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A bed that is not there is a skip at a desk, and a failure in CI."""
    if reason := None if bed.is_inside() else beds.lacking(mark.name for mark in item.iter_markers()):
        if "CI" in os.environ:
            pytest.fail(f"this machine does not offer the bed: {reason}", pytrace=False)
        pytest.skip(reason)


def pytest_sessionstart() -> None:
    """Let tests interrupt what they start; inside the namespaces of one test, make them usable."""
    # A shell that runs us in the background has us ignore SIGINT, and every program we start would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if bed.is_inside():
        bed.enter()
