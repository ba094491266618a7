"""All files of a Node together. Pure."""

from aoscore.ctl.target import configs, disks, network, system, units
from aoscore.ctl.target.entry import Entry
from aoscore.ctl.target.node import Node

PARTS = ("base", "iam", "cm", "sm", "mp", "network", "firewall", "provisioning", "disks", "data", "image")


def tree(node: Node, parts: tuple[str, ...] = PARTS) -> list[Entry]:
    """The entries of the parts, sorted by path. Raises ValueError for an unknown part."""
    for part in parts:
        if part not in PARTS:
            raise ValueError(f"part {part!r} is unknown; valid: {' '.join(PARTS)}")
    made = [entry for module in (configs, units, system, network, disks) for entry in module.entries(node)]
    return sorted((entry for entry in made if entry.part in parts), key=lambda entry: entry.path)
