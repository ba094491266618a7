ALTER TABLE instancenetwork ADD COLUMN hostIfName TEXT;
