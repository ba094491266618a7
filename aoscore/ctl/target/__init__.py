"""The files of a Node, from one source: for the Yocto images, for guests and for a hand install.

`Node` says what distinguishes one Node from another, `tree(node)` makes all its files of it, `write` puts them below a
root directory. Pure but for `write`, and only the standard library is imported here and below: the recipes run this
code in a Python that has nothing else (yocto.md §11).

Every entry belongs to a part, so that a recipe can take its share:

    iam, cm, sm, mp   configuration and units of one component
    base              aos.target, slice, environment, directories, kernel settings, versions
    network           addresses, host names, name server
    firewall          base rules and provisioning firewall
    provisioning      hooks of IAM, OpenSSL's key provider
    disks             volumes and network file system
    data              directories of /var and /run, where no systemd-tmpfiles makes them
    image             names and mounts of the whole system, in files that belong to other packages
"""

from aoscore.ctl.target.build import PARTS, tree
from aoscore.ctl.target.entry import Entry, write
from aoscore.ctl.target.node import COMPONENTS, Node
from aoscore.ctl.target.settings import node_from

__all__ = ["COMPONENTS", "PARTS", "Entry", "Node", "node_from", "tree", "write"]
