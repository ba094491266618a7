"""A certificate authority made once, and an empty store."""

from collections.abc import Iterator
from pathlib import Path

import apsw
import pytest

from aoscore.devcloud.ca import Authority
from aoscore.devcloud.cloud import Cloud
from aoscore.devcloud.endpoints import Endpoints
from aoscore.devcloud.faults import Faults
from aoscore.devcloud.store import SCHEMA, Store


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.open(tmp_path_factory.mktemp("ca"), "cloud.test")


@pytest.fixture(scope="session")
def sp_file(authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("users") / "sp.p12"
    path.write_bytes(authority.user_pkcs12("sp", "alice"))
    return path


@pytest.fixture
def store() -> Iterator[Store]:
    connection = apsw.Connection(":memory:")
    connection.execute("PRAGMA foreign_keys=ON")
    for statement in SCHEMA.create:
        connection.execute(statement)
    yield Store(connection)
    connection.close()


@pytest.fixture
def faults() -> Faults:
    return Faults()


@pytest.fixture
def cloud(authority: Authority, faults: Faults) -> Cloud:
    return Cloud(authority, Endpoints("cloud.test", 10000, 9000, 9000, 9002), faults)
