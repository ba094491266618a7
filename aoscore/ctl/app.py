"""`aosctl`: looks at and drives a Unit from the command line."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from aoscore.common.errors import AosError
from aoscore.ctl.demo import Demo


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is 0, 1 for a failure, 130 when interrupted."""
    parser = argparse.ArgumentParser(prog="aosctl", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    demo = commands.add_parser("demo", help="a cloud and a Unit on this machine")
    demo.add_argument("action", choices=("up", "down"))
    demo.add_argument("--dir", type=Path, default=Path(".state/demo"), help="where it lives (%(default)s)")
    demo.add_argument("--tools", type=Path, default=Path(".venv-tools"), help="environment of aos-prov (%(default)s)")
    demo.set_defaults(run=_demo)
    arguments = parser.parse_args(argv)
    try:
        arguments.run(arguments)
    except AosError as error:
        print(f"aosctl: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _demo(arguments: argparse.Namespace) -> None:
    demo = Demo(arguments.dir, arguments.tools)
    if arguments.action == "up":
        demo.up()
    else:
        demo.down()
