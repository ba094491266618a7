"""Tables of CM's database `cm.db`, schema version 0 (database.md §2).

Names, columns and value forms are those of AosCore 9.1, so that a Unit can change between it and us in place. What we
need beyond is in tables of our own, prefix `aoscore_`, which 9.1 ignores (database.md §5). The functions that read and
write a table live with the module that owns it.
"""

import logging
from typing import Final

from aoscore.cm.config import Config
from aoscore.common.db import Database, Schema
from aoscore.common.log import kv

_log = logging.getLogger(__name__)

SCHEMA_VERSION: Final = 0

_IDENT: Final = "itemID TEXT, subjectID TEXT, instance INTEGER, type TEXT, preinstalled INTEGER"
_IDENT_KEY: Final = "itemID, subjectID, instance, type, preinstalled"

UPDATE_MANAGER_TABLES: Final = (
    "CREATE TABLE IF NOT EXISTS updatemanager (desiredStatus TEXT, updateState TEXT)",
    "INSERT INTO updatemanager SELECT '{}', 'none' WHERE NOT EXISTS (SELECT 1 FROM updatemanager)",
)

IMAGE_MANAGER_TABLES: Final = (
    """CREATE TABLE IF NOT EXISTS imagemanager (
        itemID TEXT, type TEXT, version TEXT, indexDigest TEXT, state TEXT, timestamp INTEGER,
        PRIMARY KEY (itemID, version))""",
)

STORAGE_STATE_TABLES: Final = (
    f"""CREATE TABLE IF NOT EXISTS storagestate (
        {_IDENT}, storageQuota INTEGER, stateQuota INTEGER, stateChecksum BLOB,
        PRIMARY KEY ({_IDENT_KEY}))""",
)

NETWORK_MANAGER_TABLES: Final = (
    "CREATE TABLE IF NOT EXISTS networks (networkID TEXT NOT NULL PRIMARY KEY, subnet TEXT, vlanID INTEGER)",
    """CREATE TABLE IF NOT EXISTS hosts (
        networkID TEXT NOT NULL, nodeID TEXT NOT NULL, ip TEXT,
        PRIMARY KEY (networkID, nodeID),
        FOREIGN KEY (networkID) REFERENCES networks (networkID))""",
    f"""CREATE TABLE IF NOT EXISTS networkmanager_instances (
        {_IDENT}, networkID TEXT, nodeID TEXT, ip TEXT, exposedPorts TEXT, dnsServers TEXT,
        PRIMARY KEY ({_IDENT_KEY}),
        FOREIGN KEY (networkID) REFERENCES networks (networkID),
        FOREIGN KEY (networkID, nodeID) REFERENCES hosts (networkID, nodeID))""",
    """CREATE TABLE IF NOT EXISTS pending_connections (
        requesterItemID TEXT, requesterSubjectID TEXT, requesterInstance INTEGER, requesterType TEXT,
        requesterPreinstalled INTEGER, nodeID TEXT, networkID TEXT, requesterIP TEXT, requesterSubnet TEXT,
        targetItemID TEXT, port TEXT, protocol TEXT)""",
    # AosCore 9.1 leaves doubles. An index against them would make an insert of it fail, and with it the start of an
    # instance that allows a connection twice.
    """DELETE FROM pending_connections WHERE rowid NOT IN (SELECT min(rowid) FROM pending_connections GROUP BY
        requesterItemID, requesterSubjectID, requesterInstance, requesterType, requesterPreinstalled, nodeID, networkID,
        requesterIP, requesterSubnet, targetItemID, port, protocol)""",
)

LAUNCHER_TABLES: Final = (
    f"""CREATE TABLE IF NOT EXISTS launcher_instances (
        {_IDENT}, version TEXT, manifestDigest TEXT, nodeID TEXT, prevNodeID TEXT, runtimeID TEXT,
        uid INTEGER, gid INTEGER, timestamp INTEGER, state TEXT, isUnitSubject INTEGER, subjectType TEXT, ownerID TEXT,
        labels TEXT, priority INTEGER, disableRebalancing INTEGER,
        PRIMARY KEY ({_IDENT_KEY}, version))""",
    """CREATE TABLE IF NOT EXISTS launcher_run_requests (
        itemID TEXT, type TEXT, version TEXT, ownerID TEXT, subjectID TEXT, subjectType TEXT, isUnitSubject INTEGER,
        priority INTEGER, numInstances INTEGER, labels TEXT)""",
    "CREATE TABLE IF NOT EXISTS launcher_override_envvars (itemID TEXT, subjectID TEXT, instance TEXT, variables TEXT)",
)

# What of an update may start, and what waits for its time.
UPDATE_GATE_TABLES: Final = (
    """CREATE TABLE IF NOT EXISTS aoscore_update_gate (
        run TEXT, kind TEXT NOT NULL PRIMARY KEY, since INTEGER, triggered INTEGER, state TEXT)""",
)

