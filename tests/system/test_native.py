"""The native runtime under a real systemd: a node that boots in systemd-nspawn (bed C); its cloud has nothing to do."""

from pathlib import Path

import pytest

from tests.support.nspawn import NspawnUnit

pytestmark = [pytest.mark.nspawn, pytest.mark.timeout(600)]

PYTHON = "/opt/aoscore/bin/python"
SCRIPT = Path(__file__).with_name("native_in_guest.py")


def test_services_as_units(nspawn_unit: NspawnUnit) -> None:
    said = nspawn_unit.nodes["main"].run(PYTHON, "-c", SCRIPT.read_text(), timeout_s=240)
    print(said)
    assert [line for line in said.splitlines() if line.startswith("kept: ")][-1] == "kept: nothing is left at the end"
