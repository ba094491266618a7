"""The cloud's public tools for tests of several components."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cloudtools import Tools
from tests.support.devcloud import DevcloudProcess


@pytest.fixture
def cloud(tmp_path: Path, repository: Path) -> Iterator[DevcloudProcess]:
    """A cloud that checks every message against the published schema."""
    process = DevcloudProcess(tmp_path / "cloud")
    process.start("--schema", str(repository / "tests/data/cloud/messages-v7.schema.json"))
    yield process
    process.stop()


@pytest.fixture
def tools_cloud(tmp_path: Path, repository: Path) -> Iterator[DevcloudProcess]:
    """A cloud on the port that the tools know."""
    process = DevcloudProcess(tmp_path / "cloud")
    process.start("--rest-port=10000", "--schema", str(repository / "tests/data/cloud/messages-v7.schema.json"))
    yield process
    process.stop()


@pytest.fixture
def tools(tools_cloud: DevcloudProcess, repository: Path, tmp_path: Path) -> Tools:
    """The tools of AOSCORE_AOS_PROV_PYTHON's environment, else of the one of `make`, which trust the cloud's root."""
    python = Path(os.environ.get("AOSCORE_AOS_PROV_PYTHON", repository / ".venv-tools/bin/python"))
    if not python.exists():
        pytest.skip(f"{python} is not here: `make integration` sets it up, or set AOSCORE_AOS_PROV_PYTHON")
    shipped = [
        path
        for package in ("aos_keys", "aos_prov", "aos_signer")
        for path in python.parent.parent.glob(f"lib/python3*/site-packages/{package}/files/1rootCA.crt")
    ]
    assert len(shipped) == 3
    for path in shipped:
        subprocess.run(["mount", "--bind", tools_cloud.root_file, path], check=True)
    return Tools(python.parent, tmp_path / "home")
