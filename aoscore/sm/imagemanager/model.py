"""What the image manager hands out."""

from pathlib import Path

import msgspec

from aoscore.common.oci import ImageConfig, ItemConfig
from aoscore.common.types import InstanceInfo, ItemType


class ItemKey(msgspec.Struct, frozen=True, order=True):
    """One version of an update item as the node needs it; the digest is that of the image manifest.

    The digest is part of it: CM may choose another manifest of the same version.
    """

    item_id: str
    type: ItemType
    version: str
    manifest_digest: str

    def __str__(self) -> str:
        return f"{self.item_id} {self.version}"


def item_key(info: InstanceInfo) -> ItemKey:
    """The item an instance runs."""
    return ItemKey(info.ident.item_id, info.ident.type, info.version, info.manifest_digest)


class Payload(msgspec.Struct, frozen=True):
    """A layer of a component: a blob that its runtime installs as it is."""

    path: Path
    media_type: str
    digest: str
    size_bytes: int


class InstalledImage(msgspec.Struct, frozen=True):
    """A complete item on this node: every file is there and was verified when it was installed.

    `layers` are the unpacked trees of a service from bottom to top; `payloads` the files of a component.
    """

    key: ItemKey
    image_config: ImageConfig
    item_config: ItemConfig | None = None
    layers: tuple[Path, ...] = ()
    payloads: tuple[Payload, ...] = ()
