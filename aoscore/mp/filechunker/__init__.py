"""A gateway's downloads for its nodes, in pieces."""
