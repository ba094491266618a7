-- The old tables may exist already: AosCore 9.1 makes them at every start before it looks at the version.
DROP TABLE IF EXISTS items;
DROP TABLE IF EXISTS instances;
DROP TABLE IF EXISTS services;
DROP TABLE IF EXISTS layers;
CREATE TABLE services (
    id TEXT NOT NULL, version TEXT, providerID TEXT, imagePath TEXT, manifestDigest BLOB, state INTEGER,
    timestamp TIMESTAMP, size INTEGER, GID INTEGER, PRIMARY KEY (id, version));
CREATE TABLE layers (
    digest TEXT NOT NULL PRIMARY KEY, unpackedDigest TEXT, layerId TEXT, path TEXT, osVersion TEXT, version TEXT,
    timestamp TIMESTAMP, state INTEGER, size INTEGER);
CREATE TABLE instances (
    instanceID TEXT NOT NULL PRIMARY KEY, serviceID TEXT, subjectID TEXT, instance INTEGER, uid INTEGER,
    priority INTEGER, storagePath TEXT, statePath TEXT, network BLOB);
CREATE TABLE network_old (
    networkID TEXT NOT NULL PRIMARY KEY, ip TEXT, subnet TEXT, vlanID INTEGER, vlanIfName TEXT);
INSERT INTO network_old SELECT networkID, ip, subnet, vlanID, vlanIfName FROM network;
DROP TABLE network;
ALTER TABLE network_old RENAME TO network;
