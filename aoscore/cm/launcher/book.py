"""Every instance the Unit knows, and how requests change them. Pure (cm-orchestration §4.3, §4.9)."""

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import datetime, timedelta

import msgspec

from aoscore.cm.launcher.balancer import Decision, Home, Site, order_key
from aoscore.cm.launcher.ids import IdPool
from aoscore.cm.launcher.model import InstanceRecord, RecordState, RunRequest
from aoscore.common.errors import AosError
from aoscore.common.log import kv
from aoscore.common.types import InstanceIdent, ItemType

_log = logging.getLogger(__name__)

MAX_RECORDS = 256
"""AosCore 9.1 cannot read a database with more (database.md §1.4)."""

Key = tuple[InstanceIdent, str]


def sorted_requests(requests: Iterable[RunRequest]) -> list[RunRequest]:
    """Important ones first, then by item: the order in which they are stored and placed."""
    return sorted(requests, key=lambda one: (-one.priority, one.item_id, one.subject_id))


class InstanceBook:
    """Records by identity and version. Changes are collected until `take_changes`, to be written together."""

    def __init__(self, uids: IdPool[InstanceIdent], gids: IdPool[str]) -> None:
        self._uids = uids
        self._gids = gids
        self._records: dict[Key, InstanceRecord] = {}
        self._changed: set[Key] = set()
        self.failures: dict[Key, AosError] = {}
        """Wanted instances that could not even be recorded."""

    def restore(self, records: Iterable[InstanceRecord]) -> None:
        """Take up stored records; one whose ids are taken by another gets new ones."""
        for record in records:
            if not record.is_component:
                uid_fits = self._uids.restore(record.ident, record.uid)
                gid_fits = self._gids.restore(record.ident.item_id, record.gid)
                if not (uid_fits and gid_fits):
                    _log.error(kv("Stored ids can't be used", instance=record.ident, uid=record.uid, gid=record.gid))
                    uid, gid = self._uids.get(record.ident), self._gids.get(record.ident.item_id)
                    record = msgspec.structs.replace(record, uid=uid, gid=gid)
                    self._changed.add(record.key)
            self._records[record.key] = record

    def active(self) -> list[InstanceRecord]:
        """Records of instances that are wanted and may run, important ones first."""
        records = [record for record in self._records.values() if record.state is RecordState.ACTIVE]
        return sorted(records, key=lambda one: order_key(one.priority, one.ident))

    def sites(self) -> dict[InstanceIdent, Site]:
        """Where active instances are."""
        return {record.ident: record.site for record in self.active() if record.site is not None}

    def idents(self) -> set[InstanceIdent]:
        """Identities with any record."""
        return {ident for ident, _ in self._records}

    def apply_requests(
        self,
        requests: Sequence[RunRequest],
        spots: Mapping[tuple[str, str], Collection[Home]],
        subjects: Collection[str],
        now: datetime,
    ) -> None:
        """Make records for what is wanted and put aside what is not.

        `spots`: for components wanted everywhere, by item id and version, the runtimes that can run them.
        `subjects`: those that are active.
        """
        self.failures = {}
        seen: set[InstanceIdent] = set()
        wanted: set[Key] = set()
        for request in sorted_requests(requests):
            if request.num_instances or request.item_type is not ItemType.COMPONENT:
                homes: dict[int, Home | None] = dict.fromkeys(range(request.num_instances))
            else:
                homes = dict(self._spread(request, spots.get((request.item_id, request.version), ())))
            for index, home in homes.items():
                ident = InstanceIdent(request.item_id, request.subject_id, index, request.item_type)
                if ident not in seen:
                    seen.add(ident)
                    wanted.add((ident, request.version))
                    self._want(request, ident, home, subjects, now)
        for key, record in list(self._records.items()):
            if key not in wanted and record.state is not RecordState.CACHED:
                self._put(_aside(record, RecordState.CACHED, now))

    def _spread(self, request: RunRequest, spots: Collection[Home]) -> dict[int, Home]:
        """An index for each spot; a spot keeps the index it has in any version."""
        known: dict[Home, int] = {}
        for record in self._records.values():
            same = (record.ident.item_id, record.ident.subject_id) == (request.item_id, request.subject_id)
            if same and record.pinned and record.state is not RecordState.CACHED:
                known[Home(record.node_id, record.runtime_id)] = record.ident.instance
        spread = {known[home]: home for home in spots if home in known}
        index = 0
        for home in sorted(set(spots).difference(known), key=lambda one: (one.node_id, one.runtime_id)):
            while index in spread:
                index += 1
            spread[index] = home
        return spread

    def _want(
        self,
        request: RunRequest,
        ident: InstanceIdent,
        home: Home | None,
        subjects: Collection[str],
        now: datetime,
    ) -> None:
        key = (ident, request.version)
        record = self._records.get(key)
        if record is None:
            record = InstanceRecord(ident=ident, version=request.version, created=now)
            if not record.is_component:
                try:
                    uid, gid = self._uids.get(ident), self._gids.get(ident.item_id)
                except AosError as error:
                    self.failures[key] = error
                    return
                record = msgspec.structs.replace(record, uid=uid, gid=gid)
        record = msgspec.structs.replace(
            record,
            is_unit_subject=request.is_unit_subject,
            subject_type=request.subject_type,
            owner_id=request.owner_id,
            labels=request.labels,
            priority=request.priority,
            pinned=home is not None,
        )
        if home is not None:
            record = msgspec.structs.replace(record, node_id=home.node_id, runtime_id=home.runtime_id)
        if request.is_unit_subject and request.subject_id not in subjects:
            self._put(_aside(record, RecordState.DISABLED, now))
        else:
            self._put(msgspec.structs.replace(record, state=RecordState.ACTIVE, cached_since=None))

    def apply_decision(self, record: InstanceRecord, decision: Decision) -> InstanceRecord:
        """Note where an instance runs now; the new record."""
        site = decision.site
        if site == record.site or (site is None and record.pinned):
            return record
        placed = msgspec.structs.replace(
            record,
            node_id=site.node_id if site else "",
            runtime_id=site.runtime_id if site else "",
            manifest_digest=site.manifest_digest if site else record.manifest_digest,
            prev_node_id=record.node_id,
        )
        self._put(placed)
        return placed

    def drop_outdated(self, now: datetime, ttl_s: float) -> None:
        """Forget records that were put aside too long ago, and the oldest of them when there are too many."""
        aside = sorted(
            (record for record in self._records.values() if record.state is not RecordState.ACTIVE),
            key=lambda one: one.cached_since or one.created,
        )
        too_many = len(self._records) - MAX_RECORDS
        for number, record in enumerate(aside):
            if number < too_many or now - (record.cached_since or record.created) >= timedelta(seconds=ttl_s):
                del self._records[record.key]
                self._changed.add(record.key)
        self._uids.keep({ident for ident, _ in self._records})
        self._gids.keep({ident.item_id for ident, _ in self._records})

    def take_changes(self) -> tuple[list[InstanceRecord], list[Key]]:
        """Records to write and keys of records to delete since the last call."""
        changed = [self._records[key] for key in sorted(self._changed) if key in self._records]
        deleted = [key for key in sorted(self._changed) if key not in self._records]
        self._changed.clear()
        return changed, deleted

    def put_back_changes(self, changed: Iterable[InstanceRecord], deleted: Iterable[Key]) -> None:
        """The changes could not be written: they are still to be."""
        self._changed.update(record.key for record in changed)
        self._changed.update(deleted)

    def _put(self, record: InstanceRecord) -> None:
        if self._records.get(record.key) != record:
            self._records[record.key] = record
            self._changed.add(record.key)


def _aside(record: InstanceRecord, state: RecordState, now: datetime) -> InstanceRecord:
    """Not to run; the time counts from the first day aside."""
    return msgspec.structs.replace(
        record,
        state=state,
        node_id="",
        runtime_id="",
        prev_node_id=record.node_id or record.prev_node_id,
        cached_since=record.cached_since or now,
    )
