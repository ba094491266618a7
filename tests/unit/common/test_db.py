import asyncio
import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import apsw
import pytest

from aoscore.common.db import Database, Schema
from aoscore.common.errors import AlreadyExistsError, FailedError, InvalidArgumentError, NoSpaceError

ROOT = Path(__file__).parents[3]
CREATE = ["CREATE TABLE IF NOT EXISTS things (name TEXT PRIMARY KEY, size INTEGER)"]


async def test_fresh_file_has_tables_and_version(tmp_path: Path) -> None:
    path = tmp_path / "new" / "x.db"
    async with Database(path, Schema(create=CREATE, version=3)) as db:
        assert await db.select("SELECT version FROM SchemaVersion") == [(3,)]
        await db.execute("INSERT INTO things VALUES (?, ?)", ("a", 2**62 + 1))
        assert await db.select("SELECT * FROM things") == [("a", 2**62 + 1)]
    assert path.stat().st_mode & 0o777 == 0o600
    assert [entry.name for entry in path.parent.iterdir()] == ["x.db"], "a clean close leaves the single file"


async def test_transaction_is_whole_or_nothing(tmp_path: Path) -> None:
    async with Database(tmp_path / "x.db", Schema(create=CREATE)) as db:

        def two(connection: apsw.Connection) -> None:
            connection.execute("INSERT INTO things VALUES ('a', 1)")
            connection.execute("INSERT INTO things VALUES ('a', 2)")

        with pytest.raises(AlreadyExistsError, match=r"x\.db"):
            await db.write(two)
        assert await db.select("SELECT * FROM things") == []
        with pytest.raises(FailedError, match="no such table"):
            await db.select("SELECT * FROM missing")


def scripts(directory: Path) -> Path:
    directory.mkdir()
    (directory / "1_update.up.sql").write_text(
        "BEGIN TRANSACTION;\nALTER TABLE things ADD COLUMN colour TEXT;\nCOMMIT;\n"
    )
    (directory / "1_update.down.sql").write_text("ALTER TABLE things DROP COLUMN colour;")
    (directory / "2_update.up.sql").write_text("UPDATE things SET colour = 'red';")
    (directory / "2_update.down.sql").write_text("UPDATE things SET colour = NULL;")
    (directory / "README").write_text("not a script")
    return directory


async def test_migration_up_and_down_by_merged_scripts(tmp_path: Path) -> None:
    path, merged = tmp_path / "x.db", tmp_path / "merged"
    async with Database(path, Schema(create=CREATE, version=0)) as db:
        await db.execute("INSERT INTO things VALUES ('a', 1)")
    newer = scripts(tmp_path / "newer")
    async with Database(path, Schema(create=CREATE, version=2, migrations=newer, merged=merged)) as db:
        assert await db.select("SELECT name, colour FROM things") == [("a", "red")]
    older = tmp_path / "older"
    older.mkdir()
    async with Database(path, Schema(create=CREATE, version=0, migrations=older, merged=merged)) as db:
        assert await db.select("SELECT * FROM things") == [("a", 1)], "the way back comes from the merged folder"
        assert await db.select("SELECT version FROM SchemaVersion") == [(0,)]


async def test_migration_failures_are_named_and_change_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    async with Database(path, Schema(create=CREATE, version=0)):
        pass
    folder = scripts(tmp_path / "s")
    (folder / "2_update.up.sql").write_text("UPDATE things SET colour = 'red'; UPDATE nothing SET a = 1;")
    with pytest.raises(apsw.SQLError, match="nothing"):
        async with Database(path, Schema(create=CREATE, version=2, migrations=folder)):
            pass
    connection = apsw.Connection(str(path))
    assert list(connection.execute("SELECT version FROM SchemaVersion")) == [(1,)]
    connection.close()
    with pytest.raises(FailedError, match=r"3_update.up.sql is missing"):
        (folder / "2_update.up.sql").write_text("SELECT 1;")
        async with Database(path, Schema(create=CREATE, version=3, migrations=folder)):
            pass
    with pytest.raises(InvalidArgumentError, match="gone does not exist"):
        async with Database(path, Schema(create=CREATE, migrations=tmp_path / "gone", merged=tmp_path / "m")):
            pass


