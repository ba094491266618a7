"""Alerts from the system journal."""
