"""Value types to protobuf messages and back: the only place that sees the messages which several components share.

Functions are named `<what>_to_pb` and `<what>_from_pb`. Rules: grpc.md "Rules that hold for every message" and
sm.md §2.5. An unknown word raises InvalidArgumentError naming it; an unset message reads as None where that means
something.
"""

from collections.abc import Iterable
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, TypeVar

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from aoscore._pb.common.v1 import common_pb2 as v1
from aoscore._pb.common.v2 import common_pb2 as v2
from aoscore._pb.iamanager.v6 import iamanager_pb2 as iam
from aoscore._pb.servicemanager.v5 import network_pb2 as net
from aoscore._pb.servicemanager.v5 import servicemanager_pb2 as sm
from aoscore.common import types
from aoscore.common.errors import InvalidArgumentError

W = TypeVar("W", bound=StrEnum)

# C++ peers cut or refuse longer texts (grpc.md, "Caps of C++ peers").
_ERROR_TEXT = 256
_ALERT_TEXT = 256


def _word(kind: type[W], word: str) -> W:
    try:
        return kind(word)
    except ValueError:
        raise InvalidArgumentError(f"{word!r} is no {kind.__name__}") from None


# Errors, times


def error_to_pb(error: types.ErrorInfo | None) -> v2.ErrorInfo:
    """A message that is zero for "no error": for the members that C++ SMs always send."""
    if error is None:
        return v2.ErrorInfo()
    return v2.ErrorInfo(aos_code=error.aos_code, exit_code=error.exit_code, message=error.message[:_ERROR_TEXT])


def error_to_pb_v1(error: types.ErrorInfo) -> v1.ErrorInfo:
    """The v5 interfaces' copy of the error message."""
    return v1.ErrorInfo(aos_code=error.aos_code, exit_code=error.exit_code, message=error.message[:_ERROR_TEXT])


def error_from_pb(message: Any) -> types.ErrorInfo | None:
    """An ErrorInfo of v1 or v2; None when it says "fine" (both codes zero)."""
    if message.aos_code == 0 and message.exit_code == 0:
        return None
    return types.ErrorInfo(message.aos_code, message.exit_code, message.message)


def time_to_pb(time: datetime | None) -> Timestamp | None:
    """None stays unset: a present zero time crashes a C++ SM (grpc.md, "Time")."""
    if time is None:
        return None
    message = Timestamp()
    message.FromDatetime(time.astimezone(UTC))
    return message


def time_from_pb(message: Timestamp) -> datetime | None:
    """Seconds at or below zero count as absent."""
    return message.ToDatetime(tzinfo=UTC) if message.seconds > 0 else None


def _duration_to_pb(seconds: float) -> Duration | None:
    if seconds <= 0:
        return None
    message = Duration()
    message.FromNanoseconds(round(seconds * 1e9))
    return message


def _duration_from_pb(message: Duration) -> types.Duration:
    return types.Duration(message.ToNanoseconds() / 1e9)


# Identities

_ITEM_TYPES = {types.ItemType.SERVICE: v2.SERVICE, types.ItemType.COMPONENT: v2.COMPONENT}
_ITEM_TYPES_BACK = {number: word for word, number in _ITEM_TYPES.items()}


def ident_to_pb(ident: types.InstanceIdent) -> v2.InstanceIdent:
    """InstanceIdent of common.v2."""
    return v2.InstanceIdent(
        item_id=ident.item_id,
        subject_id=ident.subject_id,
        instance=ident.instance,
        type=_ITEM_TYPES[ident.type],
        preinstalled=ident.preinstalled,
    )


def ident_from_pb(message: v2.InstanceIdent) -> types.InstanceIdent:
    """InstanceIdent of common.v2."""
    kind = _ITEM_TYPES_BACK.get(message.type)
    if kind is None:
        raise InvalidArgumentError(f"{message.type} is no item type")
    return types.InstanceIdent(message.item_id, message.subject_id, message.instance, kind, message.preinstalled)


def filter_to_pb(wanted: types.InstanceFilter) -> v2.InstanceFilter:
    """ "Any instance" is -1 on the wire, since 0 is a real index."""
    return v2.InstanceFilter(
        item_id=wanted.item_id or "",
        subject_id=wanted.subject_id or "",
        instance=-1 if wanted.instance is None else wanted.instance,
    )


