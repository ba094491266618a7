"""Placement: the golden cases of cm-orchestration §9 and what must hold for any input."""

import random
from collections import Counter

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aoscore.cm.launcher.balancer import (
    Amounts,
    Budgets,
    Decision,
    Home,
    Node,
    Platform,
    Presence,
    Site,
    Usage,
    Variant,
    Wanted,
    _Ledger,
    place,
    reserved_amount,
)
from aoscore.common.errors import NotFoundError, OutOfMemoryError, WrongStateError
from aoscore.common.types import (
    AlertRulePercents,
    ArchInfo,
    InstanceIdent,
    ItemType,
    OSInfo,
    ResourceInfo,
    RuntimeInfo,
)

DISKS = Budgets(storage_bytes=1024, state_bytes=1024)


def make_node(node_id: str, priority: int = 0, runtime: str = "runc", **members: object) -> Node:
    resources = {
        "localSM": (ResourceInfo("resource1", 2), ResourceInfo("resource3", 2)),
        "remoteSM1": (ResourceInfo("resource1", 2), ResourceInfo("resource2", 2)),
    }
    defaults: dict[str, object] = {
        "max_dmips": 1000,
        "total_ram_bytes": 1024,
        "runtimes": (RuntimeInfo(f"{runtime}-{node_id}", runtime),),
        "resources": resources.get(node_id, ()),
    }
    return Node(node_id=node_id, priority=priority, **(defaults | members))  # type: ignore[arg-type]


def four_nodes(local: int = 0, remote1: int = 0, remote2: int = 0) -> list[Node]:
    return [
        make_node("localSM", local),
        make_node("remoteSM1", remote1),
        make_node("remoteSM2", remote2),
        make_node("runxSM", 0, "runx"),
    ]


def items(item_id: str, count: int, priority: int = 0, **members: object) -> list[Wanted]:
    """`count` instances of an item; members of Variant and Wanted mixed."""
    wanted_names = {"labels", "is_component", "pin"}
    kind = ItemType.COMPONENT if members.get("is_component") else ItemType.SERVICE
    variant = Variant(
        manifest_digest=f"sha256:{item_id}", **{k: v for k, v in members.items() if k not in wanted_names}
    )
    rest = {k: v for k, v in members.items() if k in wanted_names}
    return [
        Wanted(ident=InstanceIdent(item_id, "subject", index, kind), variants=(variant,), priority=priority, **rest)  # type: ignore[arg-type]
        for index in range(count)
    ]


def by_name(decisions: dict[InstanceIdent, Decision]) -> dict[str, str]:
    """ "item#index" -> node, or the class of the error."""
    return {
        f"{ident.item_id}#{ident.instance}": decision.site.node_id if decision.site else type(decision.error).__name__
        for ident, decision in decisions.items()
    }


def sites(decisions: dict[InstanceIdent, Decision]) -> dict[InstanceIdent, Site]:
    return {ident: decision.site for ident, decision in decisions.items() if decision.site}


