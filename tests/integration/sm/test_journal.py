"""Container output, log replies and alerts with a real journald, without systemd as the first process."""

import asyncio
import gzip
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from aoscore.common.types import (
    CoreAlert,
    InstanceAlert,
    InstanceFilter,
    LogData,
    LogKind,
    LogRequest,
    LogStatus,
    SystemAlert,
)
from aoscore.sm import journal
from aoscore.sm.alerts.journalalerts import CursorStore, JournalAlerts
from aoscore.sm.alerts.rules import Alert, AlertRules
from aoscore.sm.database import open_database
from aoscore.sm.launcher.runtimes.base import instance_id
from aoscore.sm.launcher.runtimes.container.config import OutputKind
from aoscore.sm.launcher.runtimes.container.history import RunHistory
from aoscore.sm.logprovider.provider import LogProvider
from aoscore.sm.logprovider.source import JournalSource
from tests.support import bed
from tests.support.containers import image, instance, runtime
from tests.support.networks import MIGRATIONS
from tests.support.running import running

JOURNALD = "/lib/systemd/systemd-journald"

pytestmark = [
    pytest.mark.container,
    pytest.mark.skipif(not shutil.which(JOURNALD), reason=f"{JOURNALD} is not installed"),
]


@pytest.fixture
def journald() -> Iterator[None]:
    """A journald that keeps its files in /run, which is the test's own, and leaves the kernel's messages alone."""
    for directory in ("/run/systemd/journal", "/run/log/journal", "/run/systemd/journald.conf.d"):
        Path(directory).mkdir(parents=True)
    Path("/run/systemd/journald.conf.d/test.conf").write_text("[Journal]\nReadKMsg=no\n")
    with subprocess.Popen([JOURNALD], stderr=subprocess.DEVNULL) as process:
        while not journal.is_available():
            assert process.poll() is None
        yield
        process.kill()


def log(message: str, priority: int, **fields: str) -> None:
    """An entry by the native protocol."""
    members = {"MESSAGE": message, "PRIORITY": str(priority), **fields}
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.sendto(
            "".join(f"{name}={value}\n" for name, value in members.items()).encode(), "/run/systemd/journal/socket"
        )


async def test_output_goes_to_the_journal_and_comes_back_as_log(journald: None, tmp_path: Path) -> None:
    host = runtime(tmp_path, output=OutputKind.AUTO)
    source = JournalSource(bed.cgroup_parent())
    sent: asyncio.Queue[LogData] = asyncio.Queue()
    provider = LogProvider(
        source, source, RunHistory(tmp_path / "logs"), sent.put, max_part_size_bytes=100_000, max_part_count=10
    )
    before = datetime.now(UTC)

    async def ask(kind: LogKind, number: int = 0, **times: datetime) -> str:
        await provider.request(LogRequest(kind, "corr", InstanceFilter(instance=number), **times))
        parts = [await sent.get()]
        while parts[-1].part < parts[-1].part_count:
            parts.append(await sent.get())
        assert {part.status for part in parts} == {LogStatus.OK}
        return b"".join(gzip.decompress(part.data) for part in parts).decode()

    async with running(host, provider):
        await host.adopt([])
        for number in (0, 1):
            script = f"echo out {number}; echo err {number} >&2; while true; do sleep 1; done"
            await host.start_instance(instance(number), image(tmp_path, script))
        await asyncio.sleep(0.5)
        lines = (await ask(LogKind.INSTANCE, since=before)).splitlines()
        # Two streams: which is read first is journald's choice.
        assert sorted(line.split(" ", 1)[1] for line in lines) == ["err 0 ", "out 0 "]
        # An instance that runs no more still has a log.
        await host.stop_instance(instance(1).ident)
        assert "out 1" in await ask(LogKind.INSTANCE, 1)
        assert instance_id(instance(0).ident) in await ask(LogKind.SYSTEM, since=before)
        await host.start_instance(instance(2), image(tmp_path, "echo last words; exit 5"))
        await asyncio.sleep(0.5)
        lines = (await ask(LogKind.CRASH, 2)).splitlines()
        assert "last words" in lines[1] and lines[-1].endswith("exited with 5 ")
        await host.stop_instance(instance(2).ident)
        await provider.request(LogRequest(LogKind.INSTANCE, "corr", since=before + timedelta(hours=1)))
        assert (await sent.get()).status is LogStatus.EMPTY
        await host.stop_instance(instance(0).ident)


@pytest.fixture
async def cursors(tmp_path: Path) -> AsyncIterator[CursorStore]:
    async with open_database(tmp_path / "sm.db", MIGRATIONS, tmp_path / "merged") as database:
        yield CursorStore(database)


async def next_alerts(queue: "asyncio.Queue[Alert]", count: int) -> list[Alert]:
    async with asyncio.timeout(10):
        return [await queue.get() for _ in range(count)]


async def test_alerts_follow_the_journal_over_restarts(journald: None, tmp_path: Path, cursors: CursorStore) -> None:
    history = RunHistory(tmp_path)
    name = instance_id(instance(0).ident)
    await asyncio.to_thread(history.note_start, name, instance(0).ident, "1.0.0")
    queue: asyncio.Queue[Alert] = asyncio.Queue()
    rules = AlertRules(["boring"], service_priority=4, system_priority=3)

    def service() -> JournalAlerts:
        return JournalAlerts(rules, cursors, history, queue.put)

    log("before the first start", 3)
    await asyncio.sleep(0.5)
    async with running(service()):
        await asyncio.sleep(0.5)
        log("disk broken", 3)
        log("boring error", 3)
        log("only a warning", 4)
        log("service warns", 4, SYSLOG_IDENTIFIER=name)
        log("../../etc", 3, SYSLOG_IDENTIFIER="../../../etc")
        one, two, three = await next_alerts(queue, 3)
        assert isinstance(one, SystemAlert) and one.message == "disk broken"
        assert isinstance(two, InstanceAlert) and (two.ident, two.version) == (instance(0).ident, "1.0.0")
        assert isinstance(three, SystemAlert)
    log("while nobody looked", 2)
    async with running(service()):
        [missed] = await next_alerts(queue, 1)
        assert isinstance(missed, SystemAlert) and missed.message == "while nobody looked"
        # A place that the journal does not know any more: go on at the end.
    await cursors.save("s=00000000000000000000000000000000;i=1;b=0;m=1;t=1;x=1")
    async with running(service()):
        await asyncio.sleep(0.5)
        log("after a lost place", 3)
        [after] = await next_alerts(queue, 1)
        assert isinstance(after, SystemAlert) and after.message == "after a lost place"
        for number in range(50):
            log(f"flood {number}", 3, SYSLOG_IDENTIFIER="flooder")
        flood = await next_alerts(queue, 20)
        assert all(isinstance(alert, SystemAlert) for alert in flood)
        async with asyncio.timeout(20):
            told = await queue.get()
        assert not isinstance(told, CoreAlert) and "more alerts of flooder were held back" in told.message
