"""`aosctl`: looks at and drives a Unit from the command line."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from aoscore.common.errors import AosError, InvalidArgumentError
from aoscore.ctl import nodestate, target


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is 0, 1 for a failure, 130 when interrupted."""
    parser = argparse.ArgumentParser(prog="aosctl", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    demo = commands.add_parser("demo", help="a cloud and a Unit on this machine")
    demo.add_argument("action", choices=("up", "down"))
    demo.add_argument("--dir", type=Path, default=Path(".state/demo"), help="where it lives (%(default)s)")
    demo.add_argument("--tools", type=Path, default=Path(".venv-tools"), help="environment of aos-prov (%(default)s)")
    demo.set_defaults(run=_demo)
    files = commands.add_parser("target", help="write the files of a node below a root directory")
    files.add_argument("root", type=Path, help="root directory to write below")
    files.add_argument("--node", type=Path, help="JSON file with settings of the node, by name")
    files.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="one setting; may be repeated")
    files.add_argument("--parts", default=" ".join(target.PARTS), help="which parts to write (all: %(default)s)")
    files.set_defaults(run=_target)
    node = commands.add_parser("node", help="what follows a change of this node's provisioning state")
    node.add_argument("action", choices=tuple(_NODE_ACTIONS))
    node.add_argument("--config", type=Path, default=Path("/etc/aos/iam.cfg"), help="IAM's file (%(default)s)")
    node.set_defaults(run=lambda given: _NODE_ACTIONS[given.action](nodestate.read_place(given.config)))
    disk = commands.add_parser("disk", help="the encrypted data disk of this node")
    disk.add_argument("action", choices=("create", "open", "close", "delete"))
    disk.add_argument("device", nargs="?", default="", help="block device (default: kernel argument opendisk.target)")
    disk.add_argument("--config", type=Path, default=Path("/etc/aos/iam.cfg"), help="IAM's file (%(default)s)")
    disk.add_argument("--layout", type=Path, default=Path("/opt/aos/aosdisk.cfg"), help="volumes (%(default)s)")
    disk.set_defaults(run=_disk)
    arguments = parser.parse_args(argv)
    try:
        arguments.run(arguments)
    except (AosError, OSError) as error:
        print(f"aosctl: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


_NODE_ACTIONS: dict[str, Callable[[nodestate.Place], None]] = {
    "finish": nodestate.finish,
    "deprovision": nodestate.deprovision,
    "wipe": nodestate.wipe,
    "clear-keys": nodestate.clear_keys,
}


def _disk(arguments: argparse.Namespace) -> None:
    # cryptography takes a while to load, which the other commands do not need.
    from aoscore.ctl import disk

    actions = {"create": disk.create, "open": disk.open_disk, "close": disk.close, "delete": disk.delete}
    actions[arguments.action](disk.read_disk(arguments.config, arguments.layout, arguments.device))


def _target(arguments: argparse.Namespace) -> None:
    try:
        settings = json.loads(arguments.node.read_bytes()) if arguments.node else {}
        for setting in arguments.set:
            name, equals, value = setting.partition("=")
            if not equals:
                raise InvalidArgumentError(f"--set {setting}: write NAME=VALUE")
            settings[name] = value
        entries = target.tree(target.node_from(settings), tuple(arguments.parts.split()))
    except ValueError as error:
        raise InvalidArgumentError(str(error)) from None
    for path in target.write(entries, arguments.root):
        print(path)


def _demo(arguments: argparse.Namespace) -> None:
    # Only where it is used: a device has no part in it.
    from aoscore.ctl.demo import Demo

    demo = Demo(arguments.dir, arguments.tools)
    if arguments.action == "up":
        demo.up()
    else:
        demo.down()