def filter_from_pb(message: v2.InstanceFilter) -> types.InstanceFilter:
    """The reverse of filter_to_pb."""
    return types.InstanceFilter(
        message.item_id or None, message.subject_id or None, message.instance if message.instance >= 0 else None
    )


# Node and certificates (iamanager.v6)


def _arch_to_pb(arch: types.ArchInfo) -> v2.ArchInfo:
    return v2.ArchInfo(architecture=arch.architecture, variant=arch.variant)


def _arch_from_pb(message: v2.ArchInfo) -> types.ArchInfo:
    return types.ArchInfo(message.architecture, message.variant)


def _os_to_pb(os: types.OSInfo) -> v2.OSInfo:
    return v2.OSInfo(os=os.os, version=os.version, features=os.features)


def _os_from_pb(message: v2.OSInfo) -> types.OSInfo:
    return types.OSInfo(message.os, message.version, tuple(message.features))


def node_info_to_pb(node: types.NodeInfo) -> iam.NodeInfo:
    """NodeInfo of iamanager.v6; `error` only when there is one."""
    return iam.NodeInfo(
        node_id=node.node_id,
        node_type=node.node_type,
        title=node.title,
        max_dmips=node.max_dmips,
        total_ram=node.total_ram,
        physical_ram=node.physical_ram,
        os_info=_os_to_pb(node.os_info),
        cpus=[
            iam.CPUInfo(
                model_name=cpu.model_name,
                num_cores=cpu.num_cores,
                num_threads=cpu.num_threads,
                arch_info=_arch_to_pb(cpu.arch_info),
                max_dmips=cpu.max_dmips,
            )
            for cpu in node.cpus
        ],
        partitions=[
            iam.PartitionInfo(
                name=partition.name, types=partition.types, total_size=partition.total_size, path=partition.path
            )
            for partition in node.partitions
        ],
        attrs=[iam.NodeAttribute(name=name, value=value) for name, value in node.attrs.items()],
        state=node.state,
        error=error_to_pb(node.error) if node.error else None,
    )


def node_info_from_pb(message: iam.NodeInfo) -> types.NodeInfo:
    """NodeInfo of iamanager.v6."""
    return types.NodeInfo(
        node_id=message.node_id,
        node_type=message.node_type,
        title=message.title,
        max_dmips=message.max_dmips,
        total_ram=message.total_ram,
        physical_ram=message.physical_ram,
        os_info=_os_from_pb(message.os_info),
        cpus=tuple(
            types.CPUInfo(cpu.model_name, cpu.num_cores, cpu.num_threads, _arch_from_pb(cpu.arch_info), cpu.max_dmips)
            for cpu in message.cpus
        ),
        partitions=tuple(
            types.PartitionInfo(partition.name, tuple(partition.types), partition.total_size, partition.path)
            for partition in message.partitions
        ),
        attrs={attribute.name: attribute.value for attribute in message.attrs},
        state=_word(types.NodeState, message.state),
        error=error_from_pb(message.error),
    )


def cert_info_to_pb(cert: types.CertInfo) -> iam.CertInfo:
    """CertInfo; the serial is hex text in a bytes field (observed.md, wire 4)."""
    return iam.CertInfo(
        type=cert.type,
        cert_url=cert.cert_url,
        key_url=cert.key_url,
        serial=cert.serial.encode("ascii"),
        issuer=cert.issuer,
    )


def cert_info_from_pb(message: iam.CertInfo) -> types.CertInfo:
    """The reverse of cert_info_to_pb."""
    return types.CertInfo(
        message.type, message.cert_url, message.key_url, message.serial.decode("ascii", "replace"), message.issuer
    )


def system_info_to_pb(system: types.SystemInfo) -> iam.SystemInfo:
    """SystemInfo of iamanager.v6."""
    return iam.SystemInfo(system_id=system.system_id, unit_model=system.unit_model, version=system.version)


def system_info_from_pb(message: iam.SystemInfo) -> types.SystemInfo:
    """SystemInfo of iamanager.v6."""
    return types.SystemInfo(message.system_id, message.unit_model, message.version)


# Service manager (servicemanager.v5)


