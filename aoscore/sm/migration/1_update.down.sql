DROP TABLE IF EXISTS layers;
CREATE TABLE layers (
    digest TEXT NOT NULL PRIMARY KEY, layerId TEXT, path TEXT, osVersion TEXT, version TEXT, timestamp TIMESTAMP,
    state INTEGER, size INTEGER);
