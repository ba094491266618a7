"""`make bench`: all measurements, one after the other, alone on the machine."""

import sys

from tests.benchmarks import cm, footprint, iam, mp, performance, sm, unit

PARTS = (footprint, unit, sm, iam, cm, mp, performance)

if __name__ == "__main__":
    sys.exit(next((code for part in PARTS if (code := part.main())), 0))
