"""Unit config documents: which part is for which node. Pure."""

import msgspec

from aoscore.cm.communication.envelope import to_json
from aoscore.cm.communication.messages import Identity, NodeConfig, UnitConfig


def pick_node_config(config: UnitConfig, node_id: str, node_type: str) -> NodeConfig:
    """The part for one node: by its id, else by its type, else an empty one; with version and node filled in."""
    empty = NodeConfig(node_group_subject=Identity.of_codename(node_type))
    of_node = [one for one in config.nodes if one.node is not None and one.node.codename == node_id]
    of_type = [one for one in config.nodes if one.node is None and one.node_group_subject.codename == node_type]
    chosen = next(iter([*of_node, *of_type]), empty)
    return msgspec.structs.replace(chosen, version=config.version, node=Identity.of_codename(node_id))


def node_config_text(config: NodeConfig) -> str:
    """The JSON text that SMs read."""
    return to_json(config).decode()
