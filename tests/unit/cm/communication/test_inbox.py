"""Messages of the cloud outlive the process that has acknowledged them."""

import asyncio

import pytest

from aoscore.cm.communication.inbox import MAX_TRIES, Inbox
from aoscore.cm.communication.link import CloudLink, LinkSettings
from aoscore.cm.communication.messages import (
    DeprovisioningRequest,
    Identity,
    Message,
    NodeSecret,
    OverrideEnvVars,
    RenewCertificatesNotification,
    UnitSecrets,
)
from aoscore.common.aio import Worker
from aoscore.common.db import Database
from aoscore.common.errors import FailedError, NoSpaceError
from tests.support.cloud import FakeCloud
from tests.support.running import running, until
from tests.unit.cm.communication.test_link import SYSTEM, Identities

NODE = Identity.of_codename("n1")
OVERRIDE = {"messageType": "overrideEnvVars", "items": []}
DEPROVISION = {"messageType": "deprovisioningRequest", "node": {"codename": "n1"}, "password": "hidden"}


class Process:
    """A link, and what it was told to act on."""

    def __init__(self, worker: Worker, db: Database, url: str, *, ping_s: float = 0.0) -> None:
        settings = LinkSettings(discovery_url=url, reconnect_first_s=0.02, reconnect_limit_s=0.1, ping_period_s=ping_s)
        self.link = CloudLink(SYSTEM, settings, Identities(), worker, inbox=Inbox(db))
        self.begun: list[Message] = []
        self.again: list[Message] = []
        self.may_end = asyncio.Event()
        self.fails = False
        for kind in (OverrideEnvVars, DeprovisioningRequest):
            self.link.on(kind, self._begin, topic="one", again=self._again)

    async def _begin(self, message: Message) -> None:
        self.begun.append(message)
        await self.may_end.wait()
        if self.fails:
            raise FailedError("no luck")

    async def _again(self, message: Message) -> None:
        self.again.append(message)


async def rows(db: Database) -> int:
    return int((await db.select("SELECT COUNT(*) FROM aoscore_inbox"))[0][0])


async def acked(cloud: FakeCloud, txn: str) -> None:
    def is_acked() -> bool:
        headers = [frame["header"] for frame in cloud.frames if frame["data"]["messageType"] == "ack"]
        return any(header["txn"] == txn for header in headers)

    await until(is_acked)


async def test_in_order_without_passwords_and_each_frame_once(db: Database) -> None:
    inbox = Inbox(db)
    renew = RenewCertificatesNotification(
        unit_secrets=UnitSecrets(version="2.0.0", nodes=(NodeSecret(node=NODE, secret="hidden"),))
    )
    keys = [
        await inbox.put("frame 1", DeprovisioningRequest(correlation_id="c", node=NODE, password="hidden")),
        await inbox.put(b"frame 2", renew),
        await inbox.put(b"frame 1", OverrideEnvVars()),
    ]
    assert keys[0] == keys[2]
    assert await inbox.load() == [
        (keys[0], DeprovisioningRequest(correlation_id="c", node=NODE)),
        (keys[1], RenewCertificatesNotification(unit_secrets=UnitSecrets())),
    ]
    assert "hidden" not in str(await db.select("SELECT * FROM aoscore_inbox"))
    await inbox.remove(keys[0])
    assert [key for key, _ in await inbox.load()] == [keys[1]]


async def test_what_cannot_be_read_or_has_ended_many_processes_goes(db: Database) -> None:
    inbox = Inbox(db)
    await inbox.put("frame", OverrideEnvVars())
    await db.execute("INSERT INTO aoscore_inbox VALUES ('x', 'inventedType', '{}', 0), ('y', 'updateState', '{', 0)")
    for _ in range(MAX_TRIES):
        assert [message for _, message in await inbox.load()] == [OverrideEnvVars()]
    assert await inbox.load() == []
    assert await rows(db) == 0


async def test_a_message_is_on_disk_before_its_ack_until_it_has_been_handled(worker: Worker, db: Database) -> None:
    async with FakeCloud(SYSTEM).running() as cloud:
        process = Process(worker, db, cloud.discovery_url)
        async with running(process.link):
            await cloud.connected()
            await acked(cloud, await cloud.send_frame(OVERRIDE))
            process.fails = True
            await acked(cloud, await cloud.send_frame(DEPROVISION))
            assert await rows(db) == 2
            process.may_end.set()
            while await rows(db):
                pass
    assert len(process.begun) == 2 and process.again == []


async def test_the_next_process_takes_up_what_was_not_finished(worker: Worker, db: Database) -> None:
    async with FakeCloud(SYSTEM).running() as cloud:
        first = Process(worker, db, cloud.discovery_url)
        async with running(first.link):
            await cloud.connected()
            for data in (DEPROVISION, OVERRIDE):
                await acked(cloud, await cloud.send_frame(data))
        second = Process(worker, db, cloud.discovery_url)
        async with running(second.link):
            await until(lambda: len(second.again) == 2)
            while await rows(db):
                pass
    assert [type(message) for message in second.again] == [DeprovisioningRequest, OverrideEnvVars]
    assert second.again[0] == DeprovisioningRequest(node=NODE)
    assert second.begun == []


async def test_a_full_disk_keeps_nothing_from_being_done(
    worker: Worker, db: Database, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def full(self: Inbox, frame: bytes | str, message: Message) -> str:
        raise NoSpaceError("database cm.db: no space left")

    monkeypatch.setattr(Inbox, "put", full)
    async with FakeCloud(SYSTEM).running() as cloud:
        process = Process(worker, db, cloud.discovery_url)
        process.may_end.set()
        async with running(process.link):
            await cloud.connected()
            await acked(cloud, await cloud.send_frame(OVERRIDE))
            await until(lambda: process.begun)
    assert "no space left" in caplog.text


async def test_a_connection_that_ends_before_the_message_is_on_disk_gives_no_ack_and_loses_nothing(
    worker: Worker, db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, waits, slow = Inbox.put, asyncio.Event(), True

    async def put(self: Inbox, frame: bytes | str, message: Message) -> str:
        waits.set()
        if slow:
            await asyncio.Event().wait()
        return await original(self, frame, message)

    monkeypatch.setattr(Inbox, "put", put)
    async with FakeCloud(SYSTEM).running() as cloud:
        process = Process(worker, db, cloud.discovery_url, ping_s=0.05)
        async with running(process.link):
            await cloud.connected()
            await cloud.send_frame(OVERRIDE, txn="t")
            await waits.wait()
            await cloud.sockets[-1].close()
            slow = False
            await until(lambda: len(cloud.sockets) == 2)
            assert process.begun == []
            assert [frame for frame in cloud.frames if frame["data"]["messageType"] == "ack"] == []
            await acked(cloud, await cloud.send_frame(OVERRIDE, txn="t"))
            await until(lambda: process.begun)
    assert len(process.begun) == 1
