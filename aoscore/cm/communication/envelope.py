"""Header and data of a message to and from JSON (cloud-protocol §3.1, §4)."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, NamedTuple, TypeVar

import msgspec

from aoscore.cm.communication import messages
from aoscore.cm.communication.messages import FROM_CLOUD, PROTOCOL_VERSION, Message, Wire
from aoscore.cm.communication.reader import Problem, read
from aoscore.common.config import JSON_ERRORS, Duration, format_iso_duration
from aoscore.common.errors import AosError, InvalidArgumentError, NotSupportedError

W = TypeVar("W", bound=Wire)


class EnvelopeError(InvalidArgumentError):
    """The frame is not a message for us: no ack, no nack (§3.1)."""


class Received(NamedTuple):
    """A message whose envelope is fine. Either `message` or `error` is set; `problems` are parts that were left out."""

    txn: str
    message: Message | None
    problems: tuple[Problem, ...] = ()
    error: AosError | None = None


def format_time(time: datetime) -> str:
    """UTC with always six fraction digits (§4.3)."""
    return f"{time.astimezone(UTC).replace(tzinfo=None).isoformat(timespec='microseconds')}Z"


def _encode_other(value: object) -> object:
    if isinstance(value, Duration):
        return format_iso_duration(value)
    raise NotImplementedError(f"cannot write {type(value).__name__}")


def _write_times(value: Any) -> None:
    """Replace times by their text in what msgspec made, in place: monitoring data are large."""
    members = value.items() if isinstance(value, dict) else enumerate(value)
    for name, member in members:
        if isinstance(member, datetime):
            value[name] = format_time(member)
        elif isinstance(member, dict):
            _write_times(member)
        elif isinstance(member, tuple):
            value[name] = list(member)
            _write_times(value[name])


def to_document(value: Wire) -> dict[str, Any]:
    """The JSON object of a message or part, with times as the contract wants them; bytes stay bytes."""
    document: dict[str, Any] = msgspec.to_builtins(value, builtin_types=(datetime, bytes), enc_hook=_encode_other)
    _write_times(document)
    return document


def encode_document(document: dict[str, Any]) -> bytes:
    """What `to_document` made, as JSON."""
    return msgspec.json.encode(document)


def to_json(value: Wire) -> bytes:
    """A part of a message, or a message without its envelope, as JSON (unit config file, stored desired status)."""
    return msgspec.json.encode(to_document(value))


def from_json(struct: type[W], text: bytes | str, what: str) -> tuple[W, list[Problem]]:
    """Reads what `to_json` wrote, or the same document from another hand.

    Raises:
        InvalidArgumentError: not JSON or not such a document; the message starts with `what`.
    """
    try:
        return read(struct, msgspec.json.decode(text))
    except JSON_ERRORS as error:
        raise InvalidArgumentError(f"{what} is not JSON: {error}") from error
    except InvalidArgumentError as error:
        raise InvalidArgumentError(f"{what}: {error}") from error


def encode(message: Message, *, system_id: str, txn: str, created_at: datetime) -> bytes:
    """The frame of a message: header and data in the order the contract names."""
    return msgspec.json.encode(
        {
            "header": {
                "version": PROTOCOL_VERSION,
                "systemId": system_id,
                "createdAt": format_time(created_at),
                "txn": txn,
            },
            "data": to_document(message),
        }
    )


def _member(document: object, name: str) -> Any:
    if not isinstance(document, dict):
        raise EnvelopeError("message from the cloud is not an object")
    if name in document:
        return document[name]
    return next((member for key, member in document.items() if str(key).lower() == name.lower()), None)


def decode(frame: bytes | str, *, system_id: str, known: dict[str, type[Message]] = FROM_CLOUD) -> Received:
    """Reads a frame.

    Raises:
        EnvelopeError: not JSON, no header or data, other protocol version, other system: to be dropped without an ack.
            A message with a sound envelope whose data cannot be read is returned with `error` set.
    """
    try:
        document = msgspec.json.decode(frame)
    except JSON_ERRORS as error:
        raise EnvelopeError(f"message from the cloud is not JSON: {error}") from error
    header, data = _member(document, "header"), _member(document, "data")
    if not isinstance(header, dict) or not isinstance(data, dict):
        raise EnvelopeError("message from the cloud has no header or no data")
    version, system, txn = (_member(header, name) for name in ("version", "systemId", "txn"))
    if str(version) != str(PROTOCOL_VERSION):
        raise EnvelopeError(f"message from the cloud has protocol version {str(version)[:16]}, not {PROTOCOL_VERSION}")
    if system != system_id:
        raise EnvelopeError(f"message from the cloud is for another system: {str(system)[:64]!r}")
    txn = txn if isinstance(txn, str) else ""
    kind = _member(data, "messageType")
    struct = known.get(kind) if isinstance(kind, str) else None
    if struct is None:
        return Received(txn, None, (), NotSupportedError(f"unknown message from the cloud: {str(kind)[:64]!r}"))
    try:
        message, problems = read(struct, data)
    except InvalidArgumentError as error:
        return Received(txn, None, (), InvalidArgumentError(f"{kind} from the cloud: {error}"))
    return Received(txn, message, tuple(problems))


__all__ = ["EnvelopeError", "Received", "decode", "encode", "format_time", "from_json", "messages", "to_json"]
