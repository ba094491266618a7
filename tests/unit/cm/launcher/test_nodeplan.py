"""What a node is told."""

import msgspec
import pytest

from aoscore.cm.launcher.nodeplan import NodeUpdate, list_digest, plan_update
from aoscore.common.types import EnvVar, InstanceIdent, InstanceInfo, InstanceState, InstanceStatus

A = InstanceIdent("a", "s", 0)
B = InstanceIdent("b", "s", 0)
PREINSTALLED = InstanceIdent("p", "s", 0, preinstalled=True)


def info(ident: InstanceIdent, version: str = "1", **members: object) -> InstanceInfo:
    return InstanceInfo(ident, version, "sha256:m", "owner", "rt", **members)  # type: ignore[arg-type]


def runs(
    ident: InstanceIdent, version: str = "1", state: InstanceState = InstanceState.ACTIVE, runtime_id: str = "rt"
) -> tuple[InstanceIdent, InstanceStatus]:
    return ident, InstanceStatus(ident, version, state, runtime_id)


@pytest.mark.parametrize(
    "running",
    [
        [runs(A)],
        [runs(A, runtime_id="")],
        [runs(A, state=InstanceState.FAILED)],
        [runs(A, state=InstanceState.INACTIVE)],
        [runs(A), runs(PREINSTALLED)],
        [runs(A), runs(B, state=InstanceState.INACTIVE)],
    ],
)
def test_nothing_to_do(running: list[tuple[InstanceIdent, InstanceStatus]]) -> None:
    assert plan_update([info(A)], dict(running), told=True) is None


def test_start_is_always_everything() -> None:
    wanted = [info(A), info(B)]
    assert plan_update(wanted, dict([runs(A)]), told=True) == NodeUpdate(tuple(wanted), ())


@pytest.mark.parametrize("running", [runs(A, "0"), runs(A, runtime_id="other")])
def test_other_version_or_runtime_is_stopped_first(running: tuple[InstanceIdent, InstanceStatus]) -> None:
    assert plan_update([info(A)], dict([running]), told=True) == NodeUpdate((info(A),), (A,))


def test_unwanted_is_stopped() -> None:
    assert plan_update([], dict([runs(A), runs(B, state=InstanceState.FAILED)]), told=True) == NodeUpdate((), (A, B))


def test_left_alone() -> None:
    assert plan_update([], dict([runs(A)]), told=False, leave={A}) is None
    assert plan_update([info(B)], dict([runs(A)]), told=True, leave={A}) == NodeUpdate((info(B),), ())


def test_changed_parameters_are_told() -> None:
    assert plan_update([info(A)], dict([runs(A)]), told=False) == NodeUpdate((info(A),), ())


def test_retry_stops_and_starts() -> None:
    running = dict([runs(A, state=InstanceState.FAILED), runs(B)])
    assert plan_update([info(A), info(B)], running, told=True, retry={A}) == NodeUpdate((info(A), info(B)), (A,))


def test_digest_names_a_list() -> None:
    wanted = [info(A), info(B)]
    assert list_digest(wanted) == list_digest(tuple(wanted))
    changed = [info(A), msgspec.structs.replace(info(B), env_vars=(EnvVar("X", "1"),))]
    assert list_digest(wanted) != list_digest(changed)
