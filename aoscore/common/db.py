"""SQLite by apsw: one connection, one worker thread, explicit transactions, migrations, a broken file set aside.

Rules of database.md §5 and §6: WAL with full sync, a step and its version number in one transaction, quick_check at
open, two generations of copies, no file that others may write. Files stay readable for AosCore 9.1.
"""

import contextlib
import errno
import glob
import logging
import os
import re
import shutil
import stat
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self, TypeVar

import apsw

from aoscore.common.aio import Worker
from aoscore.common.errors import AlreadyExistsError, FailedError, InvalidArgumentError, NoSpaceError
from aoscore.common.files import fsync_dir, fsync_file, remove_unfinished, write_atomic

_log = logging.getLogger(__name__)

T = TypeVar("T")
Row = tuple[Any, ...]

_FILES = ("", "-wal", "-shm")
_SCRIPT = re.compile(r"(\d+)_update\.(up|down)\.sql")
_TRANSACTION_WORDS = re.compile(
    r"^\s*(BEGIN( TRANSACTION)?|COMMIT|END TRANSACTION)\s*;\s*$", re.IGNORECASE | re.MULTILINE
)


class _OpenToOthersError(Exception):
    """What is in the file may be the work of somebody else."""


class Schema:
    """What a database must look like.

    `create`: statements that make missing tables of the current version (CREATE TABLE IF NOT EXISTS …).
    `version`: the number in SchemaVersion. `migrations`: directory with `<n>_update.up.sql`/`.down.sql`, None when
    there are none. `merged`: writable directory that keeps scripts of newer versions for the way back.
    `base`: tables of version 0, made in a fresh file before the migrations when there are some.
    """

    def __init__(
        self,
        *,
        create: Sequence[str],
        version: int = 0,
        migrations: Path | None = None,
        merged: Path | None = None,
        foreign_keys: bool = False,
        convert: dict[int, Callable[[apsw.Connection, bool], None]] | None = None,
    ) -> None:
        self.create = create
        self.version = version
        self.migrations = migrations
        self.merged = merged
        self.foreign_keys = foreign_keys
        # Steps done in Python instead of SQL: version -> function(connection, is_up).
        self.convert = convert or {}


