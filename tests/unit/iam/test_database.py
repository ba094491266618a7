from datetime import UTC, datetime
from pathlib import Path

import apsw
import pytest

from aoscore.common.errors import FailedError
from aoscore.common.types import ArchInfo, CertInfo, CPUInfo, ErrorInfo, NodeInfo, NodeState, OSInfo, PartitionInfo
from aoscore.iam import database as migration
from aoscore.iam.certhandler.record import CertRecord
from aoscore.iam.database import FILE_NAME, IamDatabase, convert_pins, node_from_json, node_to_json

FULL = NodeInfo(
    node_id="n1",
    node_type="type",
    title="title",
    max_dmips=10,
    total_ram=20,
    physical_ram=30,
    os_info=OSInfo("linux", "5", ("a", "b")),
    cpus=(CPUInfo("model", 2, 4, ArchInfo("arm64", "v8"), 7),),
    partitions=(PartitionInfo("p", ("storages",), 100, "/var"),),
    attrs={"MainNode": "", "AosComponents": "iam"},
    state=NodeState.ERROR,
    error=ErrorInfo(5, 2, "text"),
)
FULL_TEXT = (
    '{"identity":{"codename":"n1","title":"title"},"nodeGroupSubject":{"codename":"type"},"maxDmips":10,'
    '"physicalRam":30,"totalRam":20,"osInfo":{"os":"linux","version":"5","features":["a","b"]},"cpus":[{"modelName":'
    '"model","totalNumCores":2,"totalNumThreads":4,"archInfo":{"architecture":"arm64","variant":"v8"},"maxDmips":7}],'
    '"attrs":{"MainNode":"","AosComponents":"iam"},"partitions":[{"name":"p","path":"/var","types":["storages"],'
    '"totalSize":100}],"state":"error","isConnected":false,"errorInfo":{"aosCode":5,"exitCode":2,"message":"text"}}'
)


def record(cert_type: str, serial: int, *, year: int = 2030, url: str = "file:///a") -> CertRecord:
    info = CertInfo(cert_type, url, url, f"{serial:02x}", b"issuer")
    return CertRecord(info, datetime(year, 1, 2, 3, 4, 5, tzinfo=UTC))


def test_node_text_is_that_of_9_1() -> None:
    assert node_to_json(FULL) == FULL_TEXT
    assert node_from_json("n1", FULL_TEXT) == FULL


def test_empty_members_are_left_out_and_read_without_case() -> None:
    text = node_to_json(NodeInfo("n1", os_info=OSInfo("linux")))
    assert "cpus" not in text and "attrs" not in text and "partitions" not in text and "errorInfo" not in text
    assert "physicalRam" not in text
    assert node_from_json("n1", text.replace("nodeGroupSubject", "NODEGROUPSUBJECT")) == NodeInfo(
        "n1", os_info=OSInfo("linux")
    )


async def test_nodes(database: IamDatabase, caplog: pytest.LogCaptureFixture) -> None:
    other = NodeInfo("n2", os_info=OSInfo("linux"), state=NodeState.PAUSED)
    await database.save_node(FULL)
    await database.save_node(other)
    await database.save_node(FULL)
    assert await database.nodes() == [FULL, other]
    await database._database.execute("UPDATE nodeinfo SET info = '{}' WHERE id = 'n1'")
    assert await database.nodes() == [other]
    assert "Can't read stored Node info of n1" in caplog.text
    await database.remove_node("n2")
    await database.remove_node("n2")
    assert await database.nodes() == []


async def test_same_node_again_writes_nothing(database: IamDatabase) -> None:
    await database.save_node(FULL)
    changes = "SELECT total_changes()"
    before = await database._database.select(changes)
    await database.save_node(FULL)
    assert await database._database.select(changes) == before


async def test_certificates(database: IamDatabase) -> None:
    old, new = record("iam", 1, year=2029), record("iam", 0xABCDEF)
    await database.replace_certificates("iam", [old, new])
    await database.replace_certificates("sm", [record("sm", 7)])
    assert await database.certificates("iam") == [old, new]
    assert await database._database.select("SELECT serial, notAfter FROM certificates WHERE type='sm'") == [
        (b"\x07", 1893553445000000000)
    ]
    moved = record("iam", 0xABCDEF, url="file:///b")
    await database.replace_certificates("iam", [moved])
    assert await database.certificates("iam") == [moved]
    assert await database.certificates("sm") == [record("sm", 7)]
    # Issuer and serial are the key: the same certificate can't be of two types.
    await database.replace_certificates("cm", [record("cm", 7)])
    assert await database.certificates("sm") == []


