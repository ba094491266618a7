"""Decides which node and runtime runs each wanted instance. Pure: same input, same output.

Rules (cm-orchestration §4.5, with its "do better" §10):

* High priority goes first; equal priorities go by identity.
* Stable: an instance stays where it is as long as that place still suits it. It moves only when its node is gone, is
  overloaded (`rebalance`), or when a more important instance fits nowhere else.
* Nothing is ever promised twice: CPU, RAM, slots, shared resources, storage and state are counted in one ledger, and a
  place is taken as a whole or not at all.
* A node that is away for a moment keeps its instances; a node that is gone loses those that fit elsewhere, the others
  wait for it and are reported as failed.
"""

import heapq
import itertools
import math
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import TypeAlias

import msgspec

from aoscore.common.errors import AosError, NotFoundError, OutOfMemoryError, WrongStateError
from aoscore.common.types import AlertRulePercents, InstanceIdent, ResourceInfo, RuntimeInfo

DEFAULT_RUNTIMES = ("crun", "runc")
"""Runtime types of an item that names none."""

MAX_INSTANCES_PER_RUNTIME = 256
"""Slots of a runtime that tells no limit: what a C++ SM takes in one message (grpc.md, "Caps of C++ peers")."""

DEFAULT_RATIO_PERCENT = 50.0
"""Share of a quota that is reserved when neither item nor node say more."""


class Presence(Enum):
    """Whether a node can be given work."""

    ONLINE = "online"
    """Connected and provisioned."""
    AWAY = "away"
    """Expected back any moment: keeps what it has, gets nothing new."""
    GONE = "gone"
    """Disconnected too long, paused or faulty: what it has goes elsewhere where possible."""


class Usage(msgspec.Struct, frozen=True):
    """Average CPU and RAM use."""

    cpu_dmips: int = 0
    ram_bytes: int = 0


class Ratios(msgspec.Struct, frozen=True):
    """Shares of an item's quotas that a node reserves, percent; None: the default."""

    cpu: float | None = None
    ram: float | None = None
    storage: float | None = None
    state: float | None = None


class Node(msgspec.Struct, frozen=True, kw_only=True):
    """A node as the balancer sees it: what it has, what its configuration says, how busy it is."""

    node_id: str
    presence: Presence = Presence.ONLINE
    max_dmips: int = 0
    total_ram_bytes: int = 0
    runtimes: tuple[RuntimeInfo, ...] = ()
    resources: tuple[ResourceInfo, ...] = ()
    priority: int = 0
    labels: frozenset[str] = frozenset()
    ratios: Ratios = Ratios()
    cpu_rule: AlertRulePercents | None = None
    ram_rule: AlertRulePercents | None = None
    load: Usage = Usage()
    instance_loads: dict[tuple[InstanceIdent, str], Usage] = {}
    """Average use by (identity, runtime id)."""


class Platform(msgspec.Struct, frozen=True):
    """What an image was built for; an empty member fits everything."""

    architecture: str = ""
    variant: str = ""
    os: str = ""
    os_version: str = ""
    os_features: tuple[str, ...] = ()


class Amounts(msgspec.Struct, frozen=True):
    """CPU in DMIPS, the others in bytes; None: not told."""

    cpu: int | None = None
    ram: int | None = None
    storage: int | None = None
    state: int | None = None


class Variant(msgspec.Struct, frozen=True, kw_only=True):
    """One manifest of an item's image index: what it needs of a node."""

    manifest_digest: str
    runtime_types: tuple[str, ...] = DEFAULT_RUNTIMES
    platform: Platform = Platform()
    resources: tuple[str, ...] = ()
    quota: Amounts = Amounts()
    requested: Amounts = Amounts()
    skip_limits: bool = False
    movable: bool = True
    """False: the item's balancing policy forbids moving a running instance."""


