"""Messages that outlive the process."""

import pytest

from aoscore.cm.alerts import AlertStore
from aoscore.cm.communication.link import CloudLink, LinkSettings
from aoscore.cm.communication.messages import Alerts, IssueUnitCertificates, MonitoringData, OverrideEnvVarsStatus
from aoscore.cm.communication.outbox import Outbox, StoredMessage
from aoscore.common.aio import Worker
from aoscore.common.db import Database
from aoscore.common.errors import FailedError, NoSpaceError
from tests.support.cloud import FakeCloud
from tests.support.running import running, until
from tests.unit.cm.communication.test_link import SYSTEM, Identities

CSR = IssueUnitCertificates(requests=())


def make_link(worker: Worker, db: Database, url: str) -> CloudLink:
    settings = LinkSettings(discovery_url=url, reconnect_first_s=0.02, reconnect_limit_s=0.1, ping_period_s=0.0)
    return CloudLink(SYSTEM, settings, Identities(), worker, outbox=Outbox(db))


async def rows(db: Database) -> int:
    return int((await db.select("SELECT COUNT(*) FROM aoscore_outbox"))[0][0])


async def test_in_order_and_foreign_rows_go(db: Database) -> None:
    outbox = Outbox(db)
    stored = [StoredMessage(IssueUnitCertificates, f"t{number}", b"{}") for number in range(3)]
    for message in stored:
        await outbox.put(message)
    await db.execute("INSERT INTO aoscore_outbox VALUES ('x', 'inventedType', '{}')")
    assert await outbox.load() == stored
    await outbox.remove(["t1"])
    assert await outbox.load() == [stored[0], stored[2]]
    assert await rows(db) == 2


async def test_a_message_and_another_change_are_kept_both_or_neither(db: Database) -> None:
    outbox = Outbox(db)
    await outbox.put(StoredMessage(Alerts, "t1", b"{}"), AlertStore.replacing([]))
    with pytest.raises(FailedError, match="no such table"):
        await outbox.put(StoredMessage(Alerts, "t2", b"{}"), lambda connection: connection.execute("DELETE FROM x"))
    assert [message.txn for message in await outbox.load()] == ["t1"]


async def test_what_must_arrive_outlives_the_process_and_arrives_once(worker: Worker, db: Database) -> None:
    """A process that ends takes its other messages along."""
    dead = make_link(worker, db, "http://127.0.0.1:1/sd/v7/")
    for message in (CSR, OverrideEnvVarsStatus(statuses=()), MonitoringData(nodes=()), CSR):
        await dead.send(message)
    assert await rows(db) == 2
    async with FakeCloud(SYSTEM).running() as cloud, running(make_link(worker, db, cloud.discovery_url)):
        await cloud.next("issueUnitCertificates")
        await cloud.next("issueUnitCertificates")
        while await rows(db):
            pass
        assert len({frame["header"]["txn"] for frame in cloud.frames}) == len(cloud.frames) == 2


async def test_a_process_that_ends_before_the_ack_says_it_again_with_the_same_txn(worker: Worker, db: Database) -> None:
    async with FakeCloud(SYSTEM).running() as cloud:
        cloud.acks = False
        link = make_link(worker, db, cloud.discovery_url)
        async with running(link):
            await link.send(CSR)
            first = await cloud.next("issueUnitCertificates")
        cloud.acks = True
        async with running(make_link(worker, db, cloud.discovery_url)):
            assert await cloud.next("issueUnitCertificates") == first
            while await rows(db):
                pass


async def full(self: Outbox, message: StoredMessage, also: object = None) -> None:
    raise NoSpaceError("database cm.db: no space left")


async def test_what_need_not_arrive_is_kept_when_somebody_asks_for_it(
    worker: Worker, db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each way once: with a change of the database, and what waits without a connection."""
    dead = make_link(worker, db, "http://127.0.0.1:1/sd/v7/")
    await db.execute("INSERT INTO aoscore_alerts VALUES ('x')")
    await dead.send(MonitoringData(nodes=()), also=lambda connection: connection.execute("DELETE FROM aoscore_alerts"))
    assert await rows(db) == 1
    assert await db.select("SELECT * FROM aoscore_alerts") == []
    await dead.send(MonitoringData(nodes=()))
    assert await rows(db) == 1
    with monkeypatch.context() as patch:
        patch.setattr(Outbox, "put", full)
        with pytest.raises(NoSpaceError):
            await dead.keep(MonitoringData)
    for _ in range(2):
        await dead.keep(MonitoringData)
        assert await rows(db) == 2
    async with FakeCloud(SYSTEM).running() as cloud, running(make_link(worker, db, cloud.discovery_url)):
        for _ in range(2):
            await cloud.next("monitoringData")
        while await rows(db):
            pass
        assert len({frame["header"]["txn"] for frame in cloud.frames}) == len(cloud.frames) == 2


async def test_a_full_disk_keeps_nothing_from_being_said(
    worker: Worker, db: Database, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Outbox, "put", full)
    async with FakeCloud(SYSTEM).running() as cloud:
        link = make_link(worker, db, cloud.discovery_url)
        async with running(link):
            await link.send(CSR)
            await cloud.next("issueUnitCertificates")
    assert "no space left" in caplog.text


async def test_rows_that_could_not_be_deleted_go_later(
    worker: Worker, db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = 0
    original = Outbox.remove

    async def remove(self: Outbox, txns: list[str]) -> None:
        nonlocal tries
        tries += 1
        if tries == 1:
            raise NoSpaceError("database cm.db: no space left")
        await original(self, txns)

    monkeypatch.setattr(Outbox, "remove", remove)
    async with FakeCloud(SYSTEM).running() as cloud:
        link = make_link(worker, db, cloud.discovery_url)
        async with running(link):
            await link.send(CSR)
            await until(lambda: tries >= 2)
            while await rows(db):
                pass
