"""State of the Node on disk, in two copies that no power cut can lose together.

The state file decides which unit systemd starts, and AosCore 9.1 knows nothing else. When it is lost or unreadable
the copy in the database tells the state, so that a provisioned Node never wakes up as a new one (iam.md §16, 2).
"""

import logging
from pathlib import Path

from aoscore.common.aio import Worker
from aoscore.common.files import fsync_dir, write_atomic
from aoscore.common.log import kv
from aoscore.common.types import NodeInfo, NodeState
from aoscore.iam.database import IamDatabase

_log = logging.getLogger(__name__)
_STORED = frozenset({NodeState.PROVISIONED, NodeState.PAUSED})


class UnknownStateError(ValueError):
    """The state file holds something else than a state."""


def read_state_file(path: Path) -> NodeState | None:
    """The state in the file, None when there is no file. Raises UnknownStateError for an unknown word."""
    try:
        word = path.read_text(errors="replace").strip()
    except FileNotFoundError:
        return None
    if word not in _STORED | {NodeState.UNPROVISIONED}:
        raise UnknownStateError(f"state file {path} holds {word[:32]!r}")
    return NodeState(word)


def write_state_file(path: Path, state: NodeState) -> None:
    """Make the file say the state; no file says unprovisioned."""
    if state is NodeState.UNPROVISIONED:
        path.unlink(missing_ok=True)
        if path.parent.is_dir():
            fsync_dir(path.parent)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Readable by all: other components and scripts look at it.
        write_atomic(path, state.encode(), mode=0o644)


class StateStore:
    """Keeps the state of the Node in the state file and, with the Node info, in the database."""

    def __init__(self, path: Path, database: IamDatabase, worker: Worker) -> None:
        self._path = path
        self._database = database
        self._worker = worker

    async def load(self, node_id: str) -> NodeState:
        """The state after a start; repairs the copy that is missing or broken.

        ERROR means that the file is broken and the database knows nothing.
        """
        copy = next((node.state for node in await self._database.nodes() if node.node_id == node_id), None)
        if copy not in _STORED:
            copy = None
        try:
            state = await self._worker.run(read_state_file, self._path)
        except UnknownStateError as error:
            _log.error(kv("Node state is unreadable", error=error, database=copy))
            state = None
            if copy is None:
                return NodeState.ERROR
        if state is None and copy is not None:
            _log.warning(kv("State file was lost, restored from the database", file=self._path, state=copy))
            await self._worker.run(write_state_file, self._path, copy)
            return copy
        return state or NodeState.UNPROVISIONED

    async def remember(self, node: NodeInfo) -> None:
        """Bring the copy in the database up to date with a state that the file has."""
        await self._database.save_node(node)

    async def save(self, node: NodeInfo) -> None:
        """Store the state of `node` durably.

        The file is the authority, so it is the last to go: a crash in between leaves the old state in force.
        """
        if node.state is NodeState.UNPROVISIONED:
            await self._database.remove_node(node.node_id)
            await self._worker.run(write_state_file, self._path, node.state)
        else:
            await self._worker.run(write_state_file, self._path, node.state)
            await self.remember(node)
