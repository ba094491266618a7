"""Alerts on their way to the cloud (cm-orchestration §7.2)."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

import apsw
import msgspec

from aoscore.cm.communication import messages
from aoscore.cm.communication.envelope import from_json, to_json
from aoscore.cm.communication.messages import CoreComponent, Identity, instance_members
from aoscore.cm.communication.outbox import Change
from aoscore.cm.monitoring import Link
from aoscore.common import types
from aoscore.common.aio import log_and_continue
from aoscore.common.db import Database
from aoscore.common.errors import InvalidArgumentError
from aoscore.common.log import kv

_log = logging.getLogger(__name__)

ALERTS_PER_MESSAGE = 16
CACHE_LIMIT = 256
_NO_TIME = datetime(1970, 1, 1, tzinfo=UTC)


def cloud_alert(node_id: str, alert: types.NodeAlert) -> messages.AnyAlert:
    """The cloud's form of an alert of a node."""
    node = Identity.of_codename(node_id)
    match alert:
        case types.SystemAlert():
            return messages.SystemAlert(timestamp=alert.timestamp, node=node, message=alert.message)
        case types.CoreAlert():
            return messages.CoreAlert(
                timestamp=alert.timestamp,
                node=node,
                core_component=_core_component(alert.core_component),
                message=alert.message,
            )
        case types.InstanceAlert():
            return messages.InstanceAlert(
                timestamp=alert.timestamp,
                **instance_members(alert.ident),
                version=alert.version,
                message=alert.message,
            )
        case types.SystemQuotaAlert():
            return messages.SystemQuotaAlert(
                timestamp=alert.timestamp, node=node, parameter=alert.parameter, value=alert.value
            )
        case types.InstanceQuotaAlert():
            return messages.InstanceQuotaAlert(
                timestamp=alert.timestamp,
                **instance_members(alert.ident),
                parameter=alert.parameter,
                value=alert.value,
            )
        case types.ResourceAllocateAlert():
            return messages.ResourceAllocateAlert(
                timestamp=alert.timestamp,
                **instance_members(alert.ident),
                node=node,
                device_id=alert.resource,
                message=alert.message,
            )


def _core_component(word: str) -> CoreComponent:
    try:
        return CoreComponent(word)
    except ValueError:
        raise InvalidArgumentError(f"{word!r} is no core component") from None


class AlertCache:
    """Alerts that wait, oldest first. Pure. An alert equal to a waiting one but for its time is counted, not kept."""

    def __init__(self, limit: int = CACHE_LIMIT) -> None:
        self._limit = limit
        self._alerts: dict[messages.AnyAlert, messages.AnyAlert] = {}
        """By the alert without its time."""
        self.duplicates = 0
        self.dropped = 0

    def __len__(self) -> int:
        return len(self._alerts)

    def all(self) -> list[messages.AnyAlert]:
        """What waits, oldest first."""
        return list(self._alerts.values())

    def add(self, alert: messages.AnyAlert) -> None:
        """Keep an alert; when there are too many the oldest is dropped."""
        key = msgspec.structs.replace(alert, timestamp=_NO_TIME)
        if key in self._alerts:
            self.duplicates += 1
            return
        if len(self._alerts) >= self._limit:
            del self._alerts[next(iter(self._alerts))]
            self.dropped += 1
        self._alerts[key] = alert

    def take(self, count: int) -> list[messages.AnyAlert]:
        """Remove and return the oldest ones."""
        keys = list(self._alerts)[:count]
        return [self._alerts.pop(key) for key in keys]

    def take_counters(self) -> tuple[int, int]:
        """How many duplicates and lost alerts there were since the last call."""
        counters = self.duplicates, self.dropped
        self.duplicates = self.dropped = 0
        return counters


class AlertStore:
    """Alerts that wait for a connection, over restarts: table aoscore_alerts.

    They leave it in the transaction in which the link keeps their message: a crash sends no alert twice.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    async def load(self) -> list[messages.AnyAlert]:
        """All of them, oldest first; what cannot be read is passed over."""
        found: list[messages.AnyAlert] = []
        for (text,) in await self._database.select("SELECT alert FROM aoscore_alerts ORDER BY rowid"):
            with log_and_continue(_log, "Can't read a stored alert"):
                found += from_json(messages.Alerts, text, "stored alert")[0].items
        return found

    async def save(self, alerts: Sequence[messages.AnyAlert]) -> None:
        """Replaces all."""
        await self._database.write(self.replacing(alerts))

    @staticmethod
    def replacing(alerts: Sequence[messages.AnyAlert]) -> Change:
        """The change of the database that replaces all."""
        rows = [(to_json(messages.Alerts(items=(alert,))).decode(),) for alert in alerts]

        def change(connection: apsw.Connection) -> None:
            connection.execute("DELETE FROM aoscore_alerts")
            connection.executemany("INSERT INTO aoscore_alerts (alert) VALUES (?)", rows)

        return change


class Alerts:
    """Sends waiting alerts every `send_period_s` while the cloud is connected, as a service.

    Without a connection they are stored as often, if there are new ones.
    """

    def __init__(
        self,
        link: Link,
        store: AlertStore,
        *,
        send_period_s: float,
        main_node_id: Callable[[], str],
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._link = link
        self._store = store
        self._stored: list[messages.AnyAlert] = []
        self._send_period_s = send_period_s
        self._main_node_id = main_node_id
        self._now = now
        self._cache = AlertCache()

    def add(self, alert: messages.AnyAlert) -> None:
        """Have an alert sent with the next ones."""
        self._cache.add(alert)

    def add_core_alert(self, message: str) -> None:
        """Have an alert of CM itself sent."""
        self.add(self._core_alert(message))

    def on_node_alert(self, node_id: str, alert: types.NodeAlert) -> None:
        """An SM sent an alert."""
        self.add(cloud_alert(node_id, alert))

    async def run(self, started: Callable[[], None]) -> None:
        """Send periodically."""
        self._stored = await self._store.load()
        for alert in self._stored:
            self._cache.add(alert)
        started()
        while True:
            await asyncio.sleep(self._send_period_s)
            if self._link.connected:
                with log_and_continue(_log, "Can't send alerts"):
                    await self._send()
            with log_and_continue(_log, "Can't store alerts"):
                await self._keep()

    async def _keep(self) -> None:
        waiting = self._cache.all()
        if waiting != self._stored:
            await self._store.save(waiting)
            self._stored = waiting

    async def _send(self) -> None:
        duplicates, dropped = self._cache.take_counters()
        if duplicates:
            _log.warning(kv("Alerts were there already", count=duplicates))
        batch: list[messages.AnyAlert] = []
        if dropped:
            _log.warning(kv("Alerts were dropped", count=dropped))
            batch.append(self._core_alert(f"{dropped} alerts were dropped while waiting for the cloud"))
        while batch := batch + self._cache.take(ALERTS_PER_MESSAGE - len(batch)):
            waiting = self._cache.all()
            if await self._link.send(messages.Alerts(items=tuple(batch)), also=self._store.replacing(waiting)):
                self._stored = waiting
            batch = []

    def _core_alert(self, message: str) -> messages.CoreAlert:
        node = Identity.of_codename(self._main_node_id())
        return messages.CoreAlert(timestamp=self._now(), node=node, core_component=CoreComponent.CM, message=message)
