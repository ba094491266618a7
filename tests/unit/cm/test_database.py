"""The tables of cm.db: as AosCore 9.1 has them, and stable over restarts."""

from collections.abc import Callable, Sequence
from pathlib import Path

import apsw
import msgspec
import pytest

from aoscore.cm.config import Config
from aoscore.cm.database import open_database, warn_beyond_9_1
from aoscore.common.errors import AlreadyExistsError

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


_CLIENT = ("s2", "subject", 0, "service", 0)
_DELETE_ALL_OF_CLIENT = (
    "DELETE FROM pending_connections WHERE requesterItemID = ? AND requesterSubjectID = ? AND requesterInstance = ?"
    " AND requesterType = ? AND requesterPreinstalled = ?"
)


def _allocate_as_9_1(connection: apsw.Connection, node: str, wanted: Sequence[tuple[str, str, str]]) -> None:
    """What AosCore 9.1 does to pending connections when an instance gets its network once more or moves.

    Those of the client are deleted, then each of its allowed connections without a server is inserted, one statement
    after the other (cm-orchestration §6.3, §6.4, database.md §2.4).
    """
    connection.execute(_DELETE_ALL_OF_CLIENT, _CLIENT)
    for target in wanted:
        connection.execute(
            "INSERT INTO pending_connections VALUES (?, ?, ?, ?, ?, ?, 'n1', '172.18.0.3', '172.18.0.0/16', ?, ?, ?)",
            (*_CLIENT, node, *target),
        )


async def test_pending_connections_as_9_1_writes_them(tmp_path: Path) -> None:
    """A service that allows a connection twice, as "s1/8080" and as "s1/8080/tcp", is two equal rows to 9.1.

    That is why no index forbids them: its insert would fail, and with it the start of the instance (§6.3). They go when
    we start.
    """
    single = [("s1", "8080", "tcp"), ("s3", "53", "udp")]
    double = [("s1", "8080", "tcp"), *single]
    async with open_database(config(tmp_path)) as database:

        def replay(connection: apsw.Connection) -> None:
            for node, wanted in (("node", double), ("node", single), ("node2", double)):
                _allocate_as_9_1(connection, node, wanted)

        await database.write(replay)
        with pytest.raises(AlreadyExistsError, match="UNIQUE"):
            await database.write(_with_index(replay))
        # Without such a wish its way of writing does not hit one.
        await database.write(_with_index(lambda connection: _allocate_as_9_1(connection, "node", single)))
        await database.write(replay)
        assert await database.select("SELECT count(*) FROM pending_connections") == [(3,)]
    async with open_database(config(tmp_path)) as database:
        rows = await database.select("SELECT nodeID, targetItemID, port, protocol FROM pending_connections")
        assert rows == [("node2", *target) for target in single]


def _with_index(act: Callable[[apsw.Connection], None]) -> Callable[[apsw.Connection], None]:
    """The same while there is an index over all columns, for the length of the transaction."""

    def change(connection: apsw.Connection) -> None:
        connection.execute("DELETE FROM pending_connections")
        columns = TABLES["pending_connections"].replace(" ", ", ")
        connection.execute(f"CREATE UNIQUE INDEX aoscore_pending_connections ON pending_connections ({columns})")
        act(connection)
        connection.execute("DROP INDEX aoscore_pending_connections")

    return change


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
