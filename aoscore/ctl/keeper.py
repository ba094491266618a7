"""Waits until who started it is gone, and then removes what a machine of namespaces leaves: its control groups.

Started by `machine.Machine`; the end of its standard input is the end of its starter, however that came. Everything
else of the machine is ended by the kernel. Run as `python -m aoscore.ctl.keeper CGROUP...`.
"""

import sys
from collections.abc import Sequence

from aoscore.ctl.machine import remove_cgroups


def main(args: Sequence[str] = tuple(sys.argv[1:])) -> int:
    """Entry point."""
    sys.stdin.buffer.read()
    for name in args:
        remove_cgroups(name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
