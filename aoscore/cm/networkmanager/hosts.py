"""Host names of instances: who may have which, and the file that dnsmasq reads. Pure (cm-orchestration §6.5)."""

import re
from collections.abc import Iterable, Sequence

from aoscore.cm.networkmanager.firewall import Endpoint
from aoscore.common.errors import AlreadyExistsError, InvalidArgumentError

_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]{0,251}[A-Za-z0-9_])?")


def check_names(names: Sequence[str], item_id: str, endpoints: Iterable[Endpoint]) -> tuple[str, ...]:
    """The names an instance of item_id gets, doubles dropped.

    Instances of one item may share a name (it then resolves to all of them); two items may not.
    Raises AlreadyExistsError naming the holder, InvalidArgumentError for a name that is none: it would end up in a file
    that a name server reads.
    """
    holders = {name.lower(): one.ident for one in endpoints for name in one.hosts if one.ident.item_id != item_id}
    for name in names:
        if not _NAME.fullmatch(name):
            raise InvalidArgumentError(f"{name!r} is no host name")
        if holder := holders.get(name.lower()):
            raise AlreadyExistsError(f"host name {name} is used by {holder}")
    return tuple(dict.fromkeys(names))


def hosts_text(endpoints: Iterable[Endpoint]) -> str:
    """Content of the hosts file: a line per address, in the order of the instances."""
    lines = sorted((one.ident, "\t".join([one.ip, *one.hosts])) for one in endpoints if one.hosts)
    return "".join(f"{line}\n" for _, line in lines)
