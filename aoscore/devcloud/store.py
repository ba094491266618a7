"""What the cloud knows, in SQLite: Units, their certificates and messages, items and assignments.

`Store` wraps one connection and is made for the time of one transaction: `database.write(lambda c: f(Store(c)))`.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import apsw

from aoscore.common.db import Schema
from aoscore.common.errors import AlreadyExistsError, NotFoundError, WrongStateError
from aoscore.common.semver import SemVer

MESSAGES_KEPT_PER_UNIT = 5000
_SECRETS = frozenset({"password", "secret", "blockKey", "bearerToken"})

SCHEMA = Schema(
    foreign_keys=True,
    create=[
        """CREATE TABLE IF NOT EXISTS units (
            id TEXT PRIMARY KEY, system_id TEXT NOT NULL UNIQUE, model TEXT NOT NULL, status TEXT NOT NULL,
            registration TEXT NOT NULL, unit_status TEXT NOT NULL DEFAULT '{}', unit_config TEXT,
            subject_id TEXT NOT NULL, seen_at TEXT)""",
        """CREATE TABLE IF NOT EXISTS nodes (
            unit_id TEXT NOT NULL REFERENCES units(id) ON DELETE CASCADE, node_id TEXT NOT NULL, type TEXT NOT NULL,
            secret TEXT NOT NULL, desired_state TEXT, PRIMARY KEY (unit_id, node_id))""",
        """CREATE TABLE IF NOT EXISTS certificates (
            serial TEXT PRIMARY KEY, unit_id TEXT NOT NULL REFERENCES units(id) ON DELETE CASCADE,
            node_id TEXT NOT NULL, type TEXT NOT NULL, valid_till TEXT NOT NULL, status TEXT NOT NULL,
            pem TEXT NOT NULL)""",
        """CREATE TABLE IF NOT EXISTS tokens (
            hash TEXT PRIMARY KEY, name TEXT NOT NULL, role TEXT NOT NULL, used INTEGER NOT NULL DEFAULT 0)""",
        """CREATE TABLE IF NOT EXISTS items (
            id TEXT PRIMARY KEY, type TEXT NOT NULL, codename TEXT NOT NULL, title TEXT NOT NULL, hostname TEXT,
            owner_id TEXT NOT NULL, UNIQUE (type, codename))""",
        """CREATE TABLE IF NOT EXISTS versions (
            item_id TEXT NOT NULL REFERENCES items(id) ON DELETE CASCADE, version TEXT NOT NULL,
            index_digest TEXT NOT NULL, min_instances INTEGER NOT NULL, priority INTEGER NOT NULL, labels TEXT NOT NULL,
            default_state TEXT, PRIMARY KEY (item_id, version))""",
        """CREATE TABLE IF NOT EXISTS blobs (
            digest TEXT PRIMARY KEY, media_type TEXT NOT NULL, size INTEGER NOT NULL, sealed_size INTEGER NOT NULL,
            sha3_256 TEXT NOT NULL, key BLOB NOT NULL, iv BLOB NOT NULL, signature BLOB NOT NULL,
            signed_at TEXT NOT NULL)""",
        """CREATE TABLE IF NOT EXISTS subjects (
            id TEXT PRIMARY KEY, label TEXT NOT NULL UNIQUE, reported_by_unit INTEGER NOT NULL)""",
        """CREATE TABLE IF NOT EXISTS assignments (
            item_id TEXT NOT NULL REFERENCES items(id) ON DELETE CASCADE,
            subject_id TEXT NOT NULL REFERENCES subjects(id), version TEXT, instances INTEGER,
            PRIMARY KEY (item_id, subject_id))""",
        """CREATE TABLE IF NOT EXISTS messages (
            number INTEGER PRIMARY KEY AUTOINCREMENT, unit_id TEXT NOT NULL REFERENCES units(id) ON DELETE CASCADE,
            at TEXT NOT NULL, direction TEXT NOT NULL, type TEXT NOT NULL, correlation_id TEXT, data TEXT NOT NULL)""",
        "CREATE INDEX IF NOT EXISTS messages_of_unit ON messages (unit_id, type, number)",
        """CREATE TABLE IF NOT EXISTS violations (
            number INTEGER PRIMARY KEY AUTOINCREMENT, unit_id TEXT NOT NULL REFERENCES units(id) ON DELETE CASCADE,
            at TEXT NOT NULL, type TEXT NOT NULL, problems TEXT NOT NULL, raw TEXT NOT NULL)""",
        """CREATE TABLE IF NOT EXISTS states (
            unit_id TEXT NOT NULL REFERENCES units(id) ON DELETE CASCADE, item_id TEXT NOT NULL,
            subject_id TEXT NOT NULL, instance INTEGER NOT NULL, state TEXT NOT NULL,
            PRIMARY KEY (unit_id, item_id, subject_id, instance))""",
        """CREATE TABLE IF NOT EXISTS alerts (
            number INTEGER PRIMARY KEY AUTOINCREMENT, unit_id TEXT NOT NULL REFERENCES units(id) ON DELETE CASCADE,
            timestamp TEXT NOT NULL, tag TEXT NOT NULL, data TEXT NOT NULL)""",
        """CREATE TABLE IF NOT EXISTS monitoring (
            number INTEGER PRIMARY KEY AUTOINCREMENT, unit_id TEXT NOT NULL REFERENCES units(id) ON DELETE CASCADE,
            timestamp TEXT NOT NULL, source TEXT NOT NULL, data TEXT NOT NULL)""",
        """CREATE TABLE IF NOT EXISTS log_parts (
            unit_id TEXT NOT NULL REFERENCES units(id) ON DELETE CASCADE, correlation_id TEXT NOT NULL,
            node_id TEXT NOT NULL, part INTEGER NOT NULL, parts_count INTEGER NOT NULL, status TEXT NOT NULL,
            error TEXT, content BLOB NOT NULL, PRIMARY KEY (unit_id, correlation_id, node_id, part))""",
    ],
)


@dataclass(frozen=True)
class Unit:
    """A registered Unit. `subject_id`: the group subject that stands for this Unit alone."""

    id: str
    system_id: str
    model: str
    status: str
    unit_status: dict[str, Any]
    unit_config: dict[str, Any] | None
    subject_id: str


@dataclass(frozen=True)
class Node:
    """A node of a Unit as registered. `secret`: its owner password."""

    node_id: str
    type: str
    secret: str
    desired_state: str | None


@dataclass(frozen=True)
class UnitCertificate:
    """A certificate that the cloud issued for a node."""

    serial: str
    node_id: str
    type: str
    valid_till: str
    status: str


@dataclass(frozen=True)
class ItemVersion:
    """One version of an item."""

    item_id: str
    type: str
    codename: str
    owner_id: str
    version: str
    index_digest: str
    min_instances: int
    priority: int
    default_state: str | None
    labels: list[str]


@dataclass(frozen=True)
class Assignment:
    """An item wanted for a subject. `version` None = newest, `instances` None = what the item asks for."""

    item_id: str
    subject_id: str
    version: str | None
    instances: int | None


@dataclass(frozen=True)
class Subject:
    """Whom items are assigned to."""

    id: str
    label: str
    reported_by_unit: bool


@dataclass(frozen=True)
class StoredBlob:
    """A sealed blob."""

    digest: str
    media_type: str
    size: int
    sealed_size: int
    sha3_256: str
    key: bytes
    iv: bytes
    signature: bytes
    signed_at: str


def now_text() -> str:
    """Present time as the wire writes it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def masked(value: Any) -> Any:
    """The value without secrets, for the journal and for people."""
    if isinstance(value, dict):
        return {name: "***" if name in _SECRETS else masked(member) for name, member in value.items()}
    return [masked(member) for member in value] if isinstance(value, list) else value