def old_file(path: Path, *urls: tuple[str | None, str | None]) -> None:
    path.parent.mkdir()
    connection = apsw.Connection(str(path))
    connection.execute(
        "CREATE TABLE certificates (type TEXT NOT NULL, issuer BLOB NOT NULL, serial BLOB NOT NULL, certURL TEXT, "
        "keyURL TEXT, notAfter TIMESTAMP, PRIMARY KEY (issuer, serial)); CREATE TABLE nodeinfo (id TEXT PRIMARY KEY, "
        "info TEXT); CREATE TABLE SchemaVersion (version INTEGER); INSERT INTO SchemaVersion VALUES (0)"
    )
    for serial, (cert_url, key_url) in enumerate(urls):
        connection.execute(
            "INSERT INTO certificates VALUES ('iam', x'00', ?, ?, ?, 1)", (bytes([serial]), cert_url, key_url)
        )
    connection.close()


async def test_file_before_9_1_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "work" / FILE_NAME
    (tmp_path / "pin").write_text("1234\n")
    token = "pkcs11:token=aos;object=iam?module-path=/lib&"
    urls = [
        (f"{token}pin-value=1234", f"{token}pin-value=unknown"),
        ("file:///x", None),
        (f"{token}pin-source=/there", f"{token}pin-value="),
    ]
    old_file(path, *urls)
    async with IamDatabase(path.parent, [tmp_path / "pin", tmp_path / "none"]) as database:
        rows = await database._database.select("SELECT certURL, keyURL FROM certificates ORDER BY serial")
        assert rows == [(f"{token}pin-source={tmp_path}/pin", urls[0][1]), *urls[1:]]
        assert await database._database.select("SELECT version FROM SchemaVersion") == [(1,)]
        assert [cert.info.key_url for cert in await database.certificates("iam")] == [urls[0][1], "", urls[2][1]]


async def test_file_of_9_1_is_used_as_it_is(tmp_path: Path) -> None:
    """A file made from the column lists of database.md, by no code of ours; what 9.1 finds afterwards."""
    path = tmp_path / "work" / FILE_NAME
    old_file(path, ("pkcs11:a?pin-source=/p", "pkcs11:a?pin-source=/p"))
    connection = apsw.Connection(str(path))
    connection.execute("UPDATE SchemaVersion SET version = 1")
    connection.execute("INSERT INTO nodeinfo VALUES ('n1', ?)", (FULL_TEXT,))
    connection.close()
    async with IamDatabase(path.parent, merged=tmp_path / "merged") as database:
        assert await database.nodes() == [FULL]
        assert [cert.info.serial for cert in await database.certificates("iam")] == ["00"]
        await database.save_node(NodeInfo("n2", os_info=OSInfo("linux"), state=NodeState.PAUSED))
        await database.save_node_key(b"key", "n2")
    connection = apsw.Connection(str(path))
    assert list(connection.execute("SELECT * FROM SchemaVersion")) == [(1,)]
    assert [name for _, name, *_ in connection.execute("PRAGMA table_info(certificates)")] == [
        "type",
        "issuer",
        "serial",
        "certURL",
        "keyURL",
        "notAfter",
    ]
    assert list(connection.execute("SELECT id, info FROM nodeinfo ORDER BY id")) == [
        ("n1", FULL_TEXT),
        (
            "n2",
            '{"identity":{"codename":"n2"},"nodeGroupSubject":{"codename":""},"maxDmips":0,"totalRam":0,'
            '"osInfo":{"os":"linux"},"state":"paused","isConnected":false}',
        ),
    ]
    connection.close()
    assert {script.name for script in (tmp_path / "merged").iterdir()} == {
        "0_update.up.sql",
        "1_update.up.sql",
        "1_update.down.sql",
    }


TOKEN = "pkcs11:token=aos;object=iam?module-path=/lib&"
URLS = [
    (f"{TOKEN}pin-value=1234", f"{TOKEN}pin-value=unknown"),
    (f"{TOKEN}pin-value=5678", "file:///x"),
    ("file:///x", None),
    (f"{TOKEN}pin-source=/there", f"{TOKEN}pin-value="),
]


def urls_of(connection: apsw.Connection) -> list[tuple[str | None, str | None]]:
    return list(connection.execute("SELECT certURL, keyURL FROM certificates ORDER BY serial"))


