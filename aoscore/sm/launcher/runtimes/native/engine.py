"""systemd as engine of the container runtime: one transient unit per instance, started through `busctl`.

busctl sends typed values, so nothing of an item is ever parsed as text, and it is part of systemd. Secrets are in a
bundle that only root can read, not in properties, which everybody on the bus may ask for.
"""

import asyncio
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from aoscore.common.aio import unbroken
from aoscore.common.config import to_json
from aoscore.common.errors import ConfigError, DeadlineError, FailedError
from aoscore.common.files import write_atomic
from aoscore.common.process import run_program
from aoscore.sm.launcher.runtimes.container.engine import EngineState, Exit
from aoscore.sm.launcher.runtimes.container.output import ContainerOutput
from aoscore.sm.launcher.runtimes.native.config import NativeConfig
from aoscore.sm.launcher.runtimes.native.unit import CGROUP_PARENT, native_spec, unit_name, unit_properties
from aoscore.sm.systemd import Systemd

_TIMEOUT_S = 30.0
_START_TIMEOUT_S = 60.0
_POLL_S = 0.02
_EXIT_WAIT_S = 2.0
_SYSTEMD = ("org.freedesktop.systemd1", "/org/freedesktop/systemd1", "org.freedesktop.systemd1.Manager")
_CLD_EXITED = "1"
_STATE = ("ActiveState", "SubState", "Result", "ExecMainPID", "ExecMainCode", "ExecMainStatus")


class SystemdEngine:
    """See the module text. Implements `aoscore.sm.launcher.runtimes.container.engine.Engine`."""

    def __init__(self, config: NativeConfig, systemd: Systemd) -> None:
        self._config = config
        self._systemd = systemd
        # The unit's control group is the service's.
        self._crun = (config.crun_executable, "--root", str(config.crun_state_root), "--cgroup-manager=disabled")

    def check(self) -> None:
        """Raises ConfigError where systemd does not run."""
        if not Path("/run/systemd/system").is_dir() or shutil.which("busctl") is None:
            raise ConfigError("the native runtime needs a node that is run by systemd, with busctl")
        if not os.access(self._config.crun_executable, os.X_OK):
            what = "install it or set 'crunExecutable' of the native runtime"
            raise ConfigError(f"{self._config.crun_executable} is not installed; {what}")

    def cgroup(self, instance_id: str) -> str:
        """Control group of the unit."""
        return f"{CGROUP_PARENT}/{unit_name(instance_id)}"

    async def run(self, instance_id: str, bundle: Path, output: ContainerOutput) -> int:
        """Start the unit; its output goes to the journal. Raises FailedError with systemd's reason, DeadlineError."""
        return await unbroken(self._run(instance_id, bundle))

    async def _run(self, instance_id: str, bundle: Path) -> int:
        spec: dict[str, Any] = msgspec.json.decode((bundle / "config.json").read_bytes())
        # Beside the spec itself, of which a restart needs the limits again.
        config = bundle / "native.json"
        await asyncio.to_thread(write_atomic, config, to_json(native_spec(spec)))
        command = [*self._crun, "run", f"--bundle={bundle}", f"--config={config}", instance_id]
        properties = unit_properties(spec, instance_id, command)
        words = [word for one in properties for word in (one.name, one.signature, *one.words)]
        # "--": arguments of a service may look like options.
        args = ["busctl", "call", "--", *_SYSTEMD, "StartTransientUnit", "ssa(sv)a(sa(sv))"]
        args += [unit_name(instance_id), "fail", str(len(properties)), *words, "0"]
        await run_program(args, timeout_s=_TIMEOUT_S)
        state = await self._wait_started(instance_id)
        if state.get("ExecMainPID", "0") == "0":
            raise FailedError(f"unit {unit_name(instance_id)} did not start: {state.get('Result', 'no reason given')}")
        return int(state["ExecMainPID"])

    async def _wait_started(self, instance_id: str) -> Mapping[str, str]:
        deadline_s = time.monotonic() + _START_TIMEOUT_S
        while True:
            state = await self._state(instance_id)
            if state.get("ActiveState") not in ("activating", "inactive"):
                return state
            if time.monotonic() > deadline_s:
                raise DeadlineError(f"unit {unit_name(instance_id)} did not start within {_START_TIMEOUT_S:g} s")
            await asyncio.sleep(_POLL_S)

    async def delete(self, instance_id: str) -> None:
        """Kill what is left and unload the unit."""
        unit = unit_name(instance_id)
        for verb in ("stop", "reset-failed"):
            await run_program(["systemctl", verb, "--", unit], timeout_s=_TIMEOUT_S, check=False)
        await run_program([*self._crun, "delete", "--force", instance_id], timeout_s=_TIMEOUT_S, check=False)
        state = await self._state(instance_id)
        if state.get("ActiveState") not in ("inactive", "failed"):
            raise FailedError(f"can't stop unit {unit}: it is {state.get('ActiveState')}")

    async def list(self) -> dict[str, EngineState]:
        """All units of our name."""
        args = ["systemctl", "list-units", "--all", "--plain", "--no-legend", "--full", "--", unit_name("*")]
        lines = (await run_program(args, timeout_s=_TIMEOUT_S)).stdout.decode().splitlines()
        names = [line.split()[0].removeprefix("aos-service@").removesuffix(".service") for line in lines if line]
        found = {}
        for name in names:
            state = await self._state(name)
            running = state.get("SubState") == "running"
            found[name] = EngineState(
                name,
                int(state.get("ExecMainPID", "0")),
                "running" if running else "stopped",
                str(self._config.runtime_dir / name),
            )
        return found

    async def exit(self, instance_id: str, bundle: Path) -> Exit:
        """What systemd remembers of the main process."""
        deadline_s = time.monotonic() + _EXIT_WAIT_S
        while True:
            state = await self._state(instance_id)
            ended = state.get("ExecMainCode", "0") != "0"
            if ended or time.monotonic() > deadline_s or state.get("ActiveState") == "inactive":
                break
            await asyncio.sleep(_POLL_S)
        if not ended:
            return Exit(None)
        status = int(state["ExecMainStatus"])
        code = status if state["ExecMainCode"] == _CLD_EXITED else 128 + status
        return Exit(code, out_of_memory=state.get("Result") == "oom-kill")

    async def _state(self, instance_id: str) -> Mapping[str, str]:
        return await self._systemd.properties(unit_name(instance_id), _STATE)
