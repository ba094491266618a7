"""Value types through protobuf bytes and back, and the words and zeros that C++ peers insist on."""

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aoscore._pb.common.v2 import common_pb2 as v2
from aoscore._pb.iamanager.v6 import iamanager_pb2 as iam
from aoscore._pb.servicemanager.v5 import servicemanager_pb2 as sm
from aoscore.common import convert, types
from aoscore.common.errors import InvalidArgumentError

WHEN = datetime(2026, 1, 2, 3, 4, 5, 600000, tzinfo=UTC)

texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)
sizes = st.integers(0, 2**64 - 1)
idents = st.builds(
    types.InstanceIdent,
    texts,
    texts,
    sizes,
    st.sampled_from([types.ItemType.SERVICE, types.ItemType.COMPONENT]),
    st.booleans(),
)
errors = st.none() | st.builds(types.ErrorInfo, st.integers(1, 14), st.integers(0, 130), texts)
times = st.datetimes(datetime(1971, 1, 1), datetime(2200, 1, 1), timezones=st.just(UTC))
thresholds = st.floats(0, 100)
percents = st.none() | st.builds(types.AlertRulePercents, thresholds, thresholds, st.integers(0, 10**6).map(float))
points = st.none() | st.builds(types.AlertRulePoints, sizes, sizes, st.integers(0, 10**6).map(float))
rules = st.builds(
    types.AlertRules,
    percents,
    percents,
    st.lists(st.builds(types.PartitionAlertRule, texts, thresholds, thresholds)).map(tuple),
    points,
    points,
)
infos = st.builds(
    types.InstanceInfo,
    ident=idents,
    version=texts,
    manifest_digest=texts,
    owner_id=texts,
    runtime_id=texts,
    uid=st.integers(0, 2**32 - 1),
    gid=st.integers(0, 2**32 - 1),
    priority=sizes,
    storage_path=texts,
    state_path=texts,
    env_vars=st.lists(st.builds(types.EnvVar, texts, texts), max_size=3).map(tuple),
    monitoring_parameters=st.none() | st.builds(types.MonitoringParameters, st.none() | rules),
)
statuses = st.builds(
    types.InstanceStatus,
    ident=idents,
    version=texts,
    state=st.sampled_from(types.InstanceState),
    runtime_id=texts,
    manifest_digest=texts,
    env_vars=st.lists(st.builds(types.EnvVarStatus, texts, errors), max_size=3).map(tuple),
    error=errors,
)
samples = st.builds(
    types.MonitoringData,
    times,
    sizes,
    sizes,
    st.lists(st.builds(types.PartitionUsage, texts, sizes), max_size=3).map(tuple),
    sizes,
    sizes,
)
monitorings = st.builds(
    types.NodeMonitoring, samples, st.lists(st.builds(types.InstanceMonitoring, idents, samples, texts)).map(tuple)
)


@given(infos)
def test_instance_info(info: types.InstanceInfo) -> None:
    wire = convert.instance_info_to_pb(info).SerializeToString()
    assert convert.instance_info_from_pb(sm.InstanceInfo.FromString(wire)) == info


@given(statuses)
def test_instance_status(status: types.InstanceStatus) -> None:
    message = convert.instance_status_to_pb(status)
    assert message.HasField("error"), "C++ CMs read the codes, C++ SMs always send the member"
    assert convert.instance_status_from_pb(sm.InstanceStatus.FromString(message.SerializeToString())) == status


@given(monitorings)
def test_monitoring(monitoring: types.NodeMonitoring) -> None:
    assert convert.monitoring_from_pb(convert.instant_monitoring_to_pb(monitoring)) == monitoring
    assert convert.monitoring_from_pb(convert.average_monitoring_to_pb(monitoring)) == monitoring


IDENT = types.InstanceIdent("item", "subject", 3)


@pytest.mark.parametrize(
    "alert",
    [
        types.SystemAlert(WHEN, "text"),
        types.CoreAlert(WHEN, "SM", "text"),
        types.InstanceAlert(WHEN, IDENT, "1.0.0", "text"),
        types.SystemQuotaAlert(WHEN, "cpu", 90, types.AlertStatus.RAISE),
        types.InstanceQuotaAlert(WHEN, IDENT, "ram", 2**40, types.AlertStatus.FALL),
        types.ResourceAllocateAlert(WHEN, IDENT, "camera", "busy"),
    ],
)
def test_alerts(alert: types.NodeAlert) -> None:
    wire = convert.alert_to_pb(alert).SerializeToString()
    assert convert.alert_from_pb(sm.Alert.FromString(wire)) == alert


