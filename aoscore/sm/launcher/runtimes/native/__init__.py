"""Service runtime: processes as transient systemd units, with the limits that containers have."""
