"""Who may register what: every row of the table in `admission`."""

import pytest

from aoscore.common.types import NodeInfo, NodeState
from aoscore.iam.iamserver.admission import (
    Accept,
    Evidence,
    Ignore,
    Learn,
    Port,
    Record,
    Refuse,
    SetAside,
    Verdict,
    judge,
)

NEW = NodeState.UNPROVISIONED
IN_SERVICE = [NodeState.PROVISIONED, NodeState.PAUSED, NodeState.ERROR]
GOOD = Evidence(present=True, owner="n2")
NO_EVIDENCE = Evidence()
NO_RECORD = Record()


def verdict(
    state: NodeState,
    port: Port,
    evidence: Evidence = NO_EVIDENCE,
    *,
    record: Record = NO_RECORD,
    node_id: str = "n2",
    learn: bool = False,
) -> Verdict:
    return judge(NodeInfo(node_id, state=state), port, evidence, record, own_id="n1", learn_keys=learn)


@pytest.mark.parametrize("port", list(Port))
@pytest.mark.parametrize("state", list(NodeState))
def test_nobody_is_the_main_node(state: NodeState, port: Port) -> None:
    local = Evidence(present=True, local=True, owner="n1")
    assert isinstance(verdict(state, port, local, node_id="n1"), Refuse)


@pytest.mark.parametrize("state", list(NodeState))
def test_nobody_else_has_the_attribute_of_the_main_node(state: NodeState) -> None:
    """aos-prov would take it for the Main Node and have the certificates of the Unit issued to it."""
    node = NodeInfo("n2", state=state, attrs={"mainnode": ""})
    assert isinstance(judge(node, Port.PUBLIC, NO_EVIDENCE, NO_RECORD, own_id="n1"), Refuse)
    assert isinstance(judge(node, Port.PROTECTED, GOOD, NO_RECORD, own_id="n1"), Refuse)


def test_node_being_provisioned_cannot_be_displaced_from_another_address() -> None:
    assert isinstance(verdict(NEW, Port.PUBLIC, record=Record(state=NEW, has_link_elsewhere=True)), Refuse)
    moved = Record(state=NodeState.PROVISIONED, has_link_elsewhere=True)
    assert verdict(NodeState.PROVISIONED, Port.PROTECTED, GOOD, record=moved) == Accept()


@pytest.mark.parametrize("node_id", ["", "x" * 65, " n2", "n2\n", "n\x1b2"])
def test_ids_without_sense(node_id: str) -> None:
    assert isinstance(verdict(NEW, Port.PUBLIC, node_id=node_id), Refuse)


@pytest.mark.parametrize("state", IN_SERVICE)
def test_each_port_has_its_states(state: NodeState) -> None:
    assert verdict(NEW, Port.PUBLIC) == Accept()
    assert isinstance(verdict(state, Port.PUBLIC), Ignore)
    assert isinstance(verdict(NEW, Port.PROTECTED, GOOD), Ignore)
    assert verdict(state, Port.PROTECTED, GOOD) == Accept()


@pytest.mark.parametrize("known", IN_SERVICE)
def test_node_in_service_that_shows_up_as_new(known: NodeState) -> None:
    assert verdict(NEW, Port.PUBLIC, record=Record(state=known)) == SetAside()
    connected = Record(state=known, has_protected_link=True)
    assert isinstance(verdict(NEW, Port.PUBLIC, record=connected), Refuse)
    # Deprovisioned over the link that it still has.
    gone = Record(state=NEW, has_protected_link=True)
    assert verdict(NEW, Port.PUBLIC, record=gone) == Accept()


@pytest.mark.parametrize(
    ("evidence", "record", "learn", "expected"),
    [
        (Evidence(), Record(), True, Refuse),
        (Evidence(present=True, owner="n2"), Record(has_keys=True), False, Accept),
        (Evidence(present=True, local=True), Record(has_keys=True), False, Accept),
        (Evidence(present=True, owner="n3", same_unit=True), Record(), True, Refuse),
        (Evidence(present=True, same_unit=True), Record(has_keys=True), False, Refuse),
        (Evidence(present=True, same_unit=True), Record(has_keys=True), True, Learn),
        (Evidence(present=True, same_unit=True), Record(), False, Learn),
        (Evidence(present=True), Record(), False, Refuse),
        (Evidence(present=True), Record(), True, Learn),
    ],
)
def test_defect_8_a_certificate_speaks_for_its_own_node_only(
    evidence: Evidence, record: Record, learn: bool, expected: type
) -> None:
    """Any certificate of the Unit's CA could register any node id (observed.md, defect 8)."""
    assert type(verdict(NodeState.PROVISIONED, Port.PROTECTED, evidence, record=record, learn=learn)) is expected
