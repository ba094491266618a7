"""Units of which IAM runs as a real process."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.iam import Iam
from tests.support.pki import TestCa


@pytest.fixture(scope="session")
def authority() -> TestCa:
    return TestCa("Unit CA")


@pytest.fixture
def make_iam(tmp_path: Path, authority: TestCa) -> Iterator[Callable[..., Iam]]:
    """Makes Units; their processes end with the test, whatever happens."""
    made: list[Iam] = []

    def make(kind: type[Iam] = Iam, **config: Any) -> Iam:
        root = tmp_path / f"unit{len(made)}"
        root.mkdir()
        made.append(kind(root, authority, **config))
        return made[-1]

    yield make
    for iam in made:
        iam.kill()


@pytest.fixture
def iam(make_iam: Callable[..., Iam]) -> Iam:
    return make_iam()


@pytest.fixture
def unit(iam: Iam) -> Iam:
    """A provisioned Unit whose IAM runs in normal mode."""
    iam.provision()
    iam.start()
    return iam
