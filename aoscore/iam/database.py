"""IAM's database, the file that AosCore 9.1 has too (iam.md §11, database.md §4)."""

import asyncio
import logging
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Self

import apsw
import msgspec

from aoscore.common.aio import log_and_continue
from aoscore.common.config import from_json_caseless, to_json
from aoscore.common.db import Database, Schema, set_foreign_aside
from aoscore.common.types import (
    ArchInfo,
    CertInfo,
    CPUInfo,
    ErrorInfo,
    NodeInfo,
    NodeState,
    OSInfo,
    PartitionInfo,
)
from aoscore.iam.certhandler.record import CertRecord

_log = logging.getLogger(__name__)

FILE_NAME = "iamanager.db"
_VERSION = 1
_CREATE = (
    "CREATE TABLE IF NOT EXISTS certificates (type TEXT NOT NULL, issuer BLOB NOT NULL, serial BLOB NOT NULL, "
    "certURL TEXT, keyURL TEXT, notAfter TIMESTAMP, PRIMARY KEY (issuer, serial))",
    "CREATE TABLE IF NOT EXISTS nodeinfo (id TEXT NOT NULL PRIMARY KEY, info TEXT)",
    # Tables of our own, which AosCore 9.1 does not look at (database.md §5).
    "CREATE TABLE IF NOT EXISTS aoscore_nodekeys (key BLOB NOT NULL PRIMARY KEY, node TEXT NOT NULL)",
    "CREATE TABLE IF NOT EXISTS aoscore_nodeseen (id TEXT NOT NULL PRIMARY KEY, seen INTEGER NOT NULL)",
    "CREATE TABLE IF NOT EXISTS aoscore_unfinished (operation TEXT NOT NULL PRIMARY KEY)",
)
_MIGRATIONS = Path(__file__).with_name("migration")
_MAX_KEYS_OF_NODE = 64
_PIN_VALUE = re.compile(r"pin-value=(.*)$", re.DOTALL)
_PIN_SOURCE = re.compile(r"pin-source=(.*)$", re.DOTALL)
_EPOCH = datetime.fromtimestamp(0, UTC)


