"""Instance records: requests, ids, cache; and their rows in the database."""

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from aoscore.cm import database
from aoscore.cm.communication.messages import EnvVar, SubjectType
from aoscore.cm.launcher.balancer import Decision, Home, Site
from aoscore.cm.launcher.book import MAX_RECORDS, InstanceBook
from aoscore.cm.launcher.envvars import Override
from aoscore.cm.launcher.ids import IdPool
from aoscore.cm.launcher.model import InstanceRecord, RecordState, RunRequest
from aoscore.cm.launcher.store import LauncherStore
from aoscore.common.db import Database, Schema
from aoscore.common.errors import NotFoundError, OutOfRangeError
from aoscore.common.types import InstanceFilter, InstanceIdent, ItemType

NOW = datetime(2026, 3, 1, tzinfo=UTC)
DAY = timedelta(days=1)


def request(item: str = "s1", version: str = "1.0.0", count: int = 1, **members: object) -> RunRequest:
    return RunRequest(item_id=item, version=version, subject_id="subject", num_instances=count, **members)  # type: ignore[arg-type]


def new_book(records: Iterable[InstanceRecord] = ()) -> InstanceBook:
    book = InstanceBook(IdPool("uid", {5001}.__contains__), IdPool("gid", lambda _: False))
    book.restore(records)
    return book


def apply(book: InstanceBook, *requests: RunRequest, now: datetime = NOW, subjects: Sequence[str] = ()) -> None:
    book.apply_requests(requests, {}, subjects, now)


def put_all_on(book: InstanceBook, node: str) -> None:
    for record in book.active():
        book.apply_decision(record, Decision(Site(node, f"rt-{node}", f"sha256:{record.version}")))


def all_records(book: InstanceBook) -> list[InstanceRecord]:
    book._changed.update(book._records)
    return book.take_changes()[0]


class TestIds:
    def test_lowest_free_number(self) -> None:
        pool: IdPool[str] = IdPool("uid", {5001}.__contains__)
        assert [pool.get(key) for key in ("a", "b", "a", "c")] == [5000, 5002, 5000, 5003]
        pool.keep({"b", "c"})
        assert pool.get("d") == 5000

    def test_restore(self) -> None:
        pool: IdPool[str] = IdPool("uid", lambda _: False)
        assert pool.restore("a", 5007)
        assert pool.restore("a", 5007)
        assert not pool.restore("a", 5008)
        assert not pool.restore("b", 5007)
        assert not pool.restore("b", 4999)
        assert not pool.restore("b", 10000)

    def test_exhausted(self) -> None:
        pool: IdPool[int] = IdPool("uid", lambda _: False)
        for key in range(5000):
            pool.get(key)
        with pytest.raises(OutOfRangeError, match="no free uid"):
            pool.get(5000)


