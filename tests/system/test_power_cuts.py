"""The power goes at any moment of an update, of one node or of both; bed C, with disks that keep what was flushed.

A node's disk after the cut is what had reached it then: `NspawnUnit.cut_power`. AOSCORE_POWER_CUTS says how many cuts,
AOSCORE_SEED which.
"""

import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.nspawn import NspawnUnit
from tests.support.wholeunit import check_whole, upload_service, wait_active
from tests.system.conftest import running_pair

CUTS = int(os.environ.get("AOSCORE_POWER_CUTS", "30"))
SEED = int(os.environ.get("AOSCORE_SEED", "9"))
# An update of both nodes takes about that long from the cloud's wish to the end of clean-up.
_UPDATE_S = 8.0

pytestmark = [pytest.mark.nspawn, pytest.mark.timeout(300 + 90 * CUTS)]


@pytest.fixture
def unit(tmp_path: Path) -> Iterator[NspawnUnit]:
    with running_pair(tmp_path, with_disks=True) as unit:
        yield unit


def test_power_cuts_at_random_moments_of_updates(unit: NspawnUnit) -> None:
    chance = random.Random(SEED)
    for number in range(1, CUTS + 1):
        version = f"1.0.{number}"
        nodes = chance.choice([("main",), ("secondary",), ("main", "secondary")])
        after_s = chance.uniform(0, _UPDATE_S)
        began = time.monotonic()
        for node in unit.nodes:
            upload_service(unit, node, version)
        time.sleep(max(0.0, began + after_s - time.monotonic()))
        unit.cut_power(*nodes)
        cut = (
            f"cut {number} of {CUTS} (seed {SEED}): {' and '.join(nodes)}, {after_s:.1f} s after the wish for {version}"
        )
        try:
            unit.wait(unit.is_online, 120, f"the Unit to be online after {cut}")
            wait_active(unit, version)
            check_whole(unit)
        except BaseException as error:
            error.add_note(cut)
            raise
        print(f"{cut}: as desired after {time.monotonic() - began:.0f} s")
    assert unit.ask("violations") == []
