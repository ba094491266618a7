"""What a desired status means: state in, decisions out."""

from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest

from aoscore.cm.communication.messages import (
    DesiredInstance,
    DesiredNode,
    DesiredNodeState,
    DesiredStatus,
    DesiredSubject,
    Identity,
    ItemState,
    SigningCertificate,
    SubjectType,
    UnitConfig,
)
from aoscore.cm.communication.reader import Problem
from aoscore.cm.imagemanager.store import Item
from aoscore.cm.launcher.model import RunRequest, UnitInstanceStatus
from aoscore.cm.nodeinfo import UnitNodeInfo
from aoscore.cm.updatemanager.phases import Outcome, Phase, next_phase
from aoscore.cm.updatemanager.plan import (
    Limits,
    Tried,
    check_removals,
    complete,
    effective_version,
    judge,
    node_changes,
    reasons_to_update,
    run_requests,
    versions_to_give_up,
)
from aoscore.common.errors import DeadlineError, FailedError, WrongStateError
from aoscore.common.types import (
    ErrorInfo,
    InstanceIdent,
    InstanceState,
    InstanceStatus,
    ItemType,
    NodeInfo,
    NodeState,
)
from tests.support.images import desired as item

BEGIN = datetime(2026, 3, 1, tzinfo=UTC)
LIMITS = Limits(activating_s=600, placement_s=60)
ERROR = ErrorInfo(1, 0, "crashed")


def instance(item_id: str, subject: str = "s", **more: Any) -> DesiredInstance:
    return DesiredInstance(item=Identity(id=item_id), subject=Identity(id=subject), **more)


def status(*versions: tuple[str, str], **more: Any) -> DesiredStatus:
    values: dict[str, Any] = {
        "items": tuple(item(item_id, version, "d" + version) for item_id, version in versions),
        "instances": tuple(instance(item_id) for item_id, _ in versions),
    }
    return DesiredStatus(**(values | more))


def known(item_id: str, version: str, state: ItemState, **more: Any) -> Item:
    values: dict[str, Any] = {"type": ItemType.SERVICE, "index_digest": "d" + version, "timestamp": BEGIN} | more
    return Item(item_id=item_id, version=version, state=state, **values)


def runs(
    item_id: str,
    version: str,
    state: InstanceState = InstanceState.ACTIVE,
    *,
    number: int = 0,
    node: str = "main",
    error: ErrorInfo | None = None,
) -> UnitInstanceStatus:
    return UnitInstanceStatus(InstanceStatus(InstanceIdent(item_id, "s", number), version, state, error=error), node)


PENDING, INSTALLED, FAILED, REMOVED = ItemState.PENDING, ItemState.INSTALLED, ItemState.FAILED, ItemState.REMOVED
ACTIVATING, BROKEN = InstanceState.ACTIVATING, InstanceState.FAILED


# --- receiving


def test_absent_lists_mean_nothing_or_as_before() -> None:
    before = status(("a", "1"))
    assert complete(DesiredStatus(), (), before, absent_means_keep=False).items == ()
    kept = complete(DesiredStatus(), (), before, absent_means_keep=True)
    assert (kept.items, kept.instances) == (before.items, before.instances)
    assert complete(status(), (), before, absent_means_keep=True).items == ()


def test_what_cannot_be_read_removes_nothing() -> None:
    before = status(("a", "1"), ("b", "1"))
    new = status(("a", "2"))
    result = complete(new, [Problem("items[1].owner", "missing")], before, absent_means_keep=False)
    assert [(entry.item_id, entry.version) for entry in result.items or ()] == [("a", "2"), ("b", "1")]
    assert [entry.item.id for entry in result.instances or ()] == ["a"]
    result = complete(new, [Problem("instances[0].subject", "missing")], before, absent_means_keep=False)
    assert [entry.item.id for entry in result.instances or ()] == ["a", "b"]
    assert complete(new, [Problem("certificates[0]", "x")], before, absent_means_keep=False) == new


@pytest.mark.parametrize(("percent", "refused"), [(100, False), (50, False), (49, True), (0, True)])
def test_too_many_removals_are_refused(percent: int, refused: bool) -> None:
    items = [known("a", "1", INSTALLED), known("b", "1", INSTALLED), known("c", "1", REMOVED)]
    if refused:
        with pytest.raises(WrongStateError, match="1 of 2 items"):
            check_removals(status(("a", "2")), items, percent)
    else:
        check_removals(status(("a", "2")), items, percent)


