"""The tables of cm.db: as AosCore 9.1 has them, and stable over restarts."""

from pathlib import Path

import apsw
import msgspec
import pytest

from aoscore.cm.config import Config
from aoscore.cm.database import open_database, warn_beyond_9_1

# database.md §2; key columns marked.
TABLES = {
    "updatemanager": "desiredStatus updateState",
    "imagemanager": "itemID* type version* indexDigest state timestamp",
    "storagestate": "itemID* subjectID* instance* type* preinstalled* storageQuota stateQuota stateChecksum",
    "networks": "networkID* subnet vlanID",
    "hosts": "networkID* nodeID* ip",
    "networkmanager_instances": (
        "itemID* subjectID* instance* type* preinstalled* networkID nodeID ip exposedPorts dnsServers"
    ),
    "pending_connections": (
        "requesterItemID requesterSubjectID requesterInstance requesterType requesterPreinstalled nodeID networkID "
        "requesterIP requesterSubnet targetItemID port protocol"
    ),
    "launcher_instances": (
        "itemID* subjectID* instance* type* preinstalled* version* manifestDigest nodeID prevNodeID runtimeID uid gid "
        "timestamp state isUnitSubject subjectType ownerID labels priority disableRebalancing"
    ),
    "launcher_run_requests": (
        "itemID type version ownerID subjectID subjectType isUnitSubject priority numInstances labels"
    ),
    "launcher_override_envvars": "itemID subjectID instance variables",
    "SchemaVersion": "version",
}


def config(tmp_path: Path) -> Config:
    return msgspec.convert(
        {
            "workingDir": str(tmp_path / "work"),
            "caCert": "ca",
            "iamProtectedServerUrl": "i:1",
            "iamPublicServerUrl": "i:2",
            "cmServerUrl": ":3",
            "fileServerUrl": "f:4",
        },
        Config,
        dec_hook=lambda kind, value: kind(value),
    )


async def test_tables_of_9_1(tmp_path: Path) -> None:
    async with open_database(config(tmp_path)) as database:
        await database.execute("INSERT INTO networks VALUES ('n', '172.17.0.0/16', 7)")
    connection = apsw.Connection(str(tmp_path / "work" / "cm.db"))
    names = [str(row[0]) for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    own = {name for name in names if name.startswith("aoscore_")}
    assert set(names) - own == set(TABLES)
    for name, columns in TABLES.items():
        info = list(connection.execute(f"PRAGMA table_info({name})"))
        assert " ".join(f"{row[1]}{'*' if row[5] else ''}" for row in info) == columns
    assert list(connection.execute("SELECT * FROM SchemaVersion")) == [(0,)]


async def test_second_start_changes_nothing_and_the_seed_row_is_single(tmp_path: Path) -> None:
    for _ in range(2):
        async with open_database(config(tmp_path)) as database:
            assert await database.select("SELECT * FROM updatemanager") == [("{}", "none")]
    assert not (tmp_path / "work" / "cm.db-wal").exists()


async def test_a_host_needs_its_network(tmp_path: Path) -> None:
    async with open_database(config(tmp_path)) as database:
        try:
            await database.execute("INSERT INTO hosts VALUES ('n', 'node', '172.17.0.1')")
        except Exception as error:
            assert "FOREIGN KEY" in str(error)
        else:
            raise AssertionError("accepted")


async def test_what_9_1_could_not_read_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with open_database(config(tmp_path)) as database:
        for network in range(4):
            await database.execute("INSERT INTO networks VALUES (?, '172.17.0.0/16', ?)", (f"n{network}", network))
            for node in range(60):
                await database.execute("INSERT INTO hosts VALUES (?, ?, '172.17.0.2')", (f"n{network}", f"node{node}"))
        await warn_beyond_9_1(database)
        assert caplog.text == ""
        await database.execute("INSERT INTO networks VALUES ('n4', '172.18.0.0/16', 4)")
        for node in range(60, 65):
            await database.execute("INSERT INTO hosts VALUES ('n0', ?, '172.17.0.2')", (f"node{node}",))
        await warn_beyond_9_1(database)
    assert "what=networks, found=5, limit=4" in caplog.text
    assert "what=nodes in one network, found=65, limit=64" in caplog.text
