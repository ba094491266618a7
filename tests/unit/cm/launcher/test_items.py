"""What an item needs, from its images."""

from aoscore.cm.launcher.balancer import Amounts, Platform
from aoscore.cm.launcher.items import load_item
from aoscore.common import oci
from aoscore.common.errors import NotFoundError


class FakeImages:
    """One index with three manifests; blobs of the second are not here."""

    def load_index(self, item_id: str, version: str) -> oci.ImageIndex:
        if item_id == "unknown":
            raise NotFoundError("no such item")
        platform = oci.Platform(architecture="arm64", os="linux", variant="v8")
        return oci.ImageIndex(
            (oci.Descriptor(digest="m1", platform=platform), oci.Descriptor(digest="m2"), oci.Descriptor(digest="m3"))
        )

    def load_manifest(self, digest: str) -> oci.ImageManifest:
        if digest == "m2":
            raise NotFoundError("blob m2 not found")
        config = oci.Descriptor(digest="aos") if digest == "m1" else None
        return oci.ImageManifest(oci.Descriptor(digest="config"), aos_item_config=config)

    def load_image_config(self, digest: str) -> oci.ImageConfig:
        return oci.ImageConfig(architecture="amd64", os="linux", os_features=("f",))

    def load_item_config(self, digest: str) -> oci.ItemConfig:
        return oci.ItemConfig(
            balancing_policy="disabled",
            runtimes=(oci.RuntimeRef("runx"),),
            quotas=oci.Quotas(cpu_dmips_limit=1, ram_limit=2, storage_limit=3, state_limit=4),
            requested_resources=oci.RequestedResources(cpu=5),
            resources=(oci.ResourceRef("gpu", "rw"),),
        )


def test_variants() -> None:
    item = load_item(FakeImages(), "item", "1.0.0", is_component=False)
    first, third = item.variants
    assert (first.manifest_digest, first.runtime_types, first.resources, first.movable) == (
        "m1",
        ("runx",),
        ("gpu",),
        False,
    )
    assert first.platform == Platform("arm64", "v8", "linux", "", ("f",))
    assert (first.quota, first.requested) == (Amounts(1, 2, 3, 4), Amounts(5, None, None, None))
    assert (third.runtime_types, third.platform.architecture, third.movable) == (("crun", "runc"), "amd64", True)
    assert item.problem == "can't load instance configs: blob m2 not found"
    assert set(item.configs) == {"m1", "m3"}


def test_components_have_no_default_runtime() -> None:
    assert load_item(FakeImages(), "item", "1.0.0", is_component=True).variants[1].runtime_types == ()


def test_unknown_item() -> None:
    item = load_item(FakeImages(), "unknown", "1.0.0", is_component=False)
    assert item.variants == ()
    assert "no such item" in item.problem
