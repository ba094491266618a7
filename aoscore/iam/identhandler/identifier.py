"""What a source of the Unit's identity must offer."""

from collections.abc import Callable
from typing import Protocol

from aoscore.common.aio import ChangeFeed
from aoscore.common.types import SystemInfo


class Identifier(Protocol):
    """Identity of the Unit. A service: what must be read before anybody asks is read before `started`.

    `subjects_changes` tells the complete list at every change, under the key None.
    """

    subjects_changes: ChangeFeed[None, tuple[str, ...]]

    async def run(self, started: Callable[[], None]) -> None:
        """See aio.Service."""

    async def system_info(self) -> SystemInfo:
        """Identity of the Unit. Raises an AosError when the source can't tell it."""

    async def subjects(self) -> tuple[str, ...]:
        """Subjects that are active now."""
