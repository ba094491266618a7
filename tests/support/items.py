"""Update items for tests: layer archives, documents, and a directory that holds them as blobs."""

import gzip
import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

from aoscore.common.oci import MEDIA_TYPE_LAYER_GZIP


def sha256(data: bytes) -> str:
    """Digest as it is written in documents."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def tar(files: dict[str, bytes], *, mode: int = 0o644) -> bytes:
    """An archive of regular files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(data), mode
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def packed(layer: bytes) -> bytes:
    """A layer as it is transferred; the same bytes at every call."""
    return gzip.compress(layer, 1, mtime=0)


class Blobs:
    """Blobs of items in a directory, by the hex part of their digest."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory

    def path(self, digest: str) -> Path:
        """File of a blob."""
        return self.directory / digest.removeprefix("sha256:")

    def put(self, data: bytes) -> str:
        """Add a blob; its digest."""
        self.path(sha256(data)).write_bytes(data)
        return sha256(data)

    def put_json(self, document: Any) -> str:
        """Add a document; its digest."""
        return self.put(json.dumps(document).encode())

    def describe(self, digest: str, media_type: str = "") -> dict[str, Any]:
        """Descriptor of a blob."""
        return {"mediaType": media_type, "digest": digest, "size": self.path(digest).stat().st_size}

    def item(
        self,
        layers: list[bytes],
        *,
        diff_ids: list[str] | None = None,
        item_config: dict[str, Any] | None = None,
        process: dict[str, Any] | None = None,
    ) -> str:
        """Add an item of gzip layers; the digest of its manifest.

        `diff_ids` replace the right ones; `process` is the member `config` of the image config.
        """
        diff_ids = [sha256(layer) for layer in layers] if diff_ids is None else diff_ids
        platform = {"architecture": "amd64", "os": "linux"}
        config = self.put_json({**platform, "config": process or {}, "rootfs": {"diff_ids": diff_ids}})
        manifest = {
            "schemaVersion": 2,
            "config": self.describe(config),
            "aosItemConfig": self.describe(self.put_json(item_config or {})),
            "layers": [self.describe(self.put(packed(layer)), MEDIA_TYPE_LAYER_GZIP) for layer in layers],
        }
        return self.put_json(manifest)
