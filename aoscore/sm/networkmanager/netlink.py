"""The part of pyroute2 that we use, without the rest of it.

`import pyroute2` loads all of its parts, its network database among them: 8 MB, of which `IPRoute` needs 3. So the
package is entered without running its `__init__`. Tested with 0.7.10 and the newest.
"""

import importlib.util
import sys
from typing import Any

_PACKAGE = "pyroute2"


def open_route() -> Any:
    """A netlink socket for links, addresses, routes and queues; the caller closes it."""
    _enter()
    from pyroute2.iproute.linux import IPRoute

    return IPRoute()


def netlink_error() -> Any:
    """The class of what the kernel's refusals raise; `code` is the error number."""
    _enter()
    from pyroute2.netlink.exceptions import NetlinkError

    return NetlinkError


def _enter() -> None:
    if _PACKAGE in sys.modules:
        return
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None:
        raise ModuleNotFoundError(f"no module named {_PACKAGE!r}", name=_PACKAGE)
    sys.modules[_PACKAGE] = importlib.util.module_from_spec(spec)
