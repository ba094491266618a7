DROP TABLE IF EXISTS instancenetwork;
