"""Pure. May a Node that shows up on a RegisterNode stream have that stream? (iam.md §9.1, §16 items 8 and 9)

port       state          what the Main Node has recorded                       verdict
---------  -------------  ----------------------------------------------------  -------
any        any            the id is that of the Main Node itself                Refuse
public     unprovisioned  nothing, or unprovisioned                             Accept
public     unprovisioned  in service and connected on the protected port        Refuse
public     unprovisioned  in service                                            SetAside
public     another        anything                                              Ignore
protected  unprovisioned  anything                                              Ignore
protected  another        by the certificate: `judge_certificate`               Accept, Learn, Refuse
"""

from enum import Enum

import msgspec

from aoscore.common.admission import speaks_for
from aoscore.common.types import NodeInfo, NodeState

MAX_ID_LENGTH = 64


class Port(Enum):
    """Where a stream came in. The public port proves nothing about who calls."""

    PUBLIC = "public"
    PROTECTED = "protected"


class Accept(msgspec.Struct, frozen=True):
    """The Node is connected by this stream; an older one of it loses the Node."""


class Learn(msgspec.Struct, frozen=True):
    """Accept, and from now on the key of the certificate is this Node's."""


class SetAside(msgspec.Struct, frozen=True):
    """The stream is kept, and used after an explicit request only."""


class Ignore(msgspec.Struct, frozen=True):
    """The stream stays open and is not used: the Node will change the port by itself."""

    reason: str


class Refuse(msgspec.Struct, frozen=True):
    """The stream ends: its peer claims to be what it is not."""

    reason: str


Verdict = Accept | Learn | SetAside | Ignore | Refuse


class Evidence(msgspec.Struct, frozen=True, kw_only=True):
    """What the client certificate of a stream on the protected port tells.

    `present`: there is one. `local`: it is one of the Main Node's own. `owner`: the Node whose key it has, None if
    unknown (`common.admission`). `same_unit`: its common name is the system id, as in every request for a certificate
    of the Unit.
    """

    present: bool = False
    local: bool = False
    owner: str | None = None
    same_unit: bool = False


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """What the Main Node has on the id: the Node's state if it is known, its links, whether keys of it are known.

    `has_link_elsewhere` means a stream on the public port that comes from another address.
    """

    state: NodeState | None = None
    has_protected_link: bool = False
    has_link_elsewhere: bool = False
    has_keys: bool = False


def judge(
    node: NodeInfo, port: Port, evidence: Evidence, record: Record, *, own_id: str, learn_keys: bool = False
) -> Verdict:
    """The verdict on a node_info. `learn_keys` lets unknown keys in, as after another program ran in our place."""
    if not is_node_id(node.node_id):
        return Refuse(f"a node id has 1 to {MAX_ID_LENGTH} printable characters and no blanks around")
    if node.node_id == own_id:
        return Refuse("this is the id of the Main Node")
    if node.is_main:
        # The provisioning tool would give it the certificates of the Unit.
        return Refuse("it has the attribute of the Main Node")
    in_service = record.state not in (None, NodeState.UNPROVISIONED)
    if port is Port.PUBLIC:
        if node.state is not NodeState.UNPROVISIONED:
            return Ignore(f"a node that is {node.state} belongs on the protected port")
        if in_service and record.has_protected_link:
            return Refuse(f"the node is {record.state} and connected on the protected port")
        if record.has_link_elsewhere:
            # In the middle of provisioning somebody else would get the Node's certificates.
            return Refuse("the node is connected from another address")
        return SetAside() if in_service else Accept()
    if node.state is NodeState.UNPROVISIONED:
        return Ignore("a node that is unprovisioned belongs on the public port")
    return judge_certificate(node.node_id, evidence, record, learn_keys=learn_keys)


def is_node_id(text: str) -> bool:
    """Whether this may be the id of a Node."""
    return 0 < len(text) <= MAX_ID_LENGTH and text.isprintable() and text == text.strip()


def judge_certificate(node_id: str, evidence: Evidence, record: Record, *, learn_keys: bool) -> Verdict:
    """Whether a certificate may speak for a Node.

    A Node of which no key is known was provisioned by AosCore 9.1 on the Main Node: its first key is taken on trust,
    if it is of our Unit.
    """
    if not evidence.present:
        return Refuse("there is no client certificate")
    known = speaks_for(node_id, is_main=evidence.local, owner=evidence.owner)
    if known:
        return Accept()
    if known is False:
        return Refuse(f"its certificate is that of node {evidence.owner!r}")
    if learn_keys:
        return Learn()
    if record.has_keys:
        return Refuse("its certificate has another key than the node (learnNodeKeys takes it once)")
    if not evidence.same_unit:
        return Refuse("its certificate is of another Unit (learnNodeKeys takes it once)")
    return Learn()
