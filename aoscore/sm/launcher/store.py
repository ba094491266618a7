"""What the launcher keeps over restarts: instances, accepted changes, who ran out of offline time.

`instances` is what AosCore 9.1 keeps too: every instance to start at boot. A change that CM asked for goes to
`aoscore_changes` first and moves to `instances` only when its image is ready and the old instance has ended; so a
process that dies at any moment finds both what ran and what is wanted.
"""

import logging
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

import apsw
import msgspec

from aoscore.common.config import from_json, to_json
from aoscore.common.db import Database
from aoscore.common.errors import AosError
from aoscore.common.types import (
    AlertRulePercents,
    AlertRulePoints,
    AlertRules,
    Duration,
    EnvVar,
    InstanceIdent,
    InstanceInfo,
    ItemType,
    MonitoringParameters,
    PartitionAlertRule,
)

_log = logging.getLogger(__name__)

Changes = Mapping[InstanceIdent, InstanceInfo | None]
"""Per instance what CM wants: its new information, or None to remove it."""

_NS = 1_000_000_000
_IDENT = "itemID = ? AND subjectID = ? AND instance = ? AND type = ? AND preinstalled = ?"
_COLUMNS = (
    "itemID, subjectID, instance, type, preinstalled, version, manifestDigest, runtimeID, ownerID, subjectType, uid, "
    "gid, priority, storagePath, statePath, envVars, monitoringParams"
)
_OFFLINE_SINCE = "offlineSince"


class Stored(msgspec.Struct, frozen=True):
    """Everything the launcher finds at start."""

    instances: dict[InstanceIdent, InstanceInfo]
    changes: dict[InstanceIdent, InstanceInfo | None]
    expired: frozenset[InstanceIdent]
    offline_since: datetime | None


