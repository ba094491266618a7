"""A machine in a few namespaces, from the inside: its first process, in the place of systemd.

Started by `machine.Machine` inside fresh PID, network, mount, UTS and IPC namespaces, so that nothing of the host is
touched and nothing can stay behind: when this process ends, however it ends, the kernel ends every process in the
namespace and takes all mounts, links, routes and firewall tables with it.

It does what systemd and the unit files do on a device: start order, readiness by sd_notify, restart of what ended,
IAM in provisioning mode until the node is provisioned, everything after. Run as
`python -m aoscore.ctl.sandbox DIR`.
"""

import contextlib
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from aoscore.common import log
from aoscore.common.linux import MS_BIND, MS_NODEV, MS_NOSUID, MS_PRIVATE, MS_REC, mount

_log = logging.getLogger("aoscore.sandbox")

RESTART_PAUSE_S = 1.0
READY_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 15.0


class Program(msgspec.Struct, frozen=True):
    """A process the sandbox keeps alive.

    `when` is "always", "unprovisioned" or "provisioned". With `notifies` the next program waits until this one
    reports READY=1.
    """

    name: str
    args: tuple[str, ...]
    when: str = "always"
    notifies: bool = True


class Layout(msgspec.Struct, frozen=True):
    """What to run, and the commands that set the machine up first: written by Machine, read inside the namespaces."""

    programs: tuple[Program, ...]
    hosts: dict[str, str]
    state_file: Path
    hostname: str = "main"
    setup: tuple[tuple[str, ...], ...] = ()


class _Process:
    """One program and its present process, if any."""

    def __init__(self, program: Program, directory: Path) -> None:
        self.program = program
        self._log_path = directory / "log" / f"{program.name}.log"
        self._socket_path = directory / "run" / f"notify.{program.name}"
        self._notify: socket.socket | None = None
        self.popen: subprocess.Popen[bytes] | None = None
        self.not_before = 0.0

    def start(self) -> None:
        self._socket_path.unlink(missing_ok=True)
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._notify.bind(str(self._socket_path))
        with self._log_path.open("ab") as output:
            self.popen = subprocess.Popen(
                self.program.args,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, "NOTIFY_SOCKET": str(self._socket_path)},
                start_new_session=True,
            )
        _log.info("Started: name=%s, pid=%d", self.program.name, self.popen.pid)
        if self.program.notifies:
            self._wait_ready()

    def _wait_ready(self) -> None:
        assert self._notify is not None and self.popen is not None  # noqa: S101 - set by start
        deadline = time.monotonic() + READY_TIMEOUT_S
        while time.monotonic() < deadline:
            readable, _, _ = select.select([self._notify], [], [], 0.05)
            if readable and b"READY=1" in self._notify.recv(4096):
                _log.info("Ready: name=%s", self.program.name)
                return
            if self.popen.poll() is not None:
                return
        _log.warning("Not ready in time: name=%s", self.program.name)

    def stop(self) -> None:
        if self.popen is None:
            return
        self.popen.terminate()
        try:
            self.popen.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait()
        _log.info("Stopped: name=%s, code=%d", self.program.name, self.popen.returncode)
        self.popen = None

    def ended(self) -> bool:
        """Notice an end; the next start waits for the restart pause."""
        if self.popen is None or self.popen.poll() is None:
            return False
        _log.warning("Ended by itself: name=%s, code=%d", self.program.name, self.popen.returncode)
        self.popen = None
        self.not_before = time.monotonic() + RESTART_PAUSE_S
        return True


class Sandbox:
    """Keeps the programs of a layout running, by the node's provisioning state."""

    def __init__(self, layout: Layout, directory: Path) -> None:
        self._layout = layout
        self._processes = [_Process(program, directory) for program in layout.programs]
        self._stopping = False

    def stop(self, *_: object) -> None:
        """Signal handler: end after the present round."""
        self._stopping = True

    def run(self) -> None:
        """Start, restart, switch, until stopped; then stop all in reverse order."""
        while not self._stopping:
            wanted = "provisioned" if self._layout.state_file.exists() else "unprovisioned"
            for process in reversed(self._processes):
                process.ended()
                if process.popen is not None and process.program.when not in ("always", wanted):
                    process.stop()
            for process in self._processes:
                due = process.program.when in ("always", wanted) and time.monotonic() >= process.not_before
                if process.popen is None and due and not self._stopping:
                    process.start()
            self._reap_orphans()
            time.sleep(0.1)
        for process in reversed(self._processes):
            process.stop()

    def _reap_orphans(self) -> None:
        """We are the first process: collect those whose parents are gone, but leave our own children to Popen."""
        own = {process.popen.pid for process in self._processes if process.popen is not None}
        with contextlib.suppress(ChildProcessError):
            while (result := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
                if result.si_pid in own:
                    return
                os.waitpid(result.si_pid, 0)


def prepare(layout: Layout, directory: Path) -> None:
    """Make the namespaces look like a machine of their own: /proc, /run, host name and hosts, loopback, forwarding."""
    mount("none", Path("/"), "", MS_REC | MS_PRIVATE)
    mount("proc", Path("/proc"), "proc", MS_NOSUID | MS_NODEV)
    mount("tmpfs", Path("/run"), "tmpfs", MS_NOSUID | MS_NODEV, "mode=0755")
    for name in ("lock", "netns"):
        Path("/run", name).mkdir()
    socket.sethostname(layout.hostname)
    hosts = directory / "run" / "hosts"
    hosts.write_text("".join(f"{address} {name}\n" for name, address in layout.hosts.items()))
    mount(hosts, Path("/etc/hosts"), "", MS_BIND)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    # As the sysctl file of a node does.
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
    for command in layout.setup:
        subprocess.run(command, check=True)


def main(args: Sequence[str] = tuple(sys.argv[1:])) -> int:
    """Entry point inside the namespaces."""
    directory = Path(args[0])
    log.setup("info", journal=False, identifier="aos-sandbox")
    layout = msgspec.json.decode(
        (directory / "layout.json").read_bytes(), type=Layout, dec_hook=lambda kind, value: kind(value)
    )
    prepare(layout, directory)
    sandbox = Sandbox(layout, directory)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, sandbox.stop)
    # From here on others may enter.
    (directory / "run" / "prepared").touch()
    sandbox.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
