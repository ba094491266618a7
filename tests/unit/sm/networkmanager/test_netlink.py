"""The part of pyroute2 that SM loads."""

import subprocess
import sys

_CODE = """
import sys
from aoscore.sm.networkmanager.netlink import netlink_error, open_route
with open_route() as route:
    names = [link.get_attr("IFLA_IFNAME") for link in route.get_links()]
    try:
        route.link("del", index=2**31 - 1)
    except netlink_error() as error:
        print(error.code)
print("lo" in names, "pyroute2.ndb" in sys.modules)
import pyroute2
print(hasattr(pyroute2, "iproute"))
"""


def test_links_are_read_without_the_rest_of_the_library() -> None:
    """In a process of its own: others may have loaded all of it here."""
    done = subprocess.run([sys.executable, "-c", _CODE], capture_output=True, text=True, check=True, timeout=60)
    code, answers, entered = done.stdout.splitlines()
    assert (int(code) in (1, 19), answers, entered) == (True, "True False", "True")