class LauncherStore:
    """Rows of the launcher. Every method is one transaction."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def load(self) -> Stored:
        """Read everything. A row that cannot be read is logged, left in the file and skipped."""
        return await self._database.read(_load)

    async def add_changes(self, changes: Changes) -> None:
        """Remember what CM wants; a later change of the same instance replaces the earlier one.

        CM speaking about an instance also ends its offline expiry.
        """

        def write(connection: apsw.Connection) -> None:
            for ident, info in changes.items():
                connection.execute(
                    "INSERT OR REPLACE INTO aoscore_changes VALUES (?, ?, ?, ?, ?, ?)", (*_key(ident), _text(info))
                )
                connection.execute(f"DELETE FROM aoscore_expired WHERE {_IDENT}", _key(ident))  # noqa: S608

        await self._database.write(write)

    async def apply(self, changes: Changes) -> None:
        """Make changes real: `instances` gets the new row or loses the old one, the change is forgotten."""

        def write(connection: apsw.Connection) -> None:
            for ident, info in changes.items():
                if info is None:
                    connection.execute(f"DELETE FROM instances WHERE {_IDENT}", _key(ident))  # noqa: S608
                else:
                    connection.execute(
                        f"INSERT OR REPLACE INTO instances ({_COLUMNS}) VALUES ({', '.join('?' * 17)})",  # noqa: S608
                        _to_row(info),
                    )
                # CM may have changed its mind since: then the newer change stays.
                connection.execute(
                    f"DELETE FROM aoscore_changes WHERE {_IDENT} AND info = ?",  # noqa: S608
                    (*_key(ident), _text(info)),
                )

        await self._database.write(write)

    async def keep_copy(self) -> None:
        """Keep a copy of the whole database: what CM wanted has been done, and nothing else is to be done."""
        await self._database.keep_copy()

    async def add_expired(self, idents: Iterable[InstanceIdent]) -> None:
        """Remember that these were stopped because the Unit was offline too long."""
        keys = [_key(ident) for ident in idents]

        def write(connection: apsw.Connection) -> None:
            for key in keys:
                connection.execute("INSERT OR REPLACE INTO aoscore_expired VALUES (?, ?, ?, ?, ?)", key)

        await self._database.write(write)

    async def set_offline_since(self, time: datetime | None) -> None:
        """Remember since when the cloud cannot be reached; None when it can."""
        if time is None:
            await self._database.execute("DELETE FROM aoscore_launcher WHERE name = ?", (_OFFLINE_SINCE,))
        else:
            await self._database.execute(
                "INSERT OR REPLACE INTO aoscore_launcher VALUES (?, ?)", (_OFFLINE_SINCE, time.isoformat())
            )


def _load(connection: apsw.Connection) -> Stored:
    instances: dict[InstanceIdent, InstanceInfo] = {}
    for row in connection.execute(f"SELECT {_COLUMNS} FROM instances"):  # noqa: S608
        try:
            info = _from_row(row)
            instances[info.ident] = info
        except (AosError, ValueError) as error:
            _log.error("Stored instance can't be read, skipped: item=%s, subject=%s, error=%s", row[0], row[1], error)
    changes: dict[InstanceIdent, InstanceInfo | None] = {}
    for *key, text in connection.execute("SELECT * FROM aoscore_changes"):
        try:
            changes[_ident(key)] = from_json(str(text), InstanceInfo, what="stored change") if text else None
        except (AosError, ValueError) as error:
            _log.error("Stored change can't be read, skipped: item=%s, subject=%s, error=%s", key[0], key[1], error)
    since = [
        row[0] for row in connection.execute("SELECT value FROM aoscore_launcher WHERE name = ?", (_OFFLINE_SINCE,))
    ]
    return Stored(
        instances=instances,
        changes=changes,
        expired=frozenset(_ident(row) for row in connection.execute("SELECT * FROM aoscore_expired")),
        offline_since=datetime.fromisoformat(str(since[0])).astimezone(UTC) if since else None,
    )


def _text(info: InstanceInfo | None) -> str:
    return "" if info is None else to_json(info).decode()


def _key(ident: InstanceIdent) -> tuple[str, str, int, str, int]:
    return ident.item_id, ident.subject_id, ident.instance, ident.type.value, int(ident.preinstalled)


def _ident(row: Iterable[Any]) -> InstanceIdent:
    item_id, subject_id, instance, item_type, preinstalled = row
    return InstanceIdent(item_id, subject_id, instance, ItemType(item_type), bool(preinstalled))


def _to_row(info: InstanceInfo) -> tuple[Any, ...]:
    return (
        *_key(info.ident),
        info.version,
        info.manifest_digest,
        info.runtime_id,
        info.owner_id,
        # Not on the wire, but AosCore 9.1 fails to read the whole table without a word it knows (database.md §1.3).
        "group",
        info.uid,
        info.gid,
        info.priority,
        info.storage_path,
        info.state_path,
        to_json(info.env_vars).decode(),
        _parameters_to_json(info.monitoring_parameters),
    )


def _from_row(row: tuple[Any, ...]) -> InstanceInfo:
    version, manifest_digest, runtime_id, owner_id, _, uid, gid, priority, storage, state, env, parameters = row[5:]
    return InstanceInfo(
        ident=_ident(row[:5]),
        version=version or "",
        manifest_digest=manifest_digest or "",
        owner_id=owner_id or "",
        runtime_id=runtime_id or "",
        uid=uid or 0,
        gid=gid or 0,
        priority=priority or 0,
        storage_path=storage or "",
        state_path=state or "",
        env_vars=from_json(env, tuple[EnvVar, ...], what="column envVars") if env else (),
        monitoring_parameters=_parameters_from_json(parameters),
    )


class _Rule(msgspec.Struct, rename="camel"):
    """An alert rule as the database has it: thresholds may be fractions (D15), the time is nanoseconds."""

    min_threshold: int | float
    max_threshold: int | float
    min_timeout: int = 0
    name: str | msgspec.UnsetType = msgspec.UNSET


class _Rules(msgspec.Struct, omit_defaults=True):
    ram: _Rule | None = None
    cpu: _Rule | None = None
    partitions: list[_Rule] = []
    download: _Rule | None = None
    upload: _Rule | None = None


class _Parameters(msgspec.Struct, rename="camel", omit_defaults=True):
    alert_rules: _Rules | None = None


def _whole(threshold: float) -> int | float:
    """AosCore 9.1 reads thresholds as integers: write them so where nothing is lost."""
    return int(threshold) if float(threshold).is_integer() else threshold


def _parameters_to_json(parameters: MonitoringParameters | None) -> str:
    if parameters is None:
        return ""
    rules = parameters.alert_rules

    def row(rule: AlertRulePercents | AlertRulePoints | PartitionAlertRule | None) -> _Rule | None:
        if rule is None:
            return None
        name = rule.name if isinstance(rule, PartitionAlertRule) else msgspec.UNSET
        return _Rule(_whole(rule.min_threshold), _whole(rule.max_threshold), round(rule.min_timeout_s * _NS), name)

    if rules is None:
        return to_json(_Parameters()).decode()
    partitions = [part for part in map(row, rules.partitions) if part]
    return to_json(
        _Parameters(_Rules(row(rules.ram), row(rules.cpu), partitions, row(rules.download), row(rules.upload)))
    ).decode()


def _parameters_from_json(text: str | None) -> MonitoringParameters | None:
    if not text:
        return None
    rules = from_json(text, _Parameters, what="column monitoringParams").alert_rules
    if rules is None:
        return MonitoringParameters()

    def percents(rule: _Rule | None) -> AlertRulePercents | None:
        if rule is None:
            return None
        return AlertRulePercents(rule.min_threshold, rule.max_threshold, Duration(rule.min_timeout / _NS))

    def points(rule: _Rule | None) -> AlertRulePoints | None:
        if rule is None:
            return None
        return AlertRulePoints(int(rule.min_threshold), int(rule.max_threshold), Duration(rule.min_timeout / _NS))

    return MonitoringParameters(
        AlertRules(
            percents(rules.ram),
            percents(rules.cpu),
            tuple(
                PartitionAlertRule(
                    rule.name or "", rule.min_threshold, rule.max_threshold, Duration(rule.min_timeout / _NS)
                )
                for rule in rules.partitions
            ),
            points(rules.download),
            points(rules.upload),
        )
    )