class TestRequests:
    def test_records_in_order_with_ids(self) -> None:
        book = new_book()
        apply(book, request("b", count=2), request("a"), request("z", priority=9))
        assert [(one.ident.item_id, one.ident.instance, one.uid, one.gid) for one in book.active()] == [
            ("z", 0, 5000, 5000),
            ("a", 0, 5002, 5001),
            ("b", 0, 5003, 5002),
            ("b", 1, 5004, 5002),
        ]

    def test_changed_request_changes_the_record(self) -> None:
        """9.1 ignores this for records of the same version."""
        book = new_book()
        apply(book, request())
        before = book.active()[0]
        apply(book, request(priority=7, labels=("x",), owner_id="o"), now=NOW + DAY)
        after = book.active()[0]
        assert (after.priority, after.labels, after.owner_id) == (7, ("x",), "o")
        assert (after.created, after.uid) == (before.created, before.uid)

    def test_new_version_keeps_the_user_and_the_place_is_known(self) -> None:
        book = new_book()
        apply(book, request(count=2))
        put_all_on(book, "n")
        sites = book.sites()
        apply(book, request(version="2.0.0", count=2))
        assert [(one.version, one.uid, one.node_id) for one in book.active()] == [
            ("2.0.0", 5000, ""),
            ("2.0.0", 5002, ""),
        ]
        assert {site.node_id for site in sites.values()} == {"n"}
        aside = [one for one in all_records(book) if one.state is RecordState.CACHED]
        assert [(one.version, one.node_id, one.prev_node_id, one.cached_since) for one in aside] == [
            ("1.0.0", "", "n", NOW)
        ] * 2

    def test_back_from_the_cache(self) -> None:
        book = new_book()
        apply(book, request())
        apply(book)
        assert book.active() == []
        apply(book, request(), now=NOW + DAY)
        (record,) = book.active()
        assert (record.uid, record.cached_since, record.created) == (5000, None, NOW)

    def test_unit_subject(self) -> None:
        book = new_book()
        wanted = request(is_unit_subject=True)
        apply(book, wanted, subjects=["other"])
        assert book.active() == []
        assert all_records(book)[0].state is RecordState.DISABLED
        apply(book, wanted, subjects=["subject"])
        assert len(book.active()) == 1

    def test_nothing_changes_nothing_is_written(self) -> None:
        book = new_book()
        apply(book, request(count=3))
        put_all_on(book, "n")
        assert len(book.take_changes()[0]) == 3
        apply(book, request(count=3), now=NOW + DAY)
        put_all_on(book, "n")
        assert book.take_changes() == ([], [])

    def test_ids_exhausted_is_a_failure_of_the_instance(self) -> None:
        book = InstanceBook(IdPool("uid", lambda number: number > 5000), IdPool("gid", lambda _: False))
        apply(book, request(count=2))
        assert len(book.active()) == 1
        ((ident, version),) = book.failures
        assert (ident.instance, version) == (1, "1.0.0")

    def test_same_instance_wanted_twice(self) -> None:
        book = new_book()
        apply(book, request(version="1.0.0"), request(version="2.0.0"))
        assert [one.version for one in book.active()] == ["1.0.0"]


class TestEverywhereComponents:
    REQUEST = request("c", count=0, item_type=ItemType.COMPONENT)
    SPOTS = (Home("b", "rt-b"), Home("a", "rt-a"))

    def spread(self, book: InstanceBook, *homes: Home, version: str = "1.0.0") -> dict[int, str]:
        wanted = request("c", version, 0, item_type=ItemType.COMPONENT)
        book.apply_requests([wanted], {("c", version): homes}, (), NOW)
        return {one.ident.instance: one.node_id for one in book.active()}

    def test_one_per_spot_in_node_order(self) -> None:
        book = new_book()
        assert self.spread(book, *self.SPOTS) == {0: "a", 1: "b"}
        assert {(one.pinned, one.uid, one.runtime_id) for one in book.active()} == {
            (True, 0, "rt-a"),
            (True, 0, "rt-b"),
        }

    def test_spots_keep_their_index(self) -> None:
        book = new_book()
        self.spread(book, *self.SPOTS)
        assert self.spread(book, *self.SPOTS, Home("0", "rt-0")) == {0: "a", 1: "b", 2: "0"}
        assert self.spread(book, Home("b", "rt-b"), Home("c", "rt-c")) == {0: "c", 1: "b"}

    def test_new_version_keeps_indexes(self) -> None:
        book = new_book()
        self.spread(book, Home("b", "rt-b"))
        assert self.spread(book, *self.SPOTS, version="2.0.0") == {0: "b", 1: "a"}

    def test_service_with_zero_instances_runs_none(self) -> None:
        book = new_book()
        apply(book, request(count=0))
        assert book.active() == []

    def test_failed_placement_keeps_the_pin(self) -> None:
        book = new_book()
        self.spread(book, Home("a", "rt-a"))
        book.apply_decision(book.active()[0], Decision(None, NotFoundError("")))
        assert book.active()[0].node_id == "a"


