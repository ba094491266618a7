"""Storage and state of instances (cm-orchestration §5)."""

import asyncio
import logging
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Protocol

import msgspec

from aoscore.cm.communication import messages
from aoscore.cm.communication.messages import StateResult, instance_members
from aoscore.cm.storagestate import files
from aoscore.cm.storagestate.store import StateRow, StateStore
from aoscore.cm.storagestate.watch import DirectoryWatch
from aoscore.common.aio import Broadcast, Worker, comes_within, log_and_continue
from aoscore.common.errors import ChecksumError, InvalidArgumentError, NotFoundError, NotSupportedError, OutOfRangeError
from aoscore.common.log import kv
from aoscore.common.quota import set_user_quota
from aoscore.common.types import InstanceIdent

_log = logging.getLogger(__name__)

QUIET_S = 10.0
"""A state file is looked at when it was not written for so long …"""
PATIENCE_S = 60.0
"""… or when it is written all the time, after this."""


class CloudLink(Protocol):
    """The cloud as far as states need it."""

    connection: Broadcast[bool]

    @property
    def connected(self) -> bool: ...

    async def send(self, message: messages.Message) -> object: ...


class Paths(msgspec.Struct, frozen=True):
    """Where an instance finds its storage and state, relative to the roots; empty: it has none."""

    storage: str = ""
    state: str = ""


class DiskBudgets(msgspec.Struct, frozen=True):
    """Sizes of the file systems that hold storages and states; the same one is counted once."""

    storage_bytes: int
    state_bytes: int
    same_partition: bool


