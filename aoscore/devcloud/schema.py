"""What a protocol v7 message must look like, written down from the contract's tables (cloud-protocol-v7 §§3, 4, 6).

Objects are closed: a member that the contract does not name is an error, so that a misspelt optional member is found
and not silently ignored. Differences D1-D25 between the published schema and AosCore 9.1 are decided here in favour of
the code; a member that the published schema wants in addition (D1, D3, D4) is allowed. Limits of AosCore 9.1 (§7) bind
what the cloud sends, since a longer value voids the whole message there.

The published schema can be applied on top, see `published.py`.
"""

import json
from collections.abc import Mapping
from typing import Any

import jsonschema

from aoscore.common.errors import InvalidArgumentError

Schema = dict[str, Any]

TIME = {"type": "string", "pattern": r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z$"}
UUID4 = {"type": "string", "pattern": "^[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$"}
BASE64 = {"type": "string", "pattern": r"^[A-Za-z0-9+/\s]*={0,2}\s*$"}
DIGEST = {"type": "string", "pattern": "^sha256:[0-9a-f]{64}$"}
SHA3_224_HEX = {"type": "string", "pattern": "^[0-9a-f]{56}$"}
SHA3_256_HEX = {"type": "string", "pattern": "^[0-9a-f]{64}$"}
SERIAL_HEX = {"type": "string", "pattern": "^[0-9a-f]{0,40}$"}
SEMVER = {
    "type": "string",
    "maxLength": 32,
    "pattern": r"^(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)(-[0-9A-Za-z.-]+)?(\+[0-9A-Za-z.-]+)?$",
}
STRING: Schema = {"type": "string"}
BOOL: Schema = {"type": "boolean"}
INT: Schema = {"type": "integer"}
COUNT: Schema = {"type": "integer", "minimum": 0}
NUMBER: Schema = {"type": "number", "minimum": 0}


def text(max_length: int, min_length: int = 0) -> Schema:
    """A string with the length limits of contract §7."""
    return {"type": "string", "maxLength": max_length, "minLength": min_length}


def one_of(*values: str) -> Schema:
    """An enumeration of strings (case-sensitive)."""
    return {"enum": list(values)}


def array(items: Schema, max_items: int | None = None, min_items: int = 0) -> Schema:
    """A list of equal things."""
    schema: Schema = {"type": "array", "items": items, "minItems": min_items}
    if max_items is not None:
        schema["maxItems"] = max_items
    return schema


def record(members: Mapping[str, Schema]) -> Schema:
    """A closed object; a member name with a trailing `?` is optional."""
    return {
        "type": "object",
        "properties": {name.rstrip("?"): schema for name, schema in members.items()},
        "required": [name for name in members if not name.endswith("?")],
        "additionalProperties": False,
    }


IDENTITY_TYPE = one_of(
    "service", "component", "layer", "subject", "oem", "sp", "fleet", "node", "node-subject", "runtime"
)
_IDENTITY: dict[str, Schema] = {
    "id?": text(64, 1),
    "codename?": text(64, 1),
    "type?": IDENTITY_TYPE,
    "title?": text(64),
    "description?": STRING,
    "urn?": STRING,
}


def identity(*required: str) -> Schema:
    """An identity that must have the named members (§4.2)."""
    return record({(name.rstrip("?") if name.rstrip("?") in required else name): s for name, s in _IDENTITY.items()})


BY_ID = identity("id")
BY_CODENAME = identity("codename")
# Node and runtime of an instance that could not be placed: the member is there, its name is empty.
PLACE: Schema = {"anyOf": [BY_CODENAME, record({"codename": {"const": ""}})]}
ID_OR_CODENAME: Schema = {"anyOf": [BY_ID, BY_CODENAME]}
TYPED_ITEM: Schema = {"anyOf": [identity("id", "type"), identity("codename", "type")]}

ERROR_INFO = record({"aosCode": {"type": "integer", "minimum": 1, "maximum": 14}, "exitCode": COUNT, "message": STRING})
ITEM_STATE = one_of("unknown", "downloading", "pending", "installing", "installed", "removing", "removed", "failed")
INSTANCE_STATE = one_of("activating", "active", "inactive", "failed")
NODE_STATE = one_of("unprovisioned", "provisioned", "paused", "error")
CERTIFICATE_TYPE = one_of("offline", "online", "sm", "cm", "iam")

ARCH_INFO = record({"architecture": text(16, 1), "variant?": text(16)})
OS_INFO = record({"os": text(16, 1), "version?": STRING, "features?": array(text(64))})

INSTANCE: dict[str, Schema] = {"item": ID_OR_CODENAME, "subject": ID_OR_CODENAME, "instance": COUNT}
INSTANCE_BY_ID: dict[str, Schema] = {"item": BY_ID, "subject": BY_ID, "instance": COUNT}

SAMPLE = record(
    {
        "timestamp": TIME,
        "ram": COUNT,
        "cpu": COUNT,
        "download": COUNT,
        "upload": COUNT,
        "partitions?": array(record({"name": text(64, 1), "usedSize": COUNT})),
    }
)

UNIT_STATUS_NODE = record(
    {
        "identity": identity("codename", "title"),
        "nodeGroupSubject": BY_CODENAME,
        "maxDmips": COUNT,
        "physicalRam?": COUNT,
        "totalRam": COUNT,
        "osInfo": OS_INFO,
        "cpus?": array(
            record(
                {
                    "modelName": STRING,
                    "totalNumCores": COUNT,
                    "totalNumThreads": COUNT,
                    "archInfo": ARCH_INFO,
                    "maxDmips?": COUNT,
                }
            ),
            min_items=1,
        ),
        "attrs?": {"type": "object", "additionalProperties": STRING, "minProperties": 1},
        "partitions?": array(
            record({"name": text(64, 1), "path?": STRING, "types": array(text(32, 1)), "totalSize": COUNT}),
            min_items=1,
        ),
        "state": NODE_STATE,
        "isConnected": BOOL,
        "errorInfo?": ERROR_INFO,
        "runtimes?": array(
            record(
                {
                    "identity": BY_CODENAME,
                    "runtimeType": text(64, 1),
                    "archInfo": ARCH_INFO,
                    "osInfo": OS_INFO,
                    "maxDmips?": COUNT,
                    "allowedDmips?": COUNT,
                    "totalRam?": COUNT,
                    "allowedRam?": COUNT,
                    "maxInstances": COUNT,
                }
            ),
            min_items=1,
        ),
        "resources?": array(record({"name": text(64, 1), "sharedCount": COUNT}), min_items=1),
    }
)

_STATUS_PARTS: dict[str, Schema] = {
    "unitConfig": array(
        record({"version?": text(32, 1), "state": one_of("absent", "installed", "failed"), "errorInfo?": ERROR_INFO}), 2
    ),
    "nodes": array(UNIT_STATUS_NODE),
    "items": array(record({"item": TYPED_ITEM, "version": text(32), "state": ITEM_STATE, "errorInfo?": ERROR_INFO})),
    "instances": array(
        record(
            {
                "item": TYPED_ITEM,
                "subject": ID_OR_CODENAME,
                "version": text(32),
                "instances": array(
                    record(
                        {
                            "node": PLACE,
                            "runtime": PLACE,
                            "instance": COUNT,
                            "stateChecksum?": SHA3_224_HEX,
                            "state": INSTANCE_STATE,
                            "errorInfo?": ERROR_INFO,
                        }
                    )
                ),
            }
        )
    ),
    "subjects": array(BY_CODENAME),
}
# A full status carries all five parts, a delta only those that changed (§6.4).
UNIT_STATUS: Schema = {
    "if": {"properties": {"isDeltaInfo": {"const": True}}},
    "then": record(
        {"messageType": STRING, "correlationId?": STRING, "isDeltaInfo": {"const": True}}
        | {f"{name}?": schema for name, schema in _STATUS_PARTS.items()}
    ),
    "else": record({"messageType": STRING, "correlationId?": STRING, "isDeltaInfo": {"const": False}} | _STATUS_PARTS),
}


def _alert(tag: str, members: Mapping[str, Schema]) -> Schema:
    return {
        "if": {"properties": {"tag": {"const": tag}}},
        "then": record({"timestamp": TIME, "tag": STRING, **members}),
    }


_QUOTA: dict[str, Schema] = {"parameter": text(64, 1), "value": COUNT}
_ALERTS: dict[str, Mapping[str, Schema]] = {
    "systemAlert": {"node": BY_CODENAME, "message": STRING},
    "coreAlert": {"node": BY_CODENAME, "coreComponent": one_of("CM", "SM", "IAM", "MP"), "message": STRING},
    "resourceAllocateAlert": {**INSTANCE, "node": BY_CODENAME, "deviceId": STRING, "message": STRING},
    "systemQuotaAlert": {"node": BY_CODENAME, **_QUOTA},
    "instanceQuotaAlert": {**INSTANCE, **_QUOTA},
    "downloadProgressAlert": {
        "digest": DIGEST,
        "url": STRING,
        "downloadedBytes": COUNT,
        "totalBytes": COUNT,
        "state": one_of("started", "paused", "interrupted", "finished"),
        "reason?": STRING,
        "errorInfo?": ERROR_INFO,
    },
    "updateItemInstanceAlert": {**INSTANCE, "subjectId?": ID_OR_CODENAME, "version": STRING, "message": STRING},
}
ALERT: Schema = {
    "type": "object",
    "properties": {"tag": one_of(*_ALERTS)},
    "required": ["tag"],
    "allOf": [_alert(tag, members) for tag, members in _ALERTS.items()],
}

# Durations in a unit config: seconds, ISO 8601, or number and unit (D20, §4.4).
DURATION: Schema = {"anyOf": [{"type": "number", "minimum": 0}, {"type": "string", "pattern": r"^-?(P|\d)"}]}
_PERCENT_RULE: dict[str, Schema] = {"minThreshold": NUMBER, "maxThreshold": NUMBER, "minTimeout?": DURATION}
_POINT_RULE = record({"minThreshold": COUNT, "maxThreshold": COUNT, "minTimeout?": DURATION})
UNIT_CONFIG = record(
    {
        "formatVersion?": STRING,
        "version": SEMVER,
        "nodes": array(
            record(
                {
                    "version?": STRING,
                    "node?": BY_CODENAME,
                    "nodeGroupSubject": BY_CODENAME,
                    "alertRules?": record(
                        {
                            "ram?": record(_PERCENT_RULE),
                            "cpu?": record(_PERCENT_RULE),
                            "partitions?": array(record({**_PERCENT_RULE, "name": text(64, 1)})),
                            "download?": _POINT_RULE,
                            "upload?": _POINT_RULE,
                        }
                    ),
                    "resourceRatios?": record({"cpu?": NUMBER, "ram?": NUMBER, "storage?": NUMBER, "state?": NUMBER}),
                    "labels?": array(text(64, 1), 4),
                    "priority?": COUNT,
                }
            )
        ),
    }
)

_TYPE_OPTIONAL = {"type?": CERTIFICATE_TYPE}
_FROM_UNIT: dict[str, Mapping[str, Schema]] = {
    "ack": {},
    "nack": {"retryAfter?": COUNT},
    "requestBlobUrls": {"correlationId": UUID4, "digests": array(DIGEST, 16, 1)},
    "monitoringData": {
        "nodes": array(
            record(
                {
                    "node": BY_CODENAME,
                    "nodeStates?": array(
                        record({"timestamp": TIME, "state": NODE_STATE, "isConnected": BOOL, "connected?": BOOL}),
                        min_items=1,
                    ),
                    "items": array(SAMPLE, 16),
                }
            )
        ),
        "instances?": array(
            record(
                {
                    **INSTANCE,
                    "node": BY_CODENAME,
                    "itemStates": array(record({"timestamp": TIME, "state": INSTANCE_STATE})),
                    "items": array(SAMPLE, 16),
                }
            ),
            min_items=1,
        ),
    },
    "alerts": {"items": array(ALERT, 16, 1)},
    "pushLog": {
        "correlationId": STRING,
        "node": BY_CODENAME,
        "part": COUNT,
        "partsCount": COUNT,
        "content": BASE64,
        "status": one_of("ok", "error", "empty", "absent"),
        "errorInfo?": ERROR_INFO,
    },
    "newState": {**INSTANCE, "stateChecksum": SHA3_224_HEX, "state": STRING},
    "stateRequest": {**INSTANCE, "default": BOOL},
    "overrideEnvVarsStatus": {
        "statuses": array(record({**INSTANCE, "subjectId?": ID_OR_CODENAME, "name": STRING, "errorInfo?": ERROR_INFO}))
    },
    "issueUnitCertificates": {
        "requests": array(record({"type": CERTIFICATE_TYPE, "node": BY_CODENAME, "csr": text(4096, 1)}), 80)
    },
    "installUnitCertificatesConfirmation": {
        "certificates": array(
            record({"type": CERTIFICATE_TYPE, "node": BY_CODENAME, "serial": SERIAL_HEX, "errorInfo?": ERROR_INFO})
        )
    },
    "startProvisioningResponse": {
        "node": BY_CODENAME,
        "errorInfo?": ERROR_INFO,
        "csrs": array(record({"type": CERTIFICATE_TYPE, "csr": text(4096, 1)})),
    },
    "finishProvisioningResponse": {"node": BY_CODENAME, "errorInfo?": ERROR_INFO},
    "deprovisioningResponse": {"node": BY_CODENAME, "errorInfo?": ERROR_INFO},
}
_NODE_ACTION: dict[str, Schema] = {"correlationId": STRING, "node": BY_CODENAME, "password": text(64)}
_FILTER: dict[str, Schema] = {"item?": BY_ID, "subject?": BY_ID, "instance?": COUNT}
_TO_UNIT: dict[str, Mapping[str, Schema]] = {
    "ack": {},
    "nack": {"retryAfter?": COUNT},
    "desiredStatus": {
        "nodes?": array(record({"item": BY_CODENAME, "state": one_of("provisioned", "paused")}), 16),
        "unitConfig?": UNIT_CONFIG,
        "items": array(
            record({"item": identity("id", "type"), "version": SEMVER, "owner": BY_ID, "indexDigest": DIGEST}), 64
        ),
        "instances": array(
            record(
                {
                    "item": BY_ID,
                    "subject": BY_ID,
                    "priority?": COUNT,
                    "numInstances": COUNT,
                    "labels?": array(text(64, 1), 4),
                }
            ),
            256,
        ),
        "subjects": array(
            record({"identity": BY_ID, "type": one_of("group", "user"), "isReportedFromUnit?": BOOL}), 64
        ),
        "certificates": array(record({"certificate": BASE64, "fingerprint": text(64, 1)}), 32),
        "certificateChains": array(record({"name": text(64, 1), "fingerprints": array(text(64, 1), 4, 1)}), 8),
    },
    "blobUrls": {
        "correlationId": STRING,
        "items": array(
            record(
                {
                    "digest": DIGEST,
                    "urls": array(text(4096, 1), 8, 1),
                    "sha256": SHA3_256_HEX,
                    "size": COUNT,
                    "decryptInfo?": record({"blockAlg": text(64), "blockIv": BASE64, "blockKey": BASE64}),
                    "signInfo?": record(
                        {
                            "chainName": text(64, 1),
                            "alg": text(64),
                            "value": BASE64,
                            "trustedTimestamp": TIME,
                            "ocspValues?": array(STRING),
                        }
                    ),
                }
            ),
            16,
        ),
    },
    "requestLog": {
        "correlationId": STRING,
        "logType": one_of("systemLog", "instanceLog", "crashLog"),
        "filter": record({"from?": TIME, "till?": TIME, "nodeIds?": array(BY_CODENAME), **_FILTER}),
        "uploadOptions?": record(
            {"type": one_of("https", "wss"), "url?": STRING, "bearerToken?": text(256), "bearerTokenTtl?": TIME}
        ),
    },
    "stateAcceptance": {
        **INSTANCE_BY_ID,
        "checksum": SHA3_224_HEX,
        "result": one_of("accepted", "rejected"),
        "reason": text(256),
    },
    "updateState": {**INSTANCE_BY_ID, "stateChecksum": SHA3_224_HEX, "state": text(65536)},
    "overrideEnvVars": {
        "items": array(
            record(
                {
                    **_FILTER,
                    "variables": array(record({"name": text(64, 1), "value": text(256), "ttl?": TIME}), 16),
                }
            ),
            256,
        )
    },
    "renewCertificatesNotification": {
        "certificates": array(
            record({**_TYPE_OPTIONAL, "node": BY_CODENAME, "serial?": SERIAL_HEX, "validTill?": TIME}), 80
        ),
        "unitSecrets": record(
            {"version": STRING, "nodes": array(record({"node": BY_CODENAME, "secret": text(64)}), 16)}
        ),
    },
    "issuedUnitCertificates": {
        "certificates": array(record({**_TYPE_OPTIONAL, "node": BY_CODENAME, "certificateChain": text(16384, 1)}), 80)
    },
    "startProvisioningRequest": _NODE_ACTION,
    "finishProvisioningRequest": {
        **_NODE_ACTION,
        "certificates": array(record({"type": CERTIFICATE_TYPE, "chain": text(16384, 1)}), 80),
    },
    "deprovisioningRequest": _NODE_ACTION,
}

HEADER = record({"version": {"const": 7}, "systemId": text(64, 1), "createdAt": TIME, "txn": UUID4})


def _validators(catalogue: Mapping[str, Mapping[str, Schema]]) -> dict[str, jsonschema.Draft202012Validator]:
    return {
        name: jsonschema.Draft202012Validator(
            record({"messageType": {"const": name}, "correlationId?": STRING, **members})
        )
        for name, members in catalogue.items()
    }


_HEADER_VALIDATOR = jsonschema.Draft202012Validator(HEADER)
FROM_UNIT = {
    **_validators(_FROM_UNIT),
    "unitStatus": jsonschema.Draft202012Validator(UNIT_STATUS),
}
TO_UNIT = _validators(_TO_UNIT)


def problems(validator: jsonschema.Draft202012Validator, value: Any) -> list[str]:
    """Every violation as `path: what is wrong`; of alternatives the one that came closest."""
    found = []
    for error in validator.iter_errors(value):
        best = jsonschema.exceptions.best_match([error]) or error
        path = ".".join(str(step) for step in best.absolute_path) or "(message)"
        found.append(f"{path}: {best.message[:300]}")
    return found


def header_problems(header: Any) -> list[str]:
    """What is wrong with a message header (§3.1)."""
    return problems(_HEADER_VALIDATOR, header)


def from_unit_problems(data: Any) -> list[str]:
    """What is wrong with the `data` of a message that the Unit sent."""
    return _data_problems(FROM_UNIT, data, "the Unit")


def to_unit_problems(data: Any) -> list[str]:
    """What is wrong with the `data` of a message for the Unit."""
    return _data_problems(TO_UNIT, data, "the cloud")


def _data_problems(catalogue: Mapping[str, jsonschema.Draft202012Validator], data: Any, sender: str) -> list[str]:
    if not isinstance(data, dict):
        return ["data: not an object"]
    validator = catalogue.get(str(data.get("messageType")))
    if validator is None:
        return [f"messageType: {data.get('messageType')!r} is no message that {sender} sends"]
    return problems(validator, data)


def check_to_unit(data: Mapping[str, Any]) -> None:
    """Refuses a message that must not go to a Unit.

    Raises:
        InvalidArgumentError: names the message type and every wrong member.
    """
    found = to_unit_problems(data)
    if found:
        raise InvalidArgumentError(f"message {data.get('messageType')} for the Unit is wrong: {'; '.join(found)}")


def canonical(value: Any) -> bytes:
    """Compact JSON text of a value, one spelling for equal values."""
    return json.dumps(value, separators=(",", ":"), sort_keys=True, ensure_ascii=False).encode()
