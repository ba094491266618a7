"""Storage and state of instances, on a real directory with a real database."""

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from aoscore.cm import database
from aoscore.cm.communication.messages import (
    Identity,
    Message,
    NewState,
    StateAcceptance,
    StateRequest,
    StateResult,
    UpdateState,
)
from aoscore.cm.storagestate import files
from aoscore.cm.storagestate.manager import Paths, StorageState
from aoscore.cm.storagestate.store import StateRow, StateStore
from aoscore.common.db import Database, Schema
from aoscore.common.errors import ChecksumError, InvalidArgumentError, NotFoundError, NotSupportedError
from aoscore.common.quota import device_of
from aoscore.common.types import InstanceIdent, ItemType
from tests.support.running import running
from tests.unit.cm.fakes import FakeLink

IDENT = InstanceIdent("item", "subject", 0)
NAMES = {"item": Identity(id="item"), "subject": Identity(id="subject"), "instance": 0}
UID, GID = (5000, 5001) if os.getuid() == 0 else (os.getuid(), os.getgid())
REQUEST = StateRequest(**NAMES, default=False)


def checksum(text: str) -> str:
    return hashlib.sha3_224(text.encode()).hexdigest()


def new_state(text: str) -> NewState:
    return NewState(**NAMES, state_checksum=checksum(text), state=text)


def verdict(text: str, result: StateResult = StateResult.ACCEPTED) -> StateAcceptance:
    return StateAcceptance(**NAMES, checksum=checksum(text), result=result)


def update(text: str) -> UpdateState:
    return UpdateState(**NAMES, state_checksum=checksum(text), state=text)


class Bed:
    def __init__(self, path: Path, db: Database) -> None:
        self.link = FakeLink()
        self.quotas: list[tuple[str, int, int]] = []
        self.alerts: list[str] = []
        self.state_file = path / "states" / "item" / "subject" / "0" / "state.dat"
        self.storage = path / "storages" / "item" / "subject" / "0"
        self.manager = StorageState(
            StateStore(db),
            self.link,
            storage_dir=path / "storages",
            state_dir=path / "states",
            set_quota=lambda where, uid, limit: self.quotas.append((where.name, uid, limit)),
            quiet_s=0.05,
            alert=self.alerts.append,
        )

    async def setup(self, storage: int = 1000, state: int = 1000) -> Paths:
        return await self.manager.setup(IDENT, UID, GID, storage_quota_bytes=storage, state_quota_bytes=state)

    async def sent(self, count: int = 1) -> list[Message]:
        """Wait for messages to the cloud and forget them."""
        async with asyncio.timeout(5):
            while len(self.link.sent) < count:
                await asyncio.sleep(0.01)
        sent, self.link.sent = self.link.sent, []
        return sent

    async def accept_state(self, text: str) -> None:
        self.state_file.write_text(text)
        assert await self.sent() == [new_state(text)]
        await self.manager.on_state_acceptance(verdict(text))


@asynccontextmanager
async def open_bed(path: Path) -> AsyncIterator[Bed]:
    schema = Schema(create=(*database.STORAGE_STATE_TABLES, *database.OWN_TABLES))
    async with Database(path / "cm.db", schema) as db:
        bed = Bed(path, db)
        async with running(bed.manager):
            yield bed


@pytest.fixture
async def bed(tmp_path: Path) -> AsyncIterator[Bed]:
    async with open_bed(tmp_path) as opened:
        yield opened


async def test_first_setup(bed: Bed) -> None:
    assert await bed.setup() == Paths("item/subject/0", "item/subject/0/state.dat")
    assert (bed.storage.stat().st_uid, bed.storage.stat().st_gid) == (UID, GID)
    status = bed.state_file.stat()
    assert (status.st_uid, status.st_gid, status.st_mode & 0o777) == (UID, GID, 0o600)
    assert bed.quotas == [("storages", UID, 2000)]
    assert await bed.sent() == [REQUEST]