class StorageState:
    """A service. `setup` and `remove` are for the launcher, the `on_…` handlers for messages of the cloud."""

    def __init__(
        self,
        store: StateStore,
        link: CloudLink,
        *,
        storage_dir: Path,
        state_dir: Path,
        set_quota: Callable[[Path, int, int], None] = set_user_quota,
        quiet_s: float = QUIET_S,
        alert: Callable[[str], None] = lambda _: None,
    ) -> None:
        """`set_quota(path, uid, bytes)` limits a user on a file system; `alert` tells the cloud about a problem."""
        self._store = store
        self._link = link
        self._storage_dir = storage_dir
        self._state_dir = state_dir
        self._set_quota = set_quota
        self._quiet_s = quiet_s
        self._alert = alert
        self._worker = Worker("storagestate")
        self._lock = asyncio.Lock()
        self._rows: dict[InstanceIdent, StateRow] = {}
        self._watch = DirectoryWatch()
        self._watched: dict[Path, InstanceIdent] = {}
        self._due_s: dict[InstanceIdent, tuple[float, float]] = {}
        """Changed states: when they were first changed, when to look at them."""
        self._wake = asyncio.Event()
        self._quotas_missing = False

    async def run(self, started: Callable[[], None]) -> None:
        """Follow the state files of all instances that are set up."""
        try:
            await self._worker.run(self._make_roots)
            self._rows = {row.ident: row for row in await self._store.load()}
            with self._watch.listening(self._on_event), self._link.connection.subscribe() as connections:
                started()
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(self._look_at_changes())
                    tasks.create_task(self._repeat_unaccepted(connections))
        finally:
            self._worker.close()

    async def budgets(self) -> DiskBudgets:
        """How much there is to give to all instances together."""
        return await self._worker.run(self._read_budgets)

    def checksum(self, ident: InstanceIdent) -> str:
        """Checksum of the instance's present state, hex; empty when it has none."""
        row = self._rows.get(ident)
        return (row.unaccepted or row.accepted).hex() if row else ""

    async def setup(
        self, ident: InstanceIdent, uid: int, gid: int, *, storage_quota_bytes: int, state_quota_bytes: int
    ) -> Paths:
        """Make what an instance needs before it starts; repeatable. A quota of 0 means: has none, delete it."""
        async with self._lock:
            known = self._rows.get(ident, StateRow(ident))
            row = msgspec.structs.replace(
                known, storage_quota_bytes=storage_quota_bytes, state_quota_bytes=state_quota_bytes
            )
            paths, state_file, is_new = await self._worker.run(self._make_dirs, row, uid, gid)
            if not state_quota_bytes or is_new:
                # A state that was lost here must come from the cloud, not be replaced there by nothing.
                row = msgspec.structs.replace(row, accepted=b"", unaccepted=b"")
            await self._keep(row)
            if state_file is None:
                self._stop_watching(ident)
            else:
                self._watched[state_file.parent] = ident
                self._watch.add(state_file.parent)
                await self._compare(row, state_file)
            return paths

    def keep_watching(self, idents: Collection[InstanceIdent]) -> None:
        """Only these instances are in use: do not follow the states of others."""
        for ident in set(self._watched.values()).difference(idents):
            self._stop_watching(ident)

    async def remove(self, ident: InstanceIdent) -> None:
        """Delete storage and state of an instance that will not come back."""
        async with self._lock:
            self._stop_watching(ident)
            await self._worker.run(files.remove_dir, self._storage_dir, ident)
            await self._worker.run(files.remove_dir, self._state_dir, ident)
            await self._store.remove(ident)
            self._rows.pop(ident, None)

    async def on_state_acceptance(self, message: messages.StateAcceptance) -> None:
        """The cloud's verdict on a state we sent. Raises NotFoundError, ChecksumError."""
        ident = _ident_of(message)
        async with self._lock:
            row = self._row(ident)
            if message.checksum.lower() != row.unaccepted.hex():
                raise ChecksumError(f"verdict on another state of {ident} than its present one")
            if message.result is StateResult.ACCEPTED:
                await self._keep(msgspec.structs.replace(row, accepted=row.unaccepted, unaccepted=b""))
                return
            _log.warning(kv("The cloud rejected a state", instance=ident, reason=message.reason))
            await self._keep(msgspec.structs.replace(row, unaccepted=b""))
            await self._request_state(ident)

    async def on_update_state(self, message: messages.UpdateState) -> None:
        """The cloud sets a state. Raises NotFoundError, InvalidArgumentError, ChecksumError."""
        ident = _ident_of(message)
        async with self._lock:
            row = self._row(ident)
            path = self._state_file(ident)
            data = message.state.encode()
            if len(data) > min(row.state_quota_bytes, files.MAX_STATE_BYTES):
                raise InvalidArgumentError(f"state of {ident} has {len(data)} bytes, more than its quota")
            checksum = files.state_checksum(data)
            if checksum.hex() != message.state_checksum.lower():
                raise ChecksumError(f"state of {ident} from the cloud does not have its checksum")
            await self._worker.run(files.write_copy, path, data)
            await self._keep(msgspec.structs.replace(row, accepted=checksum, unaccepted=b""))
            await self._worker.run(files.finish_write, path, data)
            _log.info(kv("State set by the cloud", instance=ident, size=len(data)))

    # ---- files

    def _make_roots(self) -> None:
        for root in (self._storage_dir, self._state_dir):
            root.mkdir(parents=True, exist_ok=True)

    def _read_budgets(self) -> DiskBudgets:
        same = self._storage_dir.stat().st_dev == self._state_dir.stat().st_dev
        return DiskBudgets(files.total_bytes(self._storage_dir), files.total_bytes(self._state_dir), same)

    def _make_dirs(self, row: StateRow, uid: int, gid: int) -> tuple[Paths, Path | None, bool]:
        self._set_quotas(uid, row)
        storage = state = ""
        state_file, is_new = None, False
        if row.storage_quota_bytes:
            storage = files.make_storage(self._storage_dir, row.ident, uid, gid)
        else:
            files.remove_dir(self._storage_dir, row.ident)
        if row.state_quota_bytes:
            state_file, is_new = files.make_state(self._state_dir, row.ident, uid, gid)
            state = str(state_file.relative_to(self._state_dir))
        else:
            files.remove_dir(self._state_dir, row.ident)
        return Paths(storage, state), state_file, is_new

    def _set_quotas(self, uid: int, row: StateRow) -> None:
        same = self._storage_dir.stat().st_dev == self._state_dir.stat().st_dev
        try:
            if same:
                self._set_quota(self._storage_dir, uid, row.storage_quota_bytes + row.state_quota_bytes)
            else:
                self._set_quota(self._state_dir, uid, row.state_quota_bytes)
                self._set_quota(self._storage_dir, uid, row.storage_quota_bytes)
        except NotSupportedError as error:
            if not self._quotas_missing:
                _log.warning(kv("Disk quotas are not enforced, mount the file system with usrquota", error=error))
            self._quotas_missing = True

    def _state_file(self, ident: InstanceIdent) -> Path:
        for directory, watched in self._watched.items():
            if watched == ident:
                return directory / files.STATE_FILE
        raise NotFoundError(f"instance {ident} has no state in use")

    # ---- changes

    def _on_event(self, directory: Path, name: str) -> None:
        ident = self._watched.get(directory)
        if ident is None or name not in ("", files.STATE_FILE):
            return
        now_s = asyncio.get_running_loop().time()
        first_s, _ = self._due_s.get(ident, (now_s, 0.0))
        patience_s = PATIENCE_S / QUIET_S * self._quiet_s
        self._due_s[ident] = first_s, min(now_s + self._quiet_s, first_s + patience_s)
        self._wake.set()

    async def _look_at_changes(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            for ident, (_, due_s) in list(self._due_s.items()):
                if due_s <= loop.time():
                    del self._due_s[ident]
                    with log_and_continue(_log, f"Can't handle the new state of {ident}"):
                        await self._look_at(ident)
            next_s = min((due_s for _, due_s in self._due_s.values()), default=None)
            self._wake.clear()
            await comes_within(self._wake, None if next_s is None else next_s - loop.time())

    async def _look_at(self, ident: InstanceIdent) -> None:
        async with self._lock:
            if ident in self._watched.values():
                await self._compare(self._row(ident), self._state_file(ident))

    async def _compare(self, row: StateRow, path: Path) -> None:
        """Ask the cloud for a state that is missing here; send it one that is not there yet."""
        try:
            data = await self._worker.run(files.read_state, path)
            text = data.decode()
        except (OutOfRangeError, UnicodeDecodeError) as error:
            _log.error(kv("Can't send state", instance=row.ident, error=error))
            self._alert(f"state of instance {row.ident} can't be sent: {error}")
            return
        checksum = files.state_checksum(data)
        if checksum == row.accepted:
            if row.unaccepted:
                await self._keep(msgspec.structs.replace(row, unaccepted=b""))
            return
        if not data and not row.accepted:
            await self._request_state(row.ident)
            return
        if checksum != row.unaccepted:
            await self._keep(msgspec.structs.replace(row, unaccepted=checksum))
        elif not self._link.connected:
            return
        await self._send_state(row.ident, checksum, text)

    async def _repeat_unaccepted(self, connections: asyncio.Queue[bool]) -> None:
        """After each connection: what the cloud has not accepted is sent again, what is missing asked for again."""
        while True:
            if await connections.get():
                for ident in list(self._watched.values()):
                    with log_and_continue(_log, f"Can't repeat the state of {ident}"):
                        await self._look_at(ident)

    async def _send_state(self, ident: InstanceIdent, checksum: bytes, text: str) -> None:
        if self._link.connected:
            message = messages.NewState(**instance_members(ident), state_checksum=checksum.hex(), state=text)
            await self._link.send(message)

    async def _request_state(self, ident: InstanceIdent) -> None:
        if self._link.connected:
            await self._link.send(messages.StateRequest(**instance_members(ident), default=False))

    # ---- rows

    def _row(self, ident: InstanceIdent) -> StateRow:
        try:
            return self._rows[ident]
        except KeyError:
            raise NotFoundError(f"instance {ident} is unknown") from None

    async def _keep(self, row: StateRow) -> None:
        if self._rows.get(row.ident) != row:
            await self._store.put(row)
            self._rows[row.ident] = row

    def _stop_watching(self, ident: InstanceIdent) -> None:
        for directory in [path for path, watched in self._watched.items() if watched == ident]:
            del self._watched[directory]
            self._watch.remove(directory)
        self._due_s.pop(ident, None)


def _ident_of(message: messages.StateAcceptance | messages.UpdateState) -> InstanceIdent:
    """The cloud names services only (cm-cloud §15)."""
    return InstanceIdent(message.item.id, message.subject.id, message.instance)
