"""What we read: tolerant as the contract says (§4.1, §8), and clear about what cannot be read."""

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aoscore.cm.communication import envelope
from aoscore.cm.communication.envelope import EnvelopeError, Received, decode
from aoscore.cm.communication.messages import (
    FROM_CLOUD,
    BlobUrls,
    CertType,
    DesiredStatus,
    Identity,
    IssuedUnitCertificates,
    Nack,
    NodeConfig,
    OverrideEnvVars,
    PercentRule,
    RenewCertificatesNotification,
    RequestLog,
    StartProvisioningRequest,
    StateAcceptance,
    StateResult,
    UnitConfig,
    UpdateState,
    UploadType,
)
from aoscore.cm.communication.reader import parse_time
from aoscore.common.config import Duration
from aoscore.common.errors import InvalidArgumentError, NotSupportedError
from aoscore.common.types import ItemType

SYSTEM = "unit-0042"


def receive(data: Any, **header: Any) -> Received:
    document = {"header": {"version": 7, "systemId": SYSTEM, "txn": "t1", **header}, "data": data}
    return decode(json.dumps(document), system_id=SYSTEM)


def read(data: Any) -> Any:
    received = receive(data)
    assert received.error is None, received.error
    return received.message


DESIRED: dict[str, Any] = {
    "messageType": "desiredStatus",
    "nodes": [{"item": {"codename": "node-main"}, "state": "provisioned"}],
    "items": [
        {
            "item": {"id": "i1", "type": "service"},
            "version": "1.2.0",
            "owner": {"id": "o1"},
            "indexDigest": "sha256:" + "1" * 64,
        }
    ],
    "instances": [
        {"item": {"id": "i1"}, "subject": {"id": "s1"}, "priority": 10, "numInstances": 2, "labels": ["gpu"]}
    ],
    "subjects": [{"identity": {"id": "s1"}, "type": "group", "isReportedFromUnit": False}],
    "certificates": [{"certificate": "MIIC", "fingerprint": "ab"}],
    "certificateChains": [{"name": "c", "fingerprints": ["ab"]}],
}


def test_desired_status() -> None:
    message = read(DESIRED)
    assert isinstance(message, DesiredStatus)
    assert message.items is not None and message.instances is not None
    (item,) = message.items
    assert (item.item_id, item.item_type, item.version) == ("i1", ItemType.SERVICE, "1.2.0")
    (instance,) = message.instances
    assert (instance.num_instances, instance.priority, instance.labels) == (2, 10, ("gpu",))
    assert message.certificates[0].certificate == b"\x30\x82\x02"
    assert message.unit_config is None


def test_desired_status_is_stored_in_contract_form() -> None:
    message = read(DESIRED)
    stored = envelope.to_json(message)
    assert json.loads(stored) == DESIRED
    assert envelope.from_json(DesiredStatus, stored, "stored")[0] == message


def test_names_in_any_case_nulls_and_texts_for_numbers() -> None:
    message = receive(
        {
            "MESSAGETYPE": "desiredStatus",
            "Items": None,
            "INSTANCES": [
                {"ITEM": {"ID": "i1"}, "subject": {"Id": "s1", "type": None}, "NumInstances": "3", "priority": 2.0}
            ],
            "unknown": {"x": 1},
        },
        VERSION="7",
    ).message
    assert isinstance(message, DesiredStatus)
    assert message.items is None
    assert message.instances is not None
    assert (message.instances[0].num_instances, message.instances[0].priority) == (3, 2)


def test_absent_number_of_instances_is_one_and_zero_is_zero() -> None:
    entry = {"item": {"id": "i"}, "subject": {"id": "s"}}
    message = read({"messageType": "desiredStatus", "instances": [entry, {**entry, "numInstances": 0}]})
    assert [instance.num_instances for instance in message.instances] == [1, 0]


def test_a_bad_element_is_left_out_and_reported() -> None:
    received = receive(
        {
            "messageType": "desiredStatus",
            "items": [{"item": {"id": "i1", "type": "service"}}, *DESIRED["items"]],
            "certificates": [{"certificate": "!", "fingerprint": "x"}],
            "subjects": [{"identity": {"id": "s"}, "type": "crowd"}],
        }
    )
    assert isinstance(received.message, DesiredStatus)
    assert received.message.items is not None
    assert [item.item_id for item in received.message.items] == ["i1"]
    assert [problem.path for problem in received.problems] == [
        "items[0].owner",
        "subjects[0].type",
        "certificates[0].certificate",
    ]


