"""Launcher tables (database.md §2.5)."""

import logging
from collections.abc import Iterable, Sequence
from typing import Any

import apsw
import msgspec

from aoscore.cm.communication.messages import EnvVar, SubjectType
from aoscore.cm.launcher.envvars import Override
from aoscore.cm.launcher.model import InstanceRecord, RecordState, RunRequest
from aoscore.cm.rows import EPOCH, from_ns, ident_of, ident_values, json_text, to_ns
from aoscore.common.aio import log_and_continue
from aoscore.common.db import Database
from aoscore.common.types import InstanceFilter, InstanceIdent, ItemType

_log = logging.getLogger(__name__)

_DELETE_INSTANCE = (
    "DELETE FROM launcher_instances WHERE itemID = ? AND subjectID = ? AND instance = ? AND type = ?"
    " AND preinstalled = ? AND version = ?",
    "DELETE FROM aoscore_launcher_cached WHERE itemID = ? AND subjectID = ? AND instance = ? AND type = ?"
    " AND preinstalled = ? AND version = ?",
)
_SELECT_OVERRIDES_ID = "SELECT correlationID FROM aoscore_launcher_overrides"
_SELECT_CONFIRMED = "SELECT nodeID, digest FROM aoscore_launcher_confirmed"


class Stored(msgspec.Struct, frozen=True):
    """All that was stored."""

    records: tuple[InstanceRecord, ...]
    requests: tuple[RunRequest, ...]
    overrides: tuple[Override, ...]
    overrides_id: str
    """Correlation id of the message that the overrides came with."""
    confirmed: dict[str, str]
    """Digest of the start list that each node confirmed last."""


