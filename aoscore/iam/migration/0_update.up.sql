-- Version 0 is the first layout; its tables are made when the file is created.
SELECT 0;
