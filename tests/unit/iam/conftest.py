"""What tests of IAM need: a certificate authority, a worker, an open database."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from aoscore.common.aio import Worker
from aoscore.iam.database import IamDatabase
from tests.support.pki import TestCa


@pytest.fixture(scope="session")
def authority() -> TestCa:
    return TestCa()


@pytest.fixture
async def worker() -> AsyncIterator[Worker]:
    async with Worker("test") as worker:
        yield worker


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[IamDatabase]:
    async with IamDatabase(tmp_path / "work") as database:
        yield database
