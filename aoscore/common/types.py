"""Value types that several components share: what the Unit is made of, what runs on it, how it does.

All are immutable. Times are aware datetimes in UTC, durations float seconds, sizes int bytes, CPU figures DMIPS.
Names and meanings follow grpc.md; `convert` turns them into protobuf messages and back.
"""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum

import msgspec


class Duration(float):
    """Seconds, written in JSON as "1m30s", "PT90S", "30d" or a plain number of seconds (read by common.config)."""


class Value(msgspec.Struct, frozen=True, kw_only=False, rename="camel", omit_defaults=True):
    """Base of all value types: immutable, comparable, hashable where the members are."""


class ErrorInfo(Value, frozen=True):
    """An error as it travels: both codes zero means fine."""

    aos_code: int = 0
    exit_code: int = 0
    message: str = ""


class ItemType(StrEnum):
    """Kind of an update item or of another identity in the cloud protocol (database.md §1.3)."""

    SERVICE = "service"
    COMPONENT = "component"
    LAYER = "layer"
    SUBJECT = "subject"
    OEM = "oem"
    SP = "sp"
    FLEET = "fleet"
    NODE = "node"
    NODE_SUBJECT = "node-subject"
    RUNTIME = "runtime"


class InstanceIdent(Value, frozen=True, order=True):
    """Identity of one instance; all five members count."""

    item_id: str
    subject_id: str
    instance: int
    type: ItemType = ItemType.SERVICE
    preinstalled: bool = False

    def __str__(self) -> str:
        return f"{self.item_id}:{self.subject_id}:{self.instance}"


class InstanceFilter(Value, frozen=True):
    """Selects instances; None means any."""

    item_id: str | None = None
    subject_id: str | None = None
    instance: int | None = None

    def matches(self, ident: InstanceIdent) -> bool:
        """Whether ident is selected."""
        return (
            self.item_id in (None, ident.item_id)
            and self.subject_id in (None, ident.subject_id)
            and self.instance in (None, ident.instance)
        )


class ArchInfo(Value, frozen=True):
    """CPU architecture in Go's words, e.g. amd64, arm64 with variant v8."""

    architecture: str
    variant: str = ""


class OSInfo(Value, frozen=True):
    """Operating system of a node, a runtime or an image."""

    os: str
    version: str = ""
    features: tuple[str, ...] = ()


class CPUInfo(Value, frozen=True):
    """One CPU model of a node."""

    model_name: str = ""
    num_cores: int = 1
    num_threads: int = 1
    arch_info: ArchInfo = ArchInfo("")
    max_dmips: int = 0


class PartitionInfo(Value, frozen=True):
    """A disk partition of a node."""

    name: str
    types: tuple[str, ...] = ()
    total_size: int = 0
    path: str = ""


class NodeState(StrEnum):
    """Life of a node (iam.md §3.2)."""

    UNPROVISIONED = "unprovisioned"
    PROVISIONED = "provisioned"
    PAUSED = "paused"
    ERROR = "error"


class NodeInfo(Value, frozen=True):
    """Description and state of a node as IAM knows it."""

    node_id: str
    node_type: str = ""
    title: str = ""
    max_dmips: int = 0
    total_ram: int = 0
    physical_ram: int = 0
    os_info: OSInfo = OSInfo("")
    cpus: tuple[CPUInfo, ...] = ()
    partitions: tuple[PartitionInfo, ...] = ()
    attrs: dict[str, str] = {}
    state: NodeState = NodeState.UNPROVISIONED
    error: ErrorInfo | None = None

    def attribute(self, name: str) -> str | None:
        """Value of the attribute with that name in any case, None when absent."""
        wanted = name.lower()
        return next((value for key, value in self.attrs.items() if key.lower() == wanted), None)

    @property
    def is_main(self) -> bool:
        """Whether this is the Main Node: the attribute counts, not its value."""
        return self.attribute("MainNode") is not None

    @property
    def components(self) -> frozenset[str]:
        """Aos components of the node in lower case, e.g. {"cm", "iam", "sm"}."""
        return frozenset(part.strip().lower() for part in (self.attribute("AosComponents") or "").split(",") if part)


