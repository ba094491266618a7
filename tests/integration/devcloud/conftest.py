"""A running cloud and a provisioned Unit."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.devcloud import DevcloudProcess, MiniUnit, write_service


@pytest.fixture
def unit(cloud: DevcloudProcess) -> Iterator[MiniUnit]:
    unit = MiniUnit(cloud)
    unit.provision()
    yield unit
    unit.disconnect()


@pytest.fixture
def service(cloud: DevcloudProcess, tmp_path: Path) -> Path:
    """The folder of an uploaded service `hello` 1.0.0."""
    cloud.run("user-cert", "--role", "sp")
    folder = write_service(tmp_path / "service")
    cloud.run("upload", str(folder))
    return folder
