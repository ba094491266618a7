"""The gate on disk: waiting, starts that are asked for, restarts, another desired status."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from aoscore.cm.database import UPDATE_GATE_TABLES
from aoscore.cm.updatemanager.gate import GateStore, UpdateGate
from aoscore.cm.updatemanager.schedule import ALL, Kind, Rule, Start
from aoscore.common.db import Database, Schema
from aoscore.common.errors import WrongStateError
from aoscore.common.types import Duration

FOTA, SOTA = frozenset({Kind.FOTA}), frozenset({Kind.SOTA})
NONE: frozenset[Kind] = frozenset()
NOW = datetime(2026, 11, 28, 12, tzinfo=UTC)
DRIVER = {Kind.FOTA: Rule(type=Start.TRIGGER, ttl=Duration(1000)), Kind.SOTA: Rule()}


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[GateStore]:
    async with Database(tmp_path / "cm.db", Schema(create=UPDATE_GATE_TABLES)) as database:
        yield GateStore(database)


def gate_of(store: GateStore, now: datetime = NOW) -> UpdateGate:
    return UpdateGate(store, DRIVER, now=lambda: now)


async def ready(gate: UpdateGate, kinds: frozenset[Kind]) -> None:
    async with asyncio.timeout(5):
        while gate.ready != kinds:
            await asyncio.sleep(0.001)


async def test_what_needs_no_start_passes_at_once(store: GateStore) -> None:
    gate = gate_of(store)
    assert await gate.part("run") == ALL
    assert await gate.left("run", ALL) == NONE
    assert await gate.wait("run", SOTA) == NONE
    assert await gate.part("run") == SOTA
    assert await gate.left("run", SOTA) == NONE


async def test_one_kind_passes_while_the_other_waits_for_its_start(store: GateStore) -> None:
    gate = gate_of(store)
    await gate.wait("run", ALL)
    assert await gate.part("run") == SOTA
    assert await gate.left("run", FOTA) == FOTA
    waiting = asyncio.create_task(gate.wait("run", FOTA))
    await ready(gate, FOTA)
    with pytest.raises(WrongStateError, match="no sota update is ready"):
        gate.start(Kind.SOTA)
    gate.start(Kind.FOTA)
    assert await waiting == NONE
    assert await gate.part("run") == FOTA
    with pytest.raises(WrongStateError, match="no fota update is ready"):
        gate.start(Kind.FOTA)


async def test_a_start_holds_over_a_restart_but_not_for_another_desired_status(store: GateStore) -> None:
    first = gate_of(store)
    waiting = asyncio.create_task(first.wait("run", FOTA))
    await ready(first, FOTA)
    first.start(Kind.FOTA)
    await waiting
    # The process died before it had stored that it is past the gate.
    assert await gate_of(store).wait("run", FOTA) == NONE
    again = gate_of(store)
    other = asyncio.create_task(again.wait("other", FOTA))
    await ready(again, FOTA)
    assert not other.done()
    other.cancel()
    await asyncio.gather(other, return_exceptions=True)
    assert again.ready == NONE


async def test_the_time_limit_counts_from_the_first_wait(store: GateStore) -> None:
    first = gate_of(store)
    waiting = asyncio.create_task(first.wait("run", FOTA))
    await ready(first, FOTA)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    late = gate_of(store, NOW + timedelta(seconds=1001))
    assert await late.wait("run", FOTA) == FOTA
    assert (await late.part("run"), await late.left("run", FOTA)) == (NONE, NONE)
    # Told once, and never asked about again.
    assert await late.wait("run", ALL) == NONE
    assert await late.part("run") == SOTA


async def test_a_clock_that_had_not_been_set_does_not_end_an_update(store: GateStore) -> None:
    unset = gate_of(store, datetime(1970, 1, 1, 0, 1, tzinfo=UTC))
    waiting = asyncio.create_task(unset.wait("run", FOTA))
    await ready(unset, FOTA)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    gate = gate_of(store)
    waiting = asyncio.create_task(gate.wait("run", FOTA))
    await ready(gate, FOTA)
    assert not waiting.done()
    gate.start(Kind.FOTA)
    assert await waiting == NONE
