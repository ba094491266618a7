"""aosctl: looks at and drives a Unit from the command line."""
