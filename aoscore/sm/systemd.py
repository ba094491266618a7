"""systemd, asked through its own program `systemctl`.

The program is part of systemd, so it is on every node and fits the systemd that runs there; a D-Bus library would stay
in SM's memory for a few questions in the life of a node.
"""

from collections.abc import Mapping, Sequence

from aoscore.common.errors import FailedError
from aoscore.common.process import run_program

REBOOT_UNIT = "aos-reboot.service"
_TIMEOUT_S = 60.0


class Systemd:
    """The system's systemd."""

    def __init__(self, systemctl: str = "systemctl") -> None:
        self._systemctl = systemctl

    async def active_states(self, units: Sequence[str]) -> dict[str, str]:
        """Active state (``active``, ``failed``, ``inactive`` …) of each unit; an unknown one is ``inactive``."""
        if not units:
            return {}
        done = await run_program(
            [self._systemctl, "show", "--value", "--property=ActiveState", "--", *units], timeout_s=_TIMEOUT_S
        )
        states = done.stdout.decode().split()
        if len(states) != len(units):
            raise FailedError(f"systemctl told {len(states)} states of the {len(units)} units {', '.join(units)}")
        return dict(zip(units, states, strict=True))

    async def properties(self, unit: str, names: Sequence[str]) -> Mapping[str, str]:
        """Properties of a unit as systemctl prints them; a name that systemd does not know is left out."""
        args = [self._systemctl, "show", f"--property={','.join(names)}", "--", unit]
        lines = (await run_program(args, timeout_s=_TIMEOUT_S)).stdout.decode().splitlines()
        return {name: value for name, _, value in (line.partition("=") for line in lines)}

    async def reboot(self) -> None:
        """Reboot by the unit that the image has for it (sm-runtime.md §3.2). Returns before it happens."""
        args = [self._systemctl, "start", "--no-block", "--job-mode=replace-irreversibly", REBOOT_UNIT]
        await run_program(args, timeout_s=_TIMEOUT_S)
