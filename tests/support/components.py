"""What component runtimes need in tests: a node, a systemd that says what it is told to, payloads."""

import abc
import asyncio
import hashlib
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from aoscore.common.oci import ImageConfig
from aoscore.common.types import (
    ArchInfo,
    CPUInfo,
    InstanceIdent,
    InstanceInfo,
    InstanceStatus,
    ItemType,
    NodeInfo,
    OSInfo,
)
from aoscore.sm.imagemanager.model import InstalledImage, Payload, item_key
from aoscore.sm.launcher.runtimes.component import ComponentRuntime
from tests.support.running import running, until

NODE = NodeInfo(
    "node",
    node_type="main",
    os_info=OSInfo("linux"),
    cpus=(CPUInfo(num_cores=2, arch_info=ArchInfo("amd64")),),
)
TO_REBOOT, SETTLED = 10, 0
STEPS = frozenset({"os.rename", "os.remove", "test.write"})
"""Files change by renames and removals; a test announces what else it writes."""


class FakeSystem:
    """Units are in the states of `units`, or all active."""

    def __init__(self, units: Mapping[str, str] | None = None) -> None:
        self.units = units or {}
        self.asked = 0
        self.reboots = 0

    async def active_states(self, units: Sequence[str]) -> dict[str, str]:
        self.asked += 1
        return {unit: self.units.get(unit, "active") for unit in units}

    async def reboot(self) -> None:
        self.reboots += 1


async def no_pause(seconds: float) -> None:
    """Instead of sleeping."""


def instance(runtime: str, version: str, digest: str, item: str = "item") -> InstanceInfo:
    """A component as CM asks for it."""
    ident = InstanceIdent(item, "subject", 0, ItemType.COMPONENT)
    return InstanceInfo(ident, version, digest, "owner", runtime)


def image(path: Path, info: InstanceInfo, content: bytes, media_type: str) -> InstalledImage:
    """An installed component whose only payload is written to `path`."""
    path.write_bytes(content)
    digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
    return InstalledImage(item_key(info), ImageConfig(), payloads=(Payload(path, media_type, digest, len(content)),))


def told(queue: "asyncio.Queue[InstanceStatus]") -> list[tuple[str, str, str]]:
    """All statuses published so far: version, state, error."""
    found = []
    while not queue.empty():
        status = queue.get_nowait()
        found.append((status.version, status.state.value, status.error.message if status.error else ""))
    return found


async def life(runtime: ComponentRuntime, info: InstanceInfo, payload: InstalledImage) -> int:
    """One life of SM, from its start to the reboot it asks for, or until there is nothing more to do.

    It does for `info` what the launcher does for a stored instance.
    """
    async with running(runtime):
        adopted = await runtime.adopt([info])
        if not adopted:
            try:
                await runtime.start_instance(info, payload)
            except Exception as error:
                print(f"not started: {error}")

        def is_through() -> bool:
            return all(one.status.state != "activating" for one in runtime.running())

        await until(lambda: runtime.reboot_due.is_set() or is_through(), 40)
        return TO_REBOOT if runtime.reboot_due.is_set() else SETTLED


def in_child(steps: Path, kill_at: int, work: Callable[[], Awaitable[int]]) -> int | None:
    """Run `work` in a process that dies by SIGKILL right before its `kill_at`-th persistent step, counted in `steps`.

    Steps are the audit events of `STEPS`. Returns what `work` returned, None when it was killed.
    """
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            count = int(steps.read_text() or 0) if steps.exists() else 0

            def audit(event: str, arguments: tuple[Any, ...]) -> None:
                nonlocal count
                if event in STEPS:
                    count += 1
                    fd = os.open(steps, os.O_WRONLY | os.O_CREAT)
                    os.write(fd, str(count).encode())
                    os.close(fd)
                    if count == kill_at:
                        os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(audit)

            async def main() -> int:
                return await work()

            code = asyncio.run(main())
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return None
    code = os.WEXITSTATUS(status)
    assert code in (TO_REBOOT, SETTLED), code
    return code


class Lives(abc.ABC):
    """A node on which SM lives again and again."""

    directory: Path

    @abc.abstractmethod
    def runtime(self) -> ComponentRuntime:
        """SM's next life."""

    @abc.abstractmethod
    def boot(self) -> None:
        """Reboot, or come up after a power cut."""

    async def go_through(self, info: InstanceInfo, payload: InstalledImage) -> list[list[tuple[str, str, str]]]:
        """Lives and reboots until nothing more happens; what each life told."""
        lives = []
        for _ in range(10):
            runtime = self.runtime()
            with runtime.changed.subscribe() as statuses:
                end = await life(runtime, info, payload)
                lives.append(told(statuses))
            if end == SETTLED:
                return lives
            self.boot()
        raise AssertionError(f"no end: {lives}")

    def survive(self, step: int, work: Callable[[], Awaitable[int]], *, power_cut: bool) -> bool:
        """Lives and reboots until nothing more happens, with SM killed before a step, and with it perhaps the node.

        `work` is one life. Returns whether there were so many steps.
        """
        killed = False
        for _ in range(12):
            end = in_child(self.directory / "steps", 0 if killed else step, work)
            killed = killed or end is None
            if end == SETTLED:
                return killed
            if end == TO_REBOOT or power_cut:
                self.boot()
        raise AssertionError(f"no end after step {step}")