class IamDatabase:
    """Certificates and known Nodes. Use as an async context manager.

    `pin_files` are the PIN files of all tokens; they matter only for a file of a version before 9.1. `merged` is the
    directory in which migration scripts are kept for the way back (configuration key mergedMigrationPath).
    """

    def __init__(self, working_dir: Path, pin_files: Sequence[Path] = (), merged: Path | None = None) -> None:
        def convert(connection: apsw.Connection, up: bool) -> None:
            pins = {str(path): path.read_text().rstrip("\n") for path in pin_files if path.is_file()}
            convert_pins(connection, pins, up=up)

        self._path = working_dir / FILE_NAME
        self._merged = merged
        self._database = Database(
            self._path,
            Schema(create=_CREATE, version=_VERSION, migrations=_MIGRATIONS, merged=merged, convert={1: convert}),
        )

    async def __aenter__(self) -> Self:
        await asyncio.to_thread(set_foreign_aside, self._path, self._merged)
        await self._database.__aenter__()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._database.__aexit__(*error)

    async def certificates(self, cert_type: str) -> list[CertRecord]:
        """All certificates of a type."""
        rows = await self._database.select(
            "SELECT issuer, serial, certURL, keyURL, notAfter FROM certificates WHERE type = ?", (cert_type,)
        )
        return [
            CertRecord(
                CertInfo(cert_type, cert_url or "", key_url or "", bytes(serial).hex(), bytes(issuer)),
                _EPOCH + timedelta(microseconds=(not_after_ns or 0) // 1000),
            )
            for issuer, serial, cert_url, key_url, not_after_ns in rows
        ]

    async def replace_certificates(self, cert_type: str, records: Sequence[CertRecord]) -> None:
        """Make the rows of a type these. One transaction, and no write when nothing differs."""
        if sorted(await self.certificates(cert_type), key=_row_key) == sorted(records, key=_row_key):
            return

        def replace(connection: apsw.Connection) -> None:
            connection.execute("DELETE FROM certificates WHERE type = ?", (cert_type,))
            for record in records:
                info = record.info
                connection.execute(
                    "INSERT OR REPLACE INTO certificates (type, issuer, serial, certURL, keyURL, notAfter) "
                    "VALUES (?, ?, ?, ?, ?, ?)",
                    (
                        info.type,
                        info.issuer,
                        bytes.fromhex(info.serial),
                        info.cert_url,
                        info.key_url,
                        record.not_after_ns,
                    ),
                )

        await self._database.write(replace)

    async def nodes(self) -> list[NodeInfo]:
        """Known Nodes, in the order in which they became known. A row that can't be read is logged and left out."""
        nodes = []
        for node_id, text in await self._database.select("SELECT id, info FROM nodeinfo ORDER BY rowid"):
            with log_and_continue(_log, f"Can't read stored Node info of {node_id}"):
                nodes.append(node_from_json(node_id, text))
        return nodes

    async def save_node(self, node: NodeInfo) -> None:
        """Remember a Node; nothing is written when it is known just so."""
        await self._database.execute(
            "INSERT INTO nodeinfo (id, info) VALUES (?, ?) "
            "ON CONFLICT (id) DO UPDATE SET info = excluded.info WHERE info IS NOT excluded.info",
            (node.node_id, node_to_json(node)),
        )

    async def remove_node(self, node_id: str) -> None:
        """Forget a Node; fine when it is not known."""

        def remove(connection: apsw.Connection) -> None:
            connection.execute("DELETE FROM nodeinfo WHERE id = ?", (node_id,))
            connection.execute("DELETE FROM aoscore_nodeseen WHERE id = ?", (node_id,))

        await self._database.write(remove)

    async def nodes_seen(self) -> dict[str, datetime]:
        """When each Node was connected last, as far as that was noted."""
        rows = await self._database.select("SELECT id, seen FROM aoscore_nodeseen")
        return {node_id: datetime.fromtimestamp(seen_s, UTC) for node_id, seen_s in rows}

    async def save_node_seen(self, node_id: str, seen: datetime) -> None:
        """Note when a Node was connected."""
        await self._database.execute(
            "INSERT OR REPLACE INTO aoscore_nodeseen (id, seen) VALUES (?, ?)", (node_id, int(seen.timestamp()))
        )

    async def node_keys(self) -> dict[bytes, str]:
        """Nodes by the digests of their public keys."""
        return {bytes(key): node for key, node in await self._database.select("SELECT key, node FROM aoscore_nodekeys")}

    async def save_node_key(self, key: bytes, node_id: str) -> list[bytes]:
        """Note the key of a Node. Only its newest keys are kept: the digests of those that were given up."""

        def save(connection: apsw.Connection) -> list[bytes]:
            connection.execute("INSERT OR REPLACE INTO aoscore_nodekeys (key, node) VALUES (?, ?)", (key, node_id))
            old = "SELECT key FROM aoscore_nodekeys WHERE node = ? ORDER BY rowid DESC LIMIT -1 OFFSET ?"
            given_up = [bytes(row[0]) for row in connection.execute(old, (node_id, _MAX_KEYS_OF_NODE))]
            for digest in given_up:
                connection.execute("DELETE FROM aoscore_nodekeys WHERE key = ?", (digest,))
            return given_up

        return await self._database.write(save)

    async def remove_node_keys(self, node_id: str) -> None:
        """Forget all keys of a Node."""
        await self._database.execute("DELETE FROM aoscore_nodekeys WHERE node = ?", (node_id,))

    async def unfinished(self) -> frozenset[str]:
        """Operations that were begun and neither done nor undone."""
        return frozenset(row[0] for row in await self._database.select("SELECT operation FROM aoscore_unfinished"))

    async def begin(self, operation: str) -> None:
        """Note that an operation has begun, before its first step."""
        await self._database.execute("INSERT OR IGNORE INTO aoscore_unfinished (operation) VALUES (?)", (operation,))

    async def end(self, operation: str) -> None:
        """Note that an operation is done, or undone, as a whole."""
        await self._database.execute("DELETE FROM aoscore_unfinished WHERE operation = ?", (operation,))


def _row_key(record: CertRecord) -> tuple[bytes, str]:
    return record.info.issuer, record.info.serial


def convert_pins(connection: apsw.Connection, pins: Mapping[str, str], *, up: bool) -> None:
    """Step between versions 0 and 1: PINs inside of URLs become the names of their files, or back.

    `pins` are PINs by file name. A URL without a PIN part, or with a PIN that no file holds, stays as it is
    (AosCore 9.1 makes it NULL); the comparison with the key storage repairs it.
    """
    by_pin = {pin: path for path, pin in pins.items()}

    def convert(url: str | None) -> str | None:
        pattern, known, word = (_PIN_VALUE, by_pin, "pin-source=") if up else (_PIN_SOURCE, pins, "pin-value=")
        match = pattern.search(url or "")
        if url is None or match is None or match[1] not in known:
            return url
        return url[: match.start()] + word + known[match[1]]

    # The table may be missing in a file that was left by a start that failed half-way.
    connection.execute(_CREATE[0])
    for rowid, cert_url, key_url in list(connection.execute("SELECT rowid, certURL, keyURL FROM certificates")):
        connection.execute(
            "UPDATE certificates SET certURL = ?, keyURL = ? WHERE rowid = ?",
            (convert(cert_url), convert(key_url), rowid),
        )


class _Json(msgspec.Struct, frozen=True, rename="camel", omit_defaults=True):
    """Base of the stored form; order and names of members are those of AosCore 9.1."""


class _Identity(_Json, frozen=True):
    codename: str
    title: str = ""


class _Arch(_Json, frozen=True):
    architecture: str
    variant: str = ""


class _Cpu(_Json, frozen=True, kw_only=True):
    model_name: str = ""
    total_num_cores: int = 0
    total_num_threads: int = 0
    arch_info: _Arch
    max_dmips: int = 0


class _Os(_Json, frozen=True):
    os: str
    version: str = ""
    features: tuple[str, ...] = ()


class _Partition(_Json, frozen=True):
    name: str
    path: str = ""
    types: tuple[str, ...] = ()
    total_size: int = 0


class _Error(_Json, frozen=True):
    aos_code: int = 0
    exit_code: int = 0
    message: str = ""


class _Node(_Json, frozen=True, kw_only=True, omit_defaults=False):
    identity: _Identity
    node_group_subject: _Identity
    max_dmips: int = 0
    physical_ram: int | msgspec.UnsetType = msgspec.UNSET
    total_ram: int = 0
    os_info: _Os
    cpus: tuple[_Cpu, ...] | msgspec.UnsetType = msgspec.UNSET
    attrs: dict[str, str] | msgspec.UnsetType = msgspec.UNSET
    partitions: tuple[_Partition, ...] | msgspec.UnsetType = msgspec.UNSET
    state: NodeState
    is_connected: bool = False
    error_info: _Error | msgspec.UnsetType = msgspec.UNSET


def node_to_json(node: NodeInfo) -> str:
    """The stored form of a Node."""
    stored = _Node(
        identity=_Identity(codename=node.node_id, title=node.title),
        node_group_subject=_Identity(codename=node.node_type),
        max_dmips=node.max_dmips,
        physical_ram=node.physical_ram or msgspec.UNSET,
        total_ram=node.total_ram,
        os_info=_Os(os=node.os_info.os, version=node.os_info.version, features=node.os_info.features),
        cpus=tuple(
            _Cpu(
                model_name=cpu.model_name,
                total_num_cores=cpu.num_cores,
                total_num_threads=cpu.num_threads,
                arch_info=_Arch(architecture=cpu.arch_info.architecture, variant=cpu.arch_info.variant),
                max_dmips=cpu.max_dmips,
            )
            for cpu in node.cpus
        )
        or msgspec.UNSET,
        attrs=node.attrs or msgspec.UNSET,
        partitions=tuple(
            _Partition(name=part.name, path=part.path, types=part.types, total_size=part.total_size)
            for part in node.partitions
        )
        or msgspec.UNSET,
        state=node.state,
        error_info=_Error(aos_code=node.error.aos_code, exit_code=node.error.exit_code, message=node.error.message)
        if node.error
        else msgspec.UNSET,
    )
    return to_json(stored).decode()


def node_from_json(node_id: str, text: str) -> NodeInfo:
    """A Node from its stored form. Raises InvalidArgumentError naming Node and member."""
    stored = from_json_caseless(text, _Node, what=f"stored info of node {node_id}")
    error = stored.error_info
    return NodeInfo(
        node_id=node_id,
        node_type=stored.node_group_subject.codename,
        title=stored.identity.title,
        max_dmips=stored.max_dmips,
        total_ram=stored.total_ram,
        physical_ram=stored.physical_ram or 0,
        os_info=OSInfo(stored.os_info.os, stored.os_info.version, stored.os_info.features),
        cpus=tuple(
            CPUInfo(
                cpu.model_name,
                cpu.total_num_cores,
                cpu.total_num_threads,
                ArchInfo(cpu.arch_info.architecture, cpu.arch_info.variant),
                cpu.max_dmips,
            )
            for cpu in stored.cpus or ()
        ),
        partitions=tuple(
            PartitionInfo(part.name, part.types, part.total_size, part.path) for part in stored.partitions or ()
        ),
        attrs=stored.attrs or {},
        state=stored.state,
        error=ErrorInfo(error.aos_code, error.exit_code, error.message) if error else None,
    )
