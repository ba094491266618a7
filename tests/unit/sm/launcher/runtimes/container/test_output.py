"""Files that hold what containers say."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from aoscore.sm.launcher.runtimes.container.output import FileOutput

LIMIT = 1000


class Conmon:
    """The files of one container, and conmon's end of its control pipe."""

    def __init__(self, directory: Path) -> None:
        self.bundle = directory / "bundle"
        self.bundle.mkdir()
        os.mkfifo(self.bundle / "ctl")
        self.control = os.open(self.bundle / "ctl", os.O_RDONLY | os.O_NONBLOCK)
        self.output = FileOutput(directory / "logs", LIMIT)
        self.log = directory / "logs" / "id" / "output.log"
        self.log.parent.mkdir(parents=True)

    def begin(self, size: int) -> None:
        """What conmon does when it starts a file anew: another one takes its place."""
        new = self.log.with_name("new")
        new.write_bytes(bytes(size))
        new.rename(self.log)

    def tend(self) -> bool:
        return self.output.tend("id", self.bundle)


@pytest.fixture
def conmon(tmp_path: Path) -> Iterator[Conmon]:
    made = Conmon(tmp_path)
    yield made
    os.close(made.control)


def test_file_is_renamed_at_half_the_limit(conmon: Conmon) -> None:
    conmon.begin(LIMIT // 2 - 1)
    assert not conmon.tend() and conmon.log.exists()
    conmon.begin(LIMIT // 2)
    conmon.tend()
    assert not conmon.log.exists() and conmon.log.with_name("output.log.1").stat().st_size == LIMIT // 2
    assert os.read(conmon.control, 100) == b"2 0 0\n"


@pytest.mark.parametrize(("age_s", "floods"), [(0, True), (3600, False)])
def test_flood_is_a_file_that_lasts_less_than_a_minute(conmon: Conmon, age_s: float, floods: bool) -> None:
    conmon.begin(LIMIT)
    assert not conmon.tend(), "nothing is lost yet"
    old = conmon.log.with_name("output.log.1")
    os.utime(old, (old.stat().st_atime - age_s,) * 2)
    conmon.begin(LIMIT)
    assert conmon.tend() is floods


def test_flood_is_when_conmon_starts_over_between_two_looks(conmon: Conmon) -> None:
    conmon.begin(10)
    assert not conmon.tend()
    with conmon.log.open("ab") as log:
        log.write(bytes(10))
    assert not conmon.tend()
    conmon.begin(30)
    assert conmon.tend()
    assert not conmon.tend()


def test_nothing_happens_without_a_file_or_without_conmon(conmon: Conmon) -> None:
    assert not conmon.tend()
    conmon.begin(LIMIT)
    (conmon.bundle / "ctl").unlink()
    assert not conmon.tend() and conmon.log.exists()
