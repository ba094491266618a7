"""Images that others made: a root file system of Debian's busybox, packed by umoci."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

from tests.support.items import Blobs

APPLETS = ("cat", "dd", "echo", "httpd", "seq", "sh", "sleep", "tail", "yes")
_TAG = "busybox"


def make_busybox_layout(folder: Path) -> Path:
    """The layout, made in `folder`."""
    content, layout = folder / "content", folder / "oci"
    for name in ("bin", "dev", "etc", "proc", "sys", "tmp", "www"):
        (content / name).mkdir(parents=True)
    shutil.copy("/bin/busybox", content / "bin" / "busybox")
    for applet in APPLETS:
        (content / "bin" / applet).symlink_to("busybox")
    (content / "www" / "index.html").write_text("hello\n")
    image = f"{layout}:{_TAG}"
    for args in (
        ("init", "--layout", layout),
        ("new", "--image", image),
        ("insert", "--image", image, content, "/"),
        ("config", "--image", image, "--config.entrypoint", "/bin/sh", "--config.entrypoint", "-c"),
    ):
        subprocess.run(["umoci", *args], check=True, capture_output=True)
    return layout


def add_item(
    blobs: Blobs, layout: Path, command: str, *, item_config: dict[str, Any], process: dict[str, Any] | None = None
) -> str:
    """Offer an item made of a layout's image that runs a shell command; the digest of its manifest.

    Layers and diff digests are those of the layout; `process` are more members of the image config's `config`.
    """

    def blob(digest: str) -> bytes:
        return (layout / "blobs" / "sha256" / digest.removeprefix("sha256:")).read_bytes()

    [entry] = json.loads((layout / "index.json").read_bytes())["manifests"]
    manifest = json.loads(blob(entry["digest"]))
    config = json.loads(blob(manifest["config"]["digest"]))
    config["config"] |= {"Cmd": [command], **(process or {})}
    for layer in manifest["layers"]:
        blobs.put(blob(layer["digest"]))
    manifest["config"] = blobs.describe(blobs.put_json(config), manifest["config"]["mediaType"])
    manifest["aosItemConfig"] = blobs.describe(blobs.put_json({"baseLayerIsNodeRootfs": False, **item_config}))
    return blobs.put_json(manifest)
