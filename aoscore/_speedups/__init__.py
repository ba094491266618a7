"""Hot paths in Cython, each beside a plain Python twin of the same interface."""
