"""`servicemanager.db`: schema, migrations up and down, files of other generations."""

from pathlib import Path

import apsw
import pytest

from aoscore.common.db import Database, Schema
from aoscore.common.errors import FailedError
from aoscore.sm.database import VERSION, open_database

MIGRATION = Path(__file__).resolve().parents[3] / "aoscore" / "sm" / "migration"

# database.md §3, table by table as a C++ SM of version 5 leaves them.
COLUMNS = {
    "config": ["cursor"],
    "items": ["itemID", "type", "version", "manifestDigest", "state", "timestamp"],
    "instances": [
        *(
            "itemID",
            "subjectID",
            "instance",
            "type",
            "preinstalled",
            "version",
            "manifestDigest",
            "runtimeID",
            "ownerID",
        ),
        *("subjectType", "uid", "gid", "priority", "storagePath", "statePath", "envVars", "monitoringParams"),
    ],
    "network": ["networkID", "ip", "subnet", "vlanID", "vlanIfName", "bridgeIfName"],
    "instancenetwork": ["instanceID", "networkID", "networkConfig", "allocatedParams", "hostIfName"],
    "trafficmonitor": ["chain", "time", "value"],
}
# What the create step of the first generation makes, from the same page.
VERSION_0 = """
CREATE TABLE config (cursor TEXT); INSERT INTO config VALUES ('position');
CREATE TABLE network (networkID TEXT NOT NULL PRIMARY KEY, ip TEXT, subnet TEXT, vlanID INTEGER, vlanIfName TEXT);
CREATE TABLE services (id TEXT NOT NULL, version TEXT, providerID TEXT, imagePath TEXT, manifestDigest BLOB,
    state INTEGER, timestamp TIMESTAMP, size INTEGER, GID INTEGER, PRIMARY KEY (id, version));
CREATE TABLE trafficmonitor (chain TEXT NOT NULL PRIMARY KEY, time TIMESTAMP, value INTEGER);
CREATE TABLE layers (digest TEXT NOT NULL PRIMARY KEY, layerId TEXT, path TEXT, osVersion TEXT, version TEXT,
    timestamp TIMESTAMP, state INTEGER, size INTEGER);
CREATE TABLE instances (instanceID TEXT NOT NULL PRIMARY KEY, serviceID TEXT, subjectID TEXT, instance INTEGER,
    uid INTEGER, priority INTEGER, storagePath TEXT, statePath TEXT, network BLOB);
CREATE TABLE SchemaVersion (version INTEGER); INSERT INTO SchemaVersion VALUES (0);
INSERT INTO network VALUES ('owner', '172.17.0.1', '172.17.0.0/16', 7, 'vlan-1');
INSERT INTO instances VALUES ('old', 's', 's', 0, 5000, 1, '', '', NULL);
"""


def opened(directory: Path) -> Database:
    return open_database(directory / "sm.db", MIGRATION, directory / "merged")


def columns(path: Path) -> dict[str, list[str]]:
    connection = apsw.Connection(str(path))
    tables = [str(row[0]) for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    found = {
        table: [str(row[1]) for row in connection.execute(f"PRAGMA table_info({table})")]
        for table in tables
        if not table.startswith(("aoscore_", "sqlite_", "SchemaVersion"))
    }
    connection.close()
    return found


def version(path: Path) -> int:
    connection = apsw.Connection(str(path))
    rows = list(connection.execute("SELECT version FROM SchemaVersion"))
    connection.close()
    assert len(rows) == 1
    return int(str(rows[0][0]))


async def test_fresh_file(tmp_path: Path) -> None:
    for _ in range(2):
        async with opened(tmp_path) as database:
            assert await database.select("SELECT cursor FROM config") == [("",)]
    assert columns(tmp_path / "sm.db") == COLUMNS
    assert version(tmp_path / "sm.db") == VERSION
    assert (tmp_path / "sm.db").stat().st_mode & 0o777 == 0o600
    assert not (tmp_path / "sm.db-wal").exists()
    assert {path.name for path in (tmp_path / "merged").iterdir()} == {path.name for path in MIGRATION.iterdir()}


async def test_up_from_the_first_version(tmp_path: Path) -> None:
    connection = apsw.Connection(str(tmp_path / "sm.db"))
    connection.execute(VERSION_0)
    connection.close()
    async with opened(tmp_path) as database:
        assert await database.select("SELECT networkID, vlanID FROM network") == [("owner", 7)]
        assert await database.select("SELECT cursor FROM config") == [("position",)]
        assert await database.select("SELECT * FROM instances") == []
    assert columns(tmp_path / "sm.db") == COLUMNS
    assert version(tmp_path / "sm.db") == VERSION


@pytest.mark.parametrize("target", range(VERSION))
async def test_each_step_down_and_up_again(tmp_path: Path, target: int) -> None:
    async with opened(tmp_path) as database:
        await database.execute("INSERT INTO network (networkID, vlanID) VALUES ('owner', 7)")
    # An older process finds the way back in the merged folder.
    old = Schema(create=(), version=target, migrations=tmp_path / "merged")
    async with Database(tmp_path / "sm.db", old) as database:
        assert await database.select("SELECT networkID, vlanID FROM network") == [("owner", 7)]
    assert version(tmp_path / "sm.db") == target
    async with opened(tmp_path) as database:
        assert await database.select("SELECT networkID, vlanID FROM network") == [("owner", 7)]
    found = columns(tmp_path / "sm.db")
    found.pop("services", None)
    found.pop("layers", None)
    assert found == COLUMNS


async def test_file_of_the_go_generation_is_set_aside(tmp_path: Path) -> None:
    connection = apsw.Connection(str(tmp_path / "sm.db"))
    connection.execute("CREATE TABLE schema_migrations (version INTEGER); CREATE TABLE services (cached INTEGER)")
    connection.close()
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "1_update.up.sql").write_text("nonsense")
    async with opened(tmp_path):
        pass
    assert columns(tmp_path / "sm.db") == COLUMNS
    assert len(list(tmp_path.glob("sm.db.foreign-*"))) == 1
    assert "nonsense" not in (tmp_path / "merged" / "1_update.up.sql").read_text()


@pytest.mark.parametrize("damage", ["noise", "open to others"])
async def test_damaged_file_is_set_aside(tmp_path: Path, damage: str) -> None:
    async with opened(tmp_path) as database:
        await database.execute("INSERT INTO network (networkID, vlanID) VALUES ('owner', 7)")
    if damage == "noise":
        (tmp_path / "sm.db").write_bytes(b"no database at all" * 100)
    else:
        (tmp_path / "sm.db").chmod(0o666)
    async with opened(tmp_path) as database:
        assert database.recovered is not None
        assert await database.select("SELECT * FROM network") == []
    assert columns(tmp_path / "sm.db") == COLUMNS


async def test_unknown_newer_version_is_a_clear_error(tmp_path: Path) -> None:
    async with opened(tmp_path) as database:
        await database.execute("UPDATE SchemaVersion SET version = 6")
    with pytest.raises(FailedError, match=r"6_update\.down\.sql is missing"):
        async with opened(tmp_path):
            pass