# --- is there anything to do


def reasons(desired: DesiredStatus, last: DesiredStatus | None, *items: Item, **more: Any) -> list[str]:
    values: dict[str, Any] = {"nodes": [], "unit_config": None} | more
    return reasons_to_update(desired, last, items, **values)


def test_nothing_to_do() -> None:
    desired = status(("a", "1"))
    assert reasons(desired, desired, known("a", "1", INSTALLED), known("old", "1", REMOVED)) == []


def test_a_version_that_failed_for_good_is_not_tried_again_until_something_changes() -> None:
    desired = status(("a", "2"))
    items = [known("a", "1", INSTALLED), known("a", "2", FAILED, error=ERROR, final=True)]
    assert reasons(desired, desired, *items) == []
    assert reasons(status(("a", "2"), ("b", "1")), desired, *items) != []
    signer = SigningCertificate(certificate=b"c", fingerprint="f")
    assert reasons(msgspec.structs.replace(desired, certificates=(signer,)), desired, *items) != []
    soft = msgspec.structs.replace(items[1], final=False)
    assert reasons(desired, desired, items[0], soft) == ["item a 2 is failed"]


@pytest.mark.parametrize(
    ("items", "reason"),
    [
        ([], "item a 1 is not here"),
        ([known("a", "1", INSTALLED, index_digest="other")], "item a 1 is not here"),
        ([known("a", "1", PENDING)], "item a 1 is pending"),
        ([known("a", "1", REMOVED)], "item a 1 is removed"),
        ([known("a", "1", INSTALLED, error=ERROR)], "item a 1 is installed"),
        ([known("a", "1", INSTALLED), known("b", "1", INSTALLED)], "item b is not wanted"),
    ],
)
def test_items_are_reasons(items: list[Item], reason: str) -> None:
    desired = status(("a", "1"))
    assert reasons(desired, desired, *items) == [reason]


def test_another_wish_is_a_reason_and_certificates_alone_are_none() -> None:
    desired = status(("a", "1"))
    installed = known("a", "1", INSTALLED)
    assert reasons(desired, None, installed) == ["desired status changed"]
    more = status(("a", "1"), instances=(instance("a", num_instances=2),))
    assert reasons(more, desired, installed) == ["desired status changed"]
    signed = msgspec.structs.replace(desired, certificates=(SigningCertificate(certificate=b"", fingerprint=""),))
    assert reasons(signed, desired, installed) == []


def node(node_id: str, state: NodeState) -> UnitNodeInfo:
    return UnitNodeInfo(NodeInfo(node_id, state=state))


def test_nodes_and_unit_config() -> None:
    wish = DesiredNode(item=Identity.of_codename("n1"), state=DesiredNodeState.PAUSED)
    desired = status(nodes=(wish,))
    assert node_changes(desired, [node("n1", NodeState.PAUSED)]) == []
    assert node_changes(desired, [node("n1", NodeState.PROVISIONED)]) == [("n1", DesiredNodeState.PAUSED)]
    assert node_changes(desired, []) == [("n1", DesiredNodeState.PAUSED)]
    assert reasons(desired, desired) == ["node n1 shall be paused"]
    assert reasons(desired, desired, tried=Tried(frozenset({"n1"}))) == []
    config = UnitConfig(version="2.0.0")
    desired = status(unit_config=config)
    assert reasons(desired, desired, unit_config=UnitConfig(version="1.0.0")) != []
    assert reasons(desired, desired, unit_config=config) == []
    assert reasons(desired, desired, tried=Tried(unit_config=config)) == []


# --- what shall run


def test_the_installed_version_runs_where_the_wanted_one_is_not_usable() -> None:
    items = [known("a", "1", INSTALLED), known("a", "2", FAILED)]
    assert effective_version("a", "2", items) == "1"
    assert effective_version("a", "1", items) == "1"
    assert effective_version("a", "2", [*items[:1], known("a", "2", PENDING)]) == "2"
    assert effective_version("b", "1", items) is None
    older = known("a", "0", INSTALLED, timestamp=BEGIN - timedelta(days=1))
    assert effective_version("a", "2", [older, *items]) == "1"


