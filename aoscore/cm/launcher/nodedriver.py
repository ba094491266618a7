"""Makes one node run what it should: one update at a time, growing pauses between tries (cm-orchestration §4.7)."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Protocol

import msgspec

from aoscore.cm.launcher.nodeplan import NodeUpdate, list_digest, matches, plan_update
from aoscore.common.aio import Backoff, comes_within, log_and_continue
from aoscore.common.errors import AosError, DeadlineError, NotFoundError, to_error_info
from aoscore.common.log import kv
from aoscore.common.types import InstanceIdent, InstanceInfo, InstanceState, InstanceStatus, ItemType

_log = logging.getLogger(__name__)

ALERT_AFTER_TRIES = 3


class DriverSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Pauses and limits, seconds."""

    reply_timeout_s: float = 600.0
    """How long a node may work on an update; it answers when all is downloaded, installed and started."""
    retry_first_s: float = 30.0
    retry_limit_s: float = 600.0
    """Pauses before a failed instance, or an update that did not do what it should, is tried again."""


class SendUpdate(Protocol):
    """Sends an update to a node."""

    def __call__(
        self, node_id: str, start: Sequence[InstanceInfo], stop: Sequence[InstanceIdent]
    ) -> Awaitable[None]: ...


class _Retry:
    """When a failed instance is tried again."""

    def __init__(self, backoff: Backoff) -> None:
        self.backoff = backoff
        self.tries = 0
        self.due_s: float | None = None
        self.active_since_s: float | None = None