class SystemInfo(Value, frozen=True):
    """Identity of the Unit."""

    system_id: str
    unit_model: str = ""
    version: str = ""


class CertInfo(Value, frozen=True):
    """Where a certificate and its key are. `serial` is lower-case hex, `issuer` the DER name."""

    type: str
    cert_url: str
    key_url: str
    serial: str = ""
    issuer: bytes = b""


class ResourceInfo(Value, frozen=True):
    """A host resource that a node offers; shared_count 0 means unlimited."""

    name: str
    shared_count: int = 0


class RuntimeInfo(Value, frozen=True):
    """A way to run instances on a node; zero figures mean "not told"."""

    runtime_id: str
    type: str
    max_dmips: int = 0
    allowed_dmips: int = 0
    total_ram: int = 0
    allowed_ram: int = 0
    max_instances: int = 0
    os_info: OSInfo = OSInfo("")
    arch_info: ArchInfo = ArchInfo("")


class SMInfo(Value, frozen=True):
    """Capabilities of one SM."""

    node_id: str
    runtimes: tuple[RuntimeInfo, ...] = ()
    resources: tuple[ResourceInfo, ...] = ()


class EnvVar(Value, frozen=True):
    """An environment variable override."""

    name: str
    value: str


class EnvVarStatus(Value, frozen=True):
    """Result for one override; error None means applied."""

    name: str
    error: ErrorInfo | None = None


class AlertRulePercents(Value, frozen=True):
    """Threshold pair in percent; `min_timeout_s`: how long a level must hold."""

    min_threshold: float
    max_threshold: float
    min_timeout_s: Duration = msgspec.field(name="minTimeout", default=Duration(0))


class AlertRulePoints(Value, frozen=True):
    """Threshold pair in bytes per period."""

    min_threshold: int
    max_threshold: int
    min_timeout_s: Duration = msgspec.field(name="minTimeout", default=Duration(0))


class PartitionAlertRule(Value, frozen=True):
    """Threshold pair for one partition, percent of its size."""

    name: str
    min_threshold: float
    max_threshold: float
    min_timeout_s: Duration = msgspec.field(name="minTimeout", default=Duration(0))


class AlertRules(Value, frozen=True):
    """Alert rules of a node or an instance; None means no rule."""

    ram: AlertRulePercents | None = None
    cpu: AlertRulePercents | None = None
    partitions: tuple[PartitionAlertRule, ...] = ()
    download: AlertRulePoints | None = None
    upload: AlertRulePoints | None = None


class MonitoringParameters(Value, frozen=True):
    """Monitoring settings of one instance; without rules it is sampled only."""

    alert_rules: AlertRules | None = None


class InstanceInfo(Value, frozen=True):
    """Everything SM needs to start one instance (grpc.md, servicemanager.v5.InstanceInfo).

    Paths are relative to the storage and state directories; empty means none. `monitoring_parameters` is None for
    components.
    """

    ident: InstanceIdent
    version: str
    manifest_digest: str
    owner_id: str
    runtime_id: str
    uid: int = 0
    gid: int = 0
    priority: int = 0
    storage_path: str = ""
    state_path: str = ""
    env_vars: tuple[EnvVar, ...] = ()
    monitoring_parameters: MonitoringParameters | None = None


class InstanceState(StrEnum):
    """State of an instance."""

    ACTIVATING = "activating"
    ACTIVE = "active"
    INACTIVE = "inactive"
    FAILED = "failed"


class InstanceStatus(Value, frozen=True):
    """What an SM says about one instance."""

    ident: InstanceIdent
    version: str
    state: InstanceState
    runtime_id: str = ""
    manifest_digest: str = ""
    env_vars: tuple[EnvVarStatus, ...] = ()
    error: ErrorInfo | None = None


class ConfigState(StrEnum):
    """State of a node or unit configuration."""

    ABSENT = "absent"
    INSTALLED = "installed"
    FAILED = "failed"


class NodeConfigStatus(Value, frozen=True):
    """Result of a node configuration request."""

    state: ConfigState
    version: str = ""
    error: ErrorInfo | None = None