class TestGoldenCases:
    def test_node_priority(self) -> None:
        cpu = Amounts(cpu=100)
        wanted = [
            *items("s1", 2, 100, requested=cpu, runtime_types=("runc",)),
            *items("s2", 2, 50, requested=cpu, runtime_types=("runc",)),
            *items("s3", 2, 0, requested=cpu, runtime_types=("runx",)),
        ]
        assert by_name(place(four_nodes(50, 100, 100), wanted, {}, DISKS)) == {
            "s1#0": "remoteSM1",
            "s1#1": "remoteSM2",
            "s2#0": "remoteSM1",
            "s2#1": "remoteSM2",
            "s3#0": "runxSM",
            "s3#1": "runxSM",
        }

    def test_labels(self) -> None:
        nodes = four_nodes(100, 50)
        nodes[0] = msgspec.structs.replace(nodes[0], labels=frozenset({"label1"}))
        nodes[1] = msgspec.structs.replace(nodes[1], labels=frozenset({"label2"}))
        wanted = [
            *items("s1", 2, labels=("label2",)),
            *items("s2", 2, labels=("label1",)),
            *items("s3", 2, labels=("label3",), runtime_types=("runx",)),
        ]
        decisions = place(nodes, wanted, {}, DISKS)
        assert by_name(decisions) == {
            "s1#0": "remoteSM1",
            "s1#1": "remoteSM1",
            "s2#0": "localSM",
            "s2#1": "localSM",
            "s3#0": "NotFoundError",
            "s3#1": "NotFoundError",
        }
        error = decisions[InstanceIdent("s3", "subject", 0)].error
        assert str(error) == "no nodes with instance labels"

    def test_resources(self) -> None:
        wanted = [
            *items("s1", 2, 100, resources=("resource1", "resource2")),
            *items("s2", 2, 50, resources=("resource1",)),
            *items("s3", 2, 0, resources=("resource3",)),
        ]
        assert by_name(place(four_nodes(100, 50), wanted, {}, DISKS)) == {
            "s1#0": "remoteSM1",
            "s1#1": "remoteSM1",
            "s2#0": "localSM",
            "s2#1": "localSM",
            "s3#0": "localSM",
            "s3#1": "localSM",
        }

    @pytest.mark.parametrize("kind", ["storage", "state"])
    def test_disk_budget(self, kind: str) -> None:
        wanted = items("s1", 5, quota=Amounts(**{kind: 500}), requested=Amounts(**{kind: 300}))
        decisions = place(four_nodes(100), wanted, {}, DISKS)
        assert list(by_name(decisions).values()) == ["localSM"] * 3 + ["OutOfMemoryError"] * 2
        assert str(decisions[wanted[4].ident].error) == f"not enough {kind} space"

    @pytest.mark.parametrize("kind", ["cpu", "ram"])
    def test_node_budget(self, kind: str) -> None:
        wanted = items("s1", 5, quota=Amounts(**{kind: 500}), requested=Amounts(**{kind: 300}))
        decisions = place(four_nodes(100), wanted, {}, DISKS)
        assert list(by_name(decisions).values()) == ["localSM"] * 3 + ["remoteSM1", "remoteSM2"]

    def test_unlimited_resource(self) -> None:
        node = make_node("n", resources=(ResourceInfo("r", 0),))
        assert set(by_name(place([node], items("s1", 3, resources=("r",)), {})).values()) == {"n"}

    def test_platform(self) -> None:
        def of(architecture: str, os: str) -> tuple[RuntimeInfo, ...]:
            return (RuntimeInfo("rt", "runc", os_info=OSInfo(os), arch_info=ArchInfo(architecture)),)

        nodes = [
            make_node("n1", runtimes=of("arm64", "linux")),
            make_node("n2", runtimes=of("x86_64", "windows")),
            make_node("n3", runtimes=of("x86_64", "linux")),
        ]
        wanted = [
            *items("s1", 1, platform=Platform("arm32", os="linux")),
            *items("s2", 1, platform=Platform("x86_64", os="macos")),
            *items("s3", 1, platform=Platform("x86_64", os="linux")),
        ]
        assert by_name(place(nodes, wanted, {})) == {
            "s1#0": "NotFoundError",
            "s2#0": "NotFoundError",
            "s3#0": "n3",
        }

    def test_rebalance_moves_the_least_important(self) -> None:
        """AosCore 9.1 also moves s3, which was fine where it was; we do not."""
        wanted, before = self._three_services(movable=True)
        decisions = place(self._loaded_nodes(), wanted, before, DISKS, rebalance=True)
        assert by_name(decisions) == {"s1#0": "localSM", "s2#0": "remoteSM2", "s3#0": "remoteSM1"}

    def test_rebalance_leaves_immovable_ones(self) -> None:
        wanted, before = self._three_services(movable=False)
        decisions = place(self._loaded_nodes(), wanted, before, DISKS, rebalance=True)
        assert by_name(decisions) == {"s1#0": "localSM", "s2#0": "remoteSM2", "s3#0": "remoteSM1"}

    def test_overloaded_node_keeps_what_nobody_else_takes(self) -> None:
        """9.1 would stop the instance; an overloaded place is better than none."""
        wanted, before = self._three_services(movable=True)
        before = {ident: site for ident, site in before.items() if ident.item_id != "s3"}
        decisions = place([self._loaded_nodes()[0]], wanted[:2], before, DISKS, rebalance=True)
        assert by_name(decisions) == {"s1#0": "localSM", "s2#0": "localSM"}

    @staticmethod
    def _three_services(movable: bool) -> tuple[list[Wanted], dict[InstanceIdent, Site]]:
        quota = Amounts(cpu=1000)
        wanted = [
            *items("s1", 1, 100, quota=quota),
            *items("s2", 1, 50, quota=quota),
            *items("s3", 1, 50, quota=quota, movable=movable),
        ]
        first = place(TestGoldenCases._rule_nodes(), wanted, {}, DISKS)
        assert by_name(first) == {"s1#0": "localSM", "s2#0": "localSM", "s3#0": "remoteSM1"}
        return wanted, sites(first)

    @staticmethod
    def _rule_nodes(load: dict[str, object] | None = None) -> list[Node]:
        rules = {"cpu_rule": AlertRulePercents(75, 75), "ram_rule": AlertRulePercents(85, 85)}
        return [
            make_node("localSM", 100, **rules, **(load or {})),
            make_node("remoteSM1", 50, **rules),
            make_node("remoteSM2", 50, **rules),
        ]

    @staticmethod
    def _loaded_nodes() -> list[Node]:
        uses = {(InstanceIdent(item, "subject", 0), "runc-localSM"): Usage(500) for item in ("s1", "s2")}
        return TestGoldenCases._rule_nodes({"load": Usage(1000), "instance_loads": uses})