class Home(msgspec.Struct, frozen=True):
    """A runtime of a node."""

    node_id: str
    runtime_id: str


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """An instance that shall run somewhere."""

    ident: InstanceIdent
    variants: tuple[Variant, ...]
    priority: int = 0
    labels: tuple[str, ...] = ()
    is_component: bool = False
    pin: Home | None = None
    """The only place where it may run."""
    problem: str = ""
    """Why variants of the item are missing here."""


class Site(msgspec.Struct, frozen=True):
    """Where an instance runs and which manifest of its item fits there."""

    node_id: str
    runtime_id: str
    manifest_digest: str


class Decision(msgspec.Struct, frozen=True):
    """Outcome for one instance: a site; an error; or both when it waits for its node to come back."""

    site: Site | None
    error: AosError | None = None


class Budgets(msgspec.Struct, frozen=True):
    """Bytes of the partitions for storages and states; None: not limited. Same partition: one budget for both."""

    storage_bytes: int | None = None
    state_bytes: int | None = None
    same_partition: bool = False


UNLIMITED = Budgets()

_Key: TypeAlias = tuple[str, str, str]
_Claim: TypeAlias = dict[_Key, int]
_STORAGE: _Key = ("storage", "", "")
_STATE: _Key = ("state", "", "")


def order_key(priority: int, ident: InstanceIdent) -> tuple[int, InstanceIdent]:
    """Sort key of instances and their requests: important ones first."""
    return -priority, ident


def reserved_amount(requested: int | None, quota: int | None, ratio_percent: float | None) -> int:
    """How much of a resource an instance is counted with (cm-orchestration §4.5, "Requested amounts")."""
    if requested is not None:
        return requested if quota is None else min(requested, quota)
    if quota is None:
        return 0
    ratio = min((DEFAULT_RATIO_PERCENT if ratio_percent is None else ratio_percent) / 100, 1.0)
    return math.floor(quota * ratio + 0.5)


def place(
    nodes: Sequence[Node],
    wanted: Sequence[Wanted],
    current: Mapping[InstanceIdent, Site],
    budgets: Budgets = UNLIMITED,
    *,
    rebalance: bool = False,
) -> dict[InstanceIdent, Decision]:
    """Decide for every wanted instance.

    `current` is where instances are now, whatever their version. With `rebalance`, nodes above their alert threshold
    give up their least important instances until they are below the lower one, as far as others can take them.
    """
    return _Balancer(nodes, wanted, current, budgets, rebalance).run()


class _Ledger:
    """What is left. `kept_free` is what newcomers must leave alone: the load of the system itself."""

    def __init__(self, nodes: Sequence[Node], budgets: Budgets, overloaded: frozenset[str]) -> None:
        self.free: _Claim = {}
        self.kept_free: _Claim = {}
        for node in nodes:
            system_cpu = max(0, node.load.cpu_dmips - sum(use.cpu_dmips for use in node.instance_loads.values()))
            system_ram = max(0, node.load.ram_bytes - sum(use.ram_bytes for use in node.instance_loads.values()))
            self._add_node_budget("cpu", node, node.max_dmips, system_cpu, node.cpu_rule, overloaded)
            self._add_node_budget("ram", node, node.total_ram_bytes, system_ram, node.ram_rule, overloaded)
            for runtime in node.runtimes:
                if runtime.allowed_dmips:
                    self.free["cpu", node.node_id, runtime.runtime_id] = runtime.allowed_dmips
                if runtime.allowed_ram:
                    self.free["ram", node.node_id, runtime.runtime_id] = runtime.allowed_ram
                self.free["slot", node.node_id, runtime.runtime_id] = runtime.max_instances or MAX_INSTANCES_PER_RUNTIME
            for resource in node.resources:
                if resource.shared_count:
                    self.free["resource", node.node_id, resource.name] = resource.shared_count
        self._room: dict[str, tuple[int, int]] = {}
        if budgets.storage_bytes is not None:
            self.free[_STORAGE] = budgets.storage_bytes
        if budgets.state_bytes is not None and not budgets.same_partition:
            self.free[_STATE] = budgets.state_bytes

    def _add_node_budget(
        self,
        kind: str,
        node: Node,
        total: int,
        system: int,
        rule: AlertRulePercents | None,
        overloaded: frozenset[str],
    ) -> None:
        key = (kind, node.node_id, "")
        self.free[key] = total
        goal = total
        if node.node_id in overloaded and rule is not None:
            goal = math.floor(total * rule.min_threshold / 100)
        self.kept_free[key] = total - max(0, goal - system)

    def available(self, key: _Key) -> int:
        """What a newcomer can have."""
        return max(0, self.free[key] - self.kept_free.get(key, 0))

    def room(self, node_id: str) -> tuple[int, int]:
        """CPU and RAM that a newcomer can have on a node."""
        room = self._room.get(node_id)
        if room is None:
            room = self.available(("cpu", node_id, "")), self.available(("ram", node_id, ""))
            self._room[node_id] = room
        return room

    def lacking(self, claim: _Claim, *, newcomer: bool) -> list[_Key]:
        """The parts of claim that cannot be had."""
        return [
            key
            for key, amount in claim.items()
            if key in self.free and amount > (self.available(key) if newcomer else self.free[key])
        ]

    def take(self, claim: _Claim) -> None:
        for key, amount in claim.items():
            if key in self.free:
                self.free[key] -= amount
                self._room.pop(key[1], None)

    def give_back(self, claim: _Claim) -> None:
        self.take({key: -amount for key, amount in claim.items()})


