"""Fair sending: nothing waits behind a download."""

from hypothesis import given
from hypothesis import strategies as st

from aoscore.mp.communication.ports import CONTROL, PROXY, RPC, Ports
from aoscore.mp.communication.scheduler import PATIENCE_TURNS, Burst, Scheduler

ORDER = Ports().order


def drain(scheduler: Scheduler) -> list[tuple[int, bytes]]:
    sent = []
    while (burst := scheduler.pop()) is not None:
        assert burst.number == 1
        sent.append((burst.port, burst.frames))
    return sent


def test_order_of_the_contract() -> None:
    scheduler = Scheduler(ORDER)
    for port in (PROXY, RPC, 4, 3, 2, 1, CONTROL):
        scheduler.push(port, b"x", 1)
    assert [port for port, _ in drain(scheduler)] == [CONTROL, 1, 2, 3, 4, RPC, PROXY]


def test_a_download_delays_control_by_nothing_that_waits() -> None:
    scheduler = Scheduler(ORDER)
    for _ in range(1000):
        scheduler.push(PROXY, b"bulk", 1)
    assert scheduler.pop() == Burst(PROXY, b"bulk", 1)
    scheduler.push(4, b"status", 1)
    scheduler.push(CONTROL, b"ping", 1)
    assert [scheduler.pop(), scheduler.pop(), scheduler.pop()] == [
        (CONTROL, b"ping", 1),
        (4, b"status", 1),
        (PROXY, b"bulk", 1),
    ]


def test_urgent_traffic_without_end_does_not_stop_a_download() -> None:
    scheduler = Scheduler(ORDER)
    scheduler.push(PROXY, b"bulk", 1)
    turns = 0
    while True:
        scheduler.push(CONTROL, b"c", 1)
        scheduler.push(4, b"s", 1)
        turns += 1
        popped = scheduler.pop()
        if popped == Burst(PROXY, b"bulk", 1):
            break
        assert turns <= 2 * PATIENCE_TURNS
    assert turns > PATIENCE_TURNS


@given(st.lists(st.tuples(st.sampled_from(ORDER), st.binary(min_size=1, max_size=5))))
def test_nothing_is_lost_and_channels_keep_their_order(frames: list[tuple[int, bytes]]) -> None:
    scheduler = Scheduler(ORDER)
    for port, payload in frames:
        scheduler.push(port, payload, 1)
    sent = drain(scheduler)
    assert len(sent) == len(frames)
    for port in ORDER:
        assert [payload for one, payload in sent if one == port] == [payload for one, payload in frames if one == port]
        assert scheduler.pending_bytes(port) == 0


@given(
    st.lists(st.tuples(st.booleans(), st.sampled_from(ORDER)), min_size=1, max_size=300),
)
def test_nobody_waits_for_ever(steps: list[tuple[bool, int]]) -> None:
    """Under any traffic a frame at the head of its channel is sent after at most PATIENCE_TURNS turns per channel."""
    scheduler = Scheduler(ORDER)
    waited = dict.fromkeys(ORDER, 0)
    for is_push, port in steps:
        if is_push:
            scheduler.push(port, b"x", 1)
            continue
        waiting = [one for one in ORDER if scheduler.pending_bytes(one)]
        popped = scheduler.pop()
        for one in waiting:
            waited[one] += 1
        if popped:
            waited[popped[0]] = 0
        assert max(waited.values()) <= PATIENCE_TURNS + len(ORDER)


def test_dropped_frames_are_gone() -> None:
    scheduler = Scheduler(ORDER)
    scheduler.push(4, b"old", 1)
    scheduler.drop(4)
    assert scheduler.pending_bytes(4) == 0
    scheduler.push(4, b"new", 1)
    assert drain(scheduler) == [(4, b"new")]
