"""The launcher's decision: state in, steps out; and a machine that carries steps out must always get there."""

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from aoscore.common.types import InstanceIdent, InstanceInfo
from aoscore.sm.imagemanager.model import item_key
from aoscore.sm.launcher.plan import Plan, Situation, desired, plan


def info(item: str, version: str = "1.0.0", *, instance: int = 0, priority: int = 0) -> InstanceInfo:
    return InstanceInfo(
        InstanceIdent(item, "subject", instance),
        version,
        f"sha256:{item}-{version}",
        "owner",
        "runtime",
        priority=priority,
    )


def keys(*infos: InstanceInfo) -> frozenset:
    return frozenset(map(item_key, infos))


def idents(*infos: InstanceInfo) -> frozenset[InstanceIdent]:
    return frozenset(one.ident for one in infos)


def stored(*infos: InstanceInfo) -> dict[InstanceIdent, InstanceInfo]:
    return {one.ident: one for one in infos}


A, A2, B = info("a"), info("a", "2.0.0"), info("b")


def test_nothing_to_do() -> None:
    assert plan(Situation({})) == Plan()
    assert plan(Situation(stored(A), up=idents(A), started=idents(A), installed=keys(A))) == Plan()


def test_stored_instances_start_without_waiting_for_missing_images() -> None:
    steps = plan(Situation(stored(A, B), installed=keys(A)))
    assert steps.start == (A,)
    assert steps.install == (item_key(B),)


def test_old_version_runs_until_the_new_image_is_there() -> None:
    running = Situation(stored(A), {A.ident: A2}, up=idents(A), started=idents(A), installed=keys(A))
    assert plan(running) == Plan(install=(item_key(A2),))
    ready = msgspec.structs.replace(running, installed=keys(A, A2))
    assert plan(ready) == Plan(stop=(A.ident,))
    stopped = msgspec.structs.replace(ready, up=frozenset(), started=frozenset())
    assert plan(stopped) == Plan(apply={A.ident: A2})
    applied = Situation(stored(A2), installed=keys(A, A2))
    assert plan(applied) == Plan(start=(A2,))
    done = msgspec.structs.replace(applied, up=idents(A2), started=idents(A2))
    assert plan(done) == Plan(remove_items=(item_key(A),))


def test_failed_install_keeps_the_old_version_running() -> None:
    situation = Situation(stored(A), {A.ident: A2}, up=idents(A), started=idents(A), installed=keys(A), held=keys(A2))
    assert plan(situation) == Plan()


def test_removed_instance_is_stopped_before_it_is_forgotten() -> None:
    situation = Situation(stored(A), {A.ident: None}, up=idents(A), started=idents(A), installed=keys(A))
    assert plan(situation) == Plan(stop=(A.ident,))
    assert plan(msgspec.structs.replace(situation, up=frozenset())) == Plan(apply={A.ident: None})
    assert plan(Situation({}, installed=keys(A))) == Plan(remove_items=(item_key(A),))


def test_unknown_running_instance_is_stopped() -> None:
    assert plan(Situation({}, up=idents(A))).stop == (A.ident,)


def test_unchanged_change_touches_nothing() -> None:
    situation = Situation(stored(A), {A.ident: A}, up=idents(A), started=idents(A), installed=keys(A))
    assert plan(situation) == Plan(apply={A.ident: A})


def test_order_follows_priority() -> None:
    low, high = info("low", priority=1), info("high", priority=100)
    assert plan(Situation(stored(low, high), installed=keys(low, high))).start == (high, low)
    assert plan(Situation(stored(low, high))).install == (item_key(high), item_key(low))
    changes = {low.ident: None, high.ident: None}
    running = Situation(stored(low, high), changes, up=idents(low, high), installed=keys(low, high))
    assert plan(running).stop == (low.ident, high.ident)


def test_two_instances_of_one_item_install_once() -> None:
    second = info("a", instance=1)
    assert plan(Situation(stored(A, second))).install == (item_key(A),)


def test_resting_instance_is_left_alone() -> None:
    assert plan(Situation(stored(A), installed=keys(A), resting=idents(A))) == Plan()
    replaced = Situation(stored(A), {A.ident: A2}, up=idents(A), installed=keys(A, A2), resting=idents(A))
    assert plan(replaced) == Plan()


def test_expired_instance_stops_and_stays_stopped() -> None:
    situation = Situation(stored(A), up=idents(A), started=idents(A), installed=keys(A), expired=idents(A))
    assert plan(situation) == Plan(stop=(A.ident,))
    assert plan(msgspec.structs.replace(situation, up=frozenset(), started=frozenset())) == Plan()


def test_renewed_image_restarts_its_instance() -> None:
    situation = Situation(stored(A), up=idents(A), started=idents(A), installed=keys(A), renewed=idents(A))
    assert plan(situation) == Plan(stop=(A.ident,))


def test_damaged_image_is_installed_again_while_the_instance_runs() -> None:
    situation = Situation(stored(A), up=idents(A), started=idents(A))
    assert plan(situation) == Plan(install=(item_key(A),))


_infos = st.builds(
    info, st.sampled_from("abc"), st.sampled_from(["1", "2"]), instance=st.integers(0, 1), priority=st.integers(0, 2)
)
_sets = st.lists(_infos, max_size=5).map(lambda some: {one.ident: one for one in some})


@given(_sets, st.lists(st.tuples(_infos, st.booleans()), max_size=5), st.sets(_infos.map(lambda one: one.ident)))
def test_steps_lead_to_the_desired_set(
    instances: dict[InstanceIdent, InstanceInfo],
    wishes: list[tuple[InstanceInfo, bool]],
    strays: set[InstanceIdent],
) -> None:
    """Whatever the start, carrying the steps out ends with exactly the wanted instances running."""
    changes = {one.ident: one if keep else None for one, keep in wishes}
    wanted = desired(Situation(instances, changes))
    running: dict[InstanceIdent, InstanceInfo | None] = {
        **dict.fromkeys(strays),
        **{ident: one for ident, one in instances.items() if one.priority},
    }
    instances, installed = dict(instances), set()
    for _ in range(20):
        situation = Situation(
            instances,
            changes,
            up=set(running),
            started={ident for ident in running if ident in instances and running[ident] == instances[ident]},
            installed=installed,
        )
        steps = plan(situation)
        if steps == Plan():
            break
        for ident in steps.stop:
            del running[ident]
        for ident, one in steps.apply.items():
            assert ident not in running or instances.get(ident) == one, "changed under a running instance"
            del changes[ident]
            instances.pop(ident, None)
            if one is not None:
                instances[ident] = one
        for one in steps.start:
            assert item_key(one) in installed
            running[one.ident] = one
        installed -= set(steps.remove_items)
        installed |= set(steps.install)
    assert running == wanted == instances
    assert installed == {item_key(one) for one in wanted.values()}
