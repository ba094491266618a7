"""Measurements: speed of the native modules, memory of the daemons."""