class TestStability:
    def test_stays_although_a_better_node_appears(self) -> None:
        wanted = items("s1", 1, requested=Amounts(cpu=100))
        before = sites(place([make_node("a", 10)], wanted, {}))
        assert by_name(place([make_node("a", 10), make_node("b", 100)], wanted, before)) == {"s1#0": "a"}

    def test_new_version_stays_on_its_node(self) -> None:
        before = sites(place([make_node("a"), make_node("b")], items("s1", 3), {}))
        newer = [
            msgspec.structs.replace(one, variants=(Variant(manifest_digest="sha256:new"),)) for one in items("s1", 3)
        ]
        after = sites(place([make_node("a"), make_node("b")], newer, before))
        assert {ident: site.node_id for ident, site in after.items()} == {
            ident: site.node_id for ident, site in before.items()
        }
        assert {site.manifest_digest for site in after.values()} == {"sha256:new"}

    def test_busy_system_does_not_move_what_runs(self) -> None:
        wanted = items("s1", 1, requested=Amounts(cpu=600))
        before = sites(place([make_node("a")], wanted, {}))
        busy = make_node("a", load=Usage(900))
        assert by_name(place([busy, make_node("b")], wanted, before)) == {"s1#0": "a"}
        assert by_name(place([busy, make_node("b")], wanted, {})) == {"s1#0": "b"}

    def test_important_newcomer_takes_free_room_before_somebody_elses(self) -> None:
        low = items("low", 1, 1, requested=Amounts(cpu=800))
        high = items("high", 1, 9, requested=Amounts(cpu=800))
        nodes = [make_node("a", 50), make_node("b", 10)]
        before = sites(place(nodes, low, {}))
        assert by_name(place(nodes, [*low, *high], before)) == {"high#0": "b", "low#0": "a"}

    def test_important_newcomer_displaces_when_nothing_is_free(self) -> None:
        low = items("low", 2, 1, requested=Amounts(cpu=800))
        high = items("high", 1, 9, requested=Amounts(cpu=900))
        nodes = [make_node("a"), make_node("b")]
        before = sites(place(nodes, low, {}))
        assert by_name(place(nodes, [*low, *high], before)) == {"high#0": "b", "low#0": "a", "low#1": "NotFoundError"}

    def test_equal_priority_displaces_nobody(self) -> None:
        first = items("b", 1, 5, requested=Amounts(cpu=800))
        second = items("a", 1, 5, requested=Amounts(cpu=800))
        before = sites(place([make_node("n")], first, {}))
        assert by_name(place([make_node("n")], [*first, *second], before)) == {"b#0": "n", "a#0": "NotFoundError"}


class TestRoom:
    def test_defect_10_a_node_that_is_overcommitted_has_no_room_and_never_less(self) -> None:
        """AosCore 9.1 logs negative figures then (observed.md, defect 10)."""
        ident = InstanceIdent("other", "subject", 0)
        loads = {(ident, "runc-a"): Usage(5000, 1 << 40)}
        for load in (Usage(9000, 1 << 40), Usage(0, 0)):
            busy = make_node("a", load=load, instance_loads=loads)
            ledger = _Ledger([busy], Budgets(), frozenset())
            assert min(ledger.room("a")) >= 0
        full = make_node("a", load=Usage(9000, 1 << 40))
        decision = place([full], items("s1", 1, requested=Amounts(ram=1)), {})[InstanceIdent("s1", "subject", 0)]
        assert (decision.site, str(decision.error)) == (None, "no runtimes with requested RAM")
        assert by_name(place([full], items("s1", 1), {})) == {"s1#0": "a"}


