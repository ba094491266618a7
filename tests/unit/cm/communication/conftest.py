"""A worker and CM's own tables, for links and what they keep."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from aoscore.cm import database
from aoscore.common.aio import Worker
from aoscore.common.db import Database, Schema


@pytest.fixture
async def db(tmp_path: Path) -> AsyncIterator[Database]:
    async with Database(tmp_path / "cm.db", Schema(create=database.OWN_TABLES)) as opened:
        yield opened


@pytest.fixture
async def worker() -> AsyncIterator[Worker]:
    async with Worker("test") as worker:
        yield worker