def test_run_requests() -> None:
    desired = status(
        ("a", "2"),
        ("b", "1"),
        ("c", "1"),
        instances=(
            instance("a", priority=5, num_instances=2, labels=("gpu",)),
            instance("b"),
            instance("c", "user"),
            instance("unknown"),
        ),
        subjects=(DesiredSubject(identity=Identity(id="user"), type=SubjectType.USER, is_reported_from_unit=True),),
    )
    items = [known("a", "1", INSTALLED), known("a", "2", FAILED), known("b", "1", FAILED), known("c", "1", PENDING)]
    assert run_requests(desired, items) == [
        RunRequest(
            item_id="a",
            version="1",
            owner_id="owner",
            subject_id="s",
            priority=5,
            num_instances=2,
            labels=("gpu",),
        ),
        RunRequest(
            item_id="c",
            version="1",
            owner_id="owner",
            subject_id="user",
            subject_type=SubjectType.USER,
            is_unit_subject=True,
        ),
    ]


# --- does it work


def request(item_id: str, version: str, number: int = 1, **more: Any) -> RunRequest:
    return RunRequest(item_id=item_id, version=version, subject_id="s", num_instances=number, **more)


def verdict(requests: list[RunRequest], *statuses: UnitInstanceStatus, after_s: float = 0.0) -> tuple[bool, list[str]]:
    result = judge(requests, statuses, ["active"], elapsed_s=after_s, limits=LIMITS)
    return result.settled, [f"{item_id} {version}: {error}" for (item_id, version), error in result.failed.items()]


def test_settled_when_everything_runs() -> None:
    assert verdict([]) == (True, [])
    assert verdict([request("a", "1", 2)], runs("a", "1"), runs("a", "1", number=1)) == (True, [])


@pytest.mark.parametrize(
    "statuses",
    [
        [],
        [runs("a", "1")],
        [runs("a", "2", ACTIVATING)],
        [runs("a", "2", InstanceState.INACTIVE)],
        [runs("a", "2", BROKEN, node="")],
    ],
    ids=["nothing", "old version", "activating", "inactive", "no node yet"],
)
def test_waiting_until_time_is_up(statuses: list[UnitInstanceStatus]) -> None:
    assert verdict([request("a", "2")], *statuses, after_s=59) == (False, [])
    settled, failed = verdict([request("a", "2")], *statuses, after_s=600)
    assert settled and len(failed) == 1


def test_a_failed_instance_counts_when_nothing_is_on_its_way_any_more() -> None:
    requests = [request("a", "1"), request("b", "1")]
    broken = runs("a", "1", BROKEN, error=ERROR)
    assert verdict(requests, broken, runs("b", "1", ACTIVATING)) == (False, [])
    assert verdict(requests, broken, runs("b", "1")) == (True, ["a 1: crashed"])


def test_without_a_node_it_fails_after_a_while() -> None:
    unplaced = runs("a", "1", BROKEN, node="", error=ERROR)
    assert verdict([request("a", "1")], unplaced, after_s=60) == (True, ["a 1: crashed"])


def test_instances_of_inactive_subjects_and_components_everywhere() -> None:
    assert verdict([request("a", "1", is_unit_subject=True)]) == (True, [])
    everywhere = request("os", "1", 0, item_type=ItemType.COMPONENT)
    assert verdict([everywhere]) == (True, [])
    assert verdict([everywhere], runs("os", "1"), runs("os", "1", ACTIVATING, number=1)) == (False, [])


def test_only_new_versions_with_a_predecessor_are_given_up() -> None:
    items = [
        known("new", "1", PENDING),
        known("same", "1", INSTALLED),
        known("better", "1", INSTALLED),
        known("better", "2", PENDING),
    ]
    failed = {(entry.item_id, entry.version): FailedError("x") for entry in items}
    assert list(versions_to_give_up(failed, items)) == [("better", "2")]  # type: ignore[arg-type]


def test_time_up_without_a_word_of_the_node() -> None:
    result = judge([request("a", "1")], [], [], elapsed_s=600, limits=LIMITS)
    assert isinstance(result.failed["a", "1"], DeadlineError)


def test_phases() -> None:
    phase, seen = Phase.DOWNLOADING, []
    while phase is not Phase.NONE:
        seen.append(phase)
        phase = next_phase(phase, Outcome.DONE)
    assert " ".join(seen) == "downloading pending installing launching activating finalizing"
    assert next_phase(Phase.ACTIVATING, Outcome.GO_BACK) is Phase.LAUNCHING