def test_scripts_for_other_programs_do_what_our_migration_does(tmp_path: Path) -> None:
    """Another version finds our scripts in the merged folder and runs them with a plain SQLite client."""
    pins = {"/etc/pin": "1234", "/etc/other": "5678"}
    old_file(tmp_path / "a" / FILE_NAME, *URLS)
    old_file(tmp_path / "b" / FILE_NAME, *URLS)
    ours, theirs = (apsw.Connection(str(tmp_path / name / FILE_NAME)) for name in "ab")
    theirs.execute("CREATE TABLE pins (path TEXT NOT NULL, value TEXT NOT NULL)")
    theirs.executemany("INSERT INTO pins VALUES (?, ?)", list(pins.items()))
    before = urls_of(ours)
    for up in (True, False):
        convert_pins(ours, pins, up=up)
        script = Path(migration.__file__).parent / "migration" / f"1_update.{'up' if up else 'down'}.sql"
        theirs.execute(script.read_text())
        assert urls_of(ours) == urls_of(theirs)
        assert (urls_of(ours) == before) == (not up)
    ours.close()
    theirs.close()


async def test_file_of_a_later_version_is_taken_down_by_the_script_it_left(tmp_path: Path) -> None:
    path = tmp_path / "work" / FILE_NAME
    old_file(path, ("file:///a", "file:///a"))
    connection = apsw.Connection(str(path))
    connection.execute("UPDATE SchemaVersion SET version = 2; CREATE TABLE later (x); INSERT INTO later VALUES (1)")
    connection.close()
    merged = tmp_path / "merged"
    merged.mkdir()
    with pytest.raises(FailedError, match=r"2_update\.down\.sql is missing"):
        async with IamDatabase(path.parent, merged=merged):
            pass
    # It fails in its second statement at first: nothing of it may stay.
    (merged / "2_update.down.sql").write_text("DROP TABLE later; DROP TABLE nothing;")
    with pytest.raises(apsw.SQLError):
        async with IamDatabase(path.parent, merged=merged):
            pass
    connection = apsw.Connection(str(path))
    assert list(connection.execute("SELECT x FROM later")) == [(1,)]
    assert list(connection.execute("SELECT version FROM SchemaVersion")) == [(2,)]
    connection.close()
    (merged / "2_update.down.sql").write_text("DROP TABLE later;")
    async with IamDatabase(path.parent, merged=merged) as database:
        assert await database._database.select("SELECT version FROM SchemaVersion") == [(1,)]
        assert len(await database.certificates("iam")) == 1


async def test_file_of_the_go_generation_is_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "work" / FILE_NAME
    path.parent.mkdir()
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "1_update.up.sql").write_text("nonsense")
    connection = apsw.Connection(str(path))
    connection.execute("CREATE TABLE schema_migrations (version INTEGER)")
    connection.close()
    async with IamDatabase(path.parent, merged=tmp_path / "merged") as database:
        assert await database.nodes() == []
    assert len(list(path.parent.glob("iamanager.db.foreign-*"))) == 1
    assert len(list(tmp_path.glob("merged.foreign-*"))) == 1
    assert (tmp_path / "merged" / "1_update.up.sql").read_text() != "nonsense"


@pytest.mark.parametrize("damage", ["noise", "open to others"])
async def test_broken_file_is_set_aside(tmp_path: Path, damage: str) -> None:
    async with IamDatabase(tmp_path / "work") as database:
        await database.save_node(FULL)
    if damage == "noise":
        (tmp_path / "work" / FILE_NAME).write_bytes(b"\xff" * 5000)
    else:
        (tmp_path / "work" / FILE_NAME).chmod(0o666)
    async with IamDatabase(tmp_path / "work") as database:
        assert await database.nodes() == [] and await database.node_keys() == {}
    assert len(list((tmp_path / "work").glob("iamanager.db.broken-*"))) == 1


async def test_unfinished_operations(database: IamDatabase) -> None:
    assert await database.unfinished() == frozenset()
    await database.begin("a")
    await database.begin("a")
    await database.begin("b")
    assert await database.unfinished() == {"a", "b"}
    await database.end("a")
    await database.end("x")
    assert await database.unfinished() == {"b"}


async def test_fresh_file_has_the_version_of_9_1(database: IamDatabase) -> None:
    assert await database._database.select("SELECT version FROM SchemaVersion") == [(1,)]
