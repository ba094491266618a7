"""Identity and Access Manager: who the Unit is, its keys, certificates and node states."""