def sm_info_to_pb(info: types.SMInfo) -> sm.SMInfo:
    """SMInfo."""
    return sm.SMInfo(
        node_id=info.node_id,
        runtimes=[
            sm.RuntimeInfo(
                runtime_id=runtime.runtime_id,
                type=runtime.type,
                max_dmips=runtime.max_dmips,
                allowed_dmips=runtime.allowed_dmips,
                total_ram=runtime.total_ram,
                allowed_ram=runtime.allowed_ram,
                max_instances=runtime.max_instances,
                os_info=_os_to_pb(runtime.os_info),
                arch_info=_arch_to_pb(runtime.arch_info),
            )
            for runtime in info.runtimes
        ],
        resources=[
            sm.ResourceInfo(name=resource.name, shared_count=resource.shared_count) for resource in info.resources
        ],
    )


def sm_info_from_pb(message: sm.SMInfo) -> types.SMInfo:
    """SMInfo."""
    return types.SMInfo(
        node_id=message.node_id,
        runtimes=tuple(
            types.RuntimeInfo(
                runtime_id=runtime.runtime_id,
                type=runtime.type,
                max_dmips=runtime.max_dmips,
                allowed_dmips=runtime.allowed_dmips,
                total_ram=runtime.total_ram,
                allowed_ram=runtime.allowed_ram,
                max_instances=runtime.max_instances,
                os_info=_os_from_pb(runtime.os_info),
                arch_info=_arch_from_pb(runtime.arch_info),
            )
            for runtime in message.runtimes
        ),
        resources=tuple(types.ResourceInfo(resource.name, resource.shared_count) for resource in message.resources),
    )


def _percents_to_pb(rule: types.AlertRulePercents | None) -> sm.AlertRulePercents | None:
    if rule is None:
        return None
    return sm.AlertRulePercents(
        duration=_duration_to_pb(rule.min_timeout_s),
        min_threshold=rule.min_threshold,
        max_threshold=rule.max_threshold,
    )


def _points_to_pb(rule: types.AlertRulePoints | None) -> sm.AlertRulePoints | None:
    if rule is None:
        return None
    return sm.AlertRulePoints(
        duration=_duration_to_pb(rule.min_timeout_s),
        min_threshold=rule.min_threshold,
        max_threshold=rule.max_threshold,
    )


def _alert_rules_to_pb(rules: types.AlertRules | None) -> sm.AlertRules | None:
    if rules is None:
        return None
    return sm.AlertRules(
        ram=_percents_to_pb(rules.ram),
        cpu=_percents_to_pb(rules.cpu),
        partitions=[
            sm.PartitionAlertRule(
                name=rule.name,
                duration=_duration_to_pb(rule.min_timeout_s),
                min_threshold=rule.min_threshold,
                max_threshold=rule.max_threshold,
            )
            for rule in rules.partitions
        ],
        download=_points_to_pb(rules.download),
        upload=_points_to_pb(rules.upload),
    )


def _alert_rules_from_pb(message: sm.AlertRules) -> types.AlertRules:
    def percents(name: str) -> types.AlertRulePercents | None:
        if not message.HasField(name):
            return None
        rule = getattr(message, name)
        return types.AlertRulePercents(rule.min_threshold, rule.max_threshold, _duration_from_pb(rule.duration))

    def points(name: str) -> types.AlertRulePoints | None:
        if not message.HasField(name):
            return None
        rule = getattr(message, name)
        return types.AlertRulePoints(rule.min_threshold, rule.max_threshold, _duration_from_pb(rule.duration))

    return types.AlertRules(
        ram=percents("ram"),
        cpu=percents("cpu"),
        partitions=tuple(
            types.PartitionAlertRule(
                rule.name, rule.min_threshold, rule.max_threshold, _duration_from_pb(rule.duration)
            )
            for rule in message.partitions
        ),
        download=points("download"),
        upload=points("upload"),
    )


def instance_info_to_pb(info: types.InstanceInfo) -> sm.InstanceInfo:
    """InstanceInfo; absent monitoring parameters mean "do not monitor" (components)."""
    parameters = info.monitoring_parameters
    return sm.InstanceInfo(
        instance=ident_to_pb(info.ident),
        version=info.version,
        manifest_digest=info.manifest_digest,
        owner_id=info.owner_id,
        runtime_id=info.runtime_id,
        uid=info.uid,
        gid=info.gid,
        priority=info.priority,
        storage_path=info.storage_path,
        state_path=info.state_path,
        env_vars=[sm.EnvVarInfo(name=variable.name, value=variable.value) for variable in info.env_vars],
        monitoring_parameters=(
            None
            if parameters is None
            else sm.MonitoringParameters(alert_rules=_alert_rules_to_pb(parameters.alert_rules))
        ),
    )