async def test_contents_get_the_owner_too_but_links_are_not_followed(bed: Bed, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("x")
    before = outside.stat().st_uid
    (bed.storage / "sub").mkdir(parents=True)
    (bed.storage / "sub" / "file").write_text("x")
    (bed.storage / "link").symlink_to(outside)
    await bed.setup()
    assert (bed.storage / "sub" / "file").stat().st_uid == UID
    assert outside.stat().st_uid == before


async def test_quota_zero_removes(bed: Bed) -> None:
    await bed.setup()
    assert await bed.setup(0, 0) == Paths("", "")
    assert not bed.storage.exists()
    assert not bed.state_file.exists()
    assert bed.quotas[-1] == ("storages", UID, 0)


async def test_change_is_sent_and_accepted(bed: Bed) -> None:
    await bed.setup()
    await bed.sent()
    await bed.accept_state("counter=7")
    assert bed.manager.checksum(IDENT) == "60609f67d6b00a90b85b820af24a9b464803afdc29216bb651c5351d"
    await bed.setup()
    bed.state_file.touch()
    await asyncio.sleep(0.2)
    assert bed.link.sent == []


async def test_replaced_file_is_noticed(bed: Bed) -> None:
    await bed.setup()
    await bed.sent()
    other = bed.state_file.with_name("other")
    other.write_text("b")
    other.rename(bed.state_file)
    assert await bed.sent() == [new_state("b")]


async def test_constant_writing_does_not_postpone_for_ever(bed: Bed) -> None:
    await bed.setup()
    await bed.sent()
    for number in range(40):
        bed.state_file.write_text(f"{number}")
        await asyncio.sleep(0.02)
        if bed.link.sent:
            return
    pytest.fail("a state that is written all the time was never sent")


async def test_rejected_state_is_asked_for(bed: Bed) -> None:
    await bed.setup()
    await bed.sent()
    bed.state_file.write_text("a")
    await bed.sent()
    with pytest.raises(ChecksumError):
        await bed.manager.on_state_acceptance(verdict("other"))
    await bed.manager.on_state_acceptance(verdict("a", StateResult.REJECTED))
    assert await bed.sent() == [REQUEST]


async def test_update_by_the_cloud_keeps_the_inode(bed: Bed) -> None:
    await bed.setup()
    await bed.sent()
    inode = bed.state_file.stat().st_ino
    await bed.manager.on_update_state(update("from cloud"))
    assert bed.state_file.read_text() == "from cloud"
    assert bed.state_file.stat().st_ino == inode
    assert [one.name for one in bed.state_file.parent.iterdir()] == ["state.dat"]
    await asyncio.sleep(0.2)
    assert bed.link.sent == []


async def test_wrong_updates(bed: Bed) -> None:
    with pytest.raises(NotFoundError):
        await bed.manager.on_update_state(update("a"))
    await bed.setup(state=3)
    with pytest.raises(InvalidArgumentError):
        await bed.manager.on_update_state(update("four"))
    with pytest.raises(ChecksumError):
        await bed.manager.on_update_state(UpdateState(**NAMES, state_checksum="00", state="a"))
    assert bed.state_file.read_text() == ""


async def test_unacceptable_content_is_an_alert(bed: Bed) -> None:
    await bed.setup()
    await bed.sent()
    bed.state_file.write_bytes(b"\xff\xfe")
    async with asyncio.timeout(5):
        while not bed.alerts:
            await asyncio.sleep(0.01)
    assert "item:subject:0" in bed.alerts[0]
    bed.state_file.write_bytes(b"x" * (files.MAX_STATE_BYTES + 1))
    await bed.setup()
    assert "larger" in bed.alerts[-1]
    assert bed.link.sent == []


async def test_offline_change_is_repeated_after_the_connection(bed: Bed) -> None:
    await bed.setup()
    await bed.sent()
    await bed.accept_state("old")
    bed.link.connected = False
    bed.state_file.write_text("new")
    await asyncio.sleep(0.3)
    assert bed.link.sent == []
    bed.link.connected = True
    bed.link.connection.publish(True)
    assert await bed.sent() == [new_state("new")]


async def test_change_while_we_were_down_is_sent_not_overwritten(tmp_path: Path) -> None:
    async with open_bed(tmp_path) as bed:
        await bed.setup()
        await bed.sent()
        await bed.accept_state("old")
    bed.state_file.write_text("new")
    async with open_bed(tmp_path) as bed:
        await bed.setup()
        assert await bed.sent() == [new_state("new")]


async def test_lost_state_comes_from_the_cloud(tmp_path: Path) -> None:
    async with open_bed(tmp_path) as bed:
        await bed.setup()
        await bed.sent()
        await bed.accept_state("old")
    bed.state_file.unlink()
    for _ in range(2):
        async with open_bed(tmp_path) as bed:
            await bed.setup()
            assert await bed.sent() == [REQUEST]


async def test_interrupted_write_is_finished(tmp_path: Path) -> None:
    async with open_bed(tmp_path) as bed:
        await bed.setup()
        await bed.sent()
    bed.state_file.write_text("half wri")
    bed.state_file.with_name(".state.dat.new").write_text("whole")
    async with open_bed(tmp_path) as bed:
        await bed.setup()
        assert bed.state_file.read_text() == "whole"
        assert await bed.sent() == [new_state("whole")]


async def test_only_states_in_use_are_followed(bed: Bed) -> None:
    await bed.setup()
    await bed.sent()
    bed.manager.keep_watching({IDENT})
    bed.state_file.write_text("a")
    await bed.sent()
    bed.manager.keep_watching(set())
    bed.state_file.write_text("b")
    await asyncio.sleep(0.2)
    assert bed.link.sent == []


async def test_remove(bed: Bed, tmp_path: Path) -> None:
    await bed.setup()
    await bed.manager.remove(IDENT)
    assert list((tmp_path / "states").iterdir()) == []
    assert list((tmp_path / "storages").iterdir()) == []
    assert bed.manager.checksum(IDENT) == ""


async def test_identity_cannot_lead_out_of_the_root(bed: Bed) -> None:
    evil = InstanceIdent("..", "..", 0)
    with pytest.raises(InvalidArgumentError):
        await bed.manager.setup(evil, UID, GID, storage_quota_bytes=1, state_quota_bytes=1)
    with pytest.raises(InvalidArgumentError):
        await bed.manager.remove(evil)


async def test_missing_quota_support_is_no_obstacle(
    bed: Bed, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(path: Path, uid: int, limit: int) -> None:
        raise NotSupportedError("no quotas here")

    monkeypatch.setattr(bed.manager, "_set_quota", refuse)
    await bed.setup()
    await bed.setup()
    assert caplog.text.count("Disk quotas are not enforced") == 1


async def test_budgets(bed: Bed) -> None:
    budgets = await bed.manager.budgets()
    assert budgets.same_partition
    assert budgets.storage_bytes == budgets.state_bytes > 0


async def test_rows_are_told_apart_by_the_whole_identity_and_a_bad_one_is_passed_over(tmp_path: Path) -> None:
    """An unknown word keeps AosCore 9.1 from starting (database.md §6, item 19)."""
    component = InstanceIdent("item", "subject", 0, ItemType.COMPONENT)
    preinstalled = InstanceIdent("item", "subject", 0, ItemType.SERVICE, True)
    kept = [StateRow(ident, 1, 2, b"a") for ident in (IDENT, component, preinstalled)]
    schema = Schema(create=(*database.STORAGE_STATE_TABLES, *database.OWN_TABLES))
    async with Database(tmp_path / "cm.db", schema) as db:
        store = StateStore(db)
        for row in kept:
            await store.put(row)
        await db.execute("INSERT INTO storagestate VALUES ('x', 'subject', 0, 'gadget', 0, 1, 2, NULL)")
        await db.execute("INSERT INTO storagestate VALUES ('y', 'subject', 0, 'service', 0, NULL, NULL, NULL)")
        nulls = StateRow(InstanceIdent("y", "subject", 0))
        assert {row.ident: row for row in await store.load()} == {row.ident: row for row in (*kept, nulls)}
        await store.remove(component)
        assert {row.ident for row in await store.load()} == {IDENT, preinstalled, nulls.ident}
        assert ("x",) in await db.select("SELECT itemID FROM storagestate")
    async with open_bed(tmp_path) as bed:
        assert bed.manager.checksum(IDENT) == b"a".hex()


def test_device_of_a_path(tmp_path: Path) -> None:
    assert device_of(tmp_path)
    with pytest.raises(NotFoundError):
        (tmp_path / "mounts").write_text("1 1 99:99 / / rw - ext4 /dev/x rw\n")
        device_of(tmp_path, tmp_path / "mounts")
