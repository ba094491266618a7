"""Whose a key is that a certificate of the Unit is shown with. Pure (observed.md, defect 8).

Nothing in an Aos certificate names its node: the common name is the system id, the same for all nodes of a Unit. But a
private key never leaves its node. So whoever is shown certificates remembers under which node id each key came.
"""


def speaks_for(node_id: str, *, is_main: bool, owner: str | None) -> bool | None:
    """Whether who holds a key may speak for a node; None when that node and the key are new to each other.

    `owner`: the node that has shown the key before. `is_main`: it is one of the Main Node's own, whose inter-node
    gateway shows them for the nodes behind it, which it checks itself (mp.md).
    """
    if is_main or owner == node_id:
        return True
    return None if owner is None else False