def instance_info_from_pb(message: sm.InstanceInfo) -> types.InstanceInfo:
    """InstanceInfo."""
    parameters = None
    if message.HasField("monitoring_parameters"):
        given = message.monitoring_parameters
        rules = _alert_rules_from_pb(given.alert_rules) if given.HasField("alert_rules") else None
        parameters = types.MonitoringParameters(rules)
    return types.InstanceInfo(
        ident=ident_from_pb(message.instance),
        version=message.version,
        manifest_digest=message.manifest_digest,
        owner_id=message.owner_id,
        runtime_id=message.runtime_id,
        uid=message.uid,
        gid=message.gid,
        priority=message.priority,
        storage_path=message.storage_path,
        state_path=message.state_path,
        env_vars=tuple(types.EnvVar(variable.name, variable.value) for variable in message.env_vars),
        monitoring_parameters=parameters,
    )


def instance_status_to_pb(status: types.InstanceStatus) -> sm.InstanceStatus:
    """InstanceStatus; error members are always present, as from a C++ SM."""
    return sm.InstanceStatus(
        instance=ident_to_pb(status.ident),
        version=status.version,
        runtime_id=status.runtime_id,
        manifest_digest=status.manifest_digest,
        env_vars=[
            sm.EnvVarStatus(name=variable.name, error=error_to_pb(variable.error)) for variable in status.env_vars
        ],
        state=status.state,
        error=error_to_pb(status.error),
    )


def instance_status_from_pb(message: sm.InstanceStatus) -> types.InstanceStatus:
    """InstanceStatus."""
    return types.InstanceStatus(
        ident=ident_from_pb(message.instance),
        version=message.version,
        state=_word(types.InstanceState, message.state),
        runtime_id=message.runtime_id,
        manifest_digest=message.manifest_digest,
        env_vars=tuple(
            types.EnvVarStatus(variable.name, error_from_pb(variable.error)) for variable in message.env_vars
        ),
        error=error_from_pb(message.error),
    )


def node_config_status_to_pb(status: types.NodeConfigStatus) -> sm.NodeConfigStatus:
    """NodeConfigStatus; the error member is always present."""
    return sm.NodeConfigStatus(state=status.state, version=status.version, error=error_to_pb(status.error))


def node_config_status_from_pb(message: sm.NodeConfigStatus) -> types.NodeConfigStatus:
    """NodeConfigStatus."""
    return types.NodeConfigStatus(
        _word(types.ConfigState, message.state), message.version, error_from_pb(message.error)
    )


def _sample_to_pb(data: types.MonitoringData) -> sm.MonitoringData:
    return sm.MonitoringData(
        timestamp=time_to_pb(data.timestamp),
        ram=data.ram,
        cpu=data.cpu,
        partitions=[
            sm.PartitionUsage(name=partition.name, used_size=partition.used_size) for partition in data.partitions
        ],
        download=data.download,
        upload=data.upload,
    )


def _sample_from_pb(message: sm.MonitoringData) -> types.MonitoringData:
    return types.MonitoringData(
        timestamp=time_from_pb(message.timestamp),
        ram=message.ram,
        cpu=message.cpu,
        partitions=tuple(types.PartitionUsage(partition.name, partition.used_size) for partition in message.partitions),
        download=message.download,
        upload=message.upload,
    )


def _instances_to_pb(instances: Iterable[types.InstanceMonitoring]) -> list[sm.InstanceMonitoring]:
    return [
        sm.InstanceMonitoring(
            instance=ident_to_pb(instance.ident),
            runtime_id=instance.runtime_id,
            monitoring_data=_sample_to_pb(instance.data),
        )
        for instance in instances
    ]


def instant_monitoring_to_pb(monitoring: types.NodeMonitoring) -> sm.InstantMonitoring:
    """InstantMonitoring."""
    return sm.InstantMonitoring(
        node_monitoring=_sample_to_pb(monitoring.node), instances_monitoring=_instances_to_pb(monitoring.instances)
    )


def average_monitoring_to_pb(monitoring: types.NodeMonitoring) -> sm.AverageMonitoring:
    """AverageMonitoring."""
    return sm.AverageMonitoring(
        node_monitoring=_sample_to_pb(monitoring.node), instances_monitoring=_instances_to_pb(monitoring.instances)
    )


