"""What we write: against the published schema and against recorded sessions of AosCore 9.1."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from aoscore.cm.communication import envelope
from aoscore.cm.communication.messages import (
    CPU,
    TO_CLOUD,
    Ack,
    Alerts,
    ArchInfo,
    CertificateRequest,
    CertType,
    CoreAlert,
    CoreComponent,
    DeprovisioningResponse,
    DownloadProgressAlert,
    DownloadState,
    EnvVarInstanceStatus,
    ErrorInfo,
    FinishProvisioningResponse,
    Identity,
    InstalledCertificate,
    InstallUnitCertificatesConfirmation,
    InstanceAlert,
    InstanceMonitoring,
    InstanceQuotaAlert,
    InstanceStateChange,
    IssueUnitCertificates,
    ItemState,
    Message,
    MonitoringData,
    NewState,
    NodeCSR,
    NodeIdentity,
    NodeMonitoring,
    NodeStateChange,
    OSInfo,
    OverrideEnvVarsStatus,
    Partition,
    PartitionUsage,
    Placement,
    PushLog,
    RequestBlobUrls,
    Resource,
    ResourceAllocateAlert,
    Runtime,
    Sample,
    StartProvisioningResponse,
    StateRequest,
    SystemAlert,
    SystemQuotaAlert,
    UnitConfigStatus,
    UnitInstance,
    UnitInstances,
    UnitItem,
    UnitNode,
    UnitStatus,
    instance_members,
    message_type,
)
from aoscore.common.types import ConfigState, InstanceIdent, InstanceState, ItemType, LogStatus, NodeState

DATA = Path(__file__).parents[3] / "data" / "cloud"
SCHEMA = json.loads((DATA / "messages-v7.schema.json").read_bytes())
NOW = datetime(2026, 3, 1, 8, 15, 30, 250000, UTC)
ITEM_ID = "0c2f6f6e-6c1b-4a57-9b5e-1f6f0a7c9d11"
IDENT = InstanceIdent(ITEM_ID, "5a9d3c3e-0f6e-4d39-8f0b-7a2f0c6b4e22", 0)
MEMBERS = instance_members(IDENT)
NODE = Identity.of_codename("node-main")
ERROR = ErrorInfo(aos_code=5, exit_code=0, message="not found")
ARCH = ArchInfo(architecture="arm64", variant="v8")
OS = OSInfo(os="linux", version="6.6", features=("a",))
SAMPLE = Sample(timestamp=NOW, ram=1, cpu=2, download=3, upload=4, partitions=(PartitionUsage(name="p", used_size=5),))

UNIT_NODE = UnitNode(
    identity=NodeIdentity(codename="node-main"),
    node_group_subject=Identity.of_codename("main"),
    max_dmips=10,
    physical_ram=20,
    total_ram=30,
    os_info=OS,
    cpus=(CPU(model_name="m", total_num_cores=1, total_num_threads=2, arch_info=ARCH, max_dmips=3),),
    attrs={"MainNode": ""},
    partitions=(Partition(name="p", path="/p", types=("states",), total_size=7),),
    state=NodeState.PROVISIONED,
    is_connected=True,
    error_info=ERROR,
    runtimes=(
        Runtime(
            identity=Identity.of_codename("rt"),
            runtime_type="crun",
            arch_info=ARCH,
            os_info=OS,
            max_dmips=1,
            allowed_dmips=2,
            total_ram=3,
            allowed_ram=4,
            max_instances=0,
        ),
    ),
    resources=(Resource(name="gpu", shared_count=0),),
)

SAMPLES: list[Message] = [
    Ack(),
    UnitStatus(is_delta_info=False, unit_config=(), nodes=(), items=(), instances=(), subjects=()),
    UnitStatus(is_delta_info=True, items=()),
    UnitStatus(
        is_delta_info=False,
        unit_config=(
            UnitConfigStatus(state=ConfigState.ABSENT),
            UnitConfigStatus(version="1.0.0", state=ConfigState.FAILED, error_info=ERROR),
        ),
        nodes=(UNIT_NODE,),
        items=(
            UnitItem(
                item=Identity.of_item(ITEM_ID, item_type=ItemType.SERVICE),
                version="1.0.0",
                state=ItemState.FAILED,
                error_info=ERROR,
            ),
            UnitItem(
                item=Identity.of_item("rootfs", preinstalled=True, item_type=ItemType.COMPONENT),
                version="1.0.0",
                state=ItemState.INSTALLED,
            ),
        ),
        instances=(
            UnitInstances(
                item=Identity.of_item(ITEM_ID, item_type=ItemType.SERVICE),
                subject=MEMBERS["subject"],
                version="1.0.0",
                instances=(
                    UnitInstance(
                        node=Placement(codename="node-main"),
                        runtime=Placement(codename="rt"),
                        instance=0,
                        state_checksum="ab",
                        state=InstanceState.ACTIVE,
                        error_info=ERROR,
                    ),
                ),
            ),
        ),
        subjects=(Identity.of_codename("driver-1"),),
    ),
    RequestBlobUrls(correlation_id="c", digests=("sha256:00",)),
    MonitoringData(
        nodes=(
            NodeMonitoring(
                node=NODE,
                node_states=(NodeStateChange(timestamp=NOW, state=NodeState.PAUSED, is_connected=True),),
                items=(SAMPLE,),
            ),
        ),
        instances=(
            InstanceMonitoring(
                **MEMBERS,
                node=NODE,
                item_states=(InstanceStateChange(timestamp=NOW, state=InstanceState.ACTIVE),),
                items=(SAMPLE,),
            ),
        ),
    ),
    Alerts(
        items=(
            SystemAlert(timestamp=NOW, node=NODE, message="m"),
            CoreAlert(timestamp=NOW, node=NODE, core_component=CoreComponent.CM, message="m"),
            SystemQuotaAlert(timestamp=NOW, node=NODE, parameter="cpu", value=1),
            InstanceQuotaAlert(timestamp=NOW, **MEMBERS, parameter="cpu", value=1),
            DownloadProgressAlert(
                timestamp=NOW,
                digest="sha256:00",
                url="http://x",
                downloaded_bytes=1,
                total_bytes=2,
                state=DownloadState.INTERRUPTED,
                reason="r",
                error_info=ERROR,
            ),
        )
    ),
    PushLog(correlation_id="c", node=NODE, part=1, parts_count=1, content=b"\x00" * 60, status=LogStatus.OK),
    NewState(**MEMBERS, state_checksum="ab", state="counter=7"),
    StateRequest(**MEMBERS, default=False),
    IssueUnitCertificates(requests=(CertificateRequest(type=CertType.SM, node=NODE, csr="pem"),)),
    InstallUnitCertificatesConfirmation(
        certificates=(InstalledCertificate(type=CertType.SM, node=NODE, serial="", error_info=ERROR),)
    ),
    StartProvisioningResponse(correlation_id="c", node=NODE, csrs=(NodeCSR(type="iam", csr="pem"),)),
    StartProvisioningResponse(correlation_id="c", node=NODE, error_info=ERROR, csrs=()),
    FinishProvisioningResponse(correlation_id="c", node=NODE),
    DeprovisioningResponse(correlation_id="c", node=NODE, error_info=ERROR),
]

# Where the code of the field and the schema disagree and the contract says: follow the code.
DEVIATIONS: dict[str, Message] = {
    "D2 tag resourceAllocateAlert": Alerts(
        items=(ResourceAllocateAlert(timestamp=NOW, **MEMBERS, node=NODE, device_id="gpu", message="m"),)
    ),
    "D3 subject in updateItemInstanceAlert": Alerts(
        items=(InstanceAlert(timestamp=NOW, **MEMBERS, version="1.0.0", message="m"),)
    ),
    "D4 subject in overrideEnvVarsStatus": OverrideEnvVarsStatus(
        statuses=(EnvVarInstanceStatus(**MEMBERS, name="A", error_info=ERROR),)
    ),
    "D5 status error in pushLog": PushLog(
        correlation_id="c", node=NODE, part=0, parts_count=0, status=LogStatus.ERROR, error_info=ERROR
    ),
}


def frame(message: Message) -> dict[str, Any]:
    text = envelope.encode(message, system_id="unit-0042", txn="t", created_at=NOW)
    document: dict[str, Any] = json.loads(text)
    return document


def validator(message: Message) -> jsonschema.Draft202012Validator:
    reference = SCHEMA["properties"]["data"]["discriminator"]["mapping"][message_type(message)]
    return jsonschema.Draft202012Validator({"$ref": reference, "$defs": SCHEMA["$defs"]})


@pytest.mark.parametrize("message", SAMPLES, ids=message_type)
def test_what_we_write_fits_the_schema(message: Message) -> None:
    data = frame(message)["data"]
    if isinstance(message, MonitoringData):
        for change in data["nodes"][0]["nodeStates"]:  # D1: the field writes isConnected
            change["connected"] = change["isConnected"]
    validator(message).validate(data)


@pytest.mark.parametrize("name", DEVIATIONS)
def test_known_deviations_still_deviate(name: str) -> None:
    """Fails when the schema comes to agree, so that the list of exceptions stays true."""
    with pytest.raises(jsonschema.ValidationError):
        validator(DEVIATIONS[name]).validate(frame(DEVIATIONS[name])["data"])


def test_every_message_to_the_cloud_has_a_sample() -> None:
    covered = {message_type(message) for message in [*SAMPLES, *DEVIATIONS.values()]}
    assert covered == set(TO_CLOUD)


@pytest.mark.parametrize("message", [*SAMPLES, *DEVIATIONS.values()], ids=message_type)
def test_written_messages_read_back_equal(message: Message) -> None:
    text = envelope.encode(message, system_id="unit-0042", txn="t", created_at=NOW)
    received = envelope.decode(text, system_id="unit-0042", known=TO_CLOUD)
    assert received == envelope.Received("t", message)


@pytest.mark.parametrize("name", ["deploy", "update"])
def test_recorded_sessions_are_reproduced_member_by_member(name: str) -> None:
    lines = (DATA / f"cloud-session-{name}.jsonl").read_text().splitlines()
    assert len(lines) > 5
    for line in lines:
        recorded = json.loads(line)["message"]
        header = recorded["header"]
        received = envelope.decode(json.dumps(recorded), system_id=header["systemId"], known=TO_CLOUD)
        assert received.message is not None and not received.problems
        created = datetime.fromisoformat(header["createdAt"])
        ours = envelope.encode(received.message, system_id=header["systemId"], txn=received.txn, created_at=created)
        assert json.loads(ours) == recorded
        assert list(json.loads(ours)["header"]) == ["version", "systemId", "createdAt", "txn"]


def test_times_always_have_six_digits_and_utc() -> None:
    moment = datetime.fromisoformat("2026-03-01T10:00:00+02:00")
    document = frame(Alerts(items=(SystemAlert(timestamp=moment, node=NODE, message="m"),)))
    assert document["data"]["items"][0]["timestamp"] == "2026-03-01T08:00:00.000000Z"
    assert document["header"]["createdAt"] == "2026-03-01T08:15:30.250000Z"


def test_full_status_has_all_five_lists_and_delta_only_the_touched_ones() -> None:
    full, delta = frame(SAMPLES[1])["data"], frame(SAMPLES[2])["data"]
    assert full == {
        "messageType": "unitStatus",
        "isDeltaInfo": False,
        "unitConfig": [],
        "nodes": [],
        "items": [],
        "instances": [],
        "subjects": [],
    }
    assert delta == {"messageType": "unitStatus", "isDeltaInfo": True, "items": []}


def test_base64_has_no_line_breaks() -> None:
    content = frame(SAMPLES[7])["data"]["content"]
    assert len(content) == 80 and "\n" not in content


def test_preinstalled_instances_are_named_by_codename() -> None:
    members = instance_members(InstanceIdent("rootfs", "main", 1, ItemType.COMPONENT, True))
    assert frame(StateRequest(**members, default=True))["data"] == {
        "messageType": "stateRequest",
        "item": {"codename": "rootfs"},
        "subject": {"codename": "main"},
        "instance": 1,
        "default": True,
    }