@pytest.mark.parametrize("kind", list(types.LogKind))
@pytest.mark.parametrize("since", [None, WHEN])
def test_log_requests(kind: types.LogKind, since: datetime | None) -> None:
    wanted = types.InstanceFilter() if kind is types.LogKind.SYSTEM else types.InstanceFilter("item", None, 0)
    request = types.LogRequest(kind, "correlation", wanted, since, None)
    frame = convert.log_request_to_pb(request)
    message = getattr(frame, frame.WhichOneof("SMIncomingMessage"))
    assert message.HasField("from") == (since is not None), "a zero time crashes a C++ SM"
    assert convert.log_request_from_pb(kind, message) == request


def test_any_instance_is_minus_one_on_the_wire() -> None:
    assert convert.filter_to_pb(types.InstanceFilter("a")).instance == -1
    assert convert.filter_from_pb(v2.InstanceFilter(instance=0)) == types.InstanceFilter(None, None, 0)


def test_node_info() -> None:
    node = types.NodeInfo(
        node_id="main",
        node_type="vm",
        title="Main",
        max_dmips=5000,
        total_ram=2**33,
        os_info=types.OSInfo("linux", "6.1", ("a",)),
        cpus=(types.CPUInfo("cpu", 2, 4, types.ArchInfo("arm64", "v8")),),
        partitions=(types.PartitionInfo("p", ("states",), 5, "/x"),),
        attrs={"MainNode": "", "AosComponents": "cm,iam, SM"},
        state=types.NodeState.PAUSED,
        error=types.ErrorInfo(5, 5, "no"),
    )
    wire = convert.node_info_to_pb(node).SerializeToString()
    back = convert.node_info_from_pb(iam.NodeInfo.FromString(wire))
    assert back == node
    assert back.is_main and back.components == {"cm", "iam", "sm"} and back.attribute("mainnode") == ""
    assert not convert.node_info_to_pb(types.NodeInfo("x")).HasField("error"), "absent when fine"


def test_certificates() -> None:
    cert = types.CertInfo("cm", "file:///a", "file:///b", "0aff", b"\x30\x00")
    message = convert.cert_info_to_pb(cert)
    assert message.serial == b"0aff", "hex text in a bytes field"
    assert convert.cert_info_from_pb(message) == cert


def test_sm_info() -> None:
    runtime = types.RuntimeInfo("id", "crun", 1, 2, 3, 4, 5, types.OSInfo("linux"), types.ArchInfo("amd64"))
    info = types.SMInfo("node", (runtime,), (types.ResourceInfo("camera", 2),))
    assert convert.sm_info_from_pb(convert.sm_info_to_pb(info)) == info


def test_network_messages() -> None:
    rule = types.FirewallRule("10.0.0.1", "80", "tcp", "10.0.0.2")
    network = types.InstanceNetwork("10.0.0.0/16", "10.0.0.3", ("10.0.0.100",), (rule,))
    message = convert.instance_network_to_pb(network)
    assert not message.HasField("error") and convert.instance_network_from_pb(message) == network
    node = types.NodeNetwork("10.0.0.0/16", "10.0.0.1", 7)
    assert convert.node_network_from_pb(convert.node_network_to_pb(node)) == node
    wishes = types.NetworkWishes(("web",), ("item/80/tcp",), ("8080",))
    assert convert.network_wishes_from_pb(convert.network_wishes_to_pb(wishes)) == wishes
    state = types.InstanceNetworkState(IDENT, "net", "10.0.0.3", (rule,))
    assert convert.instance_network_state_from_pb(convert.instance_network_state_to_pb(state)) == state


@pytest.mark.parametrize(
    "read",
    [
        lambda: convert.instance_status_from_pb(sm.InstanceStatus(state="sleeping")),
        lambda: convert.node_info_from_pb(iam.NodeInfo(state="")),
        lambda: convert.ident_from_pb(v2.InstanceIdent(type=77)),  # type: ignore[arg-type]
        lambda: convert.alert_from_pb(sm.Alert()),
    ],
)
def test_unknown_words_are_errors(read: object) -> None:
    with pytest.raises(InvalidArgumentError):
        read()  # type: ignore[operator]


def test_errors_are_cut_and_zero_means_none() -> None:
    assert convert.error_from_pb(v2.ErrorInfo(message="but no code")) is None
    assert len(convert.error_to_pb(types.ErrorInfo(1, 1, "x" * 1000)).message) == 256
    assert convert.error_to_pb(None) == v2.ErrorInfo()
