"""Which images of an item the Unit can use (cm-cloud.md §18). Pure."""

from __future__ import annotations

from collections.abc import Collection

import msgspec

from aoscore.common.oci import Descriptor, ImageIndex, Platform


class RuntimePlatform(msgspec.Struct, frozen=True):
    """What a runtime of the Unit runs."""

    architecture: str
    os: str
    variant: str = ""


def select_manifests(index: ImageIndex, runtimes: Collection[RuntimePlatform] | None) -> list[Descriptor]:
    """The manifests that some runtime can use.

    All of them when the runtimes are not all known (None), and when none fits: whoever places the item can then say
    what it needs.
    """
    if not runtimes:
        return list(index.manifests)
    fitting = [entry for entry in index.manifests if any(_fits(entry.platform, runtime) for runtime in runtimes)]
    return fitting or list(index.manifests)


def _fits(platform: Platform | None, runtime: RuntimePlatform) -> bool:
    if platform is None:
        return True
    return all(
        not wanted or not offered or wanted == offered
        for wanted, offered in (
            (platform.architecture, runtime.architecture),
            (platform.os, runtime.os),
            (platform.variant, runtime.variant),
        )
    )
