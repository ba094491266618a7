"""What several components need; imports no component."""
