"""Every message of the Unit-cloud protocol, version 7 (cloud-protocol §6).

One Struct per message and per part of a message, member names in Python style; `rename="camel"` gives the wire names.
Writing is strict: a member that the contract always writes has no default here, or is declared with `always()`; every
other member is left out while it has its default value. Reading goes through `reader.read`, which is tolerant.

The data of a message is a Struct whose tag is its `messageType`. Delivery (header, txn, acks) is not here: see
`envelope` and `session`.
"""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import ClassVar, Final, Self, TypedDict, TypeVar, get_args

import msgspec

from aoscore.common import types
from aoscore.common.config import Duration
from aoscore.common.errors import InvalidArgumentError
from aoscore.common.types import ConfigState, InstanceState, ItemType, LogStatus, NodeState

PROTOCOL_VERSION: Final = 7

T = TypeVar("T")


def always(value: T) -> T:
    """Default of a member that is written even when it has this value (a factory is never "equal to the default")."""
    return msgspec.field(default_factory=lambda: value)


class Wire(msgspec.Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    """Base of everything that is written to or read from the cloud."""


class Message(Wire, frozen=True, kw_only=True, tag_field="messageType"):
    """Base of all message payloads (the `data` member of the envelope)."""

    correlation_id: str = ""

    def without_secrets(self) -> Self:
        """The message with its passwords left out."""
        return self


# --- enumerations ---


class ItemState(StrEnum):
    """State of an update item in a unit status (cloud-protocol §6.0)."""

    UNKNOWN = "unknown"
    DOWNLOADING = "downloading"
    PENDING = "pending"
    INSTALLING = "installing"
    INSTALLED = "installed"
    REMOVING = "removing"
    REMOVED = "removed"
    FAILED = "failed"


class DesiredNodeState(StrEnum):
    """State the cloud may ask of a node."""

    PROVISIONED = "provisioned"
    PAUSED = "paused"


class SubjectType(StrEnum):
    """Kind of a subject."""

    GROUP = "group"
    USER = "user"


class CertType(StrEnum):
    """Certificate types known to a Unit."""

    OFFLINE = "offline"
    ONLINE = "online"
    SM = "sm"
    CM = "cm"
    IAM = "iam"


class CoreComponent(StrEnum):
    """Sender of a core alert."""

    CM = "CM"
    SM = "SM"
    IAM = "IAM"
    MP = "MP"


class DownloadState(StrEnum):
    """State in a download progress alert."""

    STARTED = "started"
    PAUSED = "paused"
    INTERRUPTED = "interrupted"
    FINISHED = "finished"


class LogType(StrEnum):
    """Kind of log the cloud asks for."""

    SYSTEM = "systemLog"
    INSTANCE = "instanceLog"
    CRASH = "crashLog"


class UploadType(StrEnum):
    """How a log is to be delivered: over the WebSocket or by an own HTTPS request (D22)."""

    WSS = "wss"
    HTTPS = "https"


class StateResult(StrEnum):
    """The cloud's verdict on a new state."""

    ACCEPTED = "accepted"
    REJECTED = "rejected"


# --- small parts ---


class ErrorInfo(Wire, frozen=True, kw_only=True):
    """An error on the wire: left out when there is none, else always with its three members (§4.6)."""

    aos_code: int = always(0)
    exit_code: int = always(0)
    message: str = always("")

    @classmethod
    def of(cls, error: types.ErrorInfo | None) -> ErrorInfo | None:
        """The wire form of an internal error info; None when there is no error."""
        if error is None or error.aos_code == 0:
            return None
        return cls(aos_code=error.aos_code, exit_code=error.exit_code, message=error.message)


class Identity(Wire, frozen=True, kw_only=True):
    """Names an entity of the cloud or of the Unit. Which members are written depends on the place (§4.2)."""

    id: str = ""
    codename: str = ""
    type: ItemType | None = None
    title: str = ""

    @classmethod
    def of_item(cls, item_id: str, *, preinstalled: bool = False, item_type: ItemType | None = None) -> Identity:
        """An update item: with `item_type` the form of unit status, without it the form of all other messages."""
        if preinstalled:
            return cls(codename=item_id, type=item_type)
        return cls(id=item_id, type=item_type)

    @classmethod
    def of_subject(cls, subject_id: str, *, preinstalled: bool = False) -> Identity:
        """The subject of an instance."""
        return cls(codename=subject_id) if preinstalled else cls(id=subject_id)

    @classmethod
    def of_codename(cls, codename: str) -> Identity:
        """A node (node id), node group (node type), runtime (runtime id) or unit subject."""
        return cls(codename=codename)


class NodeIdentity(Wire, frozen=True, kw_only=True):
    """A node in unit status, where the title is always written."""

    codename: str
    title: str = always("")


class Placement(Wire, frozen=True, kw_only=True):
    """Node or runtime of an instance in unit status: the member is always there, empty while it has no place."""

    codename: str = always("")


class InstanceMembers(TypedDict):
    """The members that name an instance."""

    item: Identity
    subject: Identity
    instance: int


def instance_members(ident: types.InstanceIdent) -> InstanceMembers:
    """The members that name an instance, for use as `NewState(**instance_members(ident), ...)`."""
    return {
        "item": Identity.of_item(ident.item_id, preinstalled=ident.preinstalled),
        "subject": Identity.of_subject(ident.subject_id, preinstalled=ident.preinstalled),
        "instance": ident.instance,
    }


def _need(owner: str, **members: object) -> None:
    """Checks members that a reader must find (§4.2, last paragraph)."""
    for name, value in members.items():
        if not value:
            raise InvalidArgumentError(f"{owner}: {name} is missing")


class ArchInfo(Wire, frozen=True, kw_only=True):
    """Processor architecture."""

    architecture: str
    variant: str = ""


class OSInfo(Wire, frozen=True, kw_only=True):
    """Operating system."""

    os: str
    version: str = ""
    features: tuple[str, ...] = ()


# --- ack and nack ---


class Ack(Message, frozen=True, kw_only=True, tag="ack"):
    """Acknowledges the message whose txn is in the header."""


class Nack(Message, frozen=True, kw_only=True, tag="nack"):
    """The receiver cannot take the message now; `retry_after` in milliseconds."""

    retry_after: int = 500


# --- unit config ---


class PercentRule(Wire, frozen=True, kw_only=True):
    """Alert rule with thresholds in percent."""

    min_threshold: float = always(0.0)
    max_threshold: float = always(0.0)
    min_timeout: Duration | None = None


class PartitionRule(PercentRule, frozen=True, kw_only=True):
    """Alert rule for one partition, thresholds in percent of its size."""

    name: str = always("")


class PointRule(Wire, frozen=True, kw_only=True):
    """Alert rule with thresholds in bytes."""

    min_threshold: int = always(0)
    max_threshold: int = always(0)
    min_timeout: Duration | None = None


class AlertRules(Wire, frozen=True, kw_only=True):
    """Alert rules of a node or an item."""

    ram: PercentRule | None = None
    cpu: PercentRule | None = None
    partitions: tuple[PartitionRule, ...] = always(())
    download: PointRule | None = None
    upload: PointRule | None = None


class ResourceRatios(Wire, frozen=True, kw_only=True):
    """Which percentage of an item's quota counts as requested when the item does not say."""

    cpu: float | None = None
    ram: float | None = None
    storage: float | None = None
    state: float | None = None


class NodeConfig(Wire, frozen=True, kw_only=True):
    """The part of a unit config for one node or one node type; `version` is used between CM and SM only."""

    version: str = ""
    node: Identity | None = None
    node_group_subject: Identity
    alert_rules: AlertRules | None = None
    resource_ratios: ResourceRatios | None = None
    labels: tuple[str, ...] = ()
    priority: int = always(0)


class UnitConfig(Wire, frozen=True, kw_only=True):
    """The configuration of the whole Unit (§6.3); also the content of the unit config file."""

    format_version: str = always("")
    version: str = always("")
    nodes: tuple[NodeConfig, ...] = always(())


# --- desired status ---


class DesiredNode(Wire, frozen=True, kw_only=True):
    """Wanted state of one node."""

    item: Identity
    state: DesiredNodeState

    def __post_init__(self) -> None:
        _need("desired node", codename=self.item.codename)


class DesiredItem(Wire, frozen=True, kw_only=True):
    """One wanted version of an update item."""

    item: Identity
    version: str = always("")
    owner: Identity
    index_digest: str = always("")

    def __post_init__(self) -> None:
        _need("desired item", id=self.item.id, type=self.item.type, owner_id=self.owner.id)

    @property
    def item_id(self) -> str:
        return self.item.id

    @property
    def item_type(self) -> ItemType:
        assert self.item.type is not None  # noqa: S101 - checked at creation, tells mypy
        return self.item.type


class DesiredInstance(Wire, frozen=True, kw_only=True):
    """How many instances of an item are wanted for a subject, and where."""

    item: Identity
    subject: Identity
    priority: int = always(0)
    num_instances: int = always(1)
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _need("desired instance", item_id=self.item.id, subject_id=self.subject.id)


class DesiredSubject(Wire, frozen=True, kw_only=True):
    """A subject the desired instances refer to."""

    identity: Identity
    type: SubjectType
    is_reported_from_unit: bool = always(False)

    def __post_init__(self) -> None:
        _need("subject", id=self.identity.id)


class SigningCertificate(Wire, frozen=True, kw_only=True):
    """A certificate of the signers, DER."""

    certificate: bytes
    fingerprint: str


class CertificateChain(Wire, frozen=True, kw_only=True):
    """Names a signer: fingerprint of the signing certificate first, then the intermediates, leaf upwards."""

    name: str
    fingerprints: tuple[str, ...] = always(())


class DesiredStatus(Message, frozen=True, kw_only=True, tag="desiredStatus"):
    """What the Unit shall become. None in `items` or `instances` means: not in the message (D17)."""

    # A bad unit config is reported as such; it does not keep items from being updated.
    may_be_unreadable: ClassVar[frozenset[str]] = frozenset({"unit_config"})

    nodes: tuple[DesiredNode, ...] = ()
    unit_config: UnitConfig | None = None
    items: tuple[DesiredItem, ...] | None = None
    instances: tuple[DesiredInstance, ...] | None = None
    subjects: tuple[DesiredSubject, ...] = ()
    certificates: tuple[SigningCertificate, ...] = ()
    certificate_chains: tuple[CertificateChain, ...] = ()


# --- unit status ---


class UnitConfigStatus(Wire, frozen=True, kw_only=True):
    """State of the current unit config or of the last attempt to change it."""

    version: str = ""
    state: ConfigState
    error_info: ErrorInfo | None = None


class CPU(Wire, frozen=True, kw_only=True):
    """One processor of a node."""

    model_name: str = always("")
    total_num_cores: int = always(0)
    total_num_threads: int = always(0)
    arch_info: ArchInfo
    max_dmips: int | None = None


class Partition(Wire, frozen=True, kw_only=True):
    """One partition of a node, size in bytes."""

    name: str
    path: str = ""
    types: tuple[str, ...] = always(())
    total_size: int


class Runtime(Wire, frozen=True, kw_only=True):
    """One runtime of a node; RAM in bytes."""

    identity: Identity
    runtime_type: str
    arch_info: ArchInfo
    os_info: OSInfo
    max_dmips: int | None = None
    allowed_dmips: int | None = None
    total_ram: int | None = None
    allowed_ram: int | None = None
    max_instances: int


class Resource(Wire, frozen=True, kw_only=True):
    """A device or other resource of a node; `shared_count` 0 = unlimited."""

    name: str
    shared_count: int


class UnitNode(Wire, frozen=True, kw_only=True):
    """A node with its runtimes, as the cloud sees it; RAM in bytes."""

    identity: NodeIdentity
    node_group_subject: Identity
    max_dmips: int
    physical_ram: int | None = None
    total_ram: int
    os_info: OSInfo
    cpus: tuple[CPU, ...] = ()
    attrs: dict[str, str] = {}
    partitions: tuple[Partition, ...] = ()
    state: NodeState
    is_connected: bool
    error_info: ErrorInfo | None = None
    runtimes: tuple[Runtime, ...] = ()
    resources: tuple[Resource, ...] = ()


class UnitItem(Wire, frozen=True, kw_only=True):
    """State of one version of an update item."""

    item: Identity
    version: str
    state: ItemState
    error_info: ErrorInfo | None = None


class UnitInstance(Wire, frozen=True, kw_only=True):
    """State of one instance; the checksum is hex SHA3-224 of its state (D8)."""

    node: Placement
    runtime: Placement
    instance: int
    state_checksum: str = ""
    state: InstanceState
    error_info: ErrorInfo | None = None


class UnitInstances(Wire, frozen=True, kw_only=True):
    """All instances of one item version and subject."""

    item: Identity
    subject: Identity
    version: str
    instances: tuple[UnitInstance, ...]


class UnitStatus(Message, frozen=True, kw_only=True, tag="unitStatus"):
    """State of the Unit. A full status has all five lists, a delta only the touched ones (None: not in the message)."""

    is_delta_info: bool
    unit_config: tuple[UnitConfigStatus, ...] | None = None
    nodes: tuple[UnitNode, ...] | None = None
    items: tuple[UnitItem, ...] | None = None
    instances: tuple[UnitInstances, ...] | None = None
    subjects: tuple[Identity, ...] | None = None


# --- blobs ---


class RequestBlobUrls(Message, frozen=True, kw_only=True, tag="requestBlobUrls"):
    """Asks where blobs can be downloaded, 1 to 16 digests."""

    digests: tuple[str, ...]


class DecryptInfo(Wire, frozen=True, kw_only=True):
    """How a blob is encrypted; the key is plain. Files with AES-GCM may hold their IV themselves."""

    block_alg: str = always("AES256/CBC/pkcs7")
    block_iv: bytes = always(b"")
    block_key: bytes

    def __repr__(self) -> str:
        return f"DecryptInfo(block_alg={self.block_alg!r})"


class SignInfo(Wire, frozen=True, kw_only=True):
    """Signature over a decrypted blob."""

    chain_name: str
    alg: str
    value: bytes
    trusted_timestamp: datetime
    ocsp_values: tuple[str, ...] = ()


class BlobInfo(Wire, frozen=True, kw_only=True):
    """Where a blob is and how to check it: `sha256` is SHA3-256 (or SHA-256, D7) of the file as downloaded."""

    digest: str
    urls: tuple[str, ...] = always(())
    sha256: str = always("")
    size: int = always(0)
    decrypt_info: DecryptInfo | None = None
    sign_info: SignInfo | None = None

    def __post_init__(self) -> None:
        _need(f"blob {self.digest}", urls=self.urls)


class BlobUrls(Message, frozen=True, kw_only=True, tag="blobUrls"):
    """Answer to RequestBlobUrls."""

    items: tuple[BlobInfo, ...] = always(())


# --- monitoring ---


class PartitionUsage(Wire, frozen=True, kw_only=True):
    """Used bytes of a partition."""

    name: str
    used_size: int


class Sample(Wire, frozen=True, kw_only=True):
    """One monitoring sample: CPU in DMIPS (whole numbers, D19), everything else in bytes."""

    timestamp: datetime
    ram: int
    cpu: int
    download: int = always(0)
    upload: int = always(0)
    partitions: tuple[PartitionUsage, ...] = ()


class NodeStateChange(Wire, frozen=True, kw_only=True):
    """A node changed its state; the flag is `isConnected` on the wire although the schema says `connected` (D1)."""

    timestamp: datetime
    state: NodeState
    is_connected: bool


class NodeMonitoring(Wire, frozen=True, kw_only=True):
    """Samples and state changes of one node."""

    node: Identity
    node_states: tuple[NodeStateChange, ...] = ()
    items: tuple[Sample, ...]


class InstanceStateChange(Wire, frozen=True, kw_only=True):
    """An instance changed its state."""

    timestamp: datetime
    state: InstanceState


class InstanceMonitoring(Wire, frozen=True, kw_only=True):
    """Samples and state changes of one instance."""

    item: Identity
    subject: Identity
    instance: int
    node: Identity
    item_states: tuple[InstanceStateChange, ...]
    items: tuple[Sample, ...]


class MonitoringData(Message, frozen=True, kw_only=True, tag="monitoringData"):
    """Everything sampled since the last such message."""

    nodes: tuple[NodeMonitoring, ...]
    instances: tuple[InstanceMonitoring, ...] = ()


# --- alerts ---


class Alert(Wire, frozen=True, kw_only=True, tag_field="tag"):
    """Base of all alerts."""

    timestamp: datetime


class SystemAlert(Alert, frozen=True, kw_only=True, tag="systemAlert"):
    """Something in the system of a node went wrong."""

    node: Identity
    message: str


class CoreAlert(Alert, frozen=True, kw_only=True, tag="coreAlert"):
    """Something in one of our own processes went wrong."""

    node: Identity
    core_component: CoreComponent
    message: str


class ResourceAllocateAlert(Alert, frozen=True, kw_only=True, tag="resourceAllocateAlert"):
    """An instance could not get a resource (tag: D2); `device_id` is the resource name."""

    item: Identity
    subject: Identity
    instance: int
    node: Identity
    device_id: str
    message: str


class SystemQuotaAlert(Alert, frozen=True, kw_only=True, tag="systemQuotaAlert"):
    """A node passed a threshold; value in DMIPS or bytes."""

    node: Identity
    parameter: str
    value: int


class InstanceQuotaAlert(Alert, frozen=True, kw_only=True, tag="instanceQuotaAlert"):
    """An instance passed a threshold; value in DMIPS or bytes."""

    item: Identity
    subject: Identity
    instance: int
    parameter: str
    value: int


class DownloadProgressAlert(Alert, frozen=True, kw_only=True, tag="downloadProgressAlert"):
    """How far a download is, in bytes."""

    digest: str
    url: str
    downloaded_bytes: int
    total_bytes: int
    state: DownloadState
    reason: str = ""
    error_info: ErrorInfo | None = None


class InstanceAlert(Alert, frozen=True, kw_only=True, tag="updateItemInstanceAlert"):
    """An instance reports something (`subject`, not the schema's `subjectId`: D3)."""

    item: Identity
    subject: Identity
    instance: int
    version: str
    message: str


AnyAlert = (
    SystemAlert
    | CoreAlert
    | ResourceAllocateAlert
    | SystemQuotaAlert
    | InstanceQuotaAlert
    | DownloadProgressAlert
    | InstanceAlert
)


class Alerts(Message, frozen=True, kw_only=True, tag="alerts"):
    """At most 16 alerts, oldest first."""

    items: tuple[AnyAlert, ...]


# --- logs ---


class LogFilter(Wire, frozen=True, kw_only=True):
    """Which log is wanted; no `node_ids` = all nodes (D23)."""

    from_: datetime | None = msgspec.field(name="from", default=None)
    till: datetime | None = None
    node_ids: tuple[Identity, ...] = ()
    item: Identity | None = None
    subject: Identity | None = None
    instance: int | None = None


class UploadOptions(Wire, frozen=True, kw_only=True):
    """Where a log shall be uploaded instead of being pushed."""

    type: UploadType
    url: str = ""
    bearer_token: str = ""
    bearer_token_ttl: datetime | None = None

    def __repr__(self) -> str:
        return f"UploadOptions(type={self.type!r}, url={self.url.partition('?')[0]!r})"


class RequestLog(Message, frozen=True, kw_only=True, tag="requestLog"):
    """The cloud asks for a log."""

    log_type: LogType
    filter: LogFilter
    upload_options: UploadOptions | None = None


class PushLog(Message, frozen=True, kw_only=True, tag="pushLog"):
    """One part of a log; the status word of a failure is `error`, not the schema's `failed` (D5)."""

    node: Identity
    part: int
    parts_count: int
    content: bytes = always(b"")
    status: LogStatus
    error_info: ErrorInfo | None = None


# --- state ---


class NewState(Message, frozen=True, kw_only=True, tag="newState"):
    """An instance changed its state; checksum is hex SHA3-224 of the text."""

    item: Identity
    subject: Identity
    instance: int
    state_checksum: str
    state: str


class StateRequest(Message, frozen=True, kw_only=True, tag="stateRequest"):
    """Asks for the state the cloud has, or the initial one."""

    item: Identity
    subject: Identity
    instance: int
    default: bool


class StateAcceptance(Message, frozen=True, kw_only=True, tag="stateAcceptance"):
    """The cloud's verdict on a new state."""

    item: Identity
    subject: Identity
    instance: int = always(0)
    checksum: str = always("")
    result: StateResult
    reason: str = always("")


class UpdateState(Message, frozen=True, kw_only=True, tag="updateState"):
    """The cloud sets a state."""

    item: Identity
    subject: Identity
    instance: int = always(0)
    state_checksum: str = always("")
    state: str = always("")


# --- environment variables ---


class EnvVar(Wire, frozen=True, kw_only=True):
    """A variable; `ttl` is the time when it expires."""

    name: str
    value: str = always("")
    ttl: datetime | None = None


class EnvVarOverride(Wire, frozen=True, kw_only=True):
    """Variables for all instances that match (a missing member matches all)."""

    item: Identity | None = None
    subject: Identity | None = None
    instance: int | None = None
    variables: tuple[EnvVar, ...] = always(())


class OverrideEnvVars(Message, frozen=True, kw_only=True, tag="overrideEnvVars"):
    """Replaces the whole set of overridden variables."""

    items: tuple[EnvVarOverride, ...] = always(())


class EnvVarInstanceStatus(Wire, frozen=True, kw_only=True):
    """Result of one variable for one instance (`subject`, not the schema's `subjectId`: D4)."""

    item: Identity
    subject: Identity
    instance: int
    name: str
    error_info: ErrorInfo | None = None


class OverrideEnvVarsStatus(Message, frozen=True, kw_only=True, tag="overrideEnvVarsStatus"):
    """Results of the overridden variables; with the correlation id of their message, which AosCore 9.1 leaves out."""

    statuses: tuple[EnvVarInstanceStatus, ...]


# --- certificates, provisioning ---


class ExpiringCertificate(Wire, frozen=True, kw_only=True):
    """A certificate that has to be renewed."""

    type: CertType = always(CertType.OFFLINE)
    node: Identity
    serial: str = ""
    valid_till: datetime | None = None

    def __post_init__(self) -> None:
        _need("certificate", node=self.node.codename)


class NodeSecret(Wire, frozen=True, kw_only=True):
    """Owner password of a node."""

    node: Identity
    secret: str = always("")

    def __post_init__(self) -> None:
        _need("secret", node=self.node.codename)

    def __repr__(self) -> str:
        return f"NodeSecret(node={self.node.codename!r})"


class UnitSecrets(Wire, frozen=True, kw_only=True):
    """Owner passwords (cloud and schema disagree on the types, both are read: D6)."""

    version: str = always("")
    nodes: tuple[NodeSecret, ...] = always(())


class RenewCertificatesNotification(Message, frozen=True, kw_only=True, tag="renewCertificatesNotification"):
    """Certificates are about to expire."""

    certificates: tuple[ExpiringCertificate, ...] = always(())
    unit_secrets: UnitSecrets

    def without_secrets(self) -> Self:
        return msgspec.structs.replace(self, unit_secrets=UnitSecrets())


class CertificateRequest(Wire, frozen=True, kw_only=True):
    """A CSR of a node, PEM."""

    type: CertType
    node: Identity
    csr: str


class IssueUnitCertificates(Message, frozen=True, kw_only=True, tag="issueUnitCertificates"):
    """The Unit asks for certificates."""

    requests: tuple[CertificateRequest, ...]


class IssuedCertificate(Wire, frozen=True, kw_only=True):
    """A new certificate with its chain, PEM."""

    type: CertType = always(CertType.OFFLINE)
    node: Identity
    certificate_chain: str = always("")

    def __post_init__(self) -> None:
        _need("certificate", node=self.node.codename)


class IssuedUnitCertificates(Message, frozen=True, kw_only=True, tag="issuedUnitCertificates"):
    """Answer to IssueUnitCertificates."""

    certificates: tuple[IssuedCertificate, ...] = always(())


class InstalledCertificate(Wire, frozen=True, kw_only=True):
    """Result of one certificate; `serial` hex, empty on failure."""

    type: CertType
    node: Identity
    serial: str
    error_info: ErrorInfo | None = None


class InstallUnitCertificatesConfirmation(
    Message, frozen=True, kw_only=True, tag="installUnitCertificatesConfirmation"
):
    """The certificates were applied, or not."""

    certificates: tuple[InstalledCertificate, ...]


class NodeCSR(Wire, frozen=True, kw_only=True):
    """A CSR made during provisioning, PEM."""

    type: str
    csr: str


class NodeCertificate(Wire, frozen=True, kw_only=True):
    """A certificate chain for a node that is being provisioned, PEM."""

    type: CertType
    chain: str = always("")


class _NodeRequest(Message, frozen=True, kw_only=True):
    """Common part of the three provisioning requests."""

    node: Identity
    password: str = always("")

    def __post_init__(self) -> None:
        _need("provisioning request", node=self.node.codename)

    def without_secrets(self) -> Self:
        return msgspec.structs.replace(self, password="")

    def __repr__(self) -> str:
        return f"{type(self).__name__}(node={self.node.codename!r})"


class StartProvisioningRequest(_NodeRequest, frozen=True, kw_only=True, tag="startProvisioningRequest"):
    """Begin to provision a node."""


class StartProvisioningResponse(Message, frozen=True, kw_only=True, tag="startProvisioningResponse"):
    """CSRs of the node, possibly only those made before an error."""

    node: Identity
    error_info: ErrorInfo | None = None
    csrs: tuple[NodeCSR, ...]


class FinishProvisioningRequest(_NodeRequest, frozen=True, kw_only=True, tag="finishProvisioningRequest"):
    """The certificates of the node are there."""

    certificates: tuple[NodeCertificate, ...]


class FinishProvisioningResponse(Message, frozen=True, kw_only=True, tag="finishProvisioningResponse"):
    """Result."""

    node: Identity
    error_info: ErrorInfo | None = None


class DeprovisioningRequest(_NodeRequest, frozen=True, kw_only=True, tag="deprovisioningRequest"):
    """Take a node out of the Unit."""


class DeprovisioningResponse(Message, frozen=True, kw_only=True, tag="deprovisioningResponse"):
    """Result."""

    node: Identity
    error_info: ErrorInfo | None = None


# --- catalogue ---

FromCloud = (
    Ack
    | Nack
    | DesiredStatus
    | BlobUrls
    | RequestLog
    | StateAcceptance
    | UpdateState
    | OverrideEnvVars
    | RenewCertificatesNotification
    | IssuedUnitCertificates
    | StartProvisioningRequest
    | FinishProvisioningRequest
    | DeprovisioningRequest
)
ToCloud = (
    Ack
    | UnitStatus
    | RequestBlobUrls
    | MonitoringData
    | Alerts
    | PushLog
    | NewState
    | StateRequest
    | OverrideEnvVarsStatus
    | IssueUnitCertificates
    | InstallUnitCertificatesConfirmation
    | StartProvisioningResponse
    | FinishProvisioningResponse
    | DeprovisioningResponse
)


def message_type(message: Message | type[Message]) -> str:
    """The `messageType` of a message or message class."""
    return str(message.__struct_config__.tag)


FROM_CLOUD: Final[dict[str, type[Message]]] = {message_type(cls): cls for cls in get_args(FromCloud)}
TO_CLOUD: Final[dict[str, type[Message]]] = {message_type(cls): cls for cls in get_args(ToCloud)}