def monitoring_from_pb(message: sm.InstantMonitoring | sm.AverageMonitoring) -> types.NodeMonitoring:
    """Either kind of monitoring."""
    return types.NodeMonitoring(
        node=_sample_from_pb(message.node_monitoring),
        instances=tuple(
            types.InstanceMonitoring(
                ident_from_pb(instance.instance), _sample_from_pb(instance.monitoring_data), instance.runtime_id
            )
            for instance in message.instances_monitoring
        ),
    )


def alert_to_pb(alert: types.NodeAlert) -> sm.Alert:
    """Alert envelope."""
    message = sm.Alert(timestamp=time_to_pb(alert.timestamp))
    match alert:
        case types.SystemAlert():
            message.system_alert.message = alert.message[:_ALERT_TEXT]
        case types.CoreAlert():
            message.core_alert.core_component = alert.core_component
            message.core_alert.message = alert.message[:_ALERT_TEXT]
        case types.InstanceAlert():
            message.instance_alert.instance.CopyFrom(ident_to_pb(alert.ident))
            message.instance_alert.service_version = alert.version
            message.instance_alert.message = alert.message[:_ALERT_TEXT]
        case types.SystemQuotaAlert():
            message.system_quota_alert.parameter = alert.parameter
            message.system_quota_alert.value = alert.value
            message.system_quota_alert.status = alert.status
        case types.InstanceQuotaAlert():
            message.instance_quota_alert.instance.CopyFrom(ident_to_pb(alert.ident))
            message.instance_quota_alert.parameter = alert.parameter
            message.instance_quota_alert.value = alert.value
            message.instance_quota_alert.status = alert.status
        case types.ResourceAllocateAlert():
            message.resource_allocate_alert.instance.CopyFrom(ident_to_pb(alert.ident))
            message.resource_allocate_alert.resource = alert.resource
            message.resource_allocate_alert.message = alert.message[:_ALERT_TEXT]
    return message


def alert_from_pb(message: sm.Alert) -> types.NodeAlert:
    """Alert envelope; an alert without time gets the present time."""
    when = time_from_pb(message.timestamp) or datetime.now(UTC)
    match message.WhichOneof("AlertItem"):
        case "system_alert":
            return types.SystemAlert(when, message.system_alert.message)
        case "core_alert":
            return types.CoreAlert(when, message.core_alert.core_component, message.core_alert.message)
        case "instance_alert":
            alert = message.instance_alert
            return types.InstanceAlert(when, ident_from_pb(alert.instance), alert.service_version, alert.message)
        case "system_quota_alert":
            quota = message.system_quota_alert
            return types.SystemQuotaAlert(when, quota.parameter, quota.value, _word(types.AlertStatus, quota.status))
        case "instance_quota_alert":
            own = message.instance_quota_alert
            return types.InstanceQuotaAlert(
                when, ident_from_pb(own.instance), own.parameter, own.value, _word(types.AlertStatus, own.status)
            )
        case "resource_allocate_alert":
            resource = message.resource_allocate_alert
            return types.ResourceAllocateAlert(
                when, ident_from_pb(resource.instance), resource.resource, resource.message
            )
        case _:
            raise InvalidArgumentError("alert without content")


def log_request_to_pb(request: types.LogRequest) -> sm.SMIncomingMessages:
    """The stream frame of a log request of any kind. `from` is a Python keyword, hence the dictionaries."""
    times: dict[str, Any] = {"correlation_id": request.correlation_id}
    if since := time_to_pb(request.since):
        times["from"] = since
    if till := time_to_pb(request.till):
        times["till"] = till
    match request.kind:
        case types.LogKind.SYSTEM:
            return sm.SMIncomingMessages(system_log_request=sm.SystemLogRequest(**times))
        case types.LogKind.INSTANCE:
            wanted = filter_to_pb(request.filter)
            return sm.SMIncomingMessages(instance_log_request=sm.InstanceLogRequest(filter=wanted, **times))
        case types.LogKind.CRASH:
            wanted = filter_to_pb(request.filter)
            return sm.SMIncomingMessages(instance_crash_log_request=sm.InstanceCrashLogRequest(filter=wanted, **times))


def log_request_from_pb(kind: types.LogKind, message: Any) -> types.LogRequest:
    """SystemLogRequest, InstanceLogRequest or InstanceCrashLogRequest; an absent filter selects all."""
    wanted = types.InstanceFilter()
    if kind is not types.LogKind.SYSTEM and message.HasField("filter"):
        wanted = filter_from_pb(message.filter)
    return types.LogRequest(
        kind, message.correlation_id, wanted, time_from_pb(getattr(message, "from")), time_from_pb(message.till)
    )