@pytest.mark.parametrize("damage", ["no database", "page"])
async def test_damaged_file_is_set_aside(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "x.db"
    async with Database(path, Schema(create=CREATE)) as db:
        await db.write(
            lambda connection: connection.executemany(
                "INSERT INTO things VALUES (?, ?)", ((f"name {number}", number) for number in range(2000))
            )
        )
    if damage == "page":
        with path.open("r+b") as file:
            file.seek(4096 * 2)
            file.write(os.urandom(4096 * 8))
    else:
        path.write_bytes(b"this is no database, it is a text" * 100)
    async with Database(path, Schema(create=CREATE)) as db:
        assert db.recovered is not None and db.recovered.exists()
        assert await db.select("SELECT * FROM things") == []


def killed(task: str, directory: Path) -> int:
    """See tests.support.dbkills."""
    command = [sys.executable, "-m", "tests.support.dbkills", task, str(directory)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_kills_during_writes_never_leave_half_a_transaction(tmp_path: Path) -> None:
    assert killed("writes", tmp_path) == 200


def test_a_kill_at_any_line_of_a_recovery_loses_neither_the_copy_nor_the_note_that_it_is_one(tmp_path: Path) -> None:
    assert killed("recovery", tmp_path) > 50


def damage(path: Path) -> None:
    path.write_bytes(b"this is no database, it is a text" * 1000)


async def fill(path: Path, last: str) -> None:
    """Things a, b and c with a copy after each, and a last one without."""
    async with Database(path, Schema(create=CREATE)) as db:
        for name in ("a", "b", "c"):
            await db.execute("INSERT INTO things VALUES (?, 1)", (name,))
            await db.keep_copy()
        await db.execute("INSERT INTO things VALUES (?, 1)", (last,))


async def names(db: Database) -> list[str]:
    return [str(name) for (name,) in await db.select("SELECT name FROM things ORDER BY name")]


async def test_the_newest_copy_that_is_whole_takes_the_place_of_a_damaged_file(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    await fill(path, last="d")
    assert {entry.name for entry in tmp_path.iterdir()} == {"x.db", "x.db.copy1", "x.db.copy2"}
    assert {entry.stat().st_mode & 0o777 for entry in tmp_path.iterdir()} == {0o600}
    damage(path)
    async with Database(path, Schema(create=CREATE)) as db:
        assert db.recovered is not None
        assert await names(db) == ["a", "b", "c"]
    damage(path)
    damage(path.with_name("x.db.copy1"))
    async with Database(path, Schema(create=CREATE)) as db:
        assert await names(db) == ["a", "b"]
    damage(path)
    damage(path.with_name("x.db.copy2"))
    async with Database(path, Schema(create=CREATE)) as db:
        assert db.recovered is not None
        assert await names(db) == []


async def test_a_full_disk_does_not_lose_the_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.db"
    await fill(path, last="d")
    damage(path)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", full)
        for _ in range(2):
            with pytest.raises(NoSpaceError, match=r"x\.db"):
                async with Database(path, Schema(create=CREATE)):
                    pass
    async with Database(path, Schema(create=CREATE)) as db:
        assert db.recovered is not None and await names(db) == ["a", "b", "c"]


async def test_a_recovery_is_known_until_it_is_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    damage(path)
    for _ in range(2):
        async with Database(path, Schema(create=CREATE)) as db:
            assert db.recovered is not None and db.recovered.exists()
    async with Database(path, Schema(create=CREATE)) as db:
        await db.forget_recovery()
    async with Database(path, Schema(create=CREATE)) as db:
        assert db.recovered is None


async def test_a_copy_is_migrated_like_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    async with Database(path, Schema(create=CREATE)) as db:
        await db.execute("INSERT INTO things VALUES ('a', 1)")
        await db.keep_copy()
    damage(path)
    newer = Schema(create=[*CREATE, "CREATE TABLE IF NOT EXISTS others (name TEXT)"])
    async with Database(path, newer) as db:
        assert await names(db) == ["a"]
        assert await db.select("SELECT * FROM others") == []


async def test_a_copy_that_can_not_be_made_leaves_the_ones_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.db"
    async with Database(path, Schema(create=CREATE)) as db:
        await db.execute("INSERT INTO things VALUES ('a', 1)")
        await db.keep_copy()

        def full(*_: object, **__: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patch:
            patch.setattr(Path, "touch", full)
            with pytest.raises(FailedError, match=r"x\.db can't be copied: No space"):
                await db.keep_copy()
    assert {entry.name for entry in tmp_path.iterdir()} == {"x.db", "x.db.copy1"}
    damage(path)
    async with Database(path, Schema(create=CREATE)) as db:
        assert await names(db) == ["a"]


async def test_an_older_script_in_the_merged_folder_is_replaced_and_a_newer_one_kept(tmp_path: Path) -> None:
    shipped, merged = scripts(tmp_path / "shipped"), tmp_path / "merged"
    merged.mkdir()
    (merged / "1_update.up.sql").write_text("this one was wrong")
    (merged / "3_update.down.sql").write_text("of a newer image")
    async with Database(tmp_path / "x.db", Schema(create=CREATE, version=2, migrations=shipped, merged=merged)):
        pass
    assert "ALTER TABLE" in (merged / "1_update.up.sql").read_text()
    assert (merged / "3_update.down.sql").read_text() == "of a newer image"
    assert not (merged / "README").exists()


async def test_a_lock_of_another_program_is_waited_for(tmp_path: Path) -> None:
    async with Database(tmp_path / "x.db", Schema(create=CREATE)) as db:
        other = apsw.Connection(str(tmp_path / "x.db"))
        other.execute("BEGIN IMMEDIATE")
        writing = asyncio.create_task(db.execute("INSERT INTO things VALUES ('a', 1)"))
        await asyncio.sleep(0.3)
        assert not writing.done()
        other.execute("ROLLBACK")
        other.close()
        await writing
        assert await names(db) == ["a"]


@pytest.mark.parametrize("suffix", ["", "-wal", ".copy1"])
async def test_what_others_may_write_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture, suffix: str) -> None:
    """Its rights could be mended, but not what somebody may have written already (database.md §6, item 25)."""
    path = tmp_path / "x.db"
    await fill(path, last="forged")
    open_to_others = path.with_name(f"x.db{suffix}")
    open_to_others.touch()
    open_to_others.chmod(0o666 if suffix else 0o620)
    if suffix == ".copy1":
        damage(path)
    async with Database(path, Schema(create=CREATE)) as db:
        assert db.recovered is not None and db.recovered.exists()
        assert await names(db) == (["a", "b"] if suffix == ".copy1" else ["a", "b", "c"])
    assert f"x.db{suffix} may be written by others" in caplog.text
    assert path.stat().st_mode & 0o777 == 0o600


async def test_what_belongs_to_another_user_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.db"
    async with Database(path, Schema(create=CREATE)) as db:
        await db.execute("INSERT INTO things VALUES ('forged', 1)")
    if os.geteuid() == 0:
        os.chown(path, 4711, 4711)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 4711)
    async with Database(path, Schema(create=CREATE)) as db:
        assert await names(db) == []


async def test_a_file_of_9_1_that_all_may_read_is_taken_and_closed_to_others(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    async with Database(path, Schema(create=CREATE)) as db:
        await db.execute("INSERT INTO things VALUES ('a', 1)")
    path.chmod(0o644)
    async with Database(path, Schema(create=CREATE)) as db:
        assert db.recovered is None and await names(db) == ["a"]
        assert {entry.stat().st_mode & 0o777 for entry in tmp_path.iterdir()} == {0o600}


@pytest.mark.parametrize("note", ["", "../../etc/passwd", "x.db.broken-"])
async def test_a_note_of_a_recovery_that_makes_no_sense(tmp_path: Path, note: str) -> None:
    path = tmp_path / "x.db"
    async with Database(path, Schema(create=CREATE)) as db:
        await db.execute("INSERT INTO things VALUES ('a', 1)")
        await db.keep_copy()
    path.with_name("x.db.recovery").write_text(note)
    async with Database(path, Schema(create=CREATE)) as db:
        assert db.recovered is not None and db.recovered.parent == tmp_path and db.recovered.exists()
        assert await names(db) == ["a"]
