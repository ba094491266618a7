"""Which instances run where: placement, identities, and telling the nodes (cm-orchestration §4)."""
