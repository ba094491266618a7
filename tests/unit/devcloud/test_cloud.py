"""The decisions: registration, desired status, blob answers, states, renewal, nodes, logs."""

import base64
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509 import CertificateSigningRequestBuilder, Name, NameAttribute
from cryptography.x509.oid import NameOID

from aoscore.common.certs import load_certificates
from aoscore.common.errors import AlreadyExistsError, InvalidArgumentError, NotFoundError
from aoscore.devcloud import schema
from aoscore.devcloud.bundleconfig import BundleError, Identity
from aoscore.devcloud.bundles import Blob, ItemImages, stable_id
from aoscore.devcloud.ca import User, serial
from aoscore.devcloud.cloud import Cloud, merge_status, state_checksum
from aoscore.devcloud.faults import Fault, Faults
from aoscore.devcloud.seal import Sealed
from aoscore.devcloud.store import Store, Unit

UNIT = "unit-1"
ALICE = User("alice", "sp")
DIGEST = "sha256:" + "a" * 64
INDEX = "sha256:" + "b" * 64
ITEM_ID = stable_id(Identity(type="service", codename="hello"))


def csr(system_id: str = UNIT) -> str:
    name = Name([NameAttribute(NameOID.COMMON_NAME, system_id)])
    request = CertificateSigningRequestBuilder().subject_name(name)
    signed = request.sign(ec.generate_private_key(ec.SECP256R1()), hashes.SHA256())
    return signed.public_bytes(serialization.Encoding.PEM).decode()


def registration() -> dict[str, Any]:
    return {
        "hardware_id": UNIT,
        "system_uid": UNIT,
        "model_name": "demo",
        "model_version": "1.0",
        "provisioning_software": "aos-provisioning:5.5.0",
        "nodes": [
            {"id": "main", "type": "main-type", "attrs": {"MainNode": ""}},
            {"id": "second", "type": "second-type", "attrs": {}},
        ],
        "secure_data": json.dumps(
            {"version": "2.0.0", "nodes": {"main": "main-password", "second": "second-password"}}
        ),
        "online_public_csr": csr(),
        "offline_public_csr": csr(),
        "additional_csrs": [
            {"cert_type": cert_type, "csr": csr(), "node_id": node}
            for node, cert_type in (("main", "iam"), ("main", "cm"), ("second", "iam"), ("second", "sm"))
        ],
    }


@pytest.fixture
def unit(cloud: Cloud, store: Store) -> Unit:
    cloud.register(store, registration())
    return store.unit(UNIT)


def add_item(cloud: Cloud, store: Store, version: str = "1.0.0", **changes: Any) -> None:
    values: dict[str, Any] = {
        "item_id": ITEM_ID,
        "identity": Identity(type="service", codename="hello"),
        "version": version,
        "index_digest": INDEX,
        "min_instances": 2,
        "priority": 7,
        "labels": ["gpu"],
        "hostname": None,
        "default_state": "counter=0",
        "blobs": [Blob(DIGEST, 3, "application/x", Path("x"))],
    }
    sealed = {DIGEST: Sealed("c" * 64, 16, b"k" * 32, b"i" * 16, b"s" * 256)}
    cloud.add_bundle(store, ALICE, [ItemImages(**{**values, **changes})], sealed)


def handle(cloud: Cloud, store: Store, data: dict[str, Any]) -> list[dict[str, Any]]:
    """Handle a message of the Unit; both the message and its answers must fit the contract."""
    assert schema.from_unit_problems(data) == []
    answers = cloud.handle(store, store.unit(UNIT), data)
    for answer in answers:
        schema.check_to_unit(answer)
    return answers


# Registration


