"""The gate between download and update: waits until the rules let an update start (cm-cloud.md §16).

What it knows is on disk: a start that was asked for holds over a restart, and an update that began with one kind goes
on with that kind. All of it belongs to one desired status: another one finds the gate as new.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Final

import apsw
import msgspec

from aoscore.cm.rows import EPOCH, from_ns, to_ns
from aoscore.cm.updatemanager.schedule import ALL, Kind, Place, Rule, State, decide, look_again_in
from aoscore.common.aio import Broadcast, comes_within
from aoscore.common.db import Database
from aoscore.common.errors import WrongStateError
from aoscore.common.log import kv

_log = logging.getLogger(__name__)

# The clock may be set meanwhile.
_LOOK_AGAIN_S: Final = 60.0
# A time before that is from a clock that had not been set.
_FIRST_YEAR: Final = 2020


class GateStore:
    """Reads and writes the places at the gate, table aoscore_update_gate."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def load(self, run: str) -> dict[Kind, Place]:
        """The places of a run."""
        rows = await self._database.select(
            "SELECT kind, since, triggered, state FROM aoscore_update_gate WHERE run = ?", (run,)
        )
        return {
            Kind(kind): Place(from_ns(since) or EPOCH, bool(triggered), State(state))
            for kind, since, triggered, state in rows
        }

    async def save(self, run: str, places: Mapping[Kind, Place]) -> None:
        """Replaces all that was kept."""
        rows = [
            (run, kind.value, to_ns(place.since), int(place.triggered), place.state.value)
            for kind, place in places.items()
        ]

        def change(connection: apsw.Connection) -> None:
            connection.execute("DELETE FROM aoscore_update_gate")
            connection.executemany("INSERT INTO aoscore_update_gate VALUES (?, ?, ?, ?, ?)", rows)

        await self._database.write(change)


class UpdateGate:
    """Decides with `schedule`; knows clock and disk. `changed` tells when `ready` is another."""

    def __init__(
        self,
        store: GateStore,
        rules: Mapping[Kind, Rule],
        *,
        now: Callable[[], datetime] = lambda: datetime.now(UTC).astimezone(),
    ) -> None:
        """`now` gives local time."""
        self._store = store
        self._rules = rules
        self._now = now
        self._asked: set[Kind] = set()
        self._wake = asyncio.Event()
        self.ready: frozenset[Kind] = frozenset()
        """Kinds that are downloaded and wait for their start."""
        self.changed: Broadcast[None] = Broadcast("update gate")

    async def part(self, run: str) -> frozenset[Kind]:
        """The kinds that a run is at. One that never came to the gate is at everything."""
        places = await self._store.load(run)
        return _those(places, State.OPEN) if places else ALL

    async def left(self, run: str, needed: frozenset[Kind]) -> frozenset[Kind]:
        """The needed kinds that a run has not let through or given up yet."""
        places = await self._store.load(run)
        if not places:
            return frozenset()
        return frozenset(kind for kind in needed if kind not in places or places[kind].state is State.WAITING)

    async def wait(self, run: str, needed: frozenset[Kind]) -> frozenset[Kind]:
        """Until some of the needed kinds may be updated or all are given up; stored on return.

        `run` names the desired status. Returns the kinds that were given up now.
        """
        stored = await self._store.load(run)
        places = {kind: self._come(stored.get(kind)) for kind in needed}
        before = _those(places, State.EXPIRED)
        try:
            while True:
                self._wake.clear()
                places |= {kind: msgspec.structs.replace(places[kind], triggered=True) for kind in self._asked & needed}
                self._asked.clear()
                places = decide(self._rules, places, self._now())
                if places != stored:
                    await self._store.save(run, places)
                    stored = places
                waiting = _those(places, State.WAITING)
                if _those(places, State.OPEN) or not waiting:
                    return _those(places, State.EXPIRED) - before
                if waiting != self.ready:
                    _log.info(kv("Update waits for its start", kinds=" ".join(sorted(waiting))))
                    self._set_ready(waiting)
                again_s = look_again_in(self._rules, places, self._now())
                await comes_within(self._wake, min(_LOOK_AGAIN_S, _LOOK_AGAIN_S if again_s is None else again_s))
        finally:
            self._set_ready(frozenset())

    def _come(self, place: Place | None) -> Place:
        """A kind comes to the gate, maybe again."""
        if place is None or place.since.year < _FIRST_YEAR:
            return Place(self._now(), place is not None and place.triggered)
        return place if place.state is State.EXPIRED else msgspec.structs.replace(place, state=State.WAITING)

    def _set_ready(self, ready: frozenset[Kind]) -> None:
        if ready != self.ready:
            self.ready = ready
            self.changed.publish(None)

    def start(self, kind: Kind) -> None:
        """Someone asks for the start. Raises WrongStateError when nothing of the kind waits."""
        if kind not in self.ready:
            raise WrongStateError(f"no {kind} update is ready to start")
        self._asked.add(kind)
        self._wake.set()


def _those(places: Mapping[Kind, Place], state: State) -> frozenset[Kind]:
    return frozenset(kind for kind, place in places.items() if place.state is state)