class TestCache:
    def test_time_counts_from_putting_aside(self) -> None:
        book = new_book()
        apply(book, request())
        later = NOW + 100 * DAY
        apply(book, now=later)
        book.drop_outdated(later + 29 * DAY, ttl_s=30 * 86400)
        assert len(book.idents()) == 1
        apply(book, now=later + 29 * DAY)
        book.drop_outdated(later + 30 * DAY, ttl_s=30 * 86400)
        assert book.idents() == set()
        _, deleted = book.take_changes()
        assert deleted == [(InstanceIdent("s1", "subject", 0), "1.0.0")]
        apply(book, request("other"))
        assert book.active()[0].uid == 5000

    def test_user_stays_while_any_version_is_known(self) -> None:
        book = new_book()
        apply(book, request())
        apply(book, request(version="2.0.0"))
        book.drop_outdated(NOW + 31 * DAY, ttl_s=30 * 86400)
        apply(book, request(version="2.0.0"), request("a"))
        assert {one.ident.item_id: one.uid for one in book.active()} == {"s1": 5000, "a": 5002}

    def test_oldest_go_when_there_are_too_many(self) -> None:
        book = new_book()
        apply(book, request("old"))
        apply(book, request("new", count=MAX_RECORDS - 1), now=NOW)
        apply(book, request("more", count=2), now=NOW + DAY)
        book.drop_outdated(NOW + DAY, ttl_s=30 * 86400)
        items = {ident.item_id for ident in book.idents()}
        assert items == {"new", "more"}
        assert len(book.idents()) == MAX_RECORDS


async def test_rows_survive(tmp_path: Path) -> None:
    schema = Schema(create=(*database.LAUNCHER_TABLES, *database.OWN_TABLES))
    requests = [request(labels=("l1", "l2"), subject_type=SubjectType.USER, is_unit_subject=True, owner_id="o")]
    overrides = [
        Override(InstanceFilter("i", None, 0), (EnvVar(name="A", value="1", ttl=NOW), EnvVar(name="B", value=""))),
        Override(InstanceFilter(), (EnvVar(name="C", value="2"),)),
    ]
    book = new_book()
    apply(book, *requests, request("c", version="2.0.0"), subjects=["subject"])
    put_all_on(book, "n")
    apply(book, *requests, subjects=["subject"])
    book.take_changes()
    records = all_records(book)
    assert {one.state for one in records} == {RecordState.ACTIVE, RecordState.CACHED}
    async with Database(tmp_path / "cm.db", schema) as db:
        store = LauncherStore(db)
        await store.save_requests(requests)
        await store.save_overrides(overrides, "correlation")
        await store.save_records(records, [])
        await store.save_confirmed("n", "digest")
        stored = await store.load()
        assert sorted(stored.records, key=lambda one: one.key) == records
        assert list(stored.requests) == requests
        assert (list(stored.overrides), stored.overrides_id) == (overrides, "correlation")
        assert stored.confirmed == {"n": "digest"}
        rows = await db.select("SELECT variables FROM launcher_override_envvars")
        assert rows[0][0] == '[{"name":"A","value":"1","ttl":1772323200000000000},{"name":"B","value":""}]'
        await store.save_records([], [records[0].key])
        await db.execute("UPDATE launcher_instances SET state = 'nonsense' WHERE itemID = 's1'")
        await store.save_requests([])
        stored = await store.load()
        assert (stored.records, stored.requests) == ((), ())


def test_conflicting_stored_ids_are_replaced() -> None:
    ident = InstanceIdent("x", "subject", 0)
    one = InstanceRecord(ident=InstanceIdent("a", "subject", 0), version="1", uid=5000, gid=5000, created=NOW)
    two = InstanceRecord(ident=ident, version="1", uid=5000, gid=7, created=NOW)
    book = new_book([one, two])
    assert [(record.uid, record.gid) for record in book.active()] == [(5000, 5000), (5002, 5001)]
    assert [record.ident for record in book.take_changes()[0]] == [ident]
