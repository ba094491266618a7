"""Images of services for peers of the older kind."""
