"""The tables of `servicemanager.db`, schema version 5 (database.md §3), and how the file is opened.

AosCore 9.1 reads and writes the same file, so the shared tables stay as they are; what only we keep is in tables with
the prefix `aoscore_`, which it ignores. The code that reads and writes rows lives with the part that owns them.
"""

from pathlib import Path

from aoscore.common.db import Database, Schema, set_foreign_aside

VERSION = 5

_IDENT = """itemID TEXT NOT NULL, subjectID TEXT NOT NULL, instance INTEGER NOT NULL,
    type TEXT NOT NULL DEFAULT 'service', preinstalled INTEGER NOT NULL DEFAULT 0"""
_IDENT_KEY = "PRIMARY KEY (itemID, subjectID, instance, type, preinstalled)"

_CREATE = (
    "CREATE TABLE IF NOT EXISTS config (cursor TEXT)",
    "INSERT INTO config (cursor) SELECT '' WHERE NOT EXISTS (SELECT 1 FROM config)",
    """CREATE TABLE IF NOT EXISTS network (
        networkID TEXT NOT NULL PRIMARY KEY, ip TEXT, subnet TEXT, vlanID INTEGER, vlanIfName TEXT,
        bridgeIfName TEXT)""",
    "CREATE TABLE IF NOT EXISTS trafficmonitor (chain TEXT NOT NULL PRIMARY KEY, time TIMESTAMP, value INTEGER)",
    """CREATE TABLE IF NOT EXISTS instancenetwork (
        instanceID TEXT NOT NULL, networkID TEXT NOT NULL, networkConfig TEXT, allocatedParams TEXT, hostIfName TEXT,
        PRIMARY KEY (instanceID, networkID))""",
    """CREATE TABLE IF NOT EXISTS items (
        itemID TEXT, type TEXT, version TEXT, manifestDigest TEXT, state TEXT, timestamp INTEGER,
        PRIMARY KEY (itemID, type, version))""",
    f"""CREATE TABLE IF NOT EXISTS instances (
        {_IDENT}, version TEXT, manifestDigest TEXT, runtimeID TEXT, ownerID TEXT, subjectType TEXT, uid INTEGER,
        gid INTEGER, priority INTEGER, storagePath TEXT, statePath TEXT, envVars TEXT, monitoringParams TEXT,
        {_IDENT_KEY})""",
    # Wanted by CM and not applied yet: the InstanceInfo as JSON, empty text = to be removed.
    f"CREATE TABLE IF NOT EXISTS aoscore_changes ({_IDENT}, info TEXT NOT NULL, {_IDENT_KEY})",
    # Stopped because their offline time ran out; they wait for CM to send them again.
    f"CREATE TABLE IF NOT EXISTS aoscore_expired ({_IDENT}, {_IDENT_KEY})",
    # Small facts of the launcher by name.
    "CREATE TABLE IF NOT EXISTS aoscore_launcher (name TEXT NOT NULL PRIMARY KEY, value TEXT NOT NULL)",
)


def open_database(path: Path, migrations: Path, merged: Path) -> Database:
    """The database, to be entered as a context manager. A file of the former Go generation is set aside."""
    set_foreign_aside(path, merged)
    return Database(path, Schema(create=_CREATE, version=VERSION, migrations=migrations, merged=merged))