def test_a_registration_answers_all_certificates(cloud: Cloud, store: Store) -> None:
    answer = cloud.register(store, registration())
    assert answer["system_uid"] == UNIT
    chains = [answer["online_certificate"], answer["offline_certificate"]]
    chains += [entry["cert"] for entry in answer["additional_certs"]]
    assert all(load_certificates(chain.encode())[-1] == cloud.authority.root for chain in chains)
    issued = {(one.node_id, one.type) for one in store.certificates(store.unit(UNIT))}
    main = {("main", "online"), ("main", "offline"), ("main", "iam"), ("main", "cm")}
    assert issued == main | {("second", "iam"), ("second", "sm")}
    online = serial(load_certificates(answer["online_certificate"].encode())[0])
    offline = serial(load_certificates(answer["offline_certificate"].encode())[0])
    assert store.system_id_of_online_certificate(online) == UNIT
    assert store.system_id_of_online_certificate(offline) is None


def test_a_unit_is_registered_once_until_it_is_forgotten(cloud: Cloud, store: Store, unit: Unit) -> None:
    with pytest.raises(AlreadyExistsError, match=UNIT):
        cloud.register(store, registration())
    store.remove_unit(unit)
    cloud.register(store, registration())
    assert [one.system_id for one in store.units()] == [UNIT]


@pytest.mark.parametrize(
    "change",
    [
        {"system_uid": ""},
        {"system_uid": "unit-2"},
        {"nodes": "main"},
        {"secure_data": "{"},
        {"additional_csrs": [{"cert_type": "um", "csr": csr(), "node_id": "main"}]},
        {"additional_csrs": [{"cert_type": "iam"}]},
    ],
)
def test_a_malformed_registration_is_refused(cloud: Cloud, store: Store, change: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError):
        cloud.register(store, {**registration(), **change})


def test_passwords_are_not_kept_with_the_registration(store: Store, unit: Unit) -> None:
    (row,) = store._rows("SELECT registration FROM units")
    assert "main-password" not in row[0]


# Desired status


def test_nothing_assigned_is_said_with_empty_lists(cloud: Cloud, store: Store, unit: Unit) -> None:
    desired = cloud.desired_status(store, unit)
    schema.check_to_unit(desired)
    assert (desired["items"], desired["instances"]) == ([], [])
    assert "nodes" not in desired
    assert "unitConfig" not in desired
    assert len(desired["certificateChains"][0]["fingerprints"]) == len(desired["certificates"]) == 2


def test_an_assigned_item_is_desired_as_its_publisher_wants(cloud: Cloud, store: Store, unit: Unit) -> None:
    add_item(cloud, store)
    cloud.assign(store, "hello", UNIT, None, None)
    desired = cloud.desired_status(store, unit)
    (item,) = desired["items"]
    assert item["item"] == {"id": ITEM_ID, "type": "service"}
    assert (item["version"], item["indexDigest"]) == ("1.0.0", INDEX)
    assert desired["instances"] == [
        {
            "item": {"id": ITEM_ID},
            "subject": {"id": unit.subject_id},
            "priority": 7,
            "numInstances": 2,
            "labels": ["gpu"],
        }
    ]
    assert desired["subjects"] == [{"identity": {"id": unit.subject_id}, "type": "group", "isReportedFromUnit": False}]


def test_version_and_number_can_be_chosen(cloud: Cloud, store: Store, unit: Unit) -> None:
    for version in ("1.9.0", "1.10.0", "1.10.0-rc.1"):
        add_item(cloud, store, version)
    cloud.assign(store, "service/hello", unit.id, None, 5)
    desired = cloud.desired_status(store, unit)
    assert desired["items"][0]["version"] == "1.10.0"
    assert desired["instances"][0]["numInstances"] == 5
    cloud.assign(store, ITEM_ID, UNIT, "1.9.0", None)
    assert cloud.desired_status(store, unit)["items"][0]["version"] == "1.9.0"
    with pytest.raises(NotFoundError, match=r"2\.0\.0"):
        cloud.assign(store, "hello", UNIT, "2.0.0", None)
    cloud.unassign(store, "hello", UNIT)
    assert cloud.desired_status(store, unit)["items"] == []
    with pytest.raises(NotFoundError, match="not assigned"):
        cloud.unassign(store, "hello", UNIT)


