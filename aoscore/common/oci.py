"""OCI documents of an update item: index, manifest, image config and Aos item config (cm-cloud.md §17, sm.md §3.3).

Names are read without case and unknown members ignored, as AosCore 9.1 does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import msgspec

from aoscore.common.config import Duration, from_json_caseless
from aoscore.common.errors import InvalidArgumentError
from aoscore.common.types import AlertRules

D = TypeVar("D")

MEDIA_TYPE_INDEX = "application/vnd.oci.image.index.v1+json"
MEDIA_TYPE_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
MEDIA_TYPE_CONFIG = "application/vnd.oci.image.config.v1+json"
MEDIA_TYPE_EMPTY = "application/vnd.oci.empty.v1+json"
MEDIA_TYPE_LAYER_TAR = "application/vnd.oci.image.layer.v1.tar"
MEDIA_TYPE_LAYER_GZIP = "application/vnd.oci.image.layer.v1.tar+gzip"
MEDIA_TYPE_LAYER_ZSTD = "application/vnd.oci.image.layer.v1.tar+zstd"

MAX_DOCUMENT_BYTES = 4 * 1024 * 1024
"""The image-spec asks readers to accept manifests of at least 4 MiB; more is refused before it is parsed."""


class _Document(msgspec.Struct, frozen=True, rename="camel", omit_defaults=True):
    """Base of all members."""


class Platform(_Document, frozen=True):
    """Where an image runs."""

    architecture: str = ""
    os: str = ""
    variant: str = ""
    os_version: str = msgspec.field(name="os.version", default="")
    os_features: tuple[str, ...] = msgspec.field(name="os.features", default=())


class Descriptor(_Document, frozen=True):
    """A reference to a blob by digest."""

    media_type: str = ""
    digest: str = ""
    size: int = 0
    platform: Platform | None = None


class ImageIndex(_Document, frozen=True):
    """One entry per platform of an item."""

    manifests: tuple[Descriptor, ...]
    schema_version: int = 2
    media_type: str = ""
    artifact_type: str = ""


class ImageManifest(_Document, frozen=True):
    """Parts of one image."""

    config: Descriptor
    layers: tuple[Descriptor, ...] = ()
    aos_item_config: Descriptor | None = None
    schema_version: int = 2
    media_type: str = ""


class ProcessConfig(_Document, frozen=True):
    """What the image runs by itself."""

    exposed_ports: dict[str, Mapping[str, object]] = {}
    env: tuple[str, ...] = ()
    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    working_dir: str = ""
    stop_signal: str = ""


class RootFs(_Document, frozen=True):
    """Digests of the unpacked layers, in the order of the manifest."""

    type: str = "layers"
    diff_ids: tuple[str, ...] = msgspec.field(name="diff_ids", default=())


class ImageConfig(_Document, frozen=True):
    """OCI image configuration."""

    architecture: str = ""
    os: str = ""
    variant: str = ""
    os_version: str = msgspec.field(name="os.version", default="")
    os_features: tuple[str, ...] = msgspec.field(name="os.features", default=())
    created: str = ""
    author: str = ""
    config: ProcessConfig = ProcessConfig()
    rootfs: RootFs = RootFs()


class RuntimeRef(_Document, frozen=True):
    """A runtime type that may run the item."""

    codename: str


class RunParameters(_Document, frozen=True):
    """Start limits, as systemd's StartLimit and Restart settings. 0 means the default.

    Own key: `stop_timeout`, from the wish that it ends to its end by force.
    """

    start_interval: Duration = Duration(0)
    start_burst: int = 0
    restart_interval: Duration = Duration(0)
    stop_timeout: Duration = Duration(0)


class Quotas(_Document, frozen=True):
    """Limits of one instance; None means none. CPU in DMIPS, sizes in bytes, speeds in kbit/s."""

    cpu_dmips_limit: int | None = msgspec.field(name="cpuDMIPSLimit", default=None)
    ram_limit: int | None = None
    pids_limit: int | None = None
    no_file_limit: int | None = None
    tmp_limit: int | None = None
    state_limit: int | None = None
    storage_limit: int | None = None
    upload_speed: int | None = None
    download_speed: int | None = None
    upload_limit: int | None = None
    download_limit: int | None = None


class RequestedResources(_Document, frozen=True):
    """What the balancer counts with instead of the limits."""

    cpu: int | None = None
    ram: int | None = None
    storage: int | None = None
    state: int | None = None


class ResourceRef(_Document, frozen=True):
    """A host resource the item wants; `mode` are device permissions such as "rw"."""

    name: str
    mode: str = ""


class ItemConfig(_Document, frozen=True):
    """Aos item configuration (sm.md §3.4).

    Own key: `drop_capabilities`, those that the service does without (``CAP_KILL``).
    """

    created: str = ""
    author: str = ""
    skip_resource_limits: bool = False
    hostname: str = ""
    balancing_policy: str = "enabled"
    base_layer_is_node_rootfs: bool = True
    runtimes: tuple[RuntimeRef, ...] = ()
    run_parameters: RunParameters = RunParameters()
    sysctl: dict[str, str] = {}
    offline_ttl: Duration = msgspec.field(name="offlineTTL", default=Duration(0))
    quotas: Quotas = Quotas()
    requested_resources: RequestedResources | None = None
    allowed_connections: dict[str, Mapping[str, object]] = {}
    resources: tuple[ResourceRef, ...] = ()
    permissions: dict[str, dict[str, str]] = {}
    drop_capabilities: tuple[str, ...] = ()
    alert_rules: AlertRules | None = None


def parse_index(data: bytes, *, what: str) -> ImageIndex:
    """Read an image index; `what` names it in errors. Raises InvalidArgumentError."""
    index = _parse(data, ImageIndex, what)
    if not index.manifests:
        raise InvalidArgumentError(f"{what}: image index names no manifest")
    return index


def parse_manifest(data: bytes, *, what: str) -> ImageManifest:
    """Read an image manifest. Raises InvalidArgumentError, also for a manifest without config."""
    manifest = _parse(data, ImageManifest, what)
    if not manifest.config.digest:
        raise InvalidArgumentError(f"{what}: image manifest names no config")
    return manifest


def parse_image_config(data: bytes, *, what: str) -> ImageConfig:
    """Read an image configuration. Raises InvalidArgumentError."""
    return _parse(data, ImageConfig, what)


def parse_item_config(data: bytes, *, what: str) -> ItemConfig:
    """Read an Aos item configuration. Raises InvalidArgumentError."""
    return _parse(data, ItemConfig, what)


def _parse(data: bytes, kind: type[D], what: str) -> D:
    if len(data) > MAX_DOCUMENT_BYTES:
        raise InvalidArgumentError(f"{what}: {len(data)} bytes is too large for a document")
    return from_json_caseless(data, kind, what=what)