class TestMissingNodes:
    def test_away_keeps_and_gets_nothing_new(self) -> None:
        wanted = items("s1", 1)
        before = sites(place([make_node("a")], wanted, {}))
        away = make_node("a", presence=Presence.AWAY, runtimes=())
        assert by_name(place([away, make_node("b")], wanted, before)) == {"s1#0": "a"}
        assert by_name(place([away, make_node("b")], wanted, {})) == {"s1#0": "b"}

    def test_gone_loses_what_fits_elsewhere(self) -> None:
        wanted = items("s1", 2, requested=Amounts(cpu=800))
        before = sites(place([make_node("a"), make_node("b")], wanted, {}))
        gone = make_node("a", presence=Presence.GONE)
        after = place([gone, make_node("b"), make_node("c")], wanted, before)
        assert sorted(by_name(after).values()) == ["b", "c"]

    def test_gone_and_nowhere_else_waits_for_its_node(self) -> None:
        wanted = items("s1", 1, labels=("x",))
        node = make_node("a", labels=frozenset({"x"}))
        before = sites(place([node], wanted, {}))
        gone = msgspec.structs.replace(node, presence=Presence.GONE)
        decision = place([gone, make_node("b")], wanted, before)[wanted[0].ident]
        assert decision.site == before[wanted[0].ident]
        assert isinstance(decision.error, WrongStateError)

    def test_immovable_waits_for_its_node(self) -> None:
        wanted = items("s1", 1, movable=False)
        before = sites(place([make_node("a")], wanted, {}))
        gone = make_node("a", presence=Presence.GONE)
        decision = place([gone, make_node("b")], wanted, before)[wanted[0].ident]
        assert decision.site == before[wanted[0].ident]
        assert decision.error is not None

    def test_no_nodes_at_all(self) -> None:
        decision = place([], items("s1", 1), {})[InstanceIdent("s1", "subject", 0)]
        assert (decision.site, str(decision.error)) == (None, "no nodes available")


class TestItems:
    def test_second_variant_is_taken_when_the_first_fits_nowhere(self) -> None:
        arm = Variant(manifest_digest="arm", platform=Platform("arm64"))
        x86 = Variant(manifest_digest="x86", platform=Platform("amd64"))
        node = make_node("a", runtimes=(RuntimeInfo("rt", "crun", arch_info=ArchInfo("amd64")),))
        wanted = Wanted(ident=InstanceIdent("s1", "s", 0), variants=(arm, x86))
        assert place([node], [wanted], {})[wanted.ident] == Decision(Site("a", "rt", "x86"))

    def test_all_reasons_are_told(self) -> None:
        first = Variant(manifest_digest="1", runtime_types=("boot",))
        second = Variant(manifest_digest="2", resources=("camera",))
        wanted = Wanted(ident=InstanceIdent("s1", "s", 0), variants=(first, second), problem="manifest 3 is broken")
        error = place([make_node("a")], [wanted], {})[wanted.ident].error
        assert isinstance(error, NotFoundError)
        assert str(error) == (
            "manifest 3 is broken; no runtimes with requested runtime type; no nodes with service resources"
        )

    def test_pin(self) -> None:
        wanted = items("c", 1, pin=Home("b", "runc-b"), is_component=True)
        assert by_name(place([make_node("a", 100), make_node("b")], wanted, {})) == {"c#0": "b"}
        assert by_name(place([make_node("a", 100)], wanted, {})) == {"c#0": "NotFoundError"}

    def test_component_needs_a_slot_only(self) -> None:
        node = make_node("a", max_dmips=0, total_ram_bytes=0, runtimes=(RuntimeInfo("rt", "runc", max_instances=1),))
        wanted = items("c", 2, is_component=True, quota=Amounts(cpu=10, ram=10))
        decisions = place([node], wanted, {})
        assert by_name(decisions) == {"c#0": "a", "c#1": "NotFoundError"}
        assert str(decisions[wanted[1].ident].error) == "no runtimes with free slots"

    def test_runtime_budget_of_its_own(self) -> None:
        node = make_node("a", runtimes=(RuntimeInfo("rt", "runc", allowed_dmips=250, allowed_ram=1),))
        wanted = items("s", 3, requested=Amounts(cpu=100))
        assert list(by_name(place([node], wanted, {})).values()) == ["a", "a", "NotFoundError"]

    def test_skip_limits(self) -> None:
        node = make_node("a", max_dmips=10)
        wanted = items("s", 1, requested=Amounts(cpu=100), skip_limits=True)
        assert by_name(place([node], wanted, {})) == {"s#0": "a"}

    def test_same_partition_shares_its_budget(self) -> None:
        wanted = items("s", 2, requested=Amounts(storage=300, state=300))
        shared = Budgets(storage_bytes=1000, state_bytes=1000, same_partition=True)
        decisions = place([make_node("a")], wanted, {}, shared)
        assert list(by_name(decisions).values()) == ["a", "OutOfMemoryError"]
        assert isinstance(decisions[wanted[1].ident].error, OutOfMemoryError)