def test_items_of_a_reported_subject_come_when_the_unit_reports_it(cloud: Cloud, store: Store, unit: Unit) -> None:
    add_item(cloud, store)
    cloud.assign(store, "hello", "subject:driver", None, 1)
    assert cloud.desired_status(store, unit)["instances"] == []
    status = {"messageType": "unitStatus", "isDeltaInfo": True, "subjects": [{"codename": "driver"}]}
    handle(cloud, store, status)
    desired = cloud.desired_status(store, store.unit(UNIT))
    assert [one["subject"] for one in desired["instances"]] == [{"id": "driver"}]
    assert {"identity": {"id": "driver"}, "type": "user", "isReportedFromUnit": True} in desired["subjects"]


def test_more_than_the_unit_can_take_is_refused(cloud: Cloud, store: Store, unit: Unit) -> None:
    for number in range(65):
        name = f"item-{number}"
        identity = Identity(type="service", codename=name)
        add_item(cloud, store, item_id=stable_id(identity), identity=identity)
        if number < 64:
            cloud.assign(store, name, UNIT, None, None)
    with pytest.raises(InvalidArgumentError, match="items"):
        cloud.assign(store, "item-64", UNIT, None, None)


def test_a_unit_config_is_sent_until_the_unit_reports_it(cloud: Cloud, store: Store, unit: Unit) -> None:
    config = {"formatVersion": "7", "version": "1.0.1", "nodes": [{"nodeGroupSubject": {"codename": "main-type"}}]}
    cloud.set_unit_config(store, unit, config)
    wanted = store.unit(UNIT)
    desired = cloud.desired_status(store, wanted)
    assert desired["unitConfig"] == config
    parts: dict[str, Any] = {"unitConfig": [{"version": "1.0.1", "state": "installed"}]}
    handle(cloud, store, {"messageType": "unitStatus", "isDeltaInfo": True, **parts})
    after = cloud.desired_status(store, store.unit(UNIT))
    assert "unitConfig" not in after
    assert cloud.desired_key(wanted, desired) == cloud.desired_key(store.unit(UNIT), after)
    with pytest.raises(InvalidArgumentError, match="version"):
        cloud.set_unit_config(store, unit, {**config, "version": "one"})


def test_node_states_are_named_only_when_wished(cloud: Cloud, store: Store, unit: Unit) -> None:
    store.set_node_state(unit, "second", "paused")
    assert cloud.desired_status(store, unit)["nodes"] == [{"item": {"codename": "second"}, "state": "paused"}]
    with pytest.raises(NotFoundError, match="third"):
        store.set_node_state(unit, "third", "paused")


def test_a_version_is_published_once_and_by_its_owner(cloud: Cloud, store: Store) -> None:
    add_item(cloud, store)
    with pytest.raises(BundleError, match="exists already"):
        add_item(cloud, store)
    item = ItemImages(ITEM_ID, Identity(type="service", codename="hello"), "2.0.0", INDEX, 1, 0, [], None, None)
    with pytest.raises(BundleError, match="another service provider"):
        cloud.add_bundle(store, User("mallory", "sp"), [item], {})


# Messages


def blob_urls(cloud: Cloud, store: Store, *digests: str) -> list[dict[str, Any]]:
    correlation = "1f1c5a34-94b1-4d0e-9a3e-5c6c5f8e0b03"
    request = {"messageType": "requestBlobUrls", "correlationId": correlation, "digests": list(digests)}
    (answer,) = handle(cloud, store, request)
    assert answer["correlationId"] == correlation
    items: list[dict[str, Any]] = answer["items"]
    return items


