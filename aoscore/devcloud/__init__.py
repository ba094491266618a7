"""A local AosCloud for development, demos and tests; never installed on a device."""