@pytest.mark.parametrize(
    ("requested", "quota", "ratio", "amount"),
    [
        (300, 500, None, 300),
        (700, 500, None, 500),
        (300, None, None, 300),
        (None, 1000, None, 500),
        (None, 1000, 25.0, 250),
        (None, 1000, 300.0, 1000),
        (None, 5, None, 3),
        (None, None, 90.0, 0),
    ],
)
def test_reserved_amount(requested: int | None, quota: int | None, ratio: float | None, amount: int) -> None:
    assert reserved_amount(requested, quota, ratio) == amount


# --- any input ---

AMOUNT = st.one_of(st.none(), st.integers(0, 700))


@st.composite
def units(draw: st.DrawFn) -> tuple[list[Node], list[Wanted], Budgets]:
    nodes = [
        make_node(
            f"n{index}",
            draw(st.integers(0, 2)),
            presence=draw(st.sampled_from([Presence.ONLINE] * 4 + [Presence.AWAY, Presence.GONE])),
            runtimes=tuple(
                RuntimeInfo(
                    f"{kind}-{index}",
                    kind,
                    allowed_dmips=draw(st.sampled_from([0, 0, 400])),
                    max_instances=draw(st.sampled_from([0, 2])),
                )
                for kind in draw(st.lists(st.sampled_from(["crun", "runx"]), min_size=1, max_size=2, unique=True))
            ),
            resources=tuple(
                ResourceInfo(name, draw(st.integers(0, 2)))
                for name in draw(st.lists(st.sampled_from(["gpu", "cam"]), unique=True))
            ),
            labels=frozenset(draw(st.lists(st.sampled_from(["x", "y"]), unique=True))),
            load=Usage(draw(st.integers(0, 1200))),
            cpu_rule=draw(st.sampled_from([None, AlertRulePercents(60, 80)])),
        )
        for index in range(draw(st.integers(0, 4)))
    ]
    wanted = [
        Wanted(
            ident=InstanceIdent(f"i{number}", "s", 0),
            variants=(
                Variant(
                    manifest_digest=f"m{number}",
                    runtime_types=draw(st.sampled_from([("crun",), ("runx",), ("crun", "runx")])),
                    resources=tuple(draw(st.lists(st.sampled_from(["gpu", "cam"]), max_size=1))),
                    quota=Amounts(cpu=draw(AMOUNT), ram=draw(AMOUNT), storage=draw(AMOUNT)),
                    requested=Amounts(cpu=draw(AMOUNT)),
                    movable=draw(st.sampled_from([True, True, False])),
                ),
            ),
            priority=draw(st.integers(0, 3)),
            labels=tuple(draw(st.lists(st.sampled_from(["x", "y"]), max_size=1))),
        )
        for number in range(draw(st.integers(0, 10)))
    ]
    return nodes, wanted, Budgets(storage_bytes=1500)


def needs(wanted: Wanted) -> tuple[int, int, int]:
    variant = wanted.variants[0]
    return (
        reserved_amount(variant.requested.cpu, variant.quota.cpu, None),
        reserved_amount(variant.requested.ram, variant.quota.ram, None),
        reserved_amount(variant.requested.storage, variant.quota.storage, None),
    )


