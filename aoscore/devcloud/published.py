"""The published JSON Schema of protocol v7 as a second check, with the contract's differences applied.

The schema file (`aos-unit-messages-v7.schema.json` of the AosEdge protocol description) is not part of this package:
`serve --schema FILE` or the variable AOSCORE_UNIT_MESSAGES_SCHEMA names it. Each difference of cloud-protocol-v7 §8
that matters to a validator is one entry of `DIFFERENCES`, in favour of what AosCore 9.1 does.
"""

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema

from aoscore.common.errors import InvalidArgumentError

VARIABLE = "AOSCORE_UNIT_MESSAGES_SCHEMA"

Definitions = dict[str, Any]


def _rename_required(definition: str, old: str, new: str | None) -> Callable[[Definitions], None]:
    def change(definitions: Definitions) -> None:
        required = definitions[definition]["required"]
        required.remove(old)
        if new is not None:
            required.append(new)

    return change


def _set(definition: str, member: str, schema: Any) -> Callable[[Definitions], None]:
    def change(definitions: Definitions) -> None:
        definitions[definition]["properties"][member] = schema

    return change


def _add_values(definition: str, member: str, *values: str) -> Callable[[Definitions], None]:
    def change(definitions: Definitions) -> None:
        schema = definitions[definition]["properties"][member]
        schema = next((part for part in schema.get("anyOf", []) if "enum" in part), schema)
        schema["enum"] = [*schema["enum"], *values]

    return change


def _each(*changes: Callable[[Definitions], None]) -> Callable[[Definitions], None]:
    def change(definitions: Definitions) -> None:
        for one in changes:
            one(definitions)

    return change


# Formats (D7, D8, D13) are not asserted by the validator; D14-D17, D19, D21-D25 need no change of the schema.
DIFFERENCES: dict[str, Callable[[Definitions], None]] = {
    "D1": _rename_required("AosNodeState", "connected", "isConnected"),
    "D2": _set("AosAlertResourceAllocateV7", "tag", {"const": "resourceAllocateAlert"}),
    "D3": _rename_required("AosAlertUpdateItemInstanceV7", "subjectId", "subject"),
    "D4": _rename_required("AosEnvVarInstanceStatusV7", "subjectId", "subject"),
    "D5": _add_values("AosPushLogV7", "status", "error"),
    "D6": _each(
        _set("AosUnitSecretsDataV7", "version", {"type": "string"}),
        _set("AosUnitSecretsDataV7", "nodes", {"type": "array", "items": {"$ref": "#/$defs/AosNodeSecretV7"}}),
    ),
    "D9": _each(
        _rename_required("AosUpdateItemBlobInfo", "decryptInfo", None),
        _rename_required("AosUpdateItemBlobInfo", "signInfo", None),
    ),
    "D10": _add_values("AosDecryptInfo", "blockAlg", "AES128/CBC/pkcs7", "AES192/CBC/pkcs7"),
    "D11": _set("AosSignInfo", "alg", {"type": "string", "pattern": "^(RSA|EC)/SHA(256|384|512)(/(PKCS1v1_5|PSS))?$"}),
    "D12": _add_values("AosIdentity", "type", "fleet", "node-subject"),
    "D18": _set("AosDesiredInstanceInfo", "numInstances", {"type": "integer", "minimum": 0}),
    "D20": _each(
        *(
            _each(
                _rename_required(rule, "minTimeout", None),
                _set(rule, "minTimeout", {"type": ["number", "string"]}),
            )
            for rule in ("AlertRulePercents", "AlertRulePercentsOfDisk", "AlertRulePoints")
        )
    ),
}


class PublishedSchema:
    """Validates `data` of one message against the published definition of its type, differences applied."""

    def __init__(self, schema: dict[str, Any]) -> None:
        whole = copy.deepcopy(schema)
        for apply in DIFFERENCES.values():
            apply(whole["$defs"])
        mapping = whole["properties"]["data"]["discriminator"]["mapping"]
        self._validators = {
            name: jsonschema.Draft202012Validator({"$ref": reference, "$defs": whole["$defs"]})
            for name, reference in mapping.items()
        }

    @classmethod
    def load(cls, path: Path | None) -> "PublishedSchema | None":
        """The schema of the file `path`, or of the one the environment names; None without either.

        Raises:
            InvalidArgumentError: the file is not the schema of protocol v7.
        """
        name = path or os.environ.get(VARIABLE)
        if not name:
            return None
        try:
            return cls(json.loads(Path(name).read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError) as error:
            raise InvalidArgumentError(f"{name} is not the published schema of protocol v7: {error!r}") from error

    def problems(self, data: Any) -> list[str]:
        """What the published schema finds wrong with the `data` of a message (either direction)."""
        validator = self._validators.get(str(data.get("messageType")) if isinstance(data, dict) else "")
        if validator is None:
            return ["messageType: not in the published schema"]
        return [
            f"{'.'.join(str(step) for step in error.absolute_path) or '(message)'}: {error.message[:300]}"
            for error in validator.iter_errors(data)
        ]
