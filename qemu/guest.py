"""One QEMU guest: start it, talk to it, save it, end it.

The host talks to `agent.py` in the guest over a virtio serial port. The serial console is only recorded, and answers
on a socket for people. All files and sockets of a guest are in the directory of its Unit, with the guest's name in
front.
"""

import base64
import contextlib
import json
import os
import re
import socket
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import msgspec

from aoscore.common.errors import DeadlineError, FailedError, NotFoundError
from aoscore.ctl.machine import last_lines

# A guest of an emulated processor on a machine that does other things too: these are for what never comes.
BOOT_S = 1200.0
ANSWER_S = 120.0
SAVE_S = 300.0
_END_S = 60.0
_AGENT = Path(__file__).with_name("agent.py")
_CONSOLE_WIDTH = 200
# Always the emulator: where /dev/kvm exists it does not mean that a guest runs (testbed.md §2). Saved states need the
# same processor everywhere. x86-64-v2 is what Python wheels expect; Xen's Dom0 crashes on one that pretends much more.
_PROCESSOR = "qemu64,+ssse3,+sse4.1,+sse4.2,+popcnt"


class Boot(msgspec.Struct, frozen=True):
    """What a guest boots. Without `kernel` its first disk has a boot loader, for the BIOS or for `firmware`.

    `disks` are backing files, the first with the root file system; the guest writes to overlays of them. A guest that
    does not start the agent by itself gets it over its serial console, where root must be able to log in without a
    password, and needs Python.
    """

    disks: tuple[Path, ...]
    kernel: Path | None = None
    initrd: Path | None = None
    append: str = "root=/dev/vda rw console=ttyS0 quiet"
    firmware: Path | None = None
    xen: Path | None = None
    """The hypervisor, which then starts `kernel` as that of Dom0."""
    xen_append: str = ""
    """Command line of the hypervisor."""
    agent: bool = True
    """Whether the guest starts the agent by itself."""


class Done(msgspec.Struct, frozen=True):
    """How a program in a guest ended."""

    code: int
    stdout: str
    stderr: str


