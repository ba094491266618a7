import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aoscore.common.errors import AosError, FailedError, InvalidArgumentError
from aoscore.iam.identhandler.visprotocol import (
    SUBJECTS_PATH,
    VIN_PATH,
    Answer,
    Notification,
    VisSession,
    to_subjects,
    to_text,
    unwrap,
)


def session() -> VisSession:
    numbers = iter(range(100))
    return VisSession(lambda: f"id{next(numbers)}")


def frame(**members: Any) -> bytes:
    return json.dumps({"timestamp": 1, **members}).encode()


def subscribed(subscription_id: str = "0") -> VisSession:
    vis = session()
    request_id, _ = vis.subscribe(SUBJECTS_PATH)
    answer = vis.receive(frame(action="subscribe", requestId=request_id, subscriptionId=subscription_id))
    assert answer == Answer(request_id, None)
    return vis


def test_requests() -> None:
    vis = session()
    assert vis.get(VIN_PATH) == ("id0", f'{{"action":"get","requestId":"id0","path":"{VIN_PATH}"}}')
    assert json.loads(vis.subscribe(SUBJECTS_PATH)[1]) == {
        "action": "subscribe",
        "requestId": "id1",
        "path": SUBJECTS_PATH,
    }
    assert json.loads(vis.unsubscribe_all()) == {"action": "unsubscribeAll", "requestId": "id2"}


@pytest.mark.parametrize("value", ["VIN", {VIN_PATH: "VIN"}])
def test_value_as_it_is_or_under_its_path(value: Any) -> None:
    vis = session()
    vis.get(VIN_PATH)
    assert vis.receive(frame(action="get", requestId="id0", value=value)) == Answer("id0", "VIN")
    assert vis.receive(frame(action="get", requestId="id0", value=value)) is None, "a second answer is nobody's"


@pytest.mark.parametrize(
    ("members", "failure"),
    [
        ({"action": "get", "error": {"number": 404, "message": "not found"}}, "404 not found"),
        ({"action": "get", "error": {"number": 400, "reason": "bad", "message": ""}}, "400 bad"),
        ({"action": "set", "value": "x"}, "as 'set'"),
    ],
)
def test_answers_that_are_failures(members: dict[str, Any], failure: str) -> None:
    vis = session()
    vis.get(VIN_PATH)
    answer = vis.receive(frame(requestId="id0", **members))
    assert isinstance(answer, Answer) and failure in answer.failure and VIN_PATH in answer.failure


def test_subscription_without_id_is_a_failure() -> None:
    vis = session()
    vis.subscribe(SUBJECTS_PATH)
    answer = vis.receive(frame(action="subscribe", requestId="id0"))
    assert isinstance(answer, Answer) and "no id" in answer.failure


def test_notifications_of_our_subscription_only() -> None:
    vis = subscribed("0")
    assert vis.receive(frame(action="subscription", subscriptionId="0", value=["a"])) == Notification(["a"])
    wrapped = {SUBJECTS_PATH: ["b"]}
    assert vis.receive(frame(action="subscription", subscriptionId="0", value=wrapped)) == Notification(["b"])
    assert vis.receive(frame(action="subscription", subscriptionId="1", value=["a"])) is None
    assert vis.receive(frame(action="subscription", value=["a"])) is None
    assert session().receive(frame(action="subscription", subscriptionId="0", value=["a"])) is None


def test_what_nobody_waits_for_any_more() -> None:
    vis = session()
    vis.get(VIN_PATH)
    vis.give_up("id0")
    vis.give_up("unknown")
    assert vis.receive(frame(action="get", requestId="id0", value="x")) is None


@given(
    st.binary()
    | st.recursive(
        st.none() | st.integers() | st.text(),
        lambda x: (
            st.lists(x)
            | st.dictionaries(st.sampled_from(["action", "requestId", "value", "error", "subscriptionId"]), x)
        ),
    ).map(lambda x: json.dumps(x).encode())
)
def test_any_frame_is_answered_or_refused(text: bytes) -> None:
    vis = subscribed()
    vis.get(VIN_PATH)
    try:
        vis.receive(text)
    except AosError as error:
        assert str(error)


def test_values() -> None:
    assert unwrap({"a": 1}, "b") == {"a": 1}
    assert to_text(" x ", VIN_PATH) == "x"
    for bad in ("", " ", 5, None, ["x"]):
        with pytest.raises(FailedError, match="VIN"):
            to_text(bad, VIN_PATH)
    assert to_subjects(["a", 5, "a", True]) == ("a", "5", "true")
    assert len(to_subjects([str(number) for number in range(65)])) == 65
    for bad in ("a", None, {"a": 1}):
        with pytest.raises(InvalidArgumentError):
            to_subjects(bad)
