"""Monitoring: how the node and its instances do, averages of it, and alerts when a level is crossed."""