def test_blob_urls_are_given_for_known_digests(cloud: Cloud, store: Store, unit: Unit) -> None:
    add_item(cloud, store)
    (info,) = blob_urls(cloud, store, DIGEST, INDEX)
    assert info["digest"] == DIGEST
    assert info["urls"] == ["http://cloud.test:9002/blobs/" + DIGEST.replace(":", "/")]
    assert (info["sha256"], info["size"]) == ("c" * 64, 16)
    assert info["decryptInfo"] == {
        "blockAlg": "AES256/CBC/pkcs7",
        "blockIv": base64.b64encode(b"i" * 16).decode(),
        "blockKey": base64.b64encode(b"k" * 32).decode(),
    }
    assert info["signInfo"]["chainName"] == cloud.desired_status(store, unit)["certificateChains"][0]["name"]
    assert blob_urls(cloud, store, INDEX) == []


@pytest.mark.parametrize(
    ("kind", "member"), [("wrong_digest", "sha256"), ("bad_signature", "signInfo"), ("unsigned", "signInfo")]
)
def test_faults_spoil_one_blob_answer(
    cloud: Cloud, store: Store, unit: Unit, faults: Faults, kind: str, member: str
) -> None:
    add_item(cloud, store)
    (good,) = blob_urls(cloud, store, DIGEST)
    faults.add(Fault(kind, on="blobUrls", digest=DIGEST))
    (bad,) = blob_urls(cloud, store, DIGEST)
    assert {name for name in good if good.get(name) != bad.get(name)} == {member}
    assert blob_urls(cloud, store, DIGEST) == [good]


def test_the_journal_keeps_no_secrets(cloud: Cloud, store: Store, unit: Unit) -> None:
    store.add_message(unit, "to", cloud.renew(store, unit))
    journal = json.dumps(store.messages(unit, None, 0, 10))
    assert "renewCertificatesNotification" in journal
    assert "main-password" not in journal


INSTANCE = {"item": {"id": ITEM_ID}, "subject": {"id": "s"}, "instance": 0}


def test_a_state_is_accepted_kept_and_given_back(cloud: Cloud, store: Store, unit: Unit) -> None:
    add_item(cloud, store)

    def ask(default: bool) -> str:
        (answer,) = handle(cloud, store, {"messageType": "stateRequest", **INSTANCE, "default": default})
        assert answer["stateChecksum"] == state_checksum(answer["state"])
        return str(answer["state"])

    assert ask(default=False) == "counter=0"
    news = {"messageType": "newState", **INSTANCE, "stateChecksum": state_checksum("counter=7"), "state": "counter=7"}
    (acceptance,) = handle(cloud, store, news)
    assert (acceptance["result"], acceptance["checksum"]) == ("accepted", news["stateChecksum"])
    assert ask(default=False) == "counter=7"
    assert ask(default=True) == "counter=0"
    (refusal,) = handle(cloud, store, {**news, "state": "counter=8"})
    assert refusal["result"] == "rejected"
    assert ask(default=False) == "counter=7"


def test_the_state_checksum_is_that_of_the_contract() -> None:
    assert state_checksum("counter=7") == "60609f67d6b00a90b85b820af24a9b464803afdc29216bb651c5351d"


def test_certificates_are_renewed_step_by_step(cloud: Cloud, store: Store, unit: Unit) -> None:
    before = store.certificates(unit)
    notification = cloud.renew(store, unit)
    schema.check_to_unit(notification)
    assert {one["serial"] for one in notification["certificates"]} == {one.serial for one in before}
    assert notification["unitSecrets"]["nodes"] == [
        {"node": {"codename": "main"}, "secret": "main-password"},
        {"node": {"codename": "second"}, "secret": "second-password"},
    ]
    requests = [{"type": one.type, "node": {"codename": one.node_id}, "csr": csr()} for one in before]
    (issued,) = handle(cloud, store, {"messageType": "issueUnitCertificates", "requests": requests})
    assert len(issued["certificates"]) == len(before)
    confirmed = []
    for entry in issued["certificates"]:
        leaf = load_certificates(entry["certificateChain"].encode())[0]
        confirmed.append({"type": entry["type"], "node": entry["node"], "serial": serial(leaf)})
    failed = {**confirmed.pop(), "serial": "", "errorInfo": {"aosCode": 1, "exitCode": 0, "message": "no"}}
    confirmation = "installUnitCertificatesConfirmation"
    handle(cloud, store, {"messageType": confirmation, "certificates": [*confirmed, failed]})
    after = {(one.node_id, one.type): one.status for one in store.certificates(unit)}
    done = {(one["node"]["codename"], one["type"]): "renew_done" for one in confirmed}
    assert {key: after[key] for key in done} == done
    assert after[failed["node"]["codename"], failed["type"]] == "renew_failed"


