-- Layers remember the digest of their unpacked tree. Their content is dropped by step 3, so rows need not survive.
DROP TABLE IF EXISTS layers;
CREATE TABLE layers (
    digest TEXT NOT NULL PRIMARY KEY, unpackedDigest TEXT, layerId TEXT, path TEXT, osVersion TEXT, version TEXT,
    timestamp TIMESTAMP, state INTEGER, size INTEGER);
