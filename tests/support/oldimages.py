"""Archives of services as AosCore 8 had them."""

import hashlib
import io
import json
import tarfile
from pathlib import Path


def tar(files: dict[str, bytes], links: dict[str, str] | None = None, *, mode: str = "w") -> bytes:
    """An archive with these files, and symbolic links."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for name, target in (links or {}).items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            archive.addfile(info)
    return buffer.getvalue()


def digest(content: bytes) -> str:
    """As descriptors have it."""
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


class ServiceImage:
    """`archive` is what CM offers. Change `blobs` or `manifest` and call `pack` for images that are wrong."""

    def __init__(self, files: dict[str, bytes], *, layer_mode: str = "w:gz") -> None:
        config, service, layer = b'{"config": {}}', b'{"author": "me"}', tar(files, mode=layer_mode)
        self.blobs = {digest(content): content for content in (config, service, layer)}
        self.layer = digest(layer)
        self.manifest = {
            "config": {"digest": digest(config)},
            "layers": [{"digest": self.layer}],
            "aosService": {"digest": digest(service)},
        }

    def pack(self, *, mode: str = "w:gz", links: dict[str, str] | None = None) -> bytes:
        """The archive."""
        files = {f"blobs/{name.replace(':', '/')}": content for name, content in self.blobs.items()}
        return tar({"manifest.json": json.dumps(self.manifest).encode(), **files}, links, mode=mode)


def write(path: Path, content: bytes) -> Path:
    """The file, written."""
    path.write_bytes(content)
    return path
