"""Processes that are not our children: noticing their end, asking them to end."""

import asyncio
import contextlib
import os
import re
import signal
from pathlib import Path
from types import TracebackType
from typing import Self

from aoscore.common.aio import comes_within
from aoscore.common.errors import InvalidArgumentError

_REAL_TIME = re.compile(r"RT(MIN|MAX)([+-][0-9]{1,2})?")


class ProcessWatch:
    """Notices the end of any process through a pidfd. A context manager.

    The descriptor stands for the process itself, so a pid that is used again cannot deceive it.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._fd = -1
        self._end = asyncio.Event()

    def __enter__(self) -> Self:
        with contextlib.suppress(ProcessLookupError):
            self._fd = os.pidfd_open(self._pid)
            asyncio.get_running_loop().add_reader(self._fd, self._on_end)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._fd >= 0:
            asyncio.get_running_loop().remove_reader(self._fd)
            os.close(self._fd)

    async def ended(self, timeout_s: float | None = None) -> bool:
        """Wait for the end, at most `timeout_s`; whether it has ended."""
        return self._fd < 0 or await comes_within(self._end, timeout_s)

    def _on_end(self) -> None:
        self._end.set()
        # The descriptor stays readable, and would wake the loop without end.
        asyncio.get_running_loop().remove_reader(self._fd)

    def signal(self, number: int) -> None:
        """Send a signal; nothing happens when it has ended."""
        if self._fd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._fd, number)


def is_alive(pid: int) -> bool:
    """Whether the process exists and is no zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in ("Z", "X")


def catches(pid: int, number: int) -> bool:
    """Whether the process has a handler for a signal."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    bit = 1 << (number - 1)
    return any(line.startswith("SigCgt:") and int(line.split()[1], 16) & bit for line in status.splitlines())


async def terminate(pid: int, timeout_s: float, number: int = signal.SIGTERM) -> None:
    """Ask it to end by a signal, then wait for the end, at most `timeout_s`."""
    with ProcessWatch(pid) as process:
        process.signal(number)
        await process.ended(timeout_s)


def parse_signal(text: str) -> int:
    """A signal as images name it: ``SIGQUIT``, ``QUIT``, ``3``, ``SIGRTMIN+3`` (OCI image-spec, StopSignal).

    Raises InvalidArgumentError.
    """
    name = text.strip().upper().removeprefix("SIG")
    number = int(name) if name.isascii() and name.isdigit() else 0
    if match := _REAL_TIME.fullmatch(name):
        number = signal.Signals[f"SIGRT{match[1]}"] + int(match[2] or 0)
    elif f"SIG{name}" in signal.Signals.__members__:
        number = signal.Signals[f"SIG{name}"]
    if not 1 <= number <= signal.SIGRTMAX:
        raise InvalidArgumentError(f"{text!r} is no signal")
    return number
