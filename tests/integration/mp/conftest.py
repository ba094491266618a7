"""A machine of Xen, played."""

from collections.abc import Iterator

import pytest

from tests.support import fakexen


@pytest.fixture
def xen() -> Iterator[fakexen.FakeXen]:
    """Skips where libxenvchan is not installed."""
    if reason := fakexen.missing():
        pytest.skip(reason)
    machine = fakexen.FakeXen()
    yield machine
    machine.remove()
