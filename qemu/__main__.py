"""`python -m qemu`: builds, saves and shows Units of guests. See README.md."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from aoscore.common.errors import AosError
from aoscore.ctl.host import step
from qemu.guest import Boot
from qemu.images import Images, build_images
from qemu.layers import ROOT
from qemu.show import show
from qemu.unit import NODES, saved_unit
from qemu.xen.show import show_xen


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is 0, 1 for a failure, 130 when interrupted."""
    parser = argparse.ArgumentParser(prog="python -m qemu", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    images = commands.add_parser("images", help="build the disk images and print where they are")
    images.set_defaults(run=_images)
    save = commands.add_parser("save", help="boot a Unit and keep its state, for tests that go on from it")
    save.set_defaults(run=_save)
    walk = commands.add_parser("show", help="provision a Unit, deploy a service, cut the power; prints figures")
    walk.add_argument("--dir", type=Path, default=ROOT / ".state" / "qemu", help="where it lives (%(default)s)")
    walk.add_argument("--report", type=Path, help="file to write the figures to, too")
    for node in NODES:
        walk.add_argument(f"--{node}-disk", type=Path, help=f"disk of the {node} node in place of ours, raw or qcow2")
    walk.add_argument("--kernel", type=Path, help="kernel for those disks; none: they have a boot loader")
    walk.add_argument("--initrd", type=Path, help="initial RAM disk to the kernel")
    walk.add_argument("--append", default=Boot.append, help="kernel command line (%(default)s)")
    walk.add_argument("--firmware", type=Path, help="UEFI firmware for disks with an EFI boot loader")
    walk.add_argument("--cloud", type=Path, help="directory of the cloud whose root certificate is in those disks")
    walk.set_defaults(run=_show)
    xen = commands.add_parser("xen", help="the same with Xen: Main Node in Dom0, Secondary Node in a guest, by vchan")
    xen.add_argument("--dir", type=Path, default=ROOT / ".state" / "xen", help="where it lives (%(default)s)")
    xen.add_argument("--report", type=Path, help="file to write the figures to, too")
    xen.set_defaults(run=_show_xen)
    arguments = parser.parse_args(argv)
    try:
        arguments.run(arguments)
    except AosError as error:
        print(f"qemu: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _images(arguments: argparse.Namespace) -> None:
    for name, boot in build_images().boots.items():
        print(f"{name}: {' '.join(map(str, boot.disks))}")


def _save(arguments: argparse.Namespace) -> None:
    print(saved_unit(build_images()).states)


def _show(arguments: argparse.Namespace) -> None:
    with step("Disk images"):
        images = _replaced(build_images(), arguments)
    report = show(arguments.dir, images)
    print(f"\n{report}\nSerial logs: {arguments.dir}/*.serial.log")
    if arguments.report is not None:
        arguments.report.write_text(f"# Guests\n\n{report}")


def _show_xen(arguments: argparse.Namespace) -> None:
    report = show_xen(arguments.dir)
    print(f"\n{report}\nConsoles: {arguments.dir}/main.serial.log, {arguments.dir}/secondary.console.log")
    if arguments.report is not None:
        arguments.report.write_text(f"# A Unit in Xen guests\n\n{report}")


def _replaced(images: Images, arguments: argparse.Namespace) -> Images:
    """The images with the disks that the user has brought."""
    boots = dict(images.boots)
    for name in NODES:
        disk = getattr(arguments, f"{name}_disk")
        if disk is not None:
            boots[name] = Boot(
                (disk,), arguments.kernel, arguments.initrd, arguments.append, arguments.firmware, agent=False
            )
    return msgspec.structs.replace(images, boots=boots, cloud=arguments.cloud or images.cloud)


if __name__ == "__main__":
    sys.exit(main())
