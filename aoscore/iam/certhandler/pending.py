"""Which keys wait for their certificates, over restarts.

A key that was made when IAM was killed, before its request left the Node, is in the key storage but not here: nobody
waits for it, and it can go.
"""

import logging
import threading
from pathlib import Path

import msgspec

from aoscore.common.aio import log_and_continue
from aoscore.common.files import fsync_dir, write_atomic

_log = logging.getLogger(__name__)

FILE_NAME = "pending-keys.json"


class PendingKeys:
    """Ids of keys by certificate type, oldest first. Calls block; each change is on disk when it returns."""

    def __init__(self, working_dir: Path) -> None:
        self._path = working_dir / FILE_NAME
        self._lock = threading.Lock()
        self._ids: dict[str, list[str]] = {}

    def load(self) -> None:
        """Read what was stored. A file that can't be read counts as empty: requests are then made again."""
        if self._path.exists():
            with log_and_continue(_log, f"Can't read {self._path}"):
                self._ids = msgspec.json.decode(self._path.read_bytes(), type=dict[str, list[str]])

    def of(self, cert_type: str) -> list[str]:
        """Keys of a type, oldest first."""
        return list(self._ids.get(cert_type, ()))

    def add(self, cert_type: str, key_id: str) -> None:
        """A key whose request is about to leave the Node."""
        self._replace(cert_type, [*self.of(cert_type), key_id])

    def remove(self, cert_type: str, *key_ids: str) -> None:
        """Keys that have got their certificates, or are gone."""
        self._replace(cert_type, [key_id for key_id in self.of(cert_type) if key_id not in key_ids])

    def clear(self, cert_type: str) -> None:
        """Forget all of a type."""
        self._replace(cert_type, [])

    def _replace(self, cert_type: str, ids: list[str]) -> None:
        with self._lock:
            if self._ids.get(cert_type, []) == ids:
                return
            wanted = {name: keys for name, keys in {**self._ids, cert_type: ids}.items() if keys}
            if wanted:
                write_atomic(self._path, msgspec.json.encode(wanted))
            else:
                self._path.unlink(missing_ok=True)
                fsync_dir(self._path.parent)
            self._ids = wanted
