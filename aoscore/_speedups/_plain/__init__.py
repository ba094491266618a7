"""Plain Python twins of the native modules: what the tests compare them with, and the fallback."""
