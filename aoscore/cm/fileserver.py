"""Gives blobs to the SMs over plain HTTP: `/blobs/sha256/<hex>` and nothing else (cm-cloud.md §9)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from aoscore.common.blobstore import check_digest
from aoscore.common.errors import ConfigError
from aoscore.common.fileserver import FileServer

_PREFIX: Final = "/blobs/sha256/"


class BlobServer:
    """Where SMs get blobs. `address` is `fileServerUrl` of the configuration: host:port or a URL."""

    def __init__(self, address: str, blob_path: Callable[[str], Path], *, is_node: Callable[[str], bool]) -> None:
        """`blob_path` gives the file of a digest or raises NotFoundError.

        `is_node` tells whether an IP address is one of a node of the Unit; only those are served, and this machine.
        """
        url = address if "://" in address else f"http://{address}"
        parts = urlsplit(url)
        try:
            port = parts.port or 80
        except ValueError as error:
            raise ConfigError(f"fileServerUrl {address!r} has no usable port") from error
        if parts.scheme != "http":
            raise ConfigError(f"fileServerUrl {address!r} is no http URL")
        self._base = f"http://{parts.netloc}{parts.path.rstrip('/')}" if parts.hostname else f"http://localhost:{port}"
        self._blob_path = blob_path
        # On all interfaces: the nodes of a Unit reach the Main Node through different ones.
        self.server = FileServer(f":{port}", self._resolve, allow=is_node)

    def url(self, digest: str) -> str:
        """URL of a blob that is here. Raises NotFoundError."""
        self._blob_path(digest)
        return f"{self._base}{_PREFIX}{digest.removeprefix('sha256:')}"

    def _resolve(self, target: str) -> Path | None:
        if not target.startswith(_PREFIX):
            return None
        return self._blob_path(check_digest(f"sha256:{target.removeprefix(_PREFIX)}"))
