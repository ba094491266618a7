"""A database whose process is killed with SIGKILL, many times: `python -m tests.support.dbkills TASK DIRECTORY`.

TASK is `recovery`: at each line of aoscore.common.db that runs while a damaged file gives way to its copy; or `writes`:
at random moments of 200 bursts of writes. A number is printed at the end: of lines, or of bursts. Each life is a fork
of one process that has the modules loaded, so that it takes milliseconds.
"""

import asyncio
import os
import random
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import apsw

from aoscore.common import db
from aoscore.common.db import Database, Schema

BURSTS = 200
SCHEMA = Schema(create=["CREATE TABLE IF NOT EXISTS pairs (a INTEGER, b INTEGER)"])


def forked(work: Callable[[], object]) -> int:
    """Exit status of a life that does this work, as waitpid(2) tells it."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return os.waitpid(pid, 0)[1]


async def with_database(path: Path, work: Callable[[apsw.Connection], Any]) -> tuple[Any, Path | None]:
    """What the work returns, and what was set aside at open."""
    async with Database(path, SCHEMA) as database:
        return await database.read(work), database.recovered


def rows(connection: apsw.Connection) -> list[tuple[Any, ...]]:
    return list(connection.execute("SELECT a, b FROM pairs ORDER BY a"))


def open_until(path: Path, last: int) -> None:
    """Open the database; die before the line with this number."""
    count = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal count
        if frame.f_code.co_filename != db.__file__:
            return None
        if event == "line":
            count += 1
            if count == last:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    threading.settrace(trace)
    asyncio.run(with_database(path, rows))


def recovery(directory: Path) -> int:
    """At every line: the next process has the copy, knows that it is one, and the broken file is kept as it was."""
    before, now = directory / "before", directory / "now"
    before.mkdir()

    async def make() -> None:
        async with Database(before / "x.db", SCHEMA) as database:
            for number in range(3):
                await database.execute("INSERT INTO pairs VALUES (?, ?)", (number, number))
                await database.keep_copy()
            await database.execute("INSERT INTO pairs VALUES (9, 9)")

    asyncio.run(make())
    noise = os.urandom(50_000)
    (before / "x.db").write_bytes(noise)
    number = 0
    while True:
        number += 1
        shutil.copytree(before, now)
        status = forked(partial(open_until, now / "x.db", number))
        assert status in (0, signal.SIGKILL), status
        found, recovered = asyncio.run(with_database(now / "x.db", rows))
        names = sorted(entry.name for entry in now.iterdir())
        case = f"line {number}: {found}, {recovered}, {names}"
        assert found == [(0, 0), (1, 1), (2, 2)], case
        assert recovered is not None and recovered.read_bytes() == noise, case
        assert {name for name in names if ".broken-" not in name} == {"x.db", "x.db.copy1", "x.db.copy2"}, case
        shutil.rmtree(now)
        if status == 0:
            return number - 1


def write_for_ever(path: Path, told: int) -> None:
    """Pairs of statements, each pair one transaction; the number of each that is done goes to a pipe."""

    async def write() -> None:
        async with Database(path, SCHEMA) as database:
            number = len(await database.read(rows))
            while True:
                number += 1

                def both(connection: apsw.Connection, number: int = number) -> None:
                    connection.execute("INSERT INTO pairs VALUES (?, NULL)", (number,))
                    connection.execute("UPDATE pairs SET b = a WHERE a = ?", (number,))

                await database.write(both)
                os.write(told, number.to_bytes(4, "big"))

    asyncio.run(write())


def writes(directory: Path) -> int:
    """After each kill the file opens, holds no half transaction and all that was told as done."""
    path, rng = directory / "x.db", random.Random(7)
    last = 0
    for burst in range(BURSTS):
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                write_for_ever(path, writer)
            finally:
                os._exit(1)
        os.close(writer)
        for _ in range(rng.randrange(1, 8)):
            data = os.read(reader, 4)
            assert data, f"burst {burst}: the process ended by itself"
            last = int.from_bytes(data, "big")
        os.kill(pid, signal.SIGKILL)
        assert os.waitpid(pid, 0)[1] == signal.SIGKILL
        while data := os.read(reader, 4):
            last = int.from_bytes(data, "big")
        os.close(reader)
        found, recovered = asyncio.run(with_database(path, rows))
        assert recovered is None, f"burst {burst}: {recovered}"
        assert all(a == b for a, b in found), f"burst {burst}: half a transaction"
        numbers = [a for a, _ in found]
        assert numbers in ([*range(1, last + 1)], [*range(1, last + 2)]), (
            f"burst {burst}: {last} of {numbers} were told"
        )
    return BURSTS


if __name__ == "__main__":
    print({"recovery": recovery, "writes": writes}[sys.argv[1]](Path(sys.argv[2])))
