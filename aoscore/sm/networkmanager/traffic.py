"""Traffic of the node and of each instance with public networks: table ``inet aos-traffic`` (sm-runtime.md §6.8).

The kernel's named counters hold the totals of the present period themselves: a counter begins with the stored value and
is set to zero when a new period begins. So nothing is lost while SM is away, and SM writes to the database seldom.
Periods are those of the calendar in UTC; AosCore 9.1 knows days only (sm-runtime.md §7, D38).
An instance over its limit is put into a set whose members lose all their traffic in that direction.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Literal, Protocol, get_args

import msgspec

from aoscore.common.log import kv
from aoscore.sm.networkmanager import nft
from aoscore.sm.networkmanager.firewall import clean_id
from aoscore.sm.networkmanager.ipv6 import Ipv6
from aoscore.sm.networkmanager.nft import Command, Expression, Table, ip, match, prefix

_log = logging.getLogger(__name__)

Period = Literal["year", "month", "day", "hour", "minute"]

TABLE = Table("aos-traffic")
SYSTEM = "system"
_PERIODS = get_args(Period)
_FIRST = (1, 1, 1, 0, 0)
"""Where each field of a moment begins, in the order of the periods."""
_DIRECTIONS = ("in", "out")
PRIVATE = ("127.0.0.0/8", "10.0.0.0/8", "192.168.0.0/16", "172.16.0.0/12")
# How often totals go to the database. The kernel has them in any case; this is for a reboot.
_SAVE_PERIOD_S = 600.0
# What the node itself sends and gets never rests: its totals are written when they have moved by so much.
_SYSTEM_STEP_BYTES = 1 << 20


class StoredTraffic(msgspec.Struct, frozen=True):
    """A total as the database has it."""

    chain: str
    time: datetime
    value: int


class TrafficStore(Protocol):
    """Where totals outlive a reboot."""

    async def load_traffic(self) -> list[StoredTraffic]:
        """All totals."""
        ...

    async def save_traffic(self, totals: Iterable[StoredTraffic]) -> None:
        """Insert or replace."""
        ...

    async def remove_traffic(self, chains: Iterable[str]) -> None:
        """Forget."""
        ...


class Counted(msgspec.Struct, frozen=True):
    """An instance whose traffic is counted; a limit of 0 means none. Bytes per period."""

    name: str
    ip: str
    download_limit_bytes: int = 0
    upload_limit_bytes: int = 0


class Totals(msgspec.Struct, frozen=True):
    """Bytes of the present period."""

    download: int = 0
    upload: int = 0


class Traffic:
    """The counters and their limits."""

    def __init__(self, store: TrafficStore, period: Period = "day", ipv6: Ipv6 | None = None) -> None:
        """`ipv6`: what counts IPv6 too."""
        self._ipv6 = ipv6
        self._store = store
        self._period = period
        self._stored: dict[str, StoredTraffic] = {}
        self._counted: dict[str, Counted] = {}
        self._blocked: dict[str, set[str]] = {"in": set(), "out": set()}
        self._values: dict[str, int] = {}
        self._since = datetime.min.replace(tzinfo=UTC)
        """Begin of the present period."""
        self._saved_s = 0.0

    async def start(self, adopted: Iterable[Counted], now: datetime) -> None:
        """Make the table for the instances that are up, with the totals that the kernel or the database still has."""
        self._stored = {total.chain: total for total in await self._store.load_traffic()}
        self._counted = {counted.name: counted for counted in adopted}
        self._since = self._start_of_period(now)
        kernel = await nft.counters(TABLE)
        last = max((total.time for total in self._stored.values()), default=now)
        # Counters that went on over the end of a period are of no use; the last save tells which one they are of.
        self._values = kernel if self._start_of_period(last) == self._since else {}
        await self._apply(table(self._counted.values(), {name: self._initial(name) for name in self._names()}))
        self._blocked = {"in": set(), "out": set()}
        await self.refresh(now)

    async def change(self, add: Iterable[Counted], remove: Iterable[str], also: Sequence[Command] = ()) -> None:
        """Count some instances and others no more, in one transaction with other commands; repeatable.

        Totals of those that are counted no more are kept for the rest of the period.
        """
        new = [counted for counted in add if self._counted.get(counted.name) != counted]
        gone = [self._counted[name] for name in {*remove, *(counted.name for counted in new)} if name in self._counted]
        if gone:
            await self.refresh(datetime.now(UTC))
        commands = [*also]
        for counted in gone:
            blocked = [direction for direction, addresses in self._blocked.items() if counted.ip in addresses]
            commands += remove_commands(counted, blocked)
        for counted in new:
            commands += add_commands(counted, {name: self._initial(name) for name in _names(counted.name)})
        await self._apply(commands)
        for counted in gone:
            for addresses in self._blocked.values():
                addresses.discard(counted.ip)
            del self._counted[counted.name]
        self._counted |= {counted.name: counted for counted in new}
        await self._save([chain for counted in gone for chain in _names(counted.name)], datetime.now(UTC))

    async def forget(self, name: str) -> None:
        """Delete the totals of an instance that is gone for good."""
        await self._store.remove_traffic(_names(name))
        for chain in _names(name):
            self._stored.pop(chain, None)
            self._values.pop(chain, None)

    async def refresh(self, now: datetime) -> None:
        """Read the counters, begin a new period when it is due, block and unblock by the limits."""
        kernel = await nft.counters(TABLE)
        is_new = self._start_of_period(now) != self._since
        if is_new:
            self._since = self._start_of_period(now)
            _log.info(kv("New traffic period", since=self._since))
            await self._apply([TABLE.reset(name) for name in kernel])
            kernel = dict.fromkeys(kernel, 0)
            self._stored.clear()
            self._values.clear()
        self._values |= kernel
        if is_new:
            # At once: after a crash it tells which period the kernel's counters are of.
            await self._save(self._names(), now)
        for direction in _DIRECTIONS:
            await self._enforce(direction)

    async def save_if_due(self, now: datetime, monotonic_s: float) -> None:
        """Write totals that have changed, at most every ten minutes: of an idle node hardly ever."""
        if monotonic_s - self._saved_s >= _SAVE_PERIOD_S:
            self._saved_s = monotonic_s
            await self._save([name for name in self._names() if self._is_worth_saving(name)], now)

    def _is_worth_saving(self, name: str) -> bool:
        stored = self._stored.get(name)
        moved = self._values.get(name, 0) - (0 if stored is None else stored.value)
        return name not in _names(SYSTEM) or abs(moved) >= _SYSTEM_STEP_BYTES

    def totals(self, name: str) -> Totals:
        """The totals as last read."""
        download, upload = (self._values.get(chain, 0) for chain in _names(name))
        return Totals(download, upload)

    async def _enforce(self, direction: str) -> None:
        over = set()
        for counted in self._counted.values():
            limit = counted.download_limit_bytes if direction == "in" else counted.upload_limit_bytes
            if limit and self._values.get(f"{direction}_{clean_id(counted.name)}", 0) > limit:
                over.add(counted.ip)
        was = self._blocked[direction]
        if over == was:
            return
        for address in sorted(over - was):
            _log.warning(kv("Traffic limit reached, traffic stopped", ip=address, direction=direction))
        name = f"blocked_{direction}"
        changes = [TABLE.add_elements(name, sorted(over - was))] if over - was else []
        changes += [TABLE.delete_elements(name, sorted(was - over))] if was - over else []
        await self._apply(changes)
        self._blocked[direction] = over

    async def _save(self, names: Iterable[str], now: datetime) -> None:
        changed = [
            StoredTraffic(name, now, self._values[name])
            for name in names
            if name in self._values and (name not in self._stored or self._stored[name].value != self._values[name])
        ]
        if changed:
            await self._store.save_traffic(changed)
            self._stored |= {total.chain: total for total in changed}

    def _initial(self, name: str) -> int:
        if name in self._values:
            return self._values[name]
        stored = self._stored.get(name)
        is_present = stored is not None and self._start_of_period(stored.time) == self._since
        return stored.value if stored is not None and is_present else 0

    def _start_of_period(self, time: datetime) -> datetime:
        return start_of_period(time, self._period)

    def _names(self) -> list[str]:
        return [chain for name in (SYSTEM, *self._counted) for chain in _names(name)]

    async def _apply(self, commands: Sequence[Command]) -> None:
        await nft.apply(commands if self._ipv6 is None else self._ipv6.with_twins(commands))


def start_of_period(time: datetime, period: Period) -> datetime:
    """When the period began that a moment is in. Pure."""
    moment = time.astimezone(UTC)
    kept = _PERIODS.index(period) + 1
    fields = (moment.year, moment.month, moment.day, moment.hour, moment.minute)
    year, month, day, hour, minute = (*fields[:kept], *_FIRST[kept:])
    return datetime(year, month, day, hour, minute, tzinfo=UTC)


def table(counted: Iterable[Counted], initial: Mapping[str, int]) -> list[Command]:
    """The transaction that makes the whole table."""
    commands = [*TABLE.begin(), *(_counter(chain, initial) for chain in _names(SYSTEM))]
    for hook in ("input", "output", "forward"):
        commands.append(TABLE.add("chain", hook, type="filter", hook=hook, prio=0, policy="accept"))
    for direction, hook, own, other in (("in", "input", "daddr", "saddr"), ("out", "output", "saddr", "daddr")):
        commands += [
            TABLE.add("map", f"{direction}_bytes", type="ipv4_addr", map="counter"),
            TABLE.add("set", f"blocked_{direction}", type="ipv4_addr"),
            TABLE.rule(hook, [_public(other), {"counter": f"{direction}_{SYSTEM}"}]),
            TABLE.rule("forward", [match(ip(own), f"@blocked_{direction}"), {"drop": None}]),
            TABLE.rule(
                "forward", [_public(other), {"counter": {"map": {"key": ip(own), "data": f"@{direction}_bytes"}}}]
            ),
        ]
    for instance in counted:
        commands += add_commands(instance, initial)
    return commands


def add_commands(counted: Counted, initial: Mapping[str, int]) -> Iterator[Command]:
    """Count an instance from now on."""
    for direction, chain in zip(_DIRECTIONS, _names(counted.name), strict=True):
        yield _counter(chain, initial)
        yield TABLE.add_elements(f"{direction}_bytes", [[counted.ip, chain]])


def remove_commands(counted: Counted, blocked: Iterable[str]) -> Iterator[Command]:
    """Stop counting an instance, which is blocked in these directions."""
    for direction in blocked:
        yield TABLE.delete_elements(f"blocked_{direction}", [counted.ip])
    for direction, chain in zip(_DIRECTIONS, _names(counted.name), strict=True):
        yield TABLE.delete_elements(f"{direction}_bytes", [[counted.ip, chain]])
        yield TABLE.delete("counter", chain)


def _names(name: str) -> tuple[str, str]:
    return (f"in_{clean_id(name)}", f"out_{clean_id(name)}")


def _counter(name: str, initial: Mapping[str, int]) -> Command:
    return TABLE.add("counter", name, packets=0, bytes=initial.get(name, 0))


def _public(field: str) -> Expression:
    return match(ip(field), {"set": [prefix(subnet) for subnet in PRIVATE]}, "!=")
