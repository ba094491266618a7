"""Keys and certificates of the Node, by certificate type."""
