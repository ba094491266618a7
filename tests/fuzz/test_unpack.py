"""The fuzz target of the layer unpacker for a fixed number of fixed inputs; `python -m tests.fuzz.unpack` goes on."""

import os
from pathlib import Path

import pytest

from aoscore._speedups.unpack import Code
from tests.fuzz.unpack import Maker, run

SEED = 20261128
INPUTS = 2000
PARTS = 4

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: owners, devices, trusted attributes")


@pytest.mark.parametrize("part", range(PARTS))
def test_both_unpackers_agree_and_nothing_gets_out(tmp_path: Path, part: int) -> None:
    count = INPUTS // PARTS
    outcomes = run(SEED, part * count, count, tmp_path)
    print(outcomes)
    # Neither all refused at the first byte nor all harmless.
    assert outcomes[None] > count // 20
    assert {Code.NAME_DOTDOT, Code.NAME_ABSOLUTE, Code.PARENT, Code.CHECKSUM, Code.LINK_MISSING} <= outcomes.keys()


def test_a_number_makes_the_same_input_again() -> None:
    assert Maker(SEED, 7).make() == Maker(SEED, 7).make() != Maker(SEED, 8).make()
