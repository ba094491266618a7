"""What the container runtime asks of whatever makes processes out of bundles: crun, or systemd for native services."""

from pathlib import Path
from typing import Protocol

import msgspec

from aoscore.sm.launcher.runtimes.container.output import ContainerOutput


class EngineState(msgspec.Struct, frozen=True):
    """An instance that the engine knows."""

    id: str
    pid: int
    status: str
    bundle: str

    @property
    def is_running(self) -> bool:
        """Started, and its first process lives."""
        return self.status == "running" and self.pid > 0


class Exit(msgspec.Struct, frozen=True):
    """How an instance ended: its code (128 + N after signal N, None when unknown), and whether memory was short."""

    code: int | None
    out_of_memory: bool = False


class Engine(Protocol):
    """See the module text. Instances go by their id; all of it outlives SM."""

    def check(self) -> None:
        """Raises ConfigError when a program that it needs is missing."""
        ...

    def cgroup(self, instance_id: str) -> str:
        """Control group of an instance, below the mount."""
        ...

    async def run(self, instance_id: str, bundle: Path, output: ContainerOutput) -> int:
        """Run the instance of a bundle; the pid of its first process."""
        ...

    async def delete(self, instance_id: str) -> None:
        """Kill it if needed and remove all of it; an unknown one is success."""
        ...

    async def list(self) -> dict[str, EngineState]:
        """All instances of this engine."""
        ...

    async def exit(self, instance_id: str, bundle: Path) -> Exit:
        """How an instance that does not run any more has ended; waits a moment for the engine's note of it."""
        ...