class LauncherStore:
    """Reads and writes the tables. A row that cannot be read is logged and left as it is."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def load(self) -> Stored:
        """Everything stored."""
        return await self._database.read(
            lambda connection: Stored(
                tuple(_load_records(connection)),
                tuple(_load_requests(connection)),
                tuple(_load_overrides(connection)),
                next((str(row[0]) for row in connection.execute(_SELECT_OVERRIDES_ID)), ""),
                {str(row[0]): str(row[1]) for row in connection.execute(_SELECT_CONFIRMED)},
            )
        )

    async def save_requests(self, requests: Sequence[RunRequest]) -> None:
        """Replace what is wanted; the order is kept."""
        await self._database.write(lambda connection: _save_requests(connection, requests))

    async def save_records(
        self, changed: Sequence[InstanceRecord], deleted: Sequence[tuple[InstanceIdent, str]]
    ) -> None:
        """Write and delete records, all or nothing."""
        await self._database.write(lambda connection: _save_records(connection, changed, deleted))

    async def save_overrides(self, overrides: Sequence[Override], correlation_id: str) -> None:
        """Replace all overridden variables."""
        await self._database.write(lambda connection: _save_overrides(connection, overrides, correlation_id))

    async def save_confirmed(self, node_id: str, digest: str) -> None:
        """Note what a node confirmed."""
        await self._database.execute(
            "INSERT OR REPLACE INTO aoscore_launcher_confirmed (nodeID, digest) VALUES (?, ?)", (node_id, digest)
        )


def _load_records(connection: apsw.Connection) -> Iterable[InstanceRecord]:
    cached = {
        tuple(row[:6]): row[6]
        for row in connection.execute(
            "SELECT itemID, subjectID, instance, type, preinstalled, version, cachedSince FROM aoscore_launcher_cached"
        )
    }
    for row in connection.execute(
        "SELECT itemID, subjectID, instance, type, preinstalled, version, manifestDigest, nodeID, prevNodeID,"
        " runtimeID, uid, gid, timestamp, state, isUnitSubject, subjectType, ownerID, labels, priority,"
        " disableRebalancing FROM launcher_instances"
    ):
        with log_and_continue(_log, f"Can't restore instance {row[0]}:{row[1]}:{row[2]}"):
            yield InstanceRecord(
                ident=ident_of(row),
                version=row[5],
                manifest_digest=row[6] or "",
                node_id=row[7] or "",
                prev_node_id=row[8] or "",
                runtime_id=row[9] or "",
                uid=row[10] or 0,
                gid=row[11] or 0,
                created=from_ns(row[12]) or EPOCH,
                state=RecordState(row[13]),
                is_unit_subject=bool(row[14]),
                subject_type=SubjectType(row[15] or SubjectType.GROUP),
                owner_id=row[16] or "",
                labels=_texts(row[17]),
                priority=row[18] or 0,
                pinned=bool(row[19]),
                cached_since=from_ns(cached.get(tuple(row[:6]))),
            )


def _load_requests(connection: apsw.Connection) -> Iterable[RunRequest]:
    for row in connection.execute(
        "SELECT itemID, type, version, ownerID, subjectID, subjectType, isUnitSubject, priority, numInstances, labels"
        " FROM launcher_run_requests ORDER BY rowid"
    ):
        with log_and_continue(_log, f"Can't restore run request of {row[0]}"):
            yield RunRequest(
                item_id=row[0],
                item_type=ItemType(row[1]),
                version=row[2] or "",
                owner_id=row[3] or "",
                subject_id=row[4],
                subject_type=SubjectType(row[5] or SubjectType.GROUP),
                is_unit_subject=bool(row[6]),
                priority=row[7] or 0,
                num_instances=row[8] or 0,
                labels=_texts(row[9]),
            )


class _Variable(msgspec.Struct, frozen=True, omit_defaults=True):
    name: str
    value: str
    ttl: int | None = None
    """Nanoseconds since 1970."""


def _load_overrides(connection: apsw.Connection) -> Iterable[Override]:
    for row in connection.execute("SELECT itemID, subjectID, instance, variables FROM launcher_override_envvars"):
        with log_and_continue(_log, f"Can't restore variables for {row[0]}:{row[1]}:{row[2]}"):
            variables = msgspec.json.decode(row[3], type=tuple[_Variable, ...])
            yield Override(
                InstanceFilter(row[0] or None, row[1] or None, int(row[2]) if row[2] else None),
                tuple(EnvVar(name=one.name, value=one.value, ttl=from_ns(one.ttl)) for one in variables),
            )


def _save_requests(connection: apsw.Connection, requests: Sequence[RunRequest]) -> None:
    connection.execute("DELETE FROM launcher_run_requests")
    connection.executemany(
        "INSERT INTO launcher_run_requests (itemID, type, version, ownerID, subjectID, subjectType, isUnitSubject,"
        " priority, numInstances, labels) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        [
            (
                one.item_id,
                one.item_type.value,
                one.version,
                one.owner_id,
                one.subject_id,
                one.subject_type.value,
                int(one.is_unit_subject),
                one.priority,
                one.num_instances,
                json_text(one.labels),
            )
            for one in requests
        ],
    )


def _save_records(
    connection: apsw.Connection, changed: Sequence[InstanceRecord], deleted: Sequence[tuple[InstanceIdent, str]]
) -> None:
    for ident, version in [*deleted, *(record.key for record in changed)]:
        for statement in _DELETE_INSTANCE:
            connection.execute(statement, (*ident_values(ident), version))
    for record in changed:
        connection.execute(
            "INSERT INTO launcher_instances (itemID, subjectID, instance, type, preinstalled, version, manifestDigest,"
            " nodeID, prevNodeID, runtimeID, uid, gid, timestamp, state, isUnitSubject, subjectType, ownerID, labels,"
            " priority, disableRebalancing) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            _record_values(record),
        )
        if record.cached_since is not None:
            connection.execute(
                "INSERT INTO aoscore_launcher_cached (itemID, subjectID, instance, type, preinstalled, version,"
                " cachedSince) VALUES (?, ?, ?, ?, ?, ?, ?)",
                (*ident_values(record.ident), record.version, to_ns(record.cached_since)),
            )


def _record_values(record: InstanceRecord) -> tuple[Any, ...]:
    return (
        *ident_values(record.ident),
        record.version,
        record.manifest_digest,
        record.node_id,
        record.prev_node_id,
        record.runtime_id,
        record.uid,
        record.gid,
        to_ns(record.created),
        record.state.value,
        int(record.is_unit_subject),
        record.subject_type.value,
        record.owner_id,
        json_text(record.labels),
        record.priority,
        int(record.pinned),
    )


def _save_overrides(connection: apsw.Connection, overrides: Sequence[Override], correlation_id: str) -> None:
    connection.execute("DELETE FROM aoscore_launcher_overrides")
    connection.execute("INSERT INTO aoscore_launcher_overrides (correlationID) VALUES (?)", (correlation_id,))
    connection.execute("DELETE FROM launcher_override_envvars")
    for override in overrides:
        wanted = override.filter
        variables = [_Variable(one.name, one.value, to_ns(one.ttl) or None) for one in override.variables]
        instance = "" if wanted.instance is None else str(wanted.instance)
        connection.execute(
            "INSERT INTO launcher_override_envvars (itemID, subjectID, instance, variables) VALUES (?, ?, ?, ?)",
            (wanted.item_id or "", wanted.subject_id or "", instance, json_text(variables)),
        )


def _texts(text: str | None) -> tuple[str, ...]:
    return msgspec.json.decode(text, type=tuple[str, ...]) if text else ()