def test_unit_config_with_all_members_and_all_duration_forms() -> None:
    node = {
        "version": "1.0.0",
        "node": {"codename": "n1"},
        "nodeGroupSubject": {"codename": "main"},
        "alertRules": {
            "ram": {"minThreshold": 10, "maxThreshold": "20.5", "minTimeout": "PT1M30S"},
            "cpu": {"minThreshold": 1.5, "maxThreshold": 2, "minTimeout": 0.5},
            "partitions": [{"name": "p", "minThreshold": 1, "maxThreshold": 2, "minTimeout": "1m5s"}],
            "download": {"minThreshold": 1, "maxThreshold": 2, "minTimeout": "7"},
        },
        "resourceRatios": {"cpu": 50, "ram": 25.5},
        "labels": ["a"],
        "priority": 3,
    }
    config = read(
        {"messageType": "desiredStatus", "unitConfig": {"formatVersion": "1", "version": "2.0.0", "nodes": [node]}}
    ).unit_config
    rules = config.nodes[0].alert_rules
    assert rules.ram == PercentRule(min_threshold=10.0, max_threshold=20.5, min_timeout=Duration(90))
    assert [rule.min_timeout for rule in (rules.cpu, rules.partitions[0], rules.download)] == [0.5, 65.0, 7.0]
    assert config.nodes[0].resource_ratios.ram == 25.5
    assert envelope.from_json(UnitConfig, envelope.to_json(config), "file")[0] == config


def test_unit_config_is_written_in_the_contract_s_order() -> None:
    written = envelope.to_json(
        UnitConfig(
            format_version="1",
            version="2.0.0",
            nodes=(NodeConfig(node=Identity.of_codename("n1"), node_group_subject=Identity.of_codename("main")),),
        )
    )
    assert written == (
        b'{"formatVersion":"1","version":"2.0.0","nodes":[{"node":{"codename":"n1"},'
        b'"nodeGroupSubject":{"codename":"main"},"priority":0}]}'
    )


def test_a_bad_unit_config_is_left_out_and_the_member_named() -> None:
    received = receive({**DESIRED, "unitConfig": {"version": {"major": 1}}})
    assert isinstance(received.message, DesiredStatus) and received.message.unit_config is None
    assert [str(problem) for problem in received.problems] == ["unitConfig.version: text expected, got an object"]


def test_blob_urls() -> None:
    message = read(
        {
            "messageType": "blobUrls",
            "correlationId": "c1",
            "items": [
                {
                    "digest": "sha256:00",
                    "urls": ["https://x/1"],
                    "sha256": "57" * 32,
                    "size": 1040,
                    "decryptInfo": {
                        "blockAlg": "AES256/CBC/pkcs7",
                        "blockIv": "AAECAwQFBgcICQ\r\noLDA0ODw==",
                        "blockKey": "AAECAwQFBgcICQoLDA0ODw==",
                    },
                    "signInfo": {
                        "chainName": "sp-1",
                        "alg": "RSA/SHA256",
                        "value": "c2ln",
                        "trustedTimestamp": "2026-02-28T12:00:00+02:00",
                        "ocspValues": ["x" * 2000],
                    },
                },
                {"digest": "sha256:01", "urls": []},
            ],
        }
    )
    assert isinstance(message, BlobUrls)
    (blob,) = message.items
    assert blob.decrypt_info is not None and blob.sign_info is not None
    assert blob.decrypt_info.block_iv == bytes(range(16))
    assert blob.sign_info.trusted_timestamp == datetime(2026, 2, 28, 10, tzinfo=UTC)
    assert "AAEC" not in repr(message) and repr(bytes(range(16))) not in repr(message)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2026-03-01T08:16:00Z", "2026-03-01T08:16:00"),
        ("2026-03-01T08:16:00", "2026-03-01T08:16:00"),
        ("2026-03-01T08:16:00+00:00", "2026-03-01T08:16:00"),
        ("2026-03-01T08:16:00.5+02:00", "2026-03-01T06:16:00.500000"),
        ("2026-03-01T08:16:00.123456789-0130", "2026-03-01T09:46:00.123456"),
    ],
)
def test_times(text: str, expected: str) -> None:
    assert parse_time(text) == datetime.fromisoformat(expected).replace(tzinfo=UTC)


@pytest.mark.parametrize("text", ["", "yesterday", "2026-13-01T00:00:00Z", "2026-03-01"])
def test_bad_times(text: str) -> None:
    with pytest.raises(InvalidArgumentError, match="not a time"):
        parse_time(text)


def test_secrets_of_both_layouts() -> None:
    """D6: the field sends a text and a list, the schema has a number and one object."""
    certificates = [
        {"type": "iam", "node": {"codename": "n1"}, "serial": "0A"},
        {"node": {"codename": "n1"}},
        {"type": "azure-iot", "node": {"codename": "n1"}},  # D15
    ]
    field = {"version": "1.0", "nodes": [{"node": {"codename": "n1"}, "secret": "hush"}]}
    schema = {"version": 7, "nodes": {"node": {"codename": "n1"}, "secret": "hush"}}
    for secrets, version in ((field, "1.0"), (schema, "7")):
        received = receive(
            {"messageType": "renewCertificatesNotification", "certificates": certificates, "unitSecrets": secrets}
        )
        message = received.message
        assert isinstance(message, RenewCertificatesNotification)
        assert [certificate.type for certificate in message.certificates] == [CertType.IAM, CertType.OFFLINE]
        assert [problem.path for problem in received.problems] == ["certificates[2].type"]
        assert message.unit_secrets.version == version
        assert message.unit_secrets.nodes[0].secret == "hush"
        assert "hush" not in repr(message)


