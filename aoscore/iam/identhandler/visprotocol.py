"""Pure. Messages between IAM and the vehicle information service (iam.md §4.2, §4.3)."""

import uuid
from collections.abc import Callable
from typing import Any

import msgspec

from aoscore.common.config import from_json, to_json
from aoscore.common.errors import FailedError, InvalidArgumentError

VIN_PATH = "Attribute.Vehicle.VehicleIdentification.VIN"
UNIT_MODEL_PATH = "Attribute.Aos.UnitModel"
SUBJECTS_PATH = "Attribute.Aos.Subjects"


class Answer(msgspec.Struct, frozen=True):
    """The answer to the request with this id; `failure` says why there is no value."""

    request_id: str
    value: Any = None
    failure: str = ""


class Notification(msgspec.Struct, frozen=True):
    """A new value of what we have subscribed to."""

    value: Any


class _Error(msgspec.Struct, frozen=True):
    number: int = 0
    reason: str = ""
    message: str = ""


class _Message(msgspec.Struct, frozen=True, rename="camel"):
    action: str = ""
    request_id: str = ""
    subscription_id: str | None = None
    value: Any = None
    error: _Error | None = None


class VisSession:
    """One connection: which requests are open, which subscription is ours."""

    def __init__(self, new_id: Callable[[], str] = lambda: str(uuid.uuid4())) -> None:
        self._new_id = new_id
        self._open: dict[str, tuple[str, str]] = {}
        self._subscription: str | None = None

    def get(self, path: str) -> tuple[str, str]:
        """Id and text of a request for a value."""
        return self._request("get", path)

    def subscribe(self, path: str) -> tuple[str, str]:
        """Id and text of the request to be told of new values."""
        return self._request("subscribe", path)

    def unsubscribe_all(self) -> str:
        """Text of the good-bye, which has no answer that anybody waits for."""
        return to_json({"action": "unsubscribeAll", "requestId": self._new_id()}).decode()

    def give_up(self, request_id: str) -> None:
        """Nobody waits for this request any more."""
        self._open.pop(request_id, None)

    def receive(self, text: bytes) -> Answer | Notification | None:
        """What a frame means; None for what is not for us. Raises InvalidArgumentError for a frame without sense."""
        message = from_json(text, _Message, what="message of the VIS server")
        if message.action == "subscription":
            known = self._subscription is not None and message.subscription_id == self._subscription
            return Notification(unwrap(message.value, SUBJECTS_PATH)) if known else None
        action, path = self._open.pop(message.request_id, ("", ""))
        if not action:
            return None
        if message.error is not None:
            error = message.error
            failure = f"VIS server refuses {action} of {path}: {error.number} {error.message or error.reason}"
            return Answer(message.request_id, failure=failure)
        if message.action != action:
            return Answer(message.request_id, failure=f"VIS server answers {action} of {path} as {message.action!r}")
        if action == "subscribe":
            if not message.subscription_id:
                return Answer(message.request_id, failure=f"VIS server gives no id for the subscription to {path}")
            self._subscription = message.subscription_id
        return Answer(message.request_id, unwrap(message.value, path))

    def _request(self, action: str, path: str) -> tuple[str, str]:
        request_id = self._new_id()
        self._open[request_id] = action, path
        return request_id, to_json({"action": action, "requestId": request_id, "path": path}).decode()


def unwrap(value: Any, path: str) -> Any:
    """A value comes as it is, or as the member of an object that is named by its path."""
    return value[path] if isinstance(value, dict) and path in value else value


def to_text(value: Any, path: str) -> str:
    """A value that must be a text with something in it. Raises FailedError naming the path."""
    if not isinstance(value, str) or not value.strip():
        raise FailedError(f"VIS server gives no text for {path}")
    return value.strip()


def to_subjects(value: Any) -> tuple[str, ...]:
    """A list of subjects; elements become texts, a repeated one counts once. Raises InvalidArgumentError."""
    if not isinstance(value, list):
        raise InvalidArgumentError(f"VIS server gives no list for {SUBJECTS_PATH}")
    return tuple(dict.fromkeys(one if isinstance(one, str) else to_json(one).decode() for one in value))
