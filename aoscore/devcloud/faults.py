"""Faults that a test asks the cloud to commit: each rule names what goes wrong, where, and how often.

| kind | where it acts | effect |
| --- | --- | --- |
| `silence` | a message type from the Unit | neither acked nor answered |
| `nack` | a message type from the Unit | nack with `retry_after_ms` instead of ack |
| `delay` | a message type from the Unit, `blob`, `discovery`, `log` | the answer comes `seconds` later |
| `drop_connection` | a message type from the Unit, `blob`, `discovery`, `log` | the TCP connection is cut, no answer |
| `malformed_json` | a message type to the Unit | a frame that is no JSON is sent instead |
| `text_frame` | a message type to the Unit | sent as a text frame, which AosCore 9.1 ignores |
| `duplicate` | a message type to the Unit | sent twice with the same txn |
| `wrong_digest` | `blobUrls` | `sha256` of another file |
| `bad_signature` | `blobUrls` | one bit of the signature is flipped |
| `unsigned` | `blobUrls` | no sign info |
| `truncated_blob` | `blob` | the connection is cut after `size_bytes` bytes of the body |
| `corrupt_blob` | `blob` | one bit of the body is flipped |
| `http_status` | `blob`, `discovery`, `websocket`, `log` | answered with `status` |
"""

import msgspec

from aoscore.common.errors import InvalidArgumentError

KINDS = frozenset(
    {
        "silence",
        "nack",
        "delay",
        "drop_connection",
        "malformed_json",
        "text_frame",
        "duplicate",
        "wrong_digest",
        "bad_signature",
        "unsigned",
        "truncated_blob",
        "corrupt_blob",
        "http_status",
    }
)
BLOB = "blob"
DISCOVERY = "discovery"
WEBSOCKET = "websocket"
LOG = "log"


class Fault(msgspec.Struct, forbid_unknown_fields=True):
    """One rule.

    `on`: a message type, or `blob`, `discovery`, `websocket`, `log`; "*" is any. `unit`: system id, "*" is any.
    `digest`: restricts blob and blobUrls faults to one blob. `times`: how often it acts, 0 = until removed.
    """

    kind: str
    on: str = "*"
    unit: str = "*"
    digest: str = "*"
    times: int = 1
    seconds: float = 1.0
    status: int = 503
    size_bytes: int = 0
    retry_after_ms: int = 500


class Faults:
    """The active rules, oldest first."""

    def __init__(self, rules: list[Fault] | None = None) -> None:
        self._rules: list[Fault] = []
        for rule in rules or []:
            self.add(rule)

    def add(self, rule: Fault) -> None:
        """Activate a rule.

        Raises:
            InvalidArgumentError: unknown kind.
        """
        if rule.kind not in KINDS:
            raise InvalidArgumentError(f"fault {rule.kind!r} is none of {', '.join(sorted(KINDS))}")
        self._rules.append(rule)

    def clear(self) -> None:
        """Forget every rule."""
        self._rules.clear()

    def active(self) -> list[Fault]:
        """The rules that still act."""
        return list(self._rules)

    def take(self, kind: str, *, on: str, unit: str = "*", digest: str = "*") -> Fault | None:
        """The first rule of this kind that matches, counted as used; None when nothing is to go wrong.

        A caller that does not know the unit or digest passes "*", which matches every rule.
        """
        for rule in self._rules:
            if (
                rule.kind == kind
                and rule.on in ("*", on)
                and (unit == "*" or rule.unit in ("*", unit))
                and (digest == "*" or rule.digest in ("*", digest))
            ):
                if rule.times == 1:
                    self._rules.remove(rule)
                elif rule.times > 1:
                    rule.times -= 1
                return rule
        return None
