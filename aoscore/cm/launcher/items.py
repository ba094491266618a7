"""What an item needs of a node, from its images (cm-cloud §17)."""

from typing import Protocol

import msgspec

from aoscore.cm.launcher.balancer import DEFAULT_RUNTIMES, Amounts, Platform, Variant
from aoscore.common import oci
from aoscore.common.errors import AosError


class Images(Protocol):
    """The image store."""

    def load_index(self, item_id: str, version: str) -> oci.ImageIndex: ...

    def load_manifest(self, digest: str) -> oci.ImageManifest: ...

    def load_image_config(self, digest: str) -> oci.ImageConfig: ...

    def load_item_config(self, digest: str) -> oci.ItemConfig: ...


class Item(msgspec.Struct, frozen=True):
    """A version of an item: its variants in the order of the index, and their configs by manifest digest."""

    variants: tuple[Variant, ...] = ()
    configs: dict[str, oci.ItemConfig] = {}
    problem: str = ""
    """Why variants, or all of them, cannot be used."""


def load_item(images: Images, item_id: str, version: str, *, is_component: bool) -> Item:
    """Read all images of a version; what cannot be read is left out and named in `problem`."""
    try:
        index = images.load_index(item_id, version)
    except AosError as error:
        return Item(problem=f"no image of {item_id} {version}: {error}")
    variants: list[Variant] = []
    configs: dict[str, oci.ItemConfig] = {}
    problems: list[str] = []
    for entry in index.manifests:
        try:
            manifest = images.load_manifest(entry.digest)
            image = images.load_image_config(manifest.config.digest)
            config = oci.ItemConfig()
            if manifest.aos_item_config is not None:
                config = images.load_item_config(manifest.aos_item_config.digest)
        except AosError as error:
            problems.append(f"can't load instance configs: {error}")
            continue
        variants.append(_variant(entry, image, config, is_component))
        configs[entry.digest] = config
    return Item(tuple(variants), configs, "; ".join(problems))


def _variant(entry: oci.Descriptor, image: oci.ImageConfig, config: oci.ItemConfig, is_component: bool) -> Variant:
    runtimes = tuple(runtime.codename for runtime in config.runtimes)
    named = entry.platform or oci.Platform()
    requested = config.requested_resources or oci.RequestedResources()
    quotas = config.quotas
    return Variant(
        manifest_digest=entry.digest,
        runtime_types=runtimes or (() if is_component else DEFAULT_RUNTIMES),
        platform=Platform(
            named.architecture or image.architecture,
            named.variant or image.variant,
            named.os or image.os,
            named.os_version or image.os_version,
            named.os_features or image.os_features,
        ),
        resources=tuple(dict.fromkeys(resource.name for resource in config.resources)),
        quota=Amounts(quotas.cpu_dmips_limit, quotas.ram_limit, quotas.storage_limit, quotas.state_limit),
        requested=Amounts(requested.cpu, requested.ram, requested.storage, requested.state),
        skip_limits=config.skip_resource_limits,
        movable=config.balancing_policy != "disabled",
    )
