"""Archives of logs that come as text."""
