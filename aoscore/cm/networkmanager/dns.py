"""The name server of the Unit: its hosts file and dnsmasq (cm-orchestration §6.5).

On devices dnsmasq is a system service that is told about a new hosts file by signal. Where a program is configured, CM
runs dnsmasq itself.
"""

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path

import msgspec

from aoscore.common.aio import Backoff, log_and_continue
from aoscore.common.errors import FailedError, NotFoundError, RuntimeFailure
from aoscore.common.log import kv

_log = logging.getLogger(__name__)

HOSTS_FILE = "addnhosts"
_STOP_TIMEOUT_S = 5.0


class DnsSettings(msgspec.Struct, frozen=True, kw_only=True):
    """`ip`: address given to instances as their resolver; empty: the Unit has no name server.

    `program`: dnsmasq to run; empty: it runs elsewhere and its PID is in `pid_file`.
    """

    ip: str = ""
    storage_path: Path = Path("/var/aos/dns")
    pid_file: Path = Path("/run/dnsmasq/dnsmasq.pid")
    program: str = ""

    @property
    def hosts_file(self) -> Path:
        """File with a line per instance address."""
        return self.storage_path / HOSTS_FILE


class DnsServer:
    """Keeps the hosts file and makes dnsmasq read it. A service; without an address it does nothing.

    A name server that is down never fails the start of an instance: the file is right, and the signal is repeated
    until it gets through.
    """

    def __init__(self, settings: DnsSettings, *, retry: Callable[[], Backoff] = lambda: Backoff(1, 60)) -> None:
        self._settings = settings
        self._retry = retry
        self._changed = asyncio.Event()

    @property
    def servers(self) -> tuple[str, ...]:
        """Resolvers for instances."""
        return (self._settings.ip,) if self._settings.ip else ()

    def write(self, text: str) -> None:
        """Replace the hosts file, if its content differs, and have it read.

        The file is not synced to disk: it is rebuilt from the database at every start.
        """
        if not self._settings.ip:
            return
        path = self._settings.hosts_file
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file() or path.read_text() != text:
            fresh = path.with_name(f".{path.name}.new")
            fresh.write_text(text)
            fresh.chmod(0o644)  # dnsmasq reads it as another user
            fresh.rename(path)
            self._changed.set()

    async def run(self, started: Callable[[], None]) -> None:
        """Run dnsmasq if that is our part, and tell it about changes."""
        if not self._settings.ip:
            started()
            await asyncio.Event().wait()
        self._settings.storage_path.mkdir(parents=True, exist_ok=True)
        self._settings.hosts_file.touch(mode=0o644)
        started()
        async with asyncio.TaskGroup() as tasks:
            if self._settings.program:
                tasks.create_task(self._keep_running())
            tasks.create_task(self._notify())

    async def _notify(self) -> None:
        pause = self._retry()
        while True:
            await self._changed.wait()
            self._changed.clear()
            try:
                self._signal()
                pause.reset()
            except (NotFoundError, RuntimeFailure) as error:
                pause_s = pause.next()
                _log.warning(kv("Can't make dnsmasq read its hosts file", error=error, retryIn=f"{pause_s:.0f}s"))
                self._changed.set()
                await asyncio.sleep(pause_s)

    def _signal(self) -> None:
        path = self._settings.pid_file
        try:
            pid = int(path.read_text().split("\n", 1)[0].strip())
        except (FileNotFoundError, ValueError):
            raise NotFoundError(f"PID file {path} holds no process id; is dnsmasq running?") from None
        try:
            os.kill(pid, signal.SIGHUP)
        except OSError as error:
            raise RuntimeFailure(f"dnsmasq, process {pid} of {path}: {error.strerror}", error.errno or 0) from error

    async def _keep_running(self) -> None:
        pause = self._retry()
        while True:
            with log_and_continue(_log, "Name server ended"):
                await self._run_once(pause)
            await asyncio.sleep(pause.next())

    async def _run_once(self, pause: Backoff) -> None:
        settings = self._settings
        settings.pid_file.parent.mkdir(parents=True, exist_ok=True)
        _end_predecessor(settings)
        try:
            process = await asyncio.create_subprocess_exec(*dnsmasq_arguments(settings))
        except OSError as error:
            raise RuntimeFailure(f"can't run {settings.program}: {error.strerror}", error.errno or 0) from error
        _log.info(kv("Name server started", program=settings.program, address=settings.ip, pid=process.pid))
        begun_s = asyncio.get_running_loop().time()
        try:
            code = await process.wait()
        finally:
            await _end(process)
        if asyncio.get_running_loop().time() - begun_s > 60:
            pause.reset()
        raise FailedError(f"{settings.program} ended with code {code}")


def _end_predecessor(settings: DnsSettings) -> None:
    """A name server left over from a CM that was killed still has our address: it is known by its command line."""
    try:
        pid = int(settings.pid_file.read_text().strip())
        arguments = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except (FileNotFoundError, ProcessLookupError, ValueError):
        return
    if f"--addn-hosts={settings.hosts_file}" in arguments:
        _log.info(kv("Ending name server of an earlier run", pid=pid))
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is not None:
        return
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    try:
        async with asyncio.timeout(_STOP_TIMEOUT_S):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()


def dnsmasq_arguments(settings: DnsSettings) -> list[str]:
    """Command line of a name server that serves our hosts file on our address only."""
    return [
        settings.program,
        "--keep-in-foreground",
        "--conf-file=/dev/null",
        "--log-facility=-",
        f"--pid-file={settings.pid_file}",
        "--no-hosts",
        f"--addn-hosts={settings.hosts_file}",
        f"--listen-address={settings.ip}",
        "--bind-dynamic",
        "--except-interface=lo",
        "--expand-hosts",
        # Plain names are ours alone: asked for another kind of address, "none" is the answer, not a refusal that makes
        # some resolvers give up the name. Unlike --local=// this holds without any other server too.
        "--domain-needed",
        "--all-servers",
        "--strict-order",
    ]
