"""Tests of whole Units: the installed product booted by systemd, and the demo."""