class Guest:
    """A guest called `name`, with its files in `directory`.

    `networks` are QEMU's -netdev options without id, `mac` the last byte of its hardware addresses, `enter` makes the
    start of the command line that runs a program where the guest shall live (nsenter).
    """

    def __init__(
        self,
        name: str,
        directory: Path,
        boot: Boot,
        *,
        networks: Sequence[str],
        mac: int,
        enter: Callable[..., list[str]],
        memory_mib: int = 1024,
        cpus: int = 1,
    ) -> None:
        self.name = name
        self.directory = directory
        self._boot = boot
        self._networks = networks
        self._mac = mac
        self._enter = enter
        self._memory_mib = memory_mib
        self._cpus = cpus
        self._process: subprocess.Popen[bytes] | None = None
        self._qmp: socket.socket | None = None
        self._agent: socket.socket | None = None
        self._lines: Iterator[bytes] = iter(())
        self._replies: Iterator[bytes] = iter(())

    @property
    def serial_log(self) -> Path:
        """All that came over the serial console, in all lives of the guest."""
        return self.directory / f"{self.name}.serial.log"

    @property
    def runs(self) -> bool:
        """Whether it has not ended."""
        return self._process is not None and self._process.poll() is None

    def make_disks(self) -> None:
        """New, empty overlays on the backing files."""
        for number, backing in enumerate(self._boot.disks):
            with backing.open("rb") as file:
                kind = "qcow2" if file.read(4) == b"QFI\xfb" else "raw"
            args = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(backing.absolute()), "-F", kind]
            subprocess.run([*args, str(self.disk(number))], check=True)

    def disk(self, number: int) -> Path:
        """An overlay."""
        return self.directory / f"{self.name}.{number}.qcow2"

    def start(self, *, resume: Path | None = None, clock: str = "") -> None:
        """Power on; with `resume`, go on from a state that `save` wrote. Returns when QEMU answers.

        `clock`: what the board's clock shows then, UTC, `1970-01-01T00:00:00`; empty: the time.
        """
        for path in self.directory.glob(f"{self.name}.*.sock"):
            path.unlink()
        # The guest ends with the program that entered on its behalf.
        command = [*self._enter(), f"--wdns={self.directory}", "setpriv", "--pdeathsig", "KILL", *self.command(resume)]
        if clock:
            command += ["-rtc", f"base={clock}"]
        with (self.directory / f"{self.name}.qemu.log").open("ab") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        self._qmp = self._connect("qmp")
        self._lines = _Lines(self._qmp)
        next(self._lines)
        self.monitor("qmp_capabilities")
        self._agent = self._connect("agent")
        self._replies = _Lines(self._agent)
        if resume is not None:
            self._wait_migrated("resume")
            self.monitor("cont")

    def command(self, resume: Path | None = None) -> list[str]:
        """QEMU's command line, for the guest's directory as working directory."""
        boot = self._boot
        args = ["qemu-system-x86_64", "-name", self.name, "-accel", "tcg,thread=multi,tb-size=256", "-cpu", _PROCESSOR]
        args += ["-smp", str(self._cpus), "-m", str(self._memory_mib), "-display", "none", "-nodefaults"]
        if boot.xen is not None:
            # By multiboot: the kernel with its command line, and its initial RAM disk, are modules.
            modules = f"{boot.kernel} {boot.append},{boot.initrd}"
            args += ["-machine", "q35", "-kernel", str(boot.xen), "-append", boot.xen_append, "-initrd", modules]
        else:
            if boot.kernel is not None:
                args += ["-kernel", str(boot.kernel), "-append", boot.append]
            if boot.initrd is not None:
                args += ["-initrd", str(boot.initrd)]
        if boot.firmware is not None:
            args += ["-bios", str(boot.firmware)]
        for number, _ in enumerate(boot.disks):
            # What the guest has flushed stays when QEMU is killed: it is the host's.
            args += ["-drive", f"file={self.disk(number).name},format=qcow2,if=virtio,cache=writeback"]
        for number, network in enumerate(self._networks):
            mac = f"52:54:00:00:{number:02x}:{self._mac:02x}"
            args += ["-netdev", f"{network},id=n{number}"]
            args += ["-device", f"virtio-net-pci,netdev=n{number},mac={mac},romfile="]
        for kind in ("serial", "agent", "qmp"):
            log = f",logfile={self.serial_log.name},logappend=on" if kind == "serial" else ""
            args += ["-chardev", f"socket,id={kind},path={self.name}.{kind}.sock,server=on,wait=off{log}"]
        args += ["-serial", "chardev:serial", "-mon", "chardev=qmp,mode=control", "-device", "virtio-serial-pci"]
        args += ["-device", "virtserialport,chardev=agent,name=aos.agent", "-device", "virtio-rng-pci"]
        if resume is not None:
            args += ["-incoming", f"exec:zstd -dcq {resume}"]
        return args

    def _connect(self, kind: str) -> socket.socket:
        """Through the directory's descriptor: a socket's path has a length limit."""
        deadline = time.monotonic() + _END_S
        descriptor = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            while True:
                connection = socket.socket(socket.AF_UNIX)
                try:
                    connection.connect(f"/proc/self/fd/{descriptor}/{self.name}.{kind}.sock")
                    connection.settimeout(ANSWER_S)
                    return connection
                except OSError:
                    connection.close()
                    self._check_runs()
                    if time.monotonic() > deadline:
                        raise DeadlineError(f"QEMU of {self.name} offers no {kind} socket") from None
                time.sleep(0.02)
        finally:
            os.close(descriptor)

    def _check_runs(self) -> None:
        if not self.runs:
            last = " ".join(last_lines(self.directory / f"{self.name}.qemu.log", 3))
            raise FailedError(f"guest {self.name} does not run: {last or 'no message'}")

    # ---- QEMU itself

    def monitor(self, command: str, **arguments: Any) -> Any:
        """Run a QMP command; its result. Raises FailedError with QEMU's refusal."""
        if self._qmp is None:
            raise FailedError(f"guest {self.name} was not started")
        self._qmp.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        for line in self._lines:
            answer = json.loads(line)
            if "error" in answer:
                raise FailedError(f"QEMU of {self.name} refuses {command}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]
        self._check_runs()
        raise FailedError(f"QEMU of {self.name} has closed its monitor during {command}")

    def save(self, state: Path) -> None:
        """Stop it where it is and write its state to a file; its overlays belong to the state. It has ended then."""
        self.monitor("stop")
        self.monitor("migrate", uri=f"exec:zstd -1 -T1 -q -f -o {state}")
        self._wait_migrated("save")
        self.monitor("quit")
        self._ended()

    def _wait_migrated(self, what: str) -> None:
        deadline = time.monotonic() + SAVE_S
        while (status := self.monitor("query-migrate").get("status")) != "completed":
            if status == "failed" or time.monotonic() > deadline:
                raise FailedError(f"guest {self.name}: {what} did not work: {status}")
            time.sleep(0.02)

    def kill(self) -> None:
        """As if the power went: at once, nothing is told to the guest."""
        if self._process is not None:
            self._process.kill()
            self._ended()

    def wait_ended(self, timeout_s: float) -> None:
        """Wait until the guest has powered off by itself. Raises DeadlineError."""
        assert self._process is not None  # noqa: S101 - the caller started it
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise DeadlineError(f"guest {self.name} did not power off within {timeout_s:g} s") from None
        self._ended()

    def _ended(self) -> None:
        """Collect the process and wait for QEMU's own end: until then its disks are locked."""
        assert self._process is not None  # noqa: S101 - the caller started it
        with contextlib.suppress(OSError):
            for _ in self._lines:
                pass
        self._process.wait(_END_S)
        for connection in (self._qmp, self._agent):
            if connection is not None:
                connection.close()
        self._process = self._qmp = self._agent = None

    # ---- programs in the guest

    def bring_agent(self, timeout_s: float = BOOT_S) -> None:
        """Log in on the serial console and start the agent from there. Raises DeadlineError."""
        program = base64.b64encode(_AGENT.read_bytes()).decode()
        # Long lines lose characters on an emulated console.
        parts = [program[start : start + _CONSOLE_WIDTH] for start in range(0, len(program), _CONSOLE_WIDTH)]
        with _Console(self._connect("serial"), timeout_s) as console:
            console.log_in()
            console.run("stty -echo; rm -f /tmp/agent.*")
            for part in parts:
                console.run(f"printf %s {part} >> /tmp/agent.b64")
            console.run("base64 -d /tmp/agent.b64 > /tmp/agent.py")
            console.run("setsid python3 -I /tmp/agent.py < /dev/null > /dev/null 2>&1 &")

    def wait_agent(self, timeout_s: float = BOOT_S) -> None:
        """Until the agent answers."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                self.run("true", timeout_s=5)
                return
            except DeadlineError:
                self._check_runs()
                if time.monotonic() > deadline:
                    tail = "\n".join(last_lines(self.serial_log, 20))
                    raise DeadlineError(f"guest {self.name} did not boot within {timeout_s:g} s:\n{tail}") from None

    def execute(self, *args: str | Path, stdin: bytes = b"", timeout_s: float = ANSWER_S) -> Done:
        """Run a program in the guest to its end. Raises DeadlineError, or FailedError when it cannot be started."""
        if self._agent is None:
            raise FailedError(f"guest {self.name} does not run")
        number = uuid.uuid4().hex
        request = {"id": number, "args": [str(arg) for arg in args], "timeout_s": timeout_s}
        request["input"] = base64.b64encode(stdin).decode()
        deadline = time.monotonic() + timeout_s
        name = f"{args[0]} in guest {self.name}"
        try:
            self._agent.settimeout(timeout_s)
            self._agent.sendall(json.dumps(request).encode() + b"\n")
            while True:
                # A little more than the guest has: then it says itself that the time is over.
                self._agent.settimeout(max(deadline + 2 - time.monotonic(), 0.1))
                answer = json.loads(next(self._replies))
                if answer["id"] == number:
                    break
        except TimeoutError:
            raise DeadlineError(f"{name} did not end within {timeout_s:g} s") from None
        except (StopIteration, OSError):
            self._replies = iter(())
            raise FailedError(f"guest {self.name} has ended while {args[0]} ran") from None
        if "error" in answer:
            kind = DeadlineError if "timed out" in answer["error"] else NotFoundError
            raise kind(f"{name}: {answer['error']}")
        stdout, stderr = (base64.b64decode(answer[key]).decode(errors="replace") for key in ("stdout", "stderr"))
        return Done(answer["code"], stdout, stderr)

    def run(self, *args: str | Path, stdin: bytes = b"", timeout_s: float = ANSWER_S) -> str:
        """Output of a program in the guest. Raises FailedError with all it said when it fails."""
        done = self.execute(*args, stdin=stdin, timeout_s=timeout_s)
        if done.code != 0:
            words = " ".join(map(str, args))
            raise FailedError(f"{words} in guest {self.name}: code {done.code}\n{done.stdout}{done.stderr}")
        return done.stdout

    def shell(self, script: str, timeout_s: float = ANSWER_S) -> str:
        """Output of a shell script in the guest."""
        return self.run("sh", "-ec", script, timeout_s=timeout_s)

    def wait_settled(self, timeout_s: float = BOOT_S) -> None:
        """Until systemd has started all that belongs to the boot."""
        deadline = time.monotonic() + timeout_s
        if not self._boot.agent:
            self.bring_agent(timeout_s)
        self.wait_agent(timeout_s)
        while True:
            state = self.execute("systemctl", "is-system-running").stdout.strip()
            if state in ("running", "degraded"):
                return
            if time.monotonic() > deadline:
                jobs = self.execute("systemctl", "list-jobs", "--no-pager").stdout
                raise DeadlineError(f"guest {self.name} is {state or 'silent'} after {timeout_s:g} s:\n{jobs}")
            # Each question costs a guest that is still busy with its boot.
            time.sleep(2)


class _Console:
    """A shell on a serial console: for a few short commands, until there is something better."""

    def __init__(self, connection: socket.socket, timeout_s: float) -> None:
        self._connection = connection
        self._deadline = time.monotonic() + timeout_s
        self._seen = b""
        self._count = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def log_in(self) -> None:
        """As root, without a password, or go on where somebody is logged in."""
        while not self._wait_for(rb"login: $|[#$] (\x1b\[[0-9;?]*[a-z])*$", 10):
            # What was shown before we came is not shown again.
            self._connection.sendall(b"\n")
        if self._seen.endswith(b"login: "):
            self._connection.sendall(b"root\n")
            self._wait_for(rb"[#$] (\x1b\[[0-9;?]*[a-z])*$", 60)

    def run(self, command: str) -> None:
        """Run a command to its end."""
        self._count += 1
        # The echo of the command does not contain what the command prints.
        self._connection.sendall(f"{command}\necho '@'{self._count}'@'\n".encode())
        while not self._wait_for(rb"@%d@" % self._count, 60):
            pass

    def _wait_for(self, pattern: bytes, timeout_s: float) -> bool:
        """Whether it came. Raises DeadlineError when the time for all is over."""
        until = time.monotonic() + timeout_s
        self._seen = b""
        while not re.search(pattern, self._seen):
            now = time.monotonic()
            if now > self._deadline:
                raise DeadlineError(f"nobody answers on the console; it shows {self._seen[-200:]!r}")
            if now > until:
                return False
            self._connection.settimeout(1)
            with contextlib.suppress(TimeoutError):
                read = self._connection.recv(1 << 16)
                if not read:
                    raise FailedError("the guest has ended")
                self._seen += read
        return True


class _Lines(Iterator[bytes]):
    """Complete lines until the other side closes. A time limit of the socket does not end it: ask again."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._buffer = b""

    def __next__(self) -> bytes:
        while b"\n" not in self._buffer:
            read = self._connection.recv(1 << 16)
            if not read:
                raise StopIteration
            self._buffer += read
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line
