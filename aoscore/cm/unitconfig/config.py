"""Unit config documents: versions, and which part is for which node. Pure."""

import re
from functools import total_ordering

import msgspec

from aoscore.cm.communication.envelope import to_json
from aoscore.cm.communication.messages import Identity, NodeConfig, UnitConfig
from aoscore.common.errors import InvalidArgumentError

_SEMVER = re.compile(r"(\d+)\.(\d+)\.(\d+)(?:-([0-9A-Za-z.-]+))?(?:\+[0-9A-Za-z.-]+)?", re.ASCII)


@total_ordering
class Version:
    """A semantic version; parts behind "+" do not count."""

    def __init__(self, text: str) -> None:
        """Raises InvalidArgumentError when text is no version."""
        match = _SEMVER.fullmatch(text)
        if match is None:
            raise InvalidArgumentError(f"{text!r} is no version, write for example 1.2.3")
        numbers = tuple(int(part) for part in match.groups()[:3])
        # A pre-release comes before its release; its numeric parts come before textual ones.
        pre = tuple((0, int(part), "") if part.isdecimal() else (1, 0, part) for part in (match[4] or "").split("."))
        self._key = (numbers, match[4] is None, pre)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Version) and self._key == other._key

    def __lt__(self, other: "Version") -> bool:
        return self._key < other._key

    def __hash__(self) -> int:
        return hash(self._key)


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