# Tables that AosCore 9.1 does not have.
OWN_TABLES: Final = (
    # Why a version failed, and whether trying again is of no use.
    """CREATE TABLE IF NOT EXISTS aoscore_items (
        itemID TEXT, version TEXT, aosCode INTEGER, exitCode INTEGER, message TEXT, final INTEGER,
        PRIMARY KEY (itemID, version))""",
    # Written at an orderly stop, taken at start: blobs whose content need not be checked again.
    """CREATE TABLE IF NOT EXISTS aoscore_verified_blobs (
        digest TEXT NOT NULL PRIMARY KEY, size INTEGER, mtimeNs INTEGER, inode INTEGER)""",
    # What an instance asked for, so that host names and rules survive a restart.
    f"""CREATE TABLE IF NOT EXISTS aoscore_network_wishes (
        {_IDENT}, hosts TEXT, connections TEXT,
        PRIMARY KEY ({_IDENT_KEY}))""",
    # When an instance was put aside; its data are kept for a time from then on.
    f"""CREATE TABLE IF NOT EXISTS aoscore_launcher_cached (
        {_IDENT}, version TEXT, cachedSince INTEGER,
        PRIMARY KEY ({_IDENT_KEY}, version))""",
    # Digest of the start list that a node confirmed last, so that a restart of CM sends nothing anew.
    "CREATE TABLE IF NOT EXISTS aoscore_launcher_confirmed (nodeID TEXT NOT NULL PRIMARY KEY, digest TEXT)",
    # Correlation id of the message that the overridden variables came with.
    "CREATE TABLE IF NOT EXISTS aoscore_launcher_overrides (correlationID TEXT)",
    *UPDATE_GATE_TABLES,
    # Alerts that wait for a connection to the cloud.
    "CREATE TABLE IF NOT EXISTS aoscore_alerts (alert TEXT)",
    # Monitoring data that wait for a connection; what is a node's names no instance.
    f"CREATE TABLE IF NOT EXISTS aoscore_monitoring_rings ({_IDENT}, nodeID TEXT, entries TEXT, dropped INTEGER)",
    # What certificates say, so that they need not be read again.
    """CREATE TABLE IF NOT EXISTS aoscore_certificate_notes (
        sha256 BLOB, topic TEXT, note TEXT, PRIMARY KEY (sha256, topic, note))""",
    # Which node has shown which key (SHA-256 of the public key).
    "CREATE TABLE IF NOT EXISTS aoscore_sm_keys (key BLOB NOT NULL PRIMARY KEY, nodeID TEXT)",
    # Messages that the cloud has not acknowledged yet, in their order.
    "CREATE TABLE IF NOT EXISTS aoscore_outbox (txn TEXT NOT NULL PRIMARY KEY, type TEXT, frame BLOB)",
    # Messages of the cloud that are still to be acted on, in their order.
    """CREATE TABLE IF NOT EXISTS aoscore_inbox (
        frame TEXT NOT NULL PRIMARY KEY, type TEXT, message TEXT, tries INTEGER)""",
    # Checksum of a state that the cloud has not accepted yet.
    f"""CREATE TABLE IF NOT EXISTS aoscore_state_unaccepted (
        {_IDENT}, checksum BLOB,
        PRIMARY KEY ({_IDENT_KEY}))""",
)


LIMITS_OF_9_1: Final = (
    ("networks", 4, "SELECT count(*) FROM networks"),
    ("nodes in one network", 64, "SELECT count(*) FROM hosts GROUP BY networkID"),
    (
        "instances in one network on one node",
        256,
        "SELECT count(*) FROM networkmanager_instances GROUP BY networkID, nodeID",
    ),
    ("pending connections", 4096, "SELECT count(*) FROM pending_connections"),
    ("storages and states", 256, "SELECT count(*) FROM storagestate"),
    ("item versions", 64, "SELECT count(*) FROM imagemanager"),
    ("instances", 256, "SELECT count(*) FROM launcher_instances"),
    ("run requests", 256, "SELECT count(*) FROM launcher_run_requests"),
    ("filters of overridden variables", 256, "SELECT count(*) FROM launcher_override_envvars"),
)
"""AosCore 9.1 cannot start on a database that holds more (database.md §1.4): what, how many, how to count."""


async def warn_beyond_9_1(database: Database) -> None:
    """Says in the log what would keep AosCore 9.1 from taking the database back (database.md §5)."""
    for what, limit, query in LIMITS_OF_9_1:
        found = max((int(row[0]) for row in await database.select(query)), default=0)
        if found > limit:
            _log.warning(kv("AosCore 9.1 can't read this database any more", what=what, found=found, limit=limit))


def schema(config: Config) -> Schema:
    """What `cm.db` must look like.

    AosCore 9.1 refuses to start without its folder of scripts; there is no script for CM, so we go without it.
    """
    scripts = config.migration.migration_path
    return Schema(
        create=(
            *UPDATE_MANAGER_TABLES,
            *IMAGE_MANAGER_TABLES,
            *STORAGE_STATE_TABLES,
            *NETWORK_MANAGER_TABLES,
            *LAUNCHER_TABLES,
            *OWN_TABLES,
        ),
        version=SCHEMA_VERSION,
        migrations=scripts if scripts.is_dir() else None,
        merged=config.migration.merged_migration_path,
        foreign_keys=True,
    )


def open_database(config: Config) -> Database:
    """The database of a CM; enter it as an async context manager before use."""
    return Database(config.database_file, schema(config))
