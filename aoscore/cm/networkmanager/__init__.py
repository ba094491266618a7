"""Networks of the Unit: addresses, firewall rules between instances, host names (cm-orchestration §6)."""