def check_fits(nodes: list[Node], wanted: list[Wanted], decisions: dict[InstanceIdent, Decision], disk: int) -> None:
    """Nothing is over capacity, and everybody is where it may be. Written without the balancer's own code."""
    cpu: Counter[tuple[str, str]] = Counter()
    ram: Counter[str] = Counter()
    slots: Counter[str] = Counter()
    resources: Counter[tuple[str, str]] = Counter()
    storage = 0
    by_id = {node.node_id: node for node in nodes}
    for one in wanted:
        decision = decisions[one.ident]
        if decision.site is None or decision.error is not None:
            assert decision.error is not None
            continue
        node = by_id[decision.site.node_id]
        one_cpu, one_ram, one_storage = needs(one)
        storage += one_storage
        if node.presence is not Presence.ONLINE:
            assert node.presence is Presence.AWAY
            continue
        runtime = next(r for r in node.runtimes if r.runtime_id == decision.site.runtime_id)
        assert runtime.type in one.variants[0].runtime_types
        assert node.labels.issuperset(one.labels)
        cpu[node.node_id, runtime.runtime_id if runtime.allowed_dmips else ""] += one_cpu
        ram[node.node_id] += one_ram
        slots[runtime.runtime_id] += 1
        for resource in one.variants[0].resources:
            resources[node.node_id, resource] += 1
    assert storage <= disk
    for node in nodes:
        assert cpu[node.node_id, ""] <= node.max_dmips
        assert ram[node.node_id] <= node.total_ram_bytes
        for runtime in node.runtimes:
            assert slots[runtime.runtime_id] <= (runtime.max_instances or 256)
            assert cpu[node.node_id, runtime.runtime_id] <= (runtime.allowed_dmips or 0)
        for resource in node.resources:
            assert not resource.shared_count or resources[node.node_id, resource.name] <= resource.shared_count


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(units(), st.booleans(), st.randoms(use_true_random=False))
def test_never_over_capacity_and_repeatable(
    unit: tuple[list[Node], list[Wanted], Budgets], rebalance: bool, rng: random.Random
) -> None:
    nodes, wanted, budgets = unit
    first = place(nodes, wanted, {}, budgets)
    check_fits(nodes, wanted, first, 1500)
    current = sites(first)
    second = place(nodes, wanted, current, budgets, rebalance=rebalance)
    check_fits(nodes, wanted, second, 1500)
    shuffled_nodes, shuffled = list(nodes), list(wanted)
    rng.shuffle(shuffled_nodes)
    rng.shuffle(shuffled)
    again = place(shuffled_nodes, shuffled, dict(reversed(current.items())), budgets, rebalance=rebalance)
    assert {k: (d.site, str(d.error)) for k, d in again.items()} == {
        k: (d.site, str(d.error)) for k, d in second.items()
    }


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(units())
def test_nothing_moves_without_a_reason(unit: tuple[list[Node], list[Wanted], Budgets]) -> None:
    nodes, wanted, budgets = unit
    first = sites(place(nodes, wanted, {}, budgets))
    again = sites(place(nodes, wanted, first, budgets))
    assert {ident: again.get(ident) for ident in first} == first


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(units(), st.integers(0, 9))
def test_removal_moves_nobody(unit: tuple[list[Node], list[Wanted], Budgets], index: int) -> None:
    nodes, wanted, budgets = unit
    first = sites(place(nodes, wanted, {}, budgets))
    rest = [one for number, one in enumerate(wanted) if number != index]
    again = sites(place(nodes, rest, first, budgets))
    for one in rest:
        if one.ident in first:
            assert again[one.ident] == first[one.ident]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(units(), st.integers(0, 3))
def test_lost_node_moves_only_its_own_unless_more_important(
    unit: tuple[list[Node], list[Wanted], Budgets], lost: int
) -> None:
    nodes, wanted, budgets = unit
    first = sites(place(nodes, wanted, {}, budgets))
    after_nodes = [
        msgspec.structs.replace(node, presence=Presence.GONE) if node.node_id == f"n{lost}" else node for node in nodes
    ]
    again = place(after_nodes, wanted, first, budgets)
    homeless = [one.priority for one in wanted if one.ident in first and first[one.ident].node_id == f"n{lost}"]
    for one in wanted:
        if one.ident not in first or first[one.ident].node_id == f"n{lost}":
            continue
        moved = again[one.ident].site != first[one.ident]
        assert not moved or one.priority < max([*homeless, *(w.priority for w in wanted if w.ident not in first)])