class PartitionUsage(Value, frozen=True):
    """Used bytes of one partition."""

    name: str
    used_size: int


class MonitoringData(Value, frozen=True):
    """One sample: RAM bytes, CPU DMIPS, traffic bytes of the current period."""

    timestamp: datetime | None = None
    ram: int = 0
    cpu: int = 0
    partitions: tuple[PartitionUsage, ...] = ()
    download: int = 0
    upload: int = 0


class InstanceMonitoring(Value, frozen=True):
    """Sample of one instance."""

    ident: InstanceIdent
    data: MonitoringData
    runtime_id: str = ""


class NodeMonitoring(Value, frozen=True):
    """Sample or average of a node and its instances."""

    node: MonitoringData
    instances: tuple[InstanceMonitoring, ...] = ()


class AlertStatus(StrEnum):
    """Phase of a quota alert."""

    RAISE = "raise"
    CONTINUE = "continue"
    FALL = "fall"


class SystemAlert(Value, frozen=True):
    """A journal line of the system."""

    timestamp: datetime
    message: str


class CoreAlert(Value, frozen=True):
    """A journal line of an Aos process; core_component is CM, SM, IAM or MP."""

    timestamp: datetime
    core_component: str
    message: str


class InstanceAlert(Value, frozen=True):
    """A journal line of an instance."""

    timestamp: datetime
    ident: InstanceIdent
    version: str
    message: str


class SystemQuotaAlert(Value, frozen=True):
    """A level of the node crossed a threshold; parameter is cpu, ram, download, upload or a partition name."""

    timestamp: datetime
    parameter: str
    value: int
    status: AlertStatus


class InstanceQuotaAlert(Value, frozen=True):
    """A level of an instance crossed a threshold."""

    timestamp: datetime
    ident: InstanceIdent
    parameter: str
    value: int
    status: AlertStatus


class ResourceAllocateAlert(Value, frozen=True):
    """A host resource could not be given to an instance."""

    timestamp: datetime
    ident: InstanceIdent
    resource: str
    message: str


NodeAlert = SystemAlert | CoreAlert | InstanceAlert | SystemQuotaAlert | InstanceQuotaAlert | ResourceAllocateAlert


class LogKind(StrEnum):
    """Which log is wanted."""

    SYSTEM = "systemLog"
    INSTANCE = "serviceLog"
    CRASH = "crashLog"


class LogRequest(Value, frozen=True):
    """A log request of the cloud; `since`/`till` None means open."""

    kind: LogKind
    correlation_id: str
    filter: InstanceFilter = InstanceFilter()
    since: datetime | None = None
    till: datetime | None = None


class LogStatus(StrEnum):
    """Outcome of a log request."""

    OK = "ok"
    ERROR = "error"
    EMPTY = "empty"
    ABSENT = "absent"


class LogData(Value, frozen=True):
    """One part of a log: a slice of a gzip stream; parts count from 1."""

    correlation_id: str
    status: LogStatus
    part_count: int = 0
    part: int = 0
    data: bytes = b""
    error: ErrorInfo | None = None


class FirewallRule(Value, frozen=True):
    """Allows one flow between instances."""

    dst_ip: str
    dst_port: str
    proto: str
    src_ip: str


class NetworkWishes(Value, frozen=True):
    """Network wishes of an item: names, ports it offers, ports of others it uses (grpc.md, UpdateItemNetworkParams)."""

    hosts: tuple[str, ...] = ()
    allowed_connections: tuple[str, ...] = ()
    exposed_ports: tuple[str, ...] = ()


class NodeNetwork(Value, frozen=True):
    """Where a node sits in a network."""

    subnet: str
    ip: str
    vlan_id: int = 0


class InstanceNetwork(Value, frozen=True):
    """Address, resolvers and rules of one instance."""

    subnet: str
    ip: str
    dns_servers: tuple[str, ...] = ()
    firewall_rules: tuple[FirewallRule, ...] = ()


class InstanceNetworkState(Value, frozen=True):
    """What a node has applied for one instance."""

    ident: InstanceIdent
    network_id: str
    ip: str
    firewall_rules: tuple[FirewallRule, ...] = ()