def log_data_to_pb(log: types.LogData) -> sm.LogData:
    """LogData; the error member is always present."""
    return sm.LogData(
        correlation_id=log.correlation_id,
        part_count=log.part_count,
        part=log.part,
        data=log.data,
        status=log.status,
        error=error_to_pb(log.error),
    )


def log_data_from_pb(message: sm.LogData) -> types.LogData:
    """LogData."""
    return types.LogData(
        correlation_id=message.correlation_id,
        status=_word(types.LogStatus, message.status),
        part_count=message.part_count,
        part=message.part,
        data=message.data,
        error=error_from_pb(message.error),
    )


# Networks (servicemanager.v5, NetworkService)


def _rules_to_pb(rules: Iterable[types.FirewallRule]) -> list[net.FirewallRule]:
    return [
        net.FirewallRule(dst_ip=rule.dst_ip, dst_port=rule.dst_port, proto=rule.proto, src_ip=rule.src_ip)
        for rule in rules
    ]


def firewall_rules_from_pb(messages: Iterable[net.FirewallRule]) -> tuple[types.FirewallRule, ...]:
    """A list of firewall rules."""
    return tuple(types.FirewallRule(rule.dst_ip, rule.dst_port, rule.proto, rule.src_ip) for rule in messages)


def network_wishes_to_pb(wishes: types.NetworkWishes) -> net.UpdateItemNetworkParams:
    """UpdateItemNetworkParams."""
    return net.UpdateItemNetworkParams(
        hosts=wishes.hosts, allowed_connections=wishes.allowed_connections, exposed_ports=wishes.exposed_ports
    )


def network_wishes_from_pb(message: net.UpdateItemNetworkParams) -> types.NetworkWishes:
    """UpdateItemNetworkParams."""
    return types.NetworkWishes(tuple(message.hosts), tuple(message.allowed_connections), tuple(message.exposed_ports))


def node_network_to_pb(network: types.NodeNetwork) -> net.GetNodeNetworkParamsResponse:
    """The success answer of GetNodeNetworkParams; `error` stays absent, as C++ SMs demand."""
    return net.GetNodeNetworkParamsResponse(subnet=network.subnet, ip=network.ip, vlan_id=network.vlan_id)


def node_network_from_pb(message: net.GetNodeNetworkParamsResponse) -> types.NodeNetwork:
    """Answer of GetNodeNetworkParams without error."""
    return types.NodeNetwork(message.subnet, message.ip, message.vlan_id)


def instance_network_to_pb(network: types.InstanceNetwork) -> net.AllocateInstanceNetworkResponse:
    """The success answer of AllocateInstanceNetwork; `error` stays absent."""
    return net.AllocateInstanceNetworkResponse(
        subnet=network.subnet,
        ip=network.ip,
        dns_servers=network.dns_servers,
        firewall_rules=_rules_to_pb(network.firewall_rules),
    )


def instance_network_from_pb(message: net.AllocateInstanceNetworkResponse) -> types.InstanceNetwork:
    """Answer of AllocateInstanceNetwork without error."""
    return types.InstanceNetwork(
        message.subnet, message.ip, tuple(message.dns_servers), firewall_rules_from_pb(message.firewall_rules)
    )


def instance_network_state_to_pb(state: types.InstanceNetworkState) -> net.InstanceNetworkStateInfo:
    """One entry of SyncNetworkState."""
    return net.InstanceNetworkStateInfo(
        instance=ident_to_pb(state.ident),
        network_id=state.network_id,
        ip=state.ip,
        firewall_rules=_rules_to_pb(state.firewall_rules),
    )


def instance_network_state_from_pb(message: net.InstanceNetworkStateInfo) -> types.InstanceNetworkState:
    """One entry of SyncNetworkState."""
    return types.InstanceNetworkState(
        ident_from_pb(message.instance), message.network_id, message.ip, firewall_rules_from_pb(message.firewall_rules)
    )


def firewall_update_to_pb(
    ident: types.InstanceIdent, rules: Iterable[types.FirewallRule]
) -> net.InstanceNetworkUpdateNotification:
    """A late firewall update of one instance."""
    return net.InstanceNetworkUpdateNotification(
        pending_firewall_update=net.PendingFirewallUpdate(
            instance=ident_to_pb(ident), firewall_rules=_rules_to_pb(rules)
        )
    )
