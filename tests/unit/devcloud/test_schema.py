"""The contract's tables as a validator: what real Units sent passes, every kind of mistake is found."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from aoscore.common.errors import InvalidArgumentError
from aoscore.devcloud import schema
from aoscore.devcloud.published import DIFFERENCES, PublishedSchema

NODE = {"codename": "main"}
INSTANCE = {"item": {"id": "item"}, "subject": {"id": "subject"}, "instance": 0}
TIME = "2026-03-01T08:15:30.250000Z"
DIGEST = "sha256:" + "0" * 64
SAMPLE = {"timestamp": TIME, "ram": 1, "cpu": 2, "download": 3, "upload": 4}
ERROR = {"aosCode": 1, "exitCode": 0, "message": ""}

# One message of each type that a Unit sends; unit statuses come from recordings.
FROM_UNIT: list[dict[str, Any]] = [
    {"messageType": "ack"},
    {"messageType": "nack", "retryAfter": 5},
    {
        "messageType": "requestBlobUrls",
        "correlationId": "1f1c5a34-94b1-4d0e-9a3e-5c6c5f8e0b03",
        "digests": [DIGEST],
    },
    {
        "messageType": "monitoringData",
        "nodes": [
            {
                "node": NODE,
                "nodeStates": [{"timestamp": TIME, "state": "provisioned", "isConnected": True}],
                "items": [SAMPLE],
            }
        ],
        "instances": [
            {
                **INSTANCE,
                "node": NODE,
                "itemStates": [{"timestamp": TIME, "state": "active"}],
                "items": [{**SAMPLE, "partitions": [{"name": "states", "usedSize": 1}]}],
            }
        ],
    },
    {
        "messageType": "alerts",
        "items": [
            {"timestamp": TIME, "tag": "systemAlert", "node": NODE, "message": "m"},
            {"timestamp": TIME, "tag": "coreAlert", "node": NODE, "coreComponent": "SM", "message": "m"},
            {
                "timestamp": TIME,
                "tag": "resourceAllocateAlert",
                **INSTANCE,
                "node": NODE,
                "deviceId": "camera",
                "message": "m",
            },
            {"timestamp": TIME, "tag": "systemQuotaAlert", "node": NODE, "parameter": "cpu", "value": 1},
            {"timestamp": TIME, "tag": "instanceQuotaAlert", **INSTANCE, "parameter": "cpu", "value": 1},
            {
                "timestamp": TIME,
                "tag": "downloadProgressAlert",
                "digest": DIGEST,
                "url": "http://x/",
                "downloadedBytes": 1,
                "totalBytes": 2,
                "state": "interrupted",
                "reason": "r",
                "errorInfo": ERROR,
            },
            {"timestamp": TIME, "tag": "updateItemInstanceAlert", **INSTANCE, "version": "1.0.0", "message": "m"},
        ],
    },
    {
        "messageType": "pushLog",
        "correlationId": "c",
        "node": NODE,
        "part": 1,
        "partsCount": 1,
        "content": "H4sI\r\nAAAA",
        "status": "error",
        "errorInfo": ERROR,
    },
    {"messageType": "newState", **INSTANCE, "stateChecksum": "0" * 56, "state": "s"},
    {"messageType": "stateRequest", **INSTANCE, "default": False},
    {"messageType": "overrideEnvVarsStatus", "statuses": [{**INSTANCE, "name": "A", "errorInfo": ERROR}]},
    {"messageType": "issueUnitCertificates", "requests": [{"type": "iam", "node": NODE, "csr": "pem"}]},
    {
        "messageType": "installUnitCertificatesConfirmation",
        "certificates": [{"type": "iam", "node": NODE, "serial": "00ff"}],
    },
    {"messageType": "startProvisioningResponse", "node": NODE, "csrs": [{"type": "cm", "csr": "pem"}]},
    {"messageType": "finishProvisioningResponse", "node": NODE},
    {"messageType": "deprovisioningResponse", "node": NODE, "errorInfo": ERROR},
]


@pytest.fixture(scope="session")
def published(repository: Path) -> PublishedSchema:
    loaded = PublishedSchema.load(repository / "tests/data/cloud/messages-v7.schema.json")
    assert loaded is not None
    return loaded


def recorded(repository: Path) -> list[dict[str, Any]]:
    lines = [
        line
        for path in sorted((repository / "tests/data/cloud").glob("cloud-session-*.jsonl"))
        for line in path.read_text().splitlines()
    ]
    return [json.loads(line)["message"] for line in lines]


def test_what_aoscore_9_1_sent_is_valid(repository: Path, published: PublishedSchema) -> None:
    messages = recorded(repository)
    types = {message["data"]["messageType"] for message in messages}
    assert types == {"ack", "unitStatus", "requestBlobUrls", "alerts", "monitoringData"}
    for message in messages:
        assert schema.header_problems(message["header"]) == []
        assert schema.from_unit_problems(message["data"]) == []
        assert published.problems(message["data"]) == []


@pytest.mark.parametrize("data", FROM_UNIT, ids=lambda data: data["messageType"])
def test_every_message_of_the_unit(data: dict[str, Any], published: PublishedSchema) -> None:
    assert schema.from_unit_problems(data) == []
    assert published.problems(data) == []


def test_every_type_is_sampled() -> None:
    assert {data["messageType"] for data in FROM_UNIT} | {"unitStatus"} == set(schema.FROM_UNIT)


@pytest.mark.parametrize("data", FROM_UNIT, ids=lambda data: data["messageType"])
def test_an_unknown_member_is_found(data: dict[str, Any]) -> None:
    assert any("tpyo" in problem for problem in schema.from_unit_problems({**data, "tpyo": 1}))


@pytest.mark.parametrize("data", FROM_UNIT, ids=lambda data: data["messageType"])
def test_a_missing_member_is_found(data: dict[str, Any]) -> None:
    optional = {"messageType", "retryAfter", "errorInfo", "instances"}
    for name in set(data) - optional:
        shorter = {key: value for key, value in data.items() if key != name}
        assert any(name in problem for problem in schema.from_unit_problems(shorter)), name


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("header", "version"), 6),
        (("header", "txn"), "not-a-uuid"),
        (("header", "createdAt"), "2026-03-01T08:15:30Z"),
        (("data", "nodes", 0, "state"), "sleeping"),
        (("data", "nodes", 0, "identity"), {"id": "main"}),
        (("data", "nodes", 0, "cpus"), []),
        (("data", "items", 0, "item"), {"id": "x"}),
        (("data", "instances", 0, "instances", 0, "stateChecksum"), "AAAA"),
        (("data", "isDeltaInfo"), "false"),
    ],
)
def test_a_wrong_value_is_found(repository: Path, path: tuple[Any, ...], value: Any) -> None:
    message = copy.deepcopy(recorded(repository)[0])
    place: Any = message
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    assert schema.header_problems(message["header"]) + schema.from_unit_problems(message["data"])


def test_a_full_status_has_all_parts_and_a_delta_only_some(repository: Path) -> None:
    full = recorded(repository)[0]["data"]
    part = {name: full[name] for name in ("messageType", "items")}
    assert schema.from_unit_problems({**part, "isDeltaInfo": True}) == []
    assert schema.from_unit_problems({**part, "isDeltaInfo": False})
    assert schema.from_unit_problems(part)


def test_a_message_of_the_other_direction_is_refused() -> None:
    assert schema.from_unit_problems({"messageType": "desiredStatus", "items": [], "instances": []})
    with pytest.raises(InvalidArgumentError, match="unitStatus"):
        schema.check_to_unit({"messageType": "unitStatus"})


def test_limits_of_aoscore_9_1_bind_the_cloud() -> None:
    def request(password: str) -> dict[str, Any]:
        return {
            "messageType": "deprovisioningRequest",
            "correlationId": "c",
            "node": NODE,
            "password": password,
        }

    schema.check_to_unit(request("x" * 64))
    with pytest.raises(InvalidArgumentError, match="password"):
        schema.check_to_unit(request("x" * 65))


def test_every_difference_changes_the_published_schema(repository: Path) -> None:
    original = json.loads((repository / "tests/data/cloud/messages-v7.schema.json").read_text())
    for name, apply in DIFFERENCES.items():
        changed = copy.deepcopy(original["$defs"])
        apply(changed)
        assert changed != original["$defs"], name


def test_a_file_that_is_not_the_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("{}")
    with pytest.raises(InvalidArgumentError, match=r"x\.json"):
        PublishedSchema.load(path)


def test_no_schema_without_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AOSCORE_UNIT_MESSAGES_SCHEMA", raising=False)
    assert PublishedSchema.load(None) is None