def test_a_certificate_issued_after_the_confirmed_one_stays_good(cloud: Cloud, store: Store, unit: Unit) -> None:
    """Two renewals overlap: the Unit has installed the second certificate when the first one's confirmation comes."""
    place = {"type": "online", "node": {"codename": "main"}}

    def issue() -> str:
        request = {"messageType": "issueUnitCertificates", "requests": [{**place, "csr": csr()}]}
        (answer,) = handle(cloud, store, request)
        return serial(load_certificates(answer["certificates"][0]["certificateChain"].encode())[0])

    def good() -> set[str]:
        return {one.serial for one in store.certificates(unit) if (one.node_id, one.type) == ("main", "online")}

    (old,) = good()
    first, second = issue(), issue()
    assert good() == {old, first, second}
    for confirmed, left in ((first, {first, second}), (second, {second})):
        certificates = [{**place, "serial": confirmed}]
        handle(cloud, store, {"messageType": "installUnitCertificatesConfirmation", "certificates": certificates})
        assert good() == left


def test_a_confirmation_of_a_foreign_certificate_is_an_error(cloud: Cloud, store: Store, unit: Unit) -> None:
    certificates = [{"type": "iam", "node": {"codename": "main"}, "serial": "00"}]
    message = {"messageType": "installUnitCertificatesConfirmation", "certificates": certificates}
    with pytest.raises(InvalidArgumentError, match="was not issued"):
        handle(cloud, store, message)


def test_a_node_is_provisioned_and_deprovisioned(cloud: Cloud, store: Store, unit: Unit) -> None:
    request = cloud.start_provisioning(store, unit, "third", "third-password")
    schema.check_to_unit(request)
    response = {
        "messageType": "startProvisioningResponse",
        "correlationId": request["correlationId"],
        "node": {"codename": "third"},
        "csrs": [{"type": "sm", "csr": csr()}],
    }
    (finish,) = handle(cloud, store, response)
    assert finish["messageType"] == "finishProvisioningRequest"
    assert finish["correlationId"] == request["correlationId"]
    assert finish["password"] == "third-password"
    assert [one["type"] for one in finish["certificates"]] == ["sm"]
    removal = cloud.deprovision(store, unit, "third")
    schema.check_to_unit(removal)
    assert removal["password"] == "third-password"
    answer = {"messageType": "deprovisioningResponse", "node": {"codename": "third"}}
    error = {"aosCode": 1, "exitCode": 0, "message": ""}
    handle(cloud, store, {**answer, "errorInfo": error})
    assert "third" in {node.node_id for node in store.nodes(unit)}
    handle(cloud, store, answer)
    assert "third" not in {node.node_id for node in store.nodes(unit)}
    with pytest.raises(NotFoundError, match="third"):
        cloud.deprovision(store, unit, "third")


def test_a_failed_start_of_provisioning_ends_there(cloud: Cloud, store: Store, unit: Unit) -> None:
    error = {"aosCode": 1, "exitCode": 0, "message": "no"}
    response = {
        "messageType": "startProvisioningResponse",
        "node": {"codename": "main"},
        "errorInfo": error,
        "csrs": [],
    }
    assert handle(cloud, store, response) == []