class Store:
    """Queries and changes inside one transaction."""

    def __init__(self, connection: apsw.Connection) -> None:
        self._connection = connection

    def _rows(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        return list(self._connection.execute(sql, values))

    # Units

    _UNIT = "SELECT id, system_id, model, status, unit_status, unit_config, subject_id FROM units "

    def units(self) -> list[Unit]:
        """All Units by system id."""
        return [self._unit(row) for row in self._rows(self._UNIT + "ORDER BY system_id")]

    def unit(self, name: str) -> Unit:
        """The Unit with this system id or id.

        Raises:
            NotFoundError: there is none.
        """
        rows = self._rows(self._UNIT + "WHERE system_id = ?1 OR id = ?1", name)
        if not rows:
            raise NotFoundError(f"Unit {name} is not registered")
        return self._unit(rows[0])

    def find_unit(self, system_id: str) -> Unit | None:
        """The Unit with this system id, None when there is none."""
        rows = self._rows(self._UNIT + "WHERE system_id = ?", system_id)
        return self._unit(rows[0]) if rows else None

    @staticmethod
    def _unit(row: Sequence[Any]) -> Unit:
        unit_id, system_id, model, status, unit_status, unit_config, subject_id = row
        return Unit(
            unit_id,
            system_id,
            model,
            status,
            json.loads(unit_status),
            json.loads(unit_config) if unit_config else None,
            subject_id,
        )

    def add_unit(self, system_id: str, model: str, registration: dict[str, Any]) -> Unit:
        """Register a Unit, with a group subject of its own. Secrets must not be part of `registration`."""
        subject = self.subject_by_label(system_id) or self.add_subject(system_id, reported_by_unit=False)
        self._rows(
            "INSERT INTO units (id, system_id, model, status, registration, subject_id) VALUES (?, ?, ?, ?, ?, ?)",
            str(uuid4()),
            system_id,
            model,
            "provisioned",
            json.dumps(registration),
            subject.id,
        )
        return self.unit(system_id)

    def remove_unit(self, unit: Unit) -> None:
        """Forget a Unit; its system id may be registered again. Assignments to its subject stay."""
        self._rows("DELETE FROM units WHERE id = ?", unit.id)

    def set_unit_status(self, unit: Unit, status: dict[str, Any]) -> None:
        """Store the merged unit status."""
        self._rows(
            "UPDATE units SET unit_status = ?, seen_at = ? WHERE id = ?", json.dumps(status), now_text(), unit.id
        )

    def set_unit_config(self, unit: Unit, config: dict[str, Any] | None) -> None:
        """Store the unit config that the Unit is to have."""
        self._rows("UPDATE units SET unit_config = ? WHERE id = ?", json.dumps(config) if config else None, unit.id)

    def nodes(self, unit: Unit) -> list[Node]:
        """Registered nodes of a Unit by id."""
        sql = "SELECT node_id, type, secret, desired_state FROM nodes WHERE unit_id = ? ORDER BY node_id"
        return [Node(*row) for row in self._rows(sql, unit.id)]

    def put_node(self, unit: Unit, node_id: str, node_type: str, secret: str) -> None:
        """Add a node or replace its type and owner password."""
        self._rows(
            "INSERT INTO nodes (unit_id, node_id, type, secret) VALUES (?, ?, ?, ?) ON CONFLICT (unit_id, node_id) "
            "DO UPDATE SET type = excluded.type, secret = excluded.secret",
            unit.id,
            node_id,
            node_type,
            secret,
        )

    def set_node_state(self, unit: Unit, node_id: str, state: str | None) -> None:
        """Set the desired state of a node; None leaves the node alone."""
        self._rows("UPDATE nodes SET desired_state = ? WHERE unit_id = ? AND node_id = ?", state, unit.id, node_id)
        if not self._connection.changes():
            raise NotFoundError(f"node {node_id} of Unit {unit.system_id} is not registered")

    def remove_node(self, unit: Unit, node_id: str) -> None:
        """Forget a node with its certificates."""
        for table in ("nodes", "certificates"):
            self._rows(f"DELETE FROM {table} WHERE unit_id = ? AND node_id = ?", unit.id, node_id)  # noqa: S608

    # Certificates

    def put_certificate(self, unit: Unit, certificate: UnitCertificate, pem: str) -> None:
        """Store an issued certificate."""
        self._rows(
            "INSERT INTO certificates (serial, unit_id, node_id, type, valid_till, status, pem) "
            "VALUES (?, ?, ?, ?, ?, ?, ?)",
            certificate.serial,
            unit.id,
            certificate.node_id,
            certificate.type,
            certificate.valid_till,
            certificate.status,
            pem,
        )

    def certificates(self, unit: Unit) -> list[UnitCertificate]:
        """Certificates of a Unit by node and type."""
        sql = (
            "SELECT serial, node_id, type, valid_till, status FROM certificates WHERE unit_id = ? "
            "ORDER BY node_id, type, valid_till"
        )
        return [UnitCertificate(*row) for row in self._rows(sql, unit.id)]

    def set_certificate_status(self, serial: str, status: str) -> None:
        """Change where a certificate stands in its renewal."""
        self._rows("UPDATE certificates SET status = ? WHERE serial = ?", status, serial)

    def drop_certificates(self, unit: Unit, node_id: str, cert_type: str, *, before: str) -> None:
        """Forget the certificates that were issued before one: it replaces them.

        One that was issued later stays: the Unit may use it already, its confirmation being on the way.
        """
        self._rows(
            "DELETE FROM certificates WHERE unit_id = ? AND node_id = ? AND type = ? "
            "AND rowid < (SELECT rowid FROM certificates WHERE serial = ?)",
            unit.id,
            node_id,
            cert_type,
            before,
        )

    def system_id_of_online_certificate(self, serial: str) -> str | None:
        """The Unit that an online certificate was issued for."""
        sql = (
            "SELECT u.system_id FROM certificates c JOIN units u ON u.id = c.unit_id "
            "WHERE c.serial = ? AND c.type = 'online'"
        )
        rows = self._rows(sql, serial)
        return str(rows[0][0]) if rows else None

    # User tokens

    def add_token(self, token_hash: str, name: str, role: str) -> None:
        """Store a one-time token for `aos-keys`, by its hash."""
        self._rows("INSERT INTO tokens (hash, name, role) VALUES (?, ?, ?)", token_hash, name, role)

    def use_token(self, token_hash: str) -> tuple[str, str] | None:
        """Name and role of a token, which is used up by this; None when it is unknown or used."""
        rows = self._rows("UPDATE tokens SET used = 1 WHERE hash = ? AND used = 0 RETURNING name, role", token_hash)
        return (str(rows[0][0]), str(rows[0][1])) if rows else None

    # Items

    _VERSION = (
        "SELECT i.id, i.type, i.codename, i.owner_id, v.version, v.index_digest, v.min_instances, v.priority, "
        "v.default_state, v.labels FROM items i JOIN versions v ON v.item_id = i.id "
    )

    def item_id(self, name: str) -> str:
        """Id of the item with this id, codename or `type/codename`.

        Raises:
            NotFoundError: no such item, or several.
        """
        rows = self._rows("SELECT id FROM items WHERE id = ?1 OR codename = ?1 OR type || '/' || codename = ?1", name)
        if len(rows) != 1:
            raise NotFoundError(f"item {name} does not exist" if not rows else f"item {name} is ambiguous, give its id")
        return str(rows[0][0])

    def service_names(self) -> dict[str, str]:
        """Item ids of services by codename and by host name."""
        rows = self._rows("SELECT id, codename, hostname FROM items WHERE type = 'service'")
        return {name: item_id for item_id, *names in rows for name in names if name}

    def put_item(
        self, item_id: str, item_type: str, codename: str, title: str, hostname: str | None, owner_id: str
    ) -> str:
        """Id of the item: that of the known item with this id or name, else `item_id`, which is then made.

        Raises:
            WrongStateError: the item belongs to somebody else, or id and name are those of two items.
        """
        sql = "SELECT id, owner_id FROM items WHERE id = ? OR (type = ? AND codename = ?)"
        rows = self._rows(sql, item_id, item_type, codename)
        if not rows:
            sql = "INSERT INTO items VALUES (?, ?, ?, ?, ?, ?)"
            self._rows(sql, item_id, item_type, codename, title, hostname, owner_id)
            return item_id
        if len(rows) > 1:
            raise WrongStateError(f"id {item_id} and {item_type} {codename} are different items")
        found, owner = rows[0]
        if owner != owner_id:
            raise WrongStateError(f"{item_type} {codename} belongs to another service provider")
        self._rows("UPDATE items SET title = ?, hostname = ? WHERE id = ?", title, hostname, found)
        return str(found)

    def add_version(
        self,
        item_id: str,
        version: str,
        index_digest: str,
        *,
        min_instances: int,
        priority: int,
        labels: list[str],
        default_state: str | None,
    ) -> None:
        """Store a new version.

        Raises:
            AlreadyExistsError: the item has it already.
        """
        if self._rows("SELECT 1 FROM versions WHERE item_id = ? AND version = ?", item_id, version):
            raise AlreadyExistsError(f"version {version} of item {item_id} exists already")
        self._rows(
            "INSERT INTO versions VALUES (?, ?, ?, ?, ?, ?, ?)",
            item_id,
            version,
            index_digest,
            min_instances,
            priority,
            json.dumps(labels),
            default_state,
        )

    def versions(self, item_id: str | None = None) -> list[ItemVersion]:
        """Versions of one item or of all, oldest first within an item."""
        where = "WHERE i.id = ?1 OR ?1 IS NULL ORDER BY i.type, i.codename"
        rows = self._rows(self._VERSION + where, item_id)
        found = [ItemVersion(*(*row[:-1], json.loads(row[-1]))) for row in rows]
        return sorted(found, key=lambda one: (one.type, one.codename, SemVer(one.version)))

    # Blobs

    def add_blob(self, blob: StoredBlob) -> None:
        """Store a sealed blob in place of an earlier sealing of the same content."""
        self._rows(
            "INSERT OR REPLACE INTO blobs VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            blob.digest,
            blob.media_type,
            blob.size,
            blob.sealed_size,
            blob.sha3_256,
            blob.key,
            blob.iv,
            blob.signature,
            blob.signed_at,
        )

    def blob(self, digest: str) -> StoredBlob | None:
        """A blob by its digest, None when there is none."""
        rows = self._rows("SELECT * FROM blobs WHERE digest = ?", digest)
        return StoredBlob(*rows[0]) if rows else None

    # Subjects and assignments

    def add_subject(self, label: str, *, reported_by_unit: bool) -> Subject:
        """A new subject. One that Units report is known by the name they report."""
        subject_id = label if reported_by_unit else str(uuid4())
        self._rows("INSERT INTO subjects VALUES (?, ?, ?)", subject_id, label, reported_by_unit)
        return Subject(subject_id, label, reported_by_unit)

    def subject_by_label(self, label: str) -> Subject | None:
        """The subject with this label, None when there is none."""
        rows = self._rows("SELECT id, label, reported_by_unit FROM subjects WHERE label = ?", label)
        return Subject(rows[0][0], rows[0][1], bool(rows[0][2])) if rows else None

    def subjects(self) -> list[Subject]:
        """All subjects by label."""
        rows = self._rows("SELECT id, label, reported_by_unit FROM subjects ORDER BY label")
        return [Subject(row[0], row[1], bool(row[2])) for row in rows]

    def assign(self, assignment: Assignment) -> None:
        """Want an item for a subject; replaces an earlier assignment of the two."""
        self._rows(
            "INSERT INTO assignments VALUES (?, ?, ?, ?) ON CONFLICT (item_id, subject_id) "
            "DO UPDATE SET version = excluded.version, instances = excluded.instances",
            assignment.item_id,
            assignment.subject_id,
            assignment.version,
            assignment.instances,
        )

    def unassign(self, item_id: str, subject_id: str) -> bool:
        """Take an item from a subject; whether it was assigned."""
        self._rows("DELETE FROM assignments WHERE item_id = ? AND subject_id = ?", item_id, subject_id)
        return bool(self._connection.changes())

    def assignments(self, subject_ids: Sequence[str]) -> list[Assignment]:
        """Assignments to these subjects, in a fixed order."""
        sql = "SELECT item_id, subject_id, version, instances FROM assignments ORDER BY item_id, subject_id"
        return [Assignment(*row) for row in self._rows(sql) if row[1] in set(subject_ids)]

    # What Units sent

    def add_message(self, unit: Unit, direction: str, data: dict[str, Any]) -> None:
        """Journal of the link: `direction` is "from" or "to". Old entries make room."""
        self._rows(
            "INSERT INTO messages (unit_id, at, direction, type, correlation_id, data) VALUES (?, ?, ?, ?, ?, ?)",
            unit.id,
            now_text(),
            direction,
            data["messageType"],
            data.get("correlationId"),
            json.dumps(masked(data)),
        )
        self._rows(
            "DELETE FROM messages WHERE unit_id = ? AND number <= ?",
            unit.id,
            self._connection.last_insert_rowid() - MESSAGES_KEPT_PER_UNIT,
        )

    def messages(self, unit: Unit, message_type: str | None, after: int, limit: int) -> list[dict[str, Any]]:
        """Journal entries with a number above `after`, oldest first."""
        sql = (
            "SELECT number, at, direction, type, data FROM messages WHERE unit_id = ?1 AND (type = ?2 OR ?2 IS NULL) "
            "AND number > ?3 ORDER BY number LIMIT ?4"
        )
        return [
            {"number": row[0], "at": row[1], "direction": row[2], "type": row[3], "data": json.loads(row[4])}
            for row in self._rows(sql, unit.id, message_type, after, limit)
        ]

    def add_violation(self, unit: Unit, message_type: str, problems: list[str], raw: str) -> None:
        """Remember a message that broke the contract."""
        self._rows(
            "INSERT INTO violations (unit_id, at, type, problems, raw) VALUES (?, ?, ?, ?, ?)",
            unit.id,
            now_text(),
            message_type,
            json.dumps(problems),
            raw[:65536],
        )

    def violations(self, unit: Unit) -> list[dict[str, Any]]:
        """Broken messages, oldest first."""
        sql = "SELECT at, type, problems, raw FROM violations WHERE unit_id = ? ORDER BY number"
        return [
            {"at": row[0], "type": row[1], "problems": json.loads(row[2]), "raw": row[3]}
            for row in self._rows(sql, unit.id)
        ]

    def put_state(self, unit: Unit, item_id: str, subject_id: str, instance: int, state: str) -> None:
        """Store the state of an instance."""
        self._rows(
            "INSERT OR REPLACE INTO states VALUES (?, ?, ?, ?, ?)", unit.id, item_id, subject_id, instance, state
        )

    def state(self, unit: Unit, item_id: str, subject_id: str, instance: int) -> str | None:
        """The last accepted state of an instance, None when there is none."""
        sql = "SELECT state FROM states WHERE unit_id = ? AND item_id = ? AND subject_id = ? AND instance = ?"
        rows = self._rows(sql, unit.id, item_id, subject_id, instance)
        return str(rows[0][0]) if rows else None

    def add_alert(self, unit: Unit, alert: dict[str, Any]) -> None:
        """Store one alert."""
        self._rows(
            "INSERT INTO alerts (unit_id, timestamp, tag, data) VALUES (?, ?, ?, ?)",
            unit.id,
            alert["timestamp"],
            alert["tag"],
            json.dumps(alert),
        )

    def alerts(self, unit: Unit, limit: int) -> list[dict[str, Any]]:
        """The newest alerts, oldest first."""
        sql = "SELECT data FROM alerts WHERE unit_id = ? ORDER BY number DESC LIMIT ?"
        return [json.loads(row[0]) for row in reversed(self._rows(sql, unit.id, limit))]

    def add_sample(self, unit: Unit, source: str, sample: dict[str, Any]) -> None:
        """Store one monitoring sample; `source` is `node NODE_ID` or `instance ITEM/SUBJECT/NUMBER`."""
        self._rows(
            "INSERT INTO monitoring (unit_id, timestamp, source, data) VALUES (?, ?, ?, ?)",
            unit.id,
            sample["timestamp"],
            source,
            json.dumps(sample),
        )

    def samples(self, unit: Unit, limit: int) -> list[dict[str, Any]]:
        """The newest samples, oldest first."""
        sql = "SELECT source, data FROM monitoring WHERE unit_id = ? ORDER BY number DESC LIMIT ?"
        return [{"source": source, **json.loads(data)} for source, data in reversed(self._rows(sql, unit.id, limit))]

    def put_log_part(self, unit: Unit, log: dict[str, Any], content: bytes) -> None:
        """Store one part of a log; a repeated part replaces itself."""
        self._rows(
            "INSERT OR REPLACE INTO log_parts VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            unit.id,
            log["correlationId"],
            log["node"]["codename"],
            log["part"],
            log["partsCount"],
            log["status"],
            json.dumps(log["errorInfo"]) if "errorInfo" in log else None,
            content,
        )

    def log_parts(self, unit: Unit, correlation_id: str) -> list[tuple[str, int, int, str, str | None, bytes]]:
        """Parts as (node id, part, parts count, status, error, content), by node and part."""
        sql = (
            "SELECT node_id, part, parts_count, status, error, content FROM log_parts "
            "WHERE unit_id = ? AND correlation_id = ? ORDER BY node_id, part"
        )
        return [(row[0], row[1], row[2], row[3], row[4], row[5]) for row in self._rows(sql, unit.id, correlation_id)]
