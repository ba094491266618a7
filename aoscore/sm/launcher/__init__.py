"""Launcher: keeps the wanted instances running on this Node."""
