"""Alerts for the cloud."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from aoscore.cm.alerts import ALERTS_PER_MESSAGE, AlertCache, Alerts, AlertStore, cloud_alert
from aoscore.cm.communication import messages
from aoscore.cm.communication.envelope import from_json, to_json
from aoscore.cm.communication.messages import DownloadState, Identity, Message
from aoscore.cm.communication.outbox import Change, Outbox, StoredMessage
from aoscore.cm.database import OWN_TABLES
from aoscore.common import types
from aoscore.common.db import Database, Schema
from aoscore.common.errors import InvalidArgumentError
from aoscore.common.types import AlertStatus, InstanceIdent
from tests.support.running import running, until
from tests.unit.cm.fakes import FakeLink

NOW = datetime(2026, 3, 1, tzinfo=UTC)
IDENT = InstanceIdent("item", "subject", 1)
NAMES = {"item": Identity(id="item"), "subject": Identity(id="subject"), "instance": 1}
NODE = Identity(codename="n")


def system_alert(number: int, second: int = 0) -> messages.SystemAlert:
    return messages.SystemAlert(timestamp=NOW + timedelta(seconds=second), node=NODE, message=f"alert {number}")


NODE_ALERTS: list[tuple[types.NodeAlert, messages.AnyAlert]] = [
    (types.SystemAlert(NOW, "x"), messages.SystemAlert(timestamp=NOW, node=NODE, message="x")),
    (
        types.CoreAlert(NOW, "SM", "x"),
        messages.CoreAlert(timestamp=NOW, node=NODE, core_component=messages.CoreComponent.SM, message="x"),
    ),
    (
        types.InstanceAlert(NOW, IDENT, "1.0.0", "x"),
        messages.InstanceAlert(timestamp=NOW, **NAMES, version="1.0.0", message="x"),
    ),
    (
        types.SystemQuotaAlert(NOW, "cpu", 5, AlertStatus.RAISE),
        messages.SystemQuotaAlert(timestamp=NOW, node=NODE, parameter="cpu", value=5),
    ),
    (
        types.InstanceQuotaAlert(NOW, IDENT, "ram", 5, AlertStatus.FALL),
        messages.InstanceQuotaAlert(timestamp=NOW, **NAMES, parameter="ram", value=5),
    ),
    (
        types.ResourceAllocateAlert(NOW, IDENT, "gpu", "x"),
        messages.ResourceAllocateAlert(timestamp=NOW, **NAMES, node=NODE, device_id="gpu", message="x"),
    ),
]


@pytest.mark.parametrize(("alert", "expected"), NODE_ALERTS)
def test_node_alerts(alert: types.NodeAlert, expected: messages.AnyAlert) -> None:
    assert cloud_alert("n", alert) == expected


def test_unknown_core_component() -> None:
    with pytest.raises(InvalidArgumentError, match="UM"):
        cloud_alert("n", types.CoreAlert(NOW, "UM", "x"))


def test_cache_collapses_and_drops_the_oldest() -> None:
    cache = AlertCache(limit=3)
    for number in (0, 1, 1, 2, 3):
        cache.add(system_alert(number, second=number))
    assert cache.take_counters() == (1, 1)
    assert cache.take_counters() == (0, 0)
    assert cache.take(2) == [system_alert(1, 1), system_alert(2, 2)]
    cache.add(system_alert(1, 9))
    assert cache.take(9) == [system_alert(3, 3), system_alert(1, 9)]
    assert len(cache) == 0


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[AlertStore]:
    async with Database(tmp_path / "cm.db", Schema(create=OWN_TABLES)) as database:
        yield AlertStore(database)


async def test_what_waits_for_a_connection_outlives_the_process(store: AlertStore) -> None:
    link = FakeLink()
    link.connected = False

    def process() -> Alerts:
        return Alerts(link, store, send_period_s=0.01, main_node_id=lambda: "main", now=lambda: NOW)

    alerts = [cloud_alert("n", alert) for alert, _ in NODE_ALERTS]
    alerts.append(
        messages.DownloadProgressAlert(
            timestamp=NOW, digest="sha256:1", url="u", downloaded_bytes=1, total_bytes=2, state=DownloadState.STARTED
        )
    )
    first = process()
    async with running(first):
        for alert in alerts:
            first.add(alert)
        while len(await store.load()) < len(alerts):
            pass
    assert await store.load() == alerts
    second = process()
    async with running(second):
        second.add(alerts[0])  # still the same
        link.connected = True
        await until(lambda: link.sent)
        while await store.load():
            pass
    assert [item for one in link.sent if isinstance(one, messages.Alerts) for item in one.items] == alerts


class KeepingLink(FakeLink):
    """Keeps alerts as the real one does; one that ends its process right then."""

    def __init__(self, store: AlertStore) -> None:
        super().__init__()
        self.outbox = Outbox(store._database)

    async def send(self, message: Message, *, also: Change | None = None) -> bool:
        await self.outbox.put(StoredMessage(messages.Alerts, str(len(self.sent)), to_json(message)), also)
        await super().send(message)
        await asyncio.Event().wait()
        return True


async def test_a_process_that_ends_while_it_sends_leaves_each_alert_in_one_place(store: AlertStore) -> None:
    alerts = [system_alert(number) for number in range(ALERTS_PER_MESSAGE + 3)]
    await store.save(alerts)
    link = KeepingLink(store)
    async with running(Alerts(link, store, send_period_s=0.01, main_node_id=lambda: "main", now=lambda: NOW)):
        await until(lambda: link.sent)
    (kept,) = await link.outbox.load()
    items = from_json(messages.Alerts, kept.frame, "kept")[0].items
    assert [*items, *await store.load()] == alerts


async def test_a_stored_alert_that_cannot_be_read_is_passed_over(store: AlertStore) -> None:
    await store.save([system_alert(1)])
    await store._database.execute("INSERT INTO aoscore_alerts VALUES ('{')")
    assert await store.load() == [system_alert(1)]


async def test_sending_in_batches_with_a_word_about_losses(store: AlertStore) -> None:
    link = FakeLink()
    link.connected = False
    alerts = Alerts(link, store, send_period_s=0.01, main_node_id=lambda: "main", now=lambda: NOW)
    async with running(alerts):
        for number in range(300):
            alerts.add(system_alert(number))
        await asyncio.sleep(0.03)
        assert link.sent == []
        link.connected = True
        await until(lambda: len(link.sent) >= 17)
    sent = [message for message in link.sent if isinstance(message, messages.Alerts)]
    assert [len(message.items) for message in sent] == [ALERTS_PER_MESSAGE] * 16 + [1]
    items = [item for message in sent for item in message.items]
    assert items[0] == messages.CoreAlert(
        timestamp=NOW,
        node=Identity(codename="main"),
        core_component=messages.CoreComponent.CM,
        message="44 alerts were dropped while waiting for the cloud",
    )
    assert items[1:] == [system_alert(number) for number in range(44, 300)]