class _Held(msgspec.Struct):
    """An instance that has a site for now."""

    wanted: Wanted
    site: Site
    claim: _Claim
    movable: bool


_Candidate: TypeAlias = tuple[Node, RuntimeInfo, Variant, _Claim]
_Needs: TypeAlias = tuple[tuple[Variant, ...], tuple[str, ...], bool, Home | None]
"""What makes a place suitable, the same for all instances of an item: variants, labels, whether a component, pin."""


class _Balancer:
    def __init__(
        self,
        nodes: Sequence[Node],
        wanted: Sequence[Wanted],
        current: Mapping[InstanceIdent, Site],
        budgets: Budgets,
        rebalance: bool,
    ) -> None:
        self._nodes = {node.node_id: node for node in sorted(nodes, key=lambda node: node.node_id)}
        self._wanted = sorted(wanted, key=lambda one: order_key(one.priority, one.ident))
        self._current = current
        self._state_key = _STORAGE if budgets.same_partition else _STATE
        self._overloaded = frozenset(node.node_id for node in nodes if rebalance and _is_overloaded(node))
        self._ledger = _Ledger(list(self._nodes.values()), budgets, self._overloaded)
        self._held: dict[InstanceIdent, _Held] = {}
        self._suiting: dict[_Needs, tuple[list[_Candidate], list[str]]] = {}
        self._decisions: dict[InstanceIdent, Decision] = {}

    def run(self) -> dict[InstanceIdent, Decision]:
        queue: list[tuple[tuple[int, InstanceIdent], Wanted]] = []
        for wanted in self._wanted:
            if not self._stay(wanted, spare_load=True):
                queue.append((order_key(wanted.priority, wanted.ident), wanted))
        heapq.heapify(queue)
        while queue:
            _, wanted = heapq.heappop(queue)
            for evicted in self._settle(wanted):
                heapq.heappush(queue, (order_key(evicted.priority, evicted.ident), evicted))
        decisions = self._decisions | {ident: Decision(held.site) for ident, held in self._held.items()}
        return {wanted.ident: decisions[wanted.ident] for wanted in self._wanted}

    def _stay(self, wanted: Wanted, *, spare_load: bool) -> bool:
        """Keep an instance where it is if that place still suits it.

        With `spare_load` an overloaded node keeps only what is below its lower threshold; without, all that fits.
        """
        home = self._current.get(wanted.ident)
        node = self._nodes.get(home.node_id) if home else None
        if home is None or node is None or node.presence is Presence.GONE:
            return False
        if wanted.pin is not None and wanted.pin != Home(home.node_id, home.runtime_id):
            return False
        if node.presence is Presence.AWAY:
            return self._stay_away(wanted, home)
        relieve = spare_load and node.node_id in self._overloaded
        for variant in wanted.variants:
            suitable, _ = self._suitable(wanted, variant, [node])
            for _, runtime in suitable:
                movable = variant.movable and wanted.pin is None and not wanted.is_component
                claim = self._claim(wanted, variant, node, runtime, measured=relieve)
                if runtime.runtime_id == home.runtime_id and not self._ledger.lacking(
                    claim, newcomer=relieve and movable
                ):
                    self._hold(wanted, node, runtime, variant, claim)
                    return True
        return False

    def _stay_away(self, wanted: Wanted, home: Site) -> bool:
        """A node that is away keeps what it has; what it has is known by the manifest."""
        variant = next((one for one in wanted.variants if one.manifest_digest == home.manifest_digest), None)
        if variant is None:
            return False
        claim = self._disk_claim(wanted, variant, self._nodes[home.node_id])
        if self._ledger.lacking(claim, newcomer=False):
            return False
        self._ledger.take(claim)
        self._held[wanted.ident] = _Held(wanted, home, claim, movable=False)
        return True

    def _settle(self, wanted: Wanted) -> list[Wanted]:
        """Find a place for an instance that has none; returns the instances that had to give way."""
        candidates, error = self._candidates(wanted)
        best = self._best(candidates)
        if best is not None:
            self._hold(wanted, *best)
            return []
        if self._stay(wanted, spare_load=False):
            return []
        if preempted := self._preempt(wanted, candidates):
            return preempted
        if candidates:
            error = self._shortage(wanted, candidates)
        self._decisions[wanted.ident] = self._stranded(wanted, error)
        return []

    def _stranded(self, wanted: Wanted, error: AosError) -> Decision:
        """No place. Where the instance's own node is only missing, it waits for that one."""
        home = self._current.get(wanted.ident)
        node = self._nodes.get(home.node_id) if home else None
        if home is None or node is None or node.presence is Presence.ONLINE:
            return Decision(None, error)
        if all(variant.manifest_digest != home.manifest_digest for variant in wanted.variants):
            return Decision(None, error)
        return Decision(home, WrongStateError(f"node {node.node_id} is not available; elsewhere: {error}"))

    def _candidates(self, wanted: Wanted) -> tuple[list[_Candidate], AosError]:
        """Places that suit an instance if they have room, best variant first; and why other variants have none."""
        reasons = [wanted.problem] if wanted.problem else []
        home = self._current.get(wanted.ident)
        home_node = self._nodes.get(home.node_id) if home else None
        pinned_down = home_node is not None and any(not variant.movable for variant in wanted.variants)
        online = [node for node in self._nodes.values() if node.presence is Presence.ONLINE]
        if pinned_down and home_node is not None and home_node.presence is not Presence.ONLINE:
            return [], WrongStateError(f"its balancing policy binds it to node {home_node.node_id}")
        candidates, unfit = self._suiting_all(wanted, online)
        if self._overloaded:
            candidates = [
                (node, runtime, variant, self._claim(wanted, variant, node, runtime, measured=True))
                if node.node_id in self._overloaded
                else (node, runtime, variant, claim)
                for node, runtime, variant, claim in candidates
            ]
        return candidates, NotFoundError("; ".join(dict.fromkeys([*reasons, *unfit])) or "item has no images")

    def _suiting_all(self, wanted: Wanted, online: Sequence[Node]) -> tuple[list[_Candidate], list[str]]:
        """Places that suit all instances with these needs, and why variants have none; looked for once."""
        needs = wanted.variants, wanted.labels, wanted.is_component, wanted.pin
        found = self._suiting.get(needs)
        if found is None:
            found = [], []
            for variant in wanted.variants:
                suitable, reason = self._suitable(wanted, variant, online)
                found[0].extend(
                    (node, runtime, variant, self._claim(wanted, variant, node, runtime, measured=False))
                    for node, runtime in suitable
                )
                if not suitable:
                    found[1].append(reason)
            self._suiting[needs] = found
        return found

    def _suitable(
        self, wanted: Wanted, variant: Variant, nodes: Sequence[Node]
    ) -> tuple[list[tuple[Node, RuntimeInfo]], str]:
        """Runtimes that could run the variant were they empty, or the reason why none can."""
        found = list(nodes)
        if not found:
            return [], "no nodes available"
        if wanted.pin is not None:
            found = [node for node in found if node.node_id == wanted.pin.node_id]
            if not found:
                return [], "no nodes with given ID"
        found = [node for node in found if node.labels.issuperset(wanted.labels)]
        if not found:
            return [], "no nodes with instance labels"
        if not wanted.is_component:
            found = [node for node in found if {one.name for one in node.resources}.issuperset(variant.resources)]
            if not found:
                return [], "no nodes with service resources"
        runtimes = [
            (node, runtime)
            for node in found
            for runtime in sorted(node.runtimes, key=lambda one: (one.type, one.runtime_id))
            if (runtime.type in variant.runtime_types)
            and (wanted.pin is None or wanted.pin.runtime_id == runtime.runtime_id)
        ]
        if not runtimes:
            return [], "no runtimes with requested runtime type"
        runtimes = [(node, runtime) for node, runtime in runtimes if _runs_platform(runtime, variant.platform)]
        return runtimes, "" if runtimes else "no runtimes with requested platform"

    def _claim(self, wanted: Wanted, variant: Variant, node: Node, runtime: RuntimeInfo, *, measured: bool) -> _Claim:
        """What the instance takes there. `measured`: on an overloaded node what it really uses, if that is more."""
        claim: _Claim = {("slot", node.node_id, runtime.runtime_id): 1}
        if wanted.is_component:
            return claim
        claim |= self._disk_claim(wanted, variant, node)
        if variant.skip_limits:
            return claim
        cpu = reserved_amount(variant.requested.cpu, variant.quota.cpu, node.ratios.cpu)
        ram = reserved_amount(variant.requested.ram, variant.quota.ram, node.ratios.ram)
        if measured and node.node_id in self._overloaded:
            used = node.instance_loads.get((wanted.ident, runtime.runtime_id), Usage())
            cpu, ram = max(cpu, used.cpu_dmips), max(ram, used.ram_bytes)
        claim["cpu", node.node_id, runtime.runtime_id if runtime.allowed_dmips else ""] = cpu
        claim["ram", node.node_id, runtime.runtime_id if runtime.allowed_ram else ""] = ram
        for resource in variant.resources:
            claim["resource", node.node_id, resource] = 1
        return claim

    def _disk_claim(self, wanted: Wanted, variant: Variant, node: Node) -> _Claim:
        if wanted.is_component or variant.skip_limits:
            return {}
        claim = {_STORAGE: reserved_amount(variant.requested.storage, variant.quota.storage, node.ratios.storage)}
        state = reserved_amount(variant.requested.state, variant.quota.state, node.ratios.state)
        claim[self._state_key] = claim.get(self._state_key, 0) + state
        return claim

    def _best(self, candidates: Sequence[_Candidate]) -> _Candidate | None:
        """A place with room for the first variant that has one, None when nothing has.

        Highest node priority, then most free CPU, most free RAM, smallest node id, smallest runtime type.
        """

        def rank(candidate: _Candidate) -> tuple[int, int, int, str, str, str]:
            node, runtime, _, _ = candidate
            cpu, ram = self._ledger.room(node.node_id)
            return -node.priority, -cpu, -ram, node.node_id, runtime.type, runtime.runtime_id

        for _, group in itertools.groupby(candidates, key=lambda one: id(one[2])):
            for candidate in sorted(group, key=rank):
                if not self._ledger.lacking(candidate[3], newcomer=True):
                    return candidate
        return None

    def _hold(self, wanted: Wanted, node: Node, runtime: RuntimeInfo, variant: Variant, claim: _Claim) -> None:
        self._ledger.take(claim)
        site = Site(node.node_id, runtime.runtime_id, variant.manifest_digest)
        movable = variant.movable and wanted.pin is None and not wanted.is_component
        self._held[wanted.ident] = _Held(wanted, site, claim, movable)

    def _preempt(self, wanted: Wanted, candidates: Sequence[_Candidate]) -> list[Wanted]:
        """Take the place of less important instances: as few as possible, then the least important ones."""
        rivals = self._less_important(wanted)
        best: tuple[tuple[int, int, int], _Candidate, list[_Held]] | None = None
        for position, candidate in enumerate(candidates):
            victims = self._victims(rivals, candidate[3])
            if victims:
                cost = (len(victims), rivals.index(victims[-1]), position)
                if best is None or cost < best[0]:
                    best = (cost, candidate, victims)
        if best is None:
            return []
        _, candidate, victims = best
        for held in victims:
            self._evict(held)
        self._hold(wanted, *candidate)
        return [held.wanted for held in victims]

    def _victims(self, rivals: Sequence[_Held], claim: _Claim) -> list[_Held]:
        """The first of the rivals whose end makes room for claim; none when even that is not enough."""
        victims: list[_Held] = []
        for held in rivals:
            lacking = self._ledger.lacking(claim, newcomer=True)
            if not lacking:
                break
            if any(held.claim.get(key, 0) for key in lacking):
                self._ledger.give_back(held.claim)
                victims.append(held)
        enough = not self._ledger.lacking(claim, newcomer=True)
        for held in victims:
            self._ledger.take(held.claim)
        return victims if enough else []

    def _less_important(self, wanted: Wanted) -> list[_Held]:
        """Instances that may have to give way to wanted, least important first."""
        rivals = [one for one in self._held.values() if one.movable and one.wanted.priority < wanted.priority]
        return sorted(rivals, key=lambda one: order_key(one.wanted.priority, one.wanted.ident), reverse=True)

    def _evict(self, held: _Held) -> None:
        self._ledger.give_back(held.claim)
        del self._held[held.wanted.ident]

    def _shortage(self, wanted: Wanted, candidates: Sequence[_Candidate]) -> AosError:
        """Name what is missing, in the order of the filters of AosCore 9.1; disk budgets last, they are the Unit's."""
        remaining = list(candidates)
        for kind, reason in (
            ("resource", "no nodes with free service resources"),
            ("cpu", "no runtimes with requested CPU"),
            ("ram", "no runtimes with requested RAM"),
            ("slot", "no runtimes with free slots"),
        ):
            remaining = [
                one
                for one in remaining
                if not any(key[0] == kind for key in self._ledger.lacking(one[3], newcomer=True))
            ]
            if not remaining:
                return NotFoundError(reason)
        short = {key for one in remaining for key in self._ledger.lacking(one[3], newcomer=True)}
        return OutOfMemoryError(f"not enough {'storage' if _STORAGE in short else 'state'} space")


def _is_overloaded(node: Node) -> bool:
    """Whether a node is above the upper threshold of one of its alert rules."""
    return (node.cpu_rule is not None and node.load.cpu_dmips > node.max_dmips * node.cpu_rule.max_threshold / 100) or (
        node.ram_rule is not None and node.load.ram_bytes > node.total_ram_bytes * node.ram_rule.max_threshold / 100
    )


def _runs_platform(runtime: RuntimeInfo, platform: Platform) -> bool:
    """Whether images of that platform run there: what the image names must be equal."""
    return (
        platform.architecture in ("", runtime.arch_info.architecture)
        and platform.variant in ("", runtime.arch_info.variant)
        and platform.os in ("", runtime.os_info.os)
        and platform.os_version in ("", runtime.os_info.version)
        and set(platform.os_features) <= set(runtime.os_info.features)
    )
