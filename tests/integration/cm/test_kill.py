"""CM is killed at any moment: what runs goes on, and the next CM knows all of it."""

import asyncio
import contextlib
import random
import signal
import sqlite3
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec

from tests.support.iam import free_port
from tests.support.nodehalf import request
from tests.support.sm import TestSm

WANTED = [request("a", 2), request("b", priority=5), request("c", 3)]


class Cm:
    """The node half as a process of its own."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.lines: list[str] = []

    async def line(self, timeout_s: float = 20) -> str:
        assert self._process.stdout is not None
        async with asyncio.timeout(timeout_s):
            text = (await self._process.stdout.readline()).decode().strip()
        assert text, "CM has ended"
        self.lines.append(text)
        return text

    async def wait_active(self, count: int) -> None:
        """Wait until so many instances are shown, all of them active."""
        while True:
            text = await self.line()
            states = [part.split("@")[0] for part in text.split("'")[3::4]]
            if states == ["active"] * count:
                return

    async def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGKILL)
        await self._process.wait()


@contextlib.asynccontextmanager
async def cm_process(directory: Path, port: int) -> AsyncIterator[Cm]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.support.nodehalf",
        str(directory),
        str(port),
        stdout=asyncio.subprocess.PIPE,
        cwd=Path(__file__).parents[3],
    )
    cm = Cm(process)
    try:
        yield cm
    finally:
        await cm.kill()


@contextlib.asynccontextmanager
async def reconnecting(sm: TestSm, port: int) -> AsyncIterator[None]:
    """Stays connected as an SM does: tries again and again."""

    async def connect() -> None:
        while True:
            async with sm.connected(port, None):
                await sm.ended.wait()
            await asyncio.sleep(0.1)

    task = asyncio.create_task(connect())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def rows(directory: Path) -> list[tuple[object, ...]]:
    """Place and ids of every instance, as the database has them."""
    with contextlib.closing(sqlite3.connect(directory / "cm.db")) as db:
        query = "SELECT itemID, instance, version, nodeID, runtimeID, uid, gid FROM launcher_instances ORDER BY 1, 2, 3"
        return db.execute(query).fetchall()


def ask_for(directory: Path, wanted: list[object]) -> None:
    (directory / "requests.json").write_bytes(msgspec.json.encode(wanted))


async def test_killed_cm_comes_back_to_the_same_instances(tmp_path: Path) -> None:
    port = free_port()
    first, second = TestSm("n1"), TestSm("n2")
    ask_for(tmp_path, WANTED)
    async with reconnecting(first, port), reconnecting(second, port):
        async with cm_process(tmp_path, port) as cm:
            await cm.wait_active(6)
            before = rows(tmp_path)
            await cm.kill()
        starts = list(first.starts), list(second.starts)
        updates = len(first.updates), len(second.updates)
        assert {row[3] for row in before} == {"n1", "n2"}
        async with cm_process(tmp_path, port) as cm:
            await cm.wait_active(6)
            await asyncio.sleep(0.5)
        assert rows(tmp_path) == before
        assert (first.starts, second.starts) == starts
        assert (len(first.updates), len(second.updates)) == updates


async def test_killed_at_any_moment(tmp_path: Path) -> None:
    port = free_port()
    rng = random.Random(7)
    first, second = TestSm("n1"), TestSm("n2")
    ids: dict[object, object] = {}
    async with reconnecting(first, port), reconnecting(second, port):
        for version in range(1, 9):
            wanted = [msgspec.structs.replace(one, version=f"{version}.0.0") for one in WANTED]
            ask_for(tmp_path, wanted)
            async with cm_process(tmp_path, port) as cm:
                assert await cm.line() == "ready"
                await asyncio.sleep(rng.random() * 0.4)
            for item, index, _, _, _, uid, gid in rows(tmp_path):
                assert ids.setdefault((item, index), (uid, gid)) == (uid, gid)
        async with cm_process(tmp_path, port) as cm:
            await cm.wait_active(6)
    running = [
        (status.instance.item_id, status.instance.instance, status.version)
        for sm in (first, second)
        for status in sm.instances.values()
    ]
    last = running[0][2]
    assert sorted(running) == sorted((one.item_id, index, last) for one in WANTED for index in range(one.num_instances))
    assert len(set(ids.values())) == 6