def test_logs_are_put_together_per_node(cloud: Cloud, store: Store, unit: Unit) -> None:
    add_item(cloud, store)
    request = cloud.request_log(
        store, unit, log_type="instanceLog", nodes=[], item="hello", instance=0, since=None, until=None
    )
    schema.check_to_unit(request)
    assert request["filter"] == {
        "nodeIds": [{"codename": "main"}, {"codename": "second"}],
        "item": {"id": ITEM_ID},
        "instance": 0,
    }
    packed = gzip.compress(b"line 1\nline 2\n")
    halves = [packed[:10], packed[10:]]

    def part(node: str, number: int, count: int, content: bytes, status: str = "ok") -> dict[str, Any]:
        text = base64.encodebytes(content).decode().replace("\n", "\r\n")
        return {
            "messageType": "pushLog",
            "correlationId": request["correlationId"],
            "node": {"codename": node},
            "part": number,
            "partsCount": count,
            "content": text,
            "status": status,
        }

    handle(cloud, store, part("main", 2, 2, halves[1]))
    assert not cloud.log_result(store, unit, request["correlationId"])["main"]["complete"]
    handle(cloud, store, part("main", 1, 2, halves[0]))
    handle(cloud, store, part("second", 0, 0, b"", "absent"))
    result = cloud.log_result(store, unit, request["correlationId"])
    assert (result["main"]["complete"], result["main"]["text"]) == (True, "line 1\nline 2\n")
    assert (result["second"]["complete"], result["second"]["status"]) == (True, "absent")


def test_alerts_and_samples_are_kept(cloud: Cloud, store: Store, unit: Unit) -> None:
    time = "2026-03-01T08:15:30.250000Z"
    alert = {"timestamp": time, "tag": "systemAlert", "node": {"codename": "main"}, "message": "m"}
    handle(cloud, store, {"messageType": "alerts", "items": [alert]})
    assert store.alerts(unit, 10) == [alert]
    sample = {"timestamp": time, "ram": 1, "cpu": 2, "download": 3, "upload": 4}
    node = {"node": {"codename": "main"}, "items": [sample]}
    instance = {**INSTANCE, "node": {"codename": "main"}, "itemStates": [], "items": [sample]}
    handle(cloud, store, {"messageType": "monitoringData", "nodes": [node], "instances": [instance]})
    assert [one["source"] for one in store.samples(unit, 10)] == ["node main", f"instance {ITEM_ID}/s/0"]


# Unit status


def group(version: str, *states: str) -> dict[str, Any]:
    return {
        "item": {"id": "i"},
        "subject": {"id": "s"},
        "version": version,
        "instances": [{"instance": number, "state": state} for number, state in enumerate(states)],
    }


def test_a_delta_changes_what_it_names(cloud: Cloud) -> None:
    full = {
        "isDeltaInfo": False,
        "unitConfig": [{"state": "absent"}],
        "nodes": [{"identity": {"codename": "a"}, "state": "paused"}, {"identity": {"codename": "b"}}],
        "items": [{"item": {"id": "i"}, "version": "1", "state": "installed"}],
        "instances": [group("1", "active", "active")],
        "subjects": [{"codename": "x"}],
    }
    known = merge_status({"items": ["old"]}, full)
    assert "isDeltaInfo" not in known
    delta = {
        "isDeltaInfo": True,
        "nodes": [{"identity": {"codename": "a"}, "state": "provisioned"}],
        "items": [{"item": {"id": "i"}, "version": "2", "state": "pending"}],
        "instances": [
            {**group("1"), "instances": [{"instance": 1, "state": "failed"}]},
            group("2", "activating"),
        ],
        "subjects": [],
    }
    merged = merge_status(known, delta)
    assert merged["nodes"] == [{"identity": {"codename": "a"}, "state": "provisioned"}, {"identity": {"codename": "b"}}]
    assert [(one["version"], one["state"]) for one in merged["items"]] == [("1", "installed"), ("2", "pending")]
    assert merged["instances"] == [group("1", "active", "failed"), group("2", "activating")]
    assert merged["subjects"] == []
    assert merged["unitConfig"] == [{"state": "absent"}]
    assert known["instances"] == [group("1", "active", "active")], "the old status is left alone"