class NodeDriver:
    """Run it as a task. Everything else is told from outside and returns at once.

    An update is in flight from its sending to the node's next full list; a C++ SM drops a second one (sm.md §4.3).
    """

    def __init__(
        self,
        node_id: str,
        send: SendUpdate,
        *,
        is_usable: Callable[[], bool],
        changed: Callable[[], None],
        confirmed: str | None,
        save_confirmed: Callable[[str, str], Awaitable[None]],
        alert: Callable[[str], None],
        settings: DriverSettings,
    ) -> None:
        """`confirmed`: digest of the start list that the node confirmed last, None when that is not known.

        `changed` is called when statuses are others than before.
        """
        self.node_id = node_id
        self.is_connected = False
        """Whether the node's SM has told all its instances since it connected."""
        self._send = send
        self._is_usable = is_usable
        self._changed = changed
        self._confirmed = confirmed
        self._save_confirmed = save_confirmed
        self._alert = alert
        self._settings = settings
        self._wanted: tuple[InstanceInfo, ...] = ()
        self._wanted_idents: frozenset[InstanceIdent] = frozenset()
        self._leave: frozenset[InstanceIdent] = frozenset()
        self._is_set = False
        self._statuses: dict[InstanceIdent, InstanceStatus] = {}
        self._retries: dict[InstanceIdent, _Retry] = {}
        self._answered = asyncio.Event()
        self._wake = asyncio.Event()
        self._last_sent: NodeUpdate | None = None
        self._not_before_s = 0.0
        self._backoff = self._new_backoff()

    # ---- told from outside

    def set_wanted(
        self, wanted: Sequence[InstanceInfo], leave: Collection[InstanceIdent] = (), *, retry: bool = False
    ) -> None:
        """What shall run on the node, and what is to be neither started nor stopped there.

        With `retry` failed instances are tried again without a pause.
        """
        self._wanted = tuple(wanted)
        self._leave = frozenset(leave)
        self._is_set = True
        self._wanted_idents = frozenset(info.ident for info in wanted)
        self._retries = {ident: one for ident, one in self._retries.items() if ident in self._wanted_idents}
        for status in list(self._statuses.values()):
            self._note(status)
            failed = self._retries.get(status.ident) if status.state is InstanceState.FAILED else None
            if retry and failed is not None:
                failed.backoff.reset()
                failed.due_s = _now_s()
                again = msgspec.structs.replace(status, state=InstanceState.ACTIVATING, error=None)
                self._statuses[status.ident] = again
        if retry:
            self._not_before_s = 0.0
        self.wake()

    def on_full_list(self, statuses: Sequence[InstanceStatus]) -> None:
        """All instances of the node: it has connected or finished an update."""
        self.is_connected = True
        self._statuses = {status.ident: status for status in statuses}
        for status in statuses:
            self._note(status)
        self._answered.set()
        self.wake()
        self._changed()

    def on_statuses(self, statuses: Sequence[InstanceStatus]) -> None:
        """Single instances of the node changed."""
        for status in statuses:
            self._statuses[status.ident] = status
            self._note(status)
        self.wake()
        self._changed()

    def on_lost(self) -> None:
        """The node's SM is disconnected; its instances go on as far as we know."""
        self.is_connected = False
        self._answered.set()
        self.wake()

    def fail_unheard(self, error: AosError) -> None:
        """Count wanted instances that the node has never told of as failed."""
        for info in self._wanted:
            if info.ident not in self._statuses:
                self._fail(info, error)
        self._changed()

    def wake(self) -> None:
        """Look again whether the node needs an update."""
        self._wake.set()

    # ---- asked from outside

    def status(self, info: InstanceInfo) -> InstanceStatus:
        """What is known about a wanted instance; activating until the node has told of this version."""
        status = self._statuses.get(info.ident)
        if status is not None and matches(info, status):
            return status
        return InstanceStatus(info.ident, info.version, InstanceState.ACTIVATING, info.runtime_id, info.manifest_digest)

    def preinstalled(self) -> list[InstanceStatus]:
        """Components that came with the node's image."""
        return [status for ident, status in sorted(self._statuses.items()) if ident.preinstalled]

    # ---- the task

    async def run(self) -> None:
        """Keep the node as it should be, until cancelled."""
        while True:
            self._wake.clear()
            pause_s: float | None = self._settings.retry_first_s
            with log_and_continue(_log, f"Can't update instances of node {self.node_id}"):
                pause_s = await self._step()
            await comes_within(self._wake, pause_s)

    async def _step(self) -> float | None:
        """Send an update if one is due; seconds after which to look again."""
        if not (self._is_set and self.is_connected and self._is_usable()):
            return None
        now_s = _now_s()
        retry = {ident for ident, one in self._retries.items() if one.due_s is not None and one.due_s <= now_s}
        digest = list_digest(self._wanted)
        told = self._confirmed in (None, digest)
        update = plan_update(self._wanted, self._statuses, told=told, retry=retry, leave=self._leave)
        if update is None:
            self._last_sent = None
            self._backoff.reset()
            return self._next_retry_s(now_s)
        if update == self._last_sent and not retry and now_s < self._not_before_s:
            return self._not_before_s - now_s
        if update != self._last_sent:
            self._backoff.reset()
        self._last_sent = update
        self._not_before_s = now_s + self._backoff.next()
        for ident in retry:
            self._retries[ident].due_s = None
        await self._exchange(update, digest)
        return 0.0

    async def _exchange(self, update: NodeUpdate, digest: str) -> None:
        _log.info(
            kv("Update instances", nodeID=self.node_id, start=len(update.start), stop=[str(one) for one in update.stop])
        )
        self._answered.clear()
        await self._send(self.node_id, update.start, update.stop)
        if not await comes_within(self._answered, self._settings.reply_timeout_s):
            error: AosError = DeadlineError(f"node {self.node_id} did not finish its update")
            _log.error(kv("No answer to an update", nodeID=self.node_id, timeout=self._settings.reply_timeout_s))
            for info in update.start:
                if info.ident.type is not ItemType.COMPONENT and self.status(info).state is InstanceState.ACTIVATING:
                    self._fail(info, error)
            self._changed()
            return
        if not self.is_connected:
            return
        for info in update.start:
            if info.ident not in self._statuses:
                self._fail(info, NotFoundError(f"node {self.node_id} did not report the instance"))
        self._changed()
        if self._confirmed != digest:
            await self._save_confirmed(self.node_id, digest)
            self._confirmed = digest

    # ---- retries

    def _fail(self, info: InstanceInfo, error: AosError) -> None:
        status = InstanceStatus(
            info.ident,
            info.version,
            InstanceState.FAILED,
            info.runtime_id,
            info.manifest_digest,
            error=to_error_info(error),
        )
        self._statuses[info.ident] = status
        self._note(status)

    def _note(self, status: InstanceStatus) -> None:
        """Plan the next try of an instance that has failed; forget the past of one that works long enough."""
        if status.ident not in self._wanted_idents:
            return
        now_s = _now_s()
        retry = self._retries.get(status.ident)
        if status.state is InstanceState.FAILED:
            if retry is None:
                retry = self._retries[status.ident] = _Retry(self._new_backoff())
            if retry.active_since_s is not None and now_s - retry.active_since_s > self._settings.retry_limit_s:
                retry.backoff.reset()
                retry.tries = 0
            retry.active_since_s = None
            if retry.due_s is None:
                retry.due_s = now_s + retry.backoff.next()
                retry.tries += 1
                if retry.tries == ALERT_AFTER_TRIES:
                    text = status.error.message if status.error else "no reason told"
                    self._alert(f"instance {status.ident} fails again and again on node {self.node_id}: {text}")
        elif retry is not None:
            retry.due_s = None
            if status.state is InstanceState.ACTIVE and retry.active_since_s is None:
                retry.active_since_s = now_s

    def _next_retry_s(self, now_s: float) -> float | None:
        due_s = min((one.due_s for one in self._retries.values() if one.due_s is not None), default=None)
        return None if due_s is None else max(0.0, due_s - now_s)

    def _new_backoff(self) -> Backoff:
        return Backoff(self._settings.retry_first_s, self._settings.retry_limit_s)


def _now_s() -> float:
    return asyncio.get_running_loop().time()