class Database:
    """One SQLite file. Use as an async context manager.

    A file that is damaged, or that others may write, is set aside at open; `recovered` is then its path, None normally.
    What there is now is the newest of its copies that is whole (`keep_copy`), else an empty database, and the owner
    rebuilds what it can from elsewhere. It stays set over restarts until he has done so (`forget_recovery`).
    """

    def __init__(self, path: Path, schema: Schema) -> None:
        self._path = path
        self._schema = schema
        self._worker = Worker(f"db-{path.stem}")
        self._connection: apsw.Connection | None = None
        self.recovered: Path | None = None

    async def __aenter__(self) -> Self:
        try:
            await self._worker.run(self._open)
        except BaseException:
            self._worker.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        # A clean close checkpoints and removes -wal and -shm, so that copies of the single file stay complete.
        if self._connection is not None:
            await self._worker.run(self._connection.close)
        self._worker.close()

    async def read(self, function: Callable[[apsw.Connection], T]) -> T:
        """Run `function(connection)` in the worker thread, without a write transaction."""
        return await self._worker.run(self._call, function, False)

    async def write(self, function: Callable[[apsw.Connection], T]) -> T:
        """Run `function(connection)` in one transaction: all of it is durable on return, or nothing."""
        return await self._worker.run(self._call, function, True)

    async def execute(self, sql: str, values: Sequence[Any] | dict[str, Any] = ()) -> list[Row]:
        """One statement in a transaction of its own; its rows."""
        return await self.write(lambda connection: list(connection.execute(sql, values)))

    async def select(self, sql: str, values: Sequence[Any] | dict[str, Any] = ()) -> list[Row]:
        """Rows of a query."""
        return await self.read(lambda connection: list(connection.execute(sql, values)))

    async def keep_copy(self) -> None:
        """Keep a copy of all of it beside the file, in case that one breaks; the copy before is kept, too.

        For moments at which everything in it fits together. Raises FailedError, NoSpaceError.
        """
        await self._worker.run(self._call, self._copy, False)

    async def forget_recovery(self) -> None:
        """What was lost with the broken file is made good."""
        await self.execute("DROP TABLE IF EXISTS aoscore_recovered")
        self.recovered = None

    @property
    def _copies(self) -> tuple[Path, Path]:
        """Newest first."""
        newest, older = (self._path.with_name(f"{self._path.name}.copy{number}") for number in (1, 2))
        return newest, older

    def _copy(self, connection: apsw.Connection) -> None:
        newest, older = self._copies
        fresh = newest.with_name(f".{newest.name}.new")
        try:
            fresh.unlink(missing_ok=True)
            fresh.touch(mode=0o600)
            target = apsw.Connection(str(fresh))
            try:
                with target.backup("main", connection, "main") as backup:
                    backup.step()
                # One file, complete without another one beside it.
                target.execute("PRAGMA journal_mode=DELETE")
            finally:
                target.close()
            with contextlib.suppress(FileNotFoundError):
                newest.rename(older)
            fresh.rename(newest)
            fsync_dir(newest.parent)
        except OSError as error:
            fresh.unlink(missing_ok=True)
            raise FailedError(f"database {self._path.name} can't be copied: {error.strerror}") from error

    def _call(self, function: Callable[[apsw.Connection], T], write: bool) -> T:
        connection = self._connection
        if connection is None:
            raise FailedError(f"database {self._path.name} is not open")
        try:
            if not write:
                return function(connection)
            with transaction(connection):
                return function(connection)
        except apsw.ConstraintError as error:
            raise AlreadyExistsError(f"database {self._path.name}: {error}") from error
        except apsw.FullError as error:
            raise NoSpaceError(f"database {self._path.name}: no space left") from error
        except apsw.Error as error:
            raise FailedError(f"database {self._path.name}: {error}") from error

    def _open(self) -> None:
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        remove_unfinished(self._recovery)
        kept = self._begun_recovery()
        if kept is not None:
            connection = self._recover(self._path.with_name(kept))
        else:
            try:
                _check_rights(self._path)
                connection = self._prepare()
            except (apsw.NotADBError, apsw.CorruptError, _OpenToOthersError) as error:
                kept = self._name_for_broken()
                _log.error("Database is damaged: file=%s, kept=%s, error=%s", self._path, kept, error)
                write_atomic(self._recovery, kept.encode())
                connection = self._recover(self._path.with_name(kept))
        self._connection = connection
        self.recovered = self._noted_recovery(connection)

    def _name_for_broken(self) -> str:
        return f"{self._path.name}.broken-{datetime.now(UTC):%Y%m%dT%H%M%S.%f}"

    def _begun_recovery(self) -> str | None:
        """The name under which an earlier process began to set the file aside, None when there is nothing to end."""
        try:
            name = self._recovery.read_text(errors="replace")
        except FileNotFoundError:
            return None
        own = re.fullmatch(rf"{re.escape(self._path.name)}\.broken-[0-9T.]+", name)
        return name if own else self._name_for_broken()

    @property
    def _recovery(self) -> Path:
        """Holds the name under which the file is set aside, from then on until another one is in its place.

        While it is there, what lies at the path of the database is no database, and the next start goes on here.
        """
        return self._path.with_name(f"{self._path.name}.recovery")

    def _recover(self, kept: Path) -> apsw.Connection:
        """Set the file aside and put the newest copy in its place. Each step may be repeated."""
        if not kept.exists():
            # The file comes last: once it is aside, what lies in its place is ours.
            for suffix in reversed(_FILES):
                with contextlib.suppress(FileNotFoundError):
                    self._path.with_name(self._path.name + suffix).rename(kept.with_name(kept.name + suffix))
            fsync_dir(kept.parent)
        self._remove_files()
        connection = self._prepare_copy() or self._prepare()
        try:
            with transaction(connection):
                connection.execute("CREATE TABLE IF NOT EXISTS aoscore_recovered (file TEXT)")
                connection.execute("INSERT INTO aoscore_recovered VALUES (?)", (kept.name,))
            self._recovery.unlink()
            fsync_dir(kept.parent)
        except BaseException:
            connection.close()
            raise
        return connection

    def _noted_recovery(self, connection: apsw.Connection) -> Path | None:
        if not list(connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'aoscore_recovered'")):
            return None
        rows = list(connection.execute("SELECT file FROM aoscore_recovered ORDER BY rowid DESC"))
        return self._path.with_name(str(rows[0][0])) if rows else None

    def _prepare_copy(self) -> apsw.Connection | None:
        """The newest copy that is whole, as the database."""
        for copy in self._copies:
            try:
                _check_rights(copy)
                self._path.touch(mode=0o600)
                shutil.copyfile(copy, self._path)
                # SQLite writes no page that it leaves as it is.
                fsync_file(self._path)
                connection = self._prepare()
            except FileNotFoundError:
                continue
            except (apsw.NotADBError, apsw.CorruptError, _OpenToOthersError, OSError) as error:
                if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                    # An empty database would have room, perhaps. The next start tries the copy again.
                    raise NoSpaceError(f"no space left for the copy of database {self._path.name}") from error
                _log.error("Copy of the database can't be used: file=%s, error=%s", copy, error)
                self._remove_files()
                continue
            _log.warning("A copy of the database is in use: file=%s", copy)
            return connection
        return None

    def _remove_files(self) -> None:
        for suffix in _FILES:
            self._path.with_name(self._path.name + suffix).unlink(missing_ok=True)

    def _prepare(self) -> apsw.Connection:
        # SQLite gives its own files beside it the same rights.
        if self._path.exists():
            self._path.chmod(0o600)
        else:
            self._path.touch(mode=0o600)
        connection = apsw.Connection(str(self._path))
        try:
            connection.set_busy_timeout(5000)
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=FULL")
            connection.execute(f"PRAGMA foreign_keys={'ON' if self._schema.foreign_keys else 'OFF'}")
            problems = [row[0] for row in connection.execute("PRAGMA quick_check(1)")]
            if problems != ["ok"]:
                raise apsw.CorruptError(str(problems[0]))
            self._merge_scripts()
            self._migrate(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _merge_scripts(self) -> None:
        """Keep our scripts beside those of newer versions, so that an older image finds the way back."""
        schema = self._schema
        if schema.migrations is None or schema.merged is None:
            return
        if not schema.migrations.is_dir():
            raise InvalidArgumentError(f"migration folder {schema.migrations} does not exist")
        schema.merged.mkdir(parents=True, exist_ok=True)
        for script in schema.migrations.iterdir():
            match = _SCRIPT.fullmatch(script.name)
            kept = schema.merged / script.name
            if match and (int(match[1]) <= schema.version or not kept.exists()):
                shutil.copyfile(script, kept)

    def _migrate(self, connection: apsw.Connection) -> None:
        schema = self._schema
        with transaction(connection):
            connection.execute("CREATE TABLE IF NOT EXISTS SchemaVersion (version INTEGER)")
            rows = list(connection.execute("SELECT version FROM SchemaVersion"))
            fresh = not rows
            if fresh:
                connection.execute("INSERT INTO SchemaVersion VALUES (?)", (schema.version,))
        current = schema.version if fresh else int(rows[0][0])
        while current != schema.version:
            up = current < schema.version
            step = current + 1 if up else current
            after = step if up else step - 1
            with transaction(connection):
                self._run_step(connection, step, up)
                connection.execute("UPDATE SchemaVersion SET version = ?", (after,))
            _log.info("Database migrated: file=%s, version=%d", self._path.name, after)
            current = after
        with transaction(connection):
            for statement in schema.create:
                connection.execute(statement)

    def _run_step(self, connection: apsw.Connection, step: int, up: bool) -> None:
        if step in self._schema.convert:
            self._schema.convert[step](connection, up)
            return
        name = f"{step}_update.{'up' if up else 'down'}.sql"
        for directory in (self._schema.merged, self._schema.migrations):
            if directory is not None and (directory / name).is_file():
                # Scripts of 9.1 open transactions themselves; ours is already open (database.md §6, item 1).
                connection.execute(_TRANSACTION_WORDS.sub("", (directory / name).read_text()))
                return
        raise FailedError(f"database {self._path.name}: migration script {name} is missing")


def files_of(path: Path) -> list[Path]:
    """All that may belong to the database at `path`: the file, what SQLite keeps beside it, copies, damaged ones."""
    return [path, *path.parent.glob(f"{glob.escape(path.name)}[-.]*")]


def _check_rights(path: Path) -> None:
    """Raises _OpenToOthersError when another user than root and ours may write the file or what SQLite keeps beside it.

    Its rights could be mended, but not what somebody may have written already (database.md §6, item 25).
    """
    for file in (path.with_name(path.name + suffix) for suffix in _FILES):
        try:
            status = file.stat()
        except FileNotFoundError:
            continue
        if status.st_uid not in (0, os.geteuid()):
            raise _OpenToOthersError(f"{file.name} belongs to user {status.st_uid}")
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise _OpenToOthersError(f"{file.name} may be written by others, its mode is {status.st_mode & 0o777:04o}")


def set_foreign_aside(path: Path, merged: Path | None) -> None:
    """Rename a database of the former Go generation, which has the name of ours and another content.

    Its collected scripts go with it: they have the same names as ours (database.md §5).
    """
    if not path.exists() or not _is_foreign(path):
        return
    suffix = f".foreign-{datetime.now(UTC):%Y%m%dT%H%M%S}"
    _log.warning("Database of another generation set aside: file=%s, suffix=%s", path, suffix)
    for name in (*(path.with_name(path.name + end) for end in _FILES), *([merged] if merged else [])):
        with contextlib.suppress(FileNotFoundError):
            name.rename(name.with_name(name.name + suffix))


def _is_foreign(path: Path) -> bool:
    """Whether the file is one of the Go generation; a damaged file is none, opening it deals with that."""
    try:
        connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READWRITE)
    except apsw.Error:
        return False
    try:
        return bool(list(connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'schema_migrations'")))
    except (apsw.NotADBError, apsw.CorruptError):
        return False
    finally:
        connection.close()


@contextlib.contextmanager
def transaction(connection: apsw.Connection) -> Any:
    """BEGIN IMMEDIATE … COMMIT, rolled back on any error."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")
