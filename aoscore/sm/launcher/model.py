"""What the launcher tells."""

import msgspec

from aoscore.common.types import InstanceStatus


class NodeStatuses(msgspec.Struct, frozen=True):
    """The complete list, told after every finished update and at the beginning of every connection to CM."""

    statuses: tuple[InstanceStatus, ...]
