"""`make bench`: all measurements, one after the other, alone on the machine."""

import sys

from tests.benchmarks import footprint, iam, mp, speedups

if __name__ == "__main__":
    sys.exit(footprint.main() or iam.main() or mp.main() or speedups.main())
