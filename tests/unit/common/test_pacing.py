"""The speed limit that transfers share."""

import random

from aoscore.common.pacing import SpeedLimit


def test_the_sum_of_all_transfers_keeps_to_the_limit() -> None:
    """Each of several transfers reads a piece when its pause is over; pieces have any size."""
    rng = random.Random(5)
    limit = SpeedLimit(1000)
    ready = [0.0] * 5
    taken = 0
    now = 0.0
    while now < 1000:
        index = min(range(5), key=ready.__getitem__)
        now = max(now, ready[index])
        assert taken <= 1000 * now + 5 * 5000, f"more than a piece each too much at {now}"
        size = rng.choice((1, 100, 5000))
        taken += size
        ready[index] = now + limit.take(size, now)
    assert taken >= 1000 * now, "and nothing is left unused"


def test_all_get_their_turn() -> None:
    limit = SpeedLimit(100)
    assert [limit.take(100, 0.0) for _ in range(4)] == [1.0, 2.0, 3.0, 4.0]


def test_unused_speed_is_made_up_for_within_a_bound() -> None:
    limit = SpeedLimit(100)
    assert limit.take(50, 0.0) == 0.5
    assert limit.take(50, 0.75) == 0.25
    assert limit.take(100, 500.0) == 0.0
    assert limit.take(100, 500.0) == 1.0
