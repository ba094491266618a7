"""Runtimes: what turns an instance into something that runs (the interface is in ``base``)."""
