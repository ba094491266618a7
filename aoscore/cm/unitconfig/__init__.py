"""The configuration of the Unit and of its nodes (cm-cloud §10)."""
