"""`make bench`: all measurements, one after the other, alone on the machine."""

import sys

from tests.benchmarks import cm, footprint, iam, sm, speedups, unit

if __name__ == "__main__":
    sys.exit(footprint.main() or unit.main() or sm.main() or iam.main() or cm.main() or speedups.main())
