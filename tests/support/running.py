"""Run services of the product inside a test, and wait for what they do."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

from aoscore.common.aio import Service, run_services


@contextlib.asynccontextmanager
async def running(*services: Service) -> AsyncIterator[asyncio.Task[None]]:
    """Start services in order and stop them at the end; raises what a service failed with."""
    ready = asyncio.Event()
    task = asyncio.create_task(run_services(services, ready.set))
    waiter = asyncio.create_task(ready.wait())
    try:
        await asyncio.wait({task, waiter}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            await task
        yield task
    finally:
        waiter.cancel()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def until(condition: Callable[[], object], timeout_s: float = 15) -> None:
    """Wait for a condition that nothing announces."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.01)
