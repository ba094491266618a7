CREATE TABLE instancenetwork_old (
    instanceID TEXT NOT NULL, networkID TEXT NOT NULL, networkConfig TEXT, allocatedParams TEXT,
    PRIMARY KEY (instanceID, networkID));
INSERT INTO instancenetwork_old SELECT instanceID, networkID, networkConfig, allocatedParams FROM instancenetwork;
DROP TABLE instancenetwork;
ALTER TABLE instancenetwork_old RENAME TO instancenetwork;
