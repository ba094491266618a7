"""What the classes of the layer do, as plain Python: tested without BitBake."""
