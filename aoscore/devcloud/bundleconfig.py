"""`config.yaml` of a deployment bundle (cloud-rest.md) and its translation to the Unit's documents.

Reading checks the shape; the two functions at the end make the Aos item config and the `config` part of an OCI image
config from it (cm-cloud.md §17, sm.md §3.4).
"""

import re
import shlex
from collections.abc import Callable, Sequence
from typing import Any, Literal

import msgspec
import yaml

from aoscore.common.config import format_iso_duration, parse_duration
from aoscore.common.errors import InvalidArgumentError
from aoscore.common.semver import SemVer

_SIZE = re.compile(r"(\d+)\s*(?:([KMGT])(i?))?B?", re.IGNORECASE)
_PORT = re.compile(r"(\d{1,5})(?:[:-](\d{1,5}))?(?:/(tcp|udp))?")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_DURATION = str | int | float
_SIZE_VALUE = str | int


class BundleError(InvalidArgumentError):
    """An upload is refused; `field` is the part of the bundle that is wrong."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.reason = message


class _Part(msgspec.Struct, rename="camel"):
    """Members that this cloud does not know are left alone, as the signer leaves them."""


class Identity(_Part):
    """Names of an item or another entity."""

    type: str | None = None
    codename: str | None = None
    id: str | None = None
    title: str | None = None
    description: str | None = None
    urn: str | None = None


class OsInfo(_Part):
    """Operating system an image is for."""

    os: str = "linux"
    version: str | None = None
    features: list[str] | None = None


class ArchInfo(_Part):
    """CPU architecture an image is for."""

    architecture: str
    variant: str | None = None


class Image(_Part):
    """One image of an item."""

    arch_info: ArchInfo
    source_folder: str | None = None
    path: str | None = None
    media_type: str | None = None
    os_info: OsInfo = msgspec.field(default_factory=OsInfo)
    env: list[str] | None = None
    working_dir: str | None = None
    cmd: str | list[str] | None = None


class Instances(_Part):
    """What the publisher wants to run."""

    min_instances: int = 1
    priority: int = 0
    labels: list[str] | None = None


class RunParameters(_Part):
    """Restart rules; ISO 8601 durations."""

    start_interval: _DURATION | None = None
    start_burst: int | None = None
    restart_interval: _DURATION | None = None


class Resource(_Part):
    """A device or another named resource of the node."""

    name: str
    mode: Literal["r", "w", "rw"] = "r"


class AlertRule(_Part):
    """Thresholds: percent, or points for upload and download."""

    min_timeout: _DURATION | None = None
    min_threshold: float | None = None
    max_threshold: float | None = None


class AlertRules(_Part):
    """Alert rules of an instance."""

    ram: AlertRule | None = None
    cpu: AlertRule | None = None
    storage: AlertRule | None = None
    upload: AlertRule | None = None
    download: AlertRule | None = None


class Quotas(_Part):
    """Limits of an instance: DMIPS, counts, and sizes as numbers of bytes or text such as `512MiB`."""

    cpu_limit: int | None = None
    ram_limit: _SIZE_VALUE | None = None
    storage_limit: _SIZE_VALUE | None = None
    state_limit: _SIZE_VALUE | None = None
    tmp_limit: _SIZE_VALUE | None = None
    upload_speed_limit: _SIZE_VALUE | None = None
    download_speed_limit: _SIZE_VALUE | None = None
    upload_limit: _SIZE_VALUE | None = None
    download_limit: _SIZE_VALUE | None = None
    no_file_limit: int | None = None
    pids_limit: int | None = None


class State(_Part):
    """State file of an instance."""

    filename: str = "state.dat"
    required: bool = False


class Configuration(_Part):
    """How an item wants to be run."""

    env: list[str] | None = None
    working_dir: str | None = None
    cmd: str | list[str] | None = None
    instances: Instances = msgspec.field(default_factory=Instances)
    skip_resource_limits: bool = False
    balancing_policy: Literal["enabled", "disabled"] = "enabled"
    base_layer_is_node_rootfs: bool = True
    hostname: str | None = None
    exposed_ports: list[int | str] | None = None
    runtimes: list[Identity] = msgspec.field(
        default_factory=lambda: [Identity(codename="runc"), Identity(codename="crun")]
    )
    run_parameters: RunParameters | None = None
    offline_ttl: _DURATION | None = msgspec.field(default=None, name="offlineTTL")
    resources: list[Resource] | None = None
    allowed_connections: list[str] | None = None
    quotas: Quotas | None = None
    alert_rules: AlertRules | None = None
    permissions: dict[str, dict[str, Literal["r", "w", "rw"]]] | None = None
    state: State | None = None


class Item(_Part):
    """One item of a bundle."""

    identity: Identity
    version: str
    images: list[Image]
    source_folder: str | None = None
    configuration: Configuration | None = None
    dependencies: list[dict[str, Any]] | None = None

    @property
    def config(self) -> Configuration:
        """The configuration, with defaults where the bundle has none."""
        return self.configuration or Configuration()


class Publisher(_Part):
    """Who made the bundle."""

    author: str | None = None
    company: str | None = None


class BundleConfig(_Part):
    """The whole file."""

    schema_version: int
    items: list[Item]
    publisher: Publisher | None = None

    @property
    def author(self) -> str:
        """Author for the documents of the Unit, "" when unknown."""
        publisher = self.publisher or Publisher()
        return ", ".join(part for part in (publisher.author, publisher.company) if part)


def read_config(text: bytes) -> BundleConfig:
    """Parse and check config.yaml.

    Raises:
        BundleError: naming the member that is wrong.
    """
    try:
        config = msgspec.convert(yaml.safe_load(text), BundleConfig, strict=False)
    except (yaml.YAMLError, msgspec.ValidationError, RecursionError) as error:
        reason, _, where = str(error).partition(" - at `$")
        raise BundleError(f"config.yaml{where.rstrip('`')}", reason) from error
    if config.schema_version != 2:
        raise BundleError("config.yaml.schemaVersion", f"is {config.schema_version}, this cloud takes 2")
    if not config.items:
        raise BundleError("config.yaml.items", "is empty")
    for number, item in enumerate(config.items):
        _check_item(item, f"config.yaml.items[{number}]")
    return config


def _check_item(item: Item, field: str) -> None:
    if item.identity.type not in ("service", "component", "layer"):
        raise BundleError(f"{field}.identity.type", f"{item.identity.type!r} is none of service, component, layer")
    if not (item.identity.codename or item.identity.id):
        raise BundleError(f"{field}.identity", "needs a codename or an id")
    if item.identity.codename and not _NAME.fullmatch(item.identity.codename):
        raise BundleError(f"{field}.identity.codename", f"{item.identity.codename!r} is no plain name")
    try:
        version = SemVer(item.version)
    except InvalidArgumentError as error:
        raise BundleError(f"{field}.version", str(error)) from error
    if len(item.version) > 32:
        raise BundleError(f"{field}.version", f"{item.version!r} is longer than 32 characters")
    if item.config.skip_resource_limits and not version.is_prerelease:
        raise BundleError(f"{field}.configuration.skipResourceLimits", "is allowed for pre-release versions only")
    if not 1 <= len(item.images) <= 8:
        raise BundleError(f"{field}.images", "needs 1 to 8 images")
    if not 1 <= item.config.instances.min_instances <= 100 or item.config.instances.priority < 0:
        raise BundleError(f"{field}.configuration.instances", "needs minInstances 1 to 100 and priority 0 or more")
    if len(item.config.instances.labels or []) > 4:
        raise BundleError(f"{field}.configuration.instances.labels", "has more than 4 labels")


def size_bytes(value: _SIZE_VALUE, field: str) -> int:
    """Number of a size: `512MiB` and `512Mi` count by 1024, `10K` and `10KB` by 1000."""
    if isinstance(value, int):
        number, factor = value, 1
    else:
        match = _SIZE.fullmatch(value.strip())
        if not match:
            raise BundleError(field, f"{value!r} is no size such as 1048576, 512MiB or 10K")
        base = 1024 if match[3] else 1000
        number, factor = int(match[1]), base ** (" KMGT".index(match[2].upper()) if match[2] else 0)
    if number < 0:
        raise BundleError(field, f"{value!r} is negative")
    return number * factor


def item_config(item: Item, author: str, item_id_of: Callable[[str], str | None], field: str) -> dict[str, Any]:
    """The Aos item config document of an item.

    Args:
        item: the bundle's item.
        author: author to name.
        item_id_of: finds the item id for a codename or host name, None when there is no such item (yet).
        field: where the item stands in config.yaml, for errors.

    Raises:
        BundleError: a value cannot be translated.
    """
    config = item.config
    field = f"{field}.configuration"
    document: dict[str, Any] = {
        "author": author,
        "skipResourceLimits": config.skip_resource_limits,
        "hostname": config.hostname,
        "balancingPolicy": config.balancing_policy,
        "baseLayerIsNodeRootfs": config.base_layer_is_node_rootfs,
        "runtimes": [{"codename": runtime.codename} for runtime in config.runtimes if runtime.codename],
        "offlineTTL": _duration(config.offline_ttl, f"{field}.offlineTTL"),
        "resources": [{"name": resource.name, "mode": resource.mode} for resource in config.resources or []],
        "permissions": config.permissions,
    }
    if (run := config.run_parameters) is not None:
        document["runParameters"] = _present(
            {
                "startInterval": _duration(run.start_interval, f"{field}.runParameters.startInterval"),
                "startBurst": run.start_burst,
                "restartInterval": _duration(run.restart_interval, f"{field}.runParameters.restartInterval"),
            }
        )
    if config.quotas is not None:
        document["quotas"] = _quotas(config.quotas, f"{field}.quotas")
    if config.alert_rules is not None:
        document["alertRules"] = _alert_rules(config.alert_rules, f"{field}.alertRules")
    if config.allowed_connections:
        document["allowedConnections"] = {
            _connection(text, item_id_of, f"{field}.allowedConnections[{number}]"): {}
            for number, text in enumerate(config.allowed_connections)
        }
    return _present(document)


def image_run_config(item: Item, image: Image, field: str) -> dict[str, Any]:
    """The `config` object of the OCI image config: an image's own values go before the item's."""
    config = item.config
    env: dict[str, str] = {}
    for entry in [*(config.env or []), *(image.env or [])]:
        name, equals, _ = entry.partition("=")
        if not (name and equals):
            raise BundleError(f"{field}.env", f"{entry!r} is not NAME=VALUE")
        env[name] = entry
    ports = {}
    for port in config.exposed_ports or []:
        match = _PORT.fullmatch(str(port))
        if not match:
            raise BundleError(f"{field}.exposedPorts", f"{port!r} is no port such as 8080, 53/udp or 8089-8090/tcp")
        ports[_ports(match) + (f"/{match[3]}" if match[3] else "")] = dict[str, Any]()
    command = image.cmd if image.cmd is not None else config.cmd
    return _present(
        {
            "Env": list(env.values()),
            "Cmd": _arguments(command, field),
            "WorkingDir": image.working_dir or config.working_dir,
            "ExposedPorts": ports,
        }
    )


def _arguments(command: str | Sequence[str] | None, field: str) -> list[str]:
    if command is None:
        return []
    if not isinstance(command, str):
        return list(command)
    try:
        return shlex.split(command)
    except ValueError as error:
        raise BundleError(f"{field}.cmd", str(error)) from error


def _quotas(quotas: Quotas, field: str) -> dict[str, Any]:
    sizes = {
        "ramLimit": quotas.ram_limit,
        "tmpLimit": quotas.tmp_limit,
        "stateLimit": quotas.state_limit,
        "storageLimit": quotas.storage_limit,
        "uploadLimit": quotas.upload_limit,
        "downloadLimit": quotas.download_limit,
    }
    speeds = {"uploadSpeed": quotas.upload_speed_limit, "downloadSpeed": quotas.download_speed_limit}
    return _present(
        {
            "cpuDMIPSLimit": quotas.cpu_limit,
            "pidsLimit": quotas.pids_limit,
            "noFileLimit": quotas.no_file_limit,
            **{name: size_bytes(value, f"{field}.{name}") for name, value in sizes.items() if value is not None},
            # The bundle counts bits per second, the Unit kilobits per second.
            **{
                name: -(-size_bytes(value, f"{field}.{name}Limit") // 1000)
                for name, value in speeds.items()
                if value is not None
            },
        }
    )


def _alert_rules(rules: AlertRules, field: str) -> dict[str, Any]:
    def rule(value: AlertRule | None, name: str, number: Callable[[float], float]) -> dict[str, Any] | None:
        if value is None:
            return None
        thresholds = {"minThreshold": value.min_threshold, "maxThreshold": value.max_threshold}
        return _present(
            {
                "minTimeout": _duration(value.min_timeout, f"{field}.{name}.minTimeout"),
                **{key: number(threshold) for key, threshold in thresholds.items() if threshold is not None},
            }
        )

    storage = rule(rules.storage, "storage", float)
    return _present(
        {
            "ram": rule(rules.ram, "ram", float),
            "cpu": rule(rules.cpu, "cpu", float),
            "partitions": [{"name": "storages", **storage}] if storage else [],
            "upload": rule(rules.upload, "upload", int),
            "download": rule(rules.download, "download", int),
        }
    )


def _connection(text: str, item_id_of: Callable[[str], str | None], field: str) -> str:
    """`host/8087:8088/tcp` of the bundle as `ITEM_ID/8087-8088/tcp`; the host stays when no item has that name."""
    host, slash, rest = text.partition("/")
    match = _PORT.fullmatch(rest)
    if not (host and slash and match):
        raise BundleError(field, f"{text!r} is not NAME/PORT[:PORT][/tcp|udp]")
    return f"{item_id_of(host) or host}/{_ports(match)}" + (f"/{match[3]}" if match[3] else "")


def _ports(match: re.Match[str]) -> str:
    return f"{match[1]}-{match[2]}" if match[2] else match[1]


def _duration(value: _DURATION | None, field: str) -> str | None:
    if value is None:
        return None
    try:
        return format_iso_duration(parse_duration(value))
    except InvalidArgumentError as error:
        raise BundleError(field, f"{value!r} is no duration") from error


def _present(document: dict[str, Any]) -> dict[str, Any]:
    """The members that say something."""
    return {name: value for name, value in document.items() if value is not None and value not in ("", [], {})}
