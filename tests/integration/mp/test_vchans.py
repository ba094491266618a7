"""The vchan binding and the transport on it, over the real libxenvchan and stand-ins for Xen."""

import subprocess
import sys

import pytest

from tests.support import fakexen

CASES = [
    "node_comes_first",
    "rest_is_read_after_the_end",
    "both_rings_full_at_once",
    "slow_reader_stops_the_writer",
    "each_link_has_new_rings",
    "node_attaches_by_halves",
    "long_paths",
    "guest_by_name_or_key",
    "a_million_small_frames",
    "stale_bytes_at_attach",
]


@pytest.mark.timeout(180)
@pytest.mark.parametrize("case", CASES)
def test_case(xen: fakexen.FakeXen, case: str) -> None:
    for path, value in (
        ("/local/domain/0/name", "Domain-0"),
        ("/local/domain/7/name", "second"),
        ("/local/domain/1/data/peer", "9"),
    ):
        xen.write(path, value)
    command = ["setpriv", "--pdeathsig", "KILL", sys.executable, "-m", "tests.support.vchancases", case]
    done = subprocess.run(command, env=xen.environment(1), capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_case_is_run(xen: fakexen.FakeXen) -> None:
    code = "from tests.support.vchancases import CASES; print(*CASES)"
    output = subprocess.run(
        [sys.executable, "-c", code], env=xen.environment(1), capture_output=True, check=True
    ).stdout
    assert output.decode().split() == CASES
