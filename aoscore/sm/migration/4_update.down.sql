ALTER TABLE instances ADD COLUMN networkParameters TEXT;
CREATE TABLE instancenetwork_old (
    instanceID TEXT NOT NULL, networkID TEXT NOT NULL, PRIMARY KEY (instanceID, networkID));
INSERT INTO instancenetwork_old SELECT instanceID, networkID FROM instancenetwork;
DROP TABLE instancenetwork;
ALTER TABLE instancenetwork_old RENAME TO instancenetwork;
