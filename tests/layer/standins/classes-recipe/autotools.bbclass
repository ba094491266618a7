# Stand-in: see parser.py.