def test_the_other_messages_from_the_cloud() -> None:
    ident = {"item": {"id": "i"}, "subject": {"id": "s"}, "instance": 2}
    log = read(
        {
            "messageType": "requestLog",
            "correlationId": "c",
            "logType": "crashLog",
            "filter": {"from": "2026-03-01T08:16:00Z", "nodeIds": [{"codename": "n1"}], "item": {"id": "i"}},
            "uploadOptions": {"type": "wss"},
        }
    )
    assert isinstance(log, RequestLog) and log.upload_options is not None
    assert log.filter.from_ == datetime(2026, 3, 1, 8, 16, tzinfo=UTC)
    assert log.upload_options.type is UploadType.WSS
    acceptance = read({"messageType": "stateAcceptance", **ident, "checksum": "ab", "result": "rejected"})
    assert isinstance(acceptance, StateAcceptance) and acceptance.result is StateResult.REJECTED
    state = read({"messageType": "updateState", **ident, "stateChecksum": "ab", "state": "text"})
    assert isinstance(state, UpdateState) and state.instance == 2
    override = read(
        {
            "messageType": "overrideEnvVars",
            "items": [{"item": {"id": "i"}, "variables": [{"name": "A", "value": 5, "ttl": "2027-01-01T00:00:00Z"}]}],
        }
    )
    assert isinstance(override, OverrideEnvVars)
    assert override.items[0].instance is None and override.items[0].variables[0].value == "5"
    certificates = [{"node": {"codename": "n"}, "certificateChain": "pem"}]
    issued = read({"messageType": "issuedUnitCertificates", "certificates": certificates})
    assert isinstance(issued, IssuedUnitCertificates) and issued.certificates[0].type is CertType.OFFLINE
    start = read({"messageType": "startProvisioningRequest", "node": {"codename": "n2"}, "password": "hush"})
    assert isinstance(start, StartProvisioningRequest) and "hush" not in repr(start)
    assert read({"messageType": "nack"}) == Nack(retry_after=500)


@pytest.mark.parametrize(
    ("data", "path"),
    [
        (
            {"messageType": "issuedUnitCertificates", "certificates": [{"node": {}, "certificateChain": "pem"}]},
            "certificates[0]",
        ),
        (
            {
                "messageType": "renewCertificatesNotification",
                "certificates": [{"node": {"id": "n"}}],
                "unitSecrets": {},
            },
            "certificates[0]",
        ),
        (
            {
                "messageType": "renewCertificatesNotification",
                "certificates": [],
                "unitSecrets": {"nodes": [{"node": {}, "secret": "hush"}]},
            },
            "unitSecrets.nodes[0]",
        ),
    ],
)
def test_what_is_for_no_node_is_left_out(data: dict[str, Any], path: str) -> None:
    """IAM takes a call without a node for one to the Main Node."""
    received = receive(data)
    assert received.message is not None
    (problem,) = received.problems
    assert problem.path == path and "hush" not in problem.text


@pytest.mark.parametrize("word", ItemType)
def test_every_kind_of_identity_is_read(word: ItemType) -> None:
    """The schema lacks some of them (D12)."""
    status = read(
        {"messageType": "desiredStatus", "instances": [{"item": {"id": "i", "type": word}, "subject": {"id": "s"}}]}
    )
    assert status.instances[0].item == Identity(id="i", type=word)


def test_an_unknown_word_in_an_identity_counts_as_absent() -> None:
    received = receive(
        {
            "messageType": "desiredStatus",
            "instances": [{"item": {"id": "i", "type": "gadget"}, "subject": {"id": "s"}}],
        }
    )
    assert isinstance(received.message, DesiredStatus) and received.message.instances is not None
    assert received.message.instances[0].item == Identity(id="i")
    assert len(received.problems) == 1


@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        (b"{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[]", "not an object"),
        (b"[" * 100_000, "not JSON"),
        (b'{"data": {}}', "no header"),
        (b'{"header": {"version": 7, "systemId": "unit-0042"}}', "no data"),
        (b'{"header": {"version": 6, "systemId": "unit-0042"}, "data": {}}', "version 6"),
        (b'{"header": {"version": 7, "systemId": "other"}, "data": {}}', "other"),
        (b'{"header": {"version": 7}, "data": {}}', "another system"),
    ],
)
def test_no_envelope(frame: bytes, reason: str) -> None:
    with pytest.raises(EnvelopeError, match=reason):
        decode(frame, system_id=SYSTEM)


@pytest.mark.parametrize("kind", [None, 5, "unitStatus", "brandNew"])
def test_unknown_types_have_a_txn_to_acknowledge(kind: object) -> None:
    received = receive({"messageType": kind})
    assert received.txn == "t1" and isinstance(received.error, NotSupportedError)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["id", "item", "items", "nodes", "node", "codename", "type", "filter", "urls", "instances"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(st.sampled_from(sorted(FROM_CLOUD)), st.dictionaries(st.sampled_from(["items", "nodes", "node"]), anything))
def test_hostile_data_is_refused_with_our_own_errors_only(kind: str, data: dict[str, Any]) -> None:
    received = receive({**data, "messageType": kind})
    assert (received.message is None) != (received.error is None)
