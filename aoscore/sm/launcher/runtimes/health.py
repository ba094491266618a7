"""Whether a system that was just updated is well: the configured units are active (sm-runtime.md §3.4)."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence

from aoscore.common.errors import AosError

ATTEMPTS = 5
_FIRST_PAUSE_S = 10.0
_LONGEST_PAUSE_S = 60.0


async def find_fault(
    states_of: Callable[[Sequence[str]], Awaitable[Mapping[str, str]]],
    units: Sequence[str],
    *,
    sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
) -> str | None:
    """What is wrong, in words; None when all units are active, or none is named.

    A failed unit is wrong at once; others get time to become active (about two minutes).
    """
    fault: str | None = None
    pause_s = _FIRST_PAUSE_S
    for attempt in range(ATTEMPTS):
        if attempt:
            await sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        try:
            states = await states_of(units)
        except AosError as error:
            fault = str(error)
            continue
        failed = [unit for unit in units if states[unit] == "failed"]
        if failed:
            return f"unit {failed[0]} has failed"
        waiting = [unit for unit in units if states[unit] != "active"]
        if not waiting:
            return None
        fault = f"unit {waiting[0]} is {states[waiting[0]]} and not active"
    return fault
