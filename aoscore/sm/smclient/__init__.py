"""The link to CM: registration, what CM sends, and what must reach it."""
