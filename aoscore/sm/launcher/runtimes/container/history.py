"""Which instances ran here and how their last runs ended: for logs of stopped instances and for crash logs.

One small file per instance, ``<root>/<instanceID>/history.json``, written when an instance starts for the first time
and when a run ends, so nothing is written while all is well (sm.md §12, D21).
"""

from collections.abc import Iterable
from datetime import datetime
from pathlib import Path

import msgspec

from aoscore.common.config import from_json, to_json
from aoscore.common.errors import InvalidArgumentError
from aoscore.common.files import remove_tree, write_atomic
from aoscore.common.types import InstanceFilter, InstanceIdent

_FILE = "history.json"
_KEPT_RUNS = 20
_KEPT_INSTANCES = 256


class Run(msgspec.Struct, frozen=True, rename="camel"):
    """One run that ended; `exit_code` is 128 + N after signal N, None when unknown."""

    started: datetime
    ended: datetime
    exit_code: int | None
    reason: str
    crashed: bool
    """False for an end that SM asked for."""


class InstanceHistory(msgspec.Struct, frozen=True, rename="camel"):
    """An instance and its last runs, oldest first."""

    ident: InstanceIdent
    version: str
    runs: tuple[Run, ...] = ()


class RunHistory:
    """All histories below one directory. Blocking: small files."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def note_start(self, instance_id: str, ident: InstanceIdent, version: str) -> None:
        """Remember that this instance exists; writes only when that is news."""
        known = self.get(instance_id)
        if known is None or known.version != version:
            # What a power cut takes away the next start notes again.
            self._write(instance_id, InstanceHistory(ident, version, known.runs if known else ()), durable=False)

    def note_end(self, instance_id: str, run: Run) -> None:
        """Add a run of a known instance."""
        known = self.get(instance_id)
        if known is not None:
            self._write(instance_id, msgspec.structs.replace(known, runs=(*known.runs, run)[-_KEPT_RUNS:]))

    def get(self, instance_id: str) -> InstanceHistory | None:
        """What is known; None for an unknown instance or a damaged file, which counts as unknown."""
        path = self._root / instance_id / _FILE
        try:
            return from_json(path.read_bytes(), InstanceHistory, what=str(path))
        except (FileNotFoundError, InvalidArgumentError):
            return None

    def find(self, wanted: InstanceFilter) -> dict[str, InstanceHistory]:
        """Known instances that match, by instance id."""
        names = sorted(path.parent.name for path in self._root.glob(f"*/{_FILE}"))
        found = {name: history for name in names if (history := self.get(name))}
        return {name: history for name, history in found.items() if wanted.matches(history.ident)}

    def prune(self, in_use: Iterable[str]) -> None:
        """Forget the longest unchanged of too many instances that are not in use, with their output files."""
        unused = [path for path in self._root.glob(f"*/{_FILE}") if path.parent.name not in set(in_use)]
        unused.sort(key=lambda path: path.stat().st_mtime)
        for path in unused[: max(0, len(unused) - _KEPT_INSTANCES)]:
            remove_tree(path.parent)

    def _write(self, instance_id: str, history: InstanceHistory, *, durable: bool = True) -> None:
        folder = self._root / instance_id
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomic(folder / _FILE, to_json(history), durable=durable)
