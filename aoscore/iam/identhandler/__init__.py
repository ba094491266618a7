"""Identity of the Unit: system id, model, subjects."""
