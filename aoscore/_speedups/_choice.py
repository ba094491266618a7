"""Which of the two implementations of a hot path this process uses."""

import os
from importlib.util import find_spec


def native_wanted(name: str) -> bool:
    """Whether to use the native module ``name`` ("_unpack"): it was built and AOSCORE_PLAIN=1 does not forbid it."""
    if os.environ.get("AOSCORE_PLAIN", "") not in ("", "0"):
        return False
    return find_spec(f"aoscore._speedups.{name}") is not None
