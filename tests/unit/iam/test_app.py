import pytest

from aoscore.common.types import NodeState
from aoscore.iam.app import _is_secure


@pytest.mark.parametrize("state", list(NodeState))
def test_plain_text_only_for_a_node_without_provisioning(state: NodeState) -> None:
    assert _is_secure(False, state)
    assert _is_secure(True, state) == (state is not NodeState.UNPROVISIONED)
