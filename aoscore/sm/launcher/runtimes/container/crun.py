"""crun and conmon by exec: run, delete, list (sm-runtime.md §2.3).

Each container has a conmon of its own as parent. It is the smallest program that keeps what must outlive SM: it waits
for the container (so the exit code is known also when SM was away), writes the exit code to a file, and carries the
output. systemd units would do the same only where systemd runs; conmon does it everywhere, and is a package of Yocto
and of every distribution.
"""

import asyncio
import contextlib
import logging
import os
import select
import signal
import time
from pathlib import Path

import msgspec

from aoscore.common.aio import Worker
from aoscore.common.config import from_json
from aoscore.common.errors import ConfigError, DeadlineError, FailedError
from aoscore.common.process import run_blocking, run_program, spawn
from aoscore.sm.cgroups import CgroupLayout
from aoscore.sm.launcher.runtimes.container.config import ContainerConfig
from aoscore.sm.launcher.runtimes.container.engine import EngineState, Exit
from aoscore.sm.launcher.runtimes.container.output import ContainerOutput
from aoscore.sm.processes import is_alive

_log = logging.getLogger(__name__)

_COMMAND_TIMEOUT_S = 30.0
_CREATE_TIMEOUT_S = 60.0
# What carries the output of a service that floods it must not take the CPU from others.
_CONMON_NICE = 10
# conmon writes the exit code right after the container has ended.
_EXIT_CODE_WAIT_S = 2.0
# In the bundle, which is where conmon runs crun.
_CRUN_LOG = "crun.log"
_ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}

# conmon has a container created only, by words that it puts behind ours: "create --bundle PATH …". Behind these they
# have the same crun run it at once, which saves a program per start: "create" is a bundle that gives way to PATH.
_RUN = ("run", "--detach", "--bundle")


class _Created(msgspec.Struct, frozen=True):
    """conmon's word on its sync pipe: the container's pid, or a negative number and the runtime's error text."""

    data: int = 0
    message: str = ""


class Crun:
    """The OCI runtime with one state directory."""

    def __init__(self, config: ContainerConfig, layout: CgroupLayout, worker: Worker) -> None:
        """Programs run in threads of `worker`, each of which waits for one."""
        self._config = config
        self._worker = worker
        self._conmon = config.conmon_executable
        # The manager is named: crun's default depends on how it was built.
        self._command = (
            *layout.runtime_prefix(),
            config.crun_executable,
            "--root",
            str(config.crun_state_root),
            "--cgroup-manager=cgroupfs",
        )
        # crun's words go to a file: where the output is the journal's, conmon has no other way to tell them.
        self._run_command = (*self._command, f"--log={_CRUN_LOG}", *_RUN)
        self._layout = layout

    def check(self) -> None:
        """Raises ConfigError when a program the runtime needs is missing, with what to do."""
        config = self._config
        for key, program in (("crunExecutable", config.crun_executable), ("conmonExecutable", self._conmon)):
            if not os.access(program, os.X_OK):
                raise ConfigError(f"{program} is not installed; install it or set {key!r} of the container runtime")

    def cgroup(self, instance_id: str) -> str:
        """Control group of an instance, below the mount."""
        return f"{self._config.cgroup_parent}/{instance_id}"

    async def run(self, instance_id: str, bundle: Path, output: ContainerOutput) -> int:
        """Run the container of a bundle; returns the pid of its first process.

        A cancellation takes effect after it, so that nothing is made behind the back of a later `delete`.
        Raises FailedError with crun's reason, NotFoundError when conmon is not installed, DeadlineError.
        """
        return await self._worker.run(self._run, instance_id, bundle, output)

    def _run(self, instance_id: str, bundle: Path, output: ContainerOutput) -> int:
        exit_dir = bundle / "exit"
        try:
            exit_dir.mkdir()
        except FileExistsError:
            for mark in (exit_file(bundle, instance_id), bundle / "oom", bundle / "conmon.pid", bundle / _CRUN_LOG):
                mark.unlink(missing_ok=True)
        # One that is left of a container whose removal was cut off has been killed. To the kernel that goes for what
        # is cloned into it later, too: the container would end before it can say a word.
        self._layout.remove(self.cgroup(instance_id))
        args: list[str | Path] = [
            *(self._conmon, "--api-version", "1", "--cid", instance_id, "--cuuid", instance_id),
            *("--name", instance_id, "--bundle", bundle, "--exit-dir", exit_dir, "--full-attach"),
            *("--container-pidfile", bundle / "pid", "--conmon-pidfile", bundle / "conmon.pid"),
            *("--runtime", self._run_command[0]),
            *(word for part in self._run_command[1:] for word in ("--runtime-arg", part)),
        ]
        read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
        try:
            with (bundle / "conmon.log").open("wb", buffering=0) as words, output.prepare(instance_id) as streams:
                try:
                    process = spawn(
                        [*args, *streams.arguments],
                        stdout=words.fileno() if streams.stdout is None else streams.stdout,
                        stderr=words.fileno() if streams.stderr is None else streams.stderr,
                        pass_fds=(write_fd,),
                        env={**_ENVIRONMENT, "_OCI_SYNCPIPE": str(write_fd)},
                        cwd=bundle,
                    )
                finally:
                    os.close(write_fd)
            line = _read_line(read_fd, what=f"container {instance_id}")
            # What stays is its child; the process that we started ends at once.
            process.wait()
        finally:
            os.close(read_fd)
        created = from_json(line, _Created, what=f"conmon's answer for container {instance_id}") if line else _Created()
        if created.data <= 0:
            if reason := _words(bundle / _CRUN_LOG) or created.message.strip():
                raise FailedError(f"can't create container {instance_id}: {reason}")
            reason = _words(bundle / "conmon.log") or "no reason given"
            raise FailedError(f"conmon of container {instance_id} failed: {reason}")
        # Only now: the container would be as nice as it.
        if (conmon := conmon_pid(bundle)) is not None:
            with contextlib.suppress(ProcessLookupError):
                os.setpriority(os.PRIO_PROCESS, conmon, _CONMON_NICE)
        return created.data

    async def delete(self, instance_id: str) -> None:
        """Kill it if needed and remove its state and control groups; an unknown one is success."""
        command = [*self._command, "delete", "--force", instance_id]
        done = await self._worker.run(run_blocking, command, timeout_s=_COMMAND_TIMEOUT_S, env=_ENVIRONMENT)
        if done.code != 0:
            known = await self.list()
            if instance_id in known:
                raise FailedError(f"can't delete container {instance_id}: {_last_line(done.stderr) or 'no output'}")

    async def list(self) -> dict[str, EngineState]:
        """All containers of the state directory."""
        done = await run_program(
            [*self._command, "list", "--format", "json"], timeout_s=_COMMAND_TIMEOUT_S, env=_ENVIRONMENT
        )
        # crun writes "null" for an empty list.
        text = done.stdout.strip()
        states = from_json(text if text.startswith(b"[") else b"[]", list[EngineState], what="crun's container list")
        return {state.id: state for state in states}

    async def exit(self, instance_id: str, bundle: Path) -> Exit:
        """conmon's note; no code when there was no conmon, or it has died too."""
        deadline_s = time.monotonic() + _EXIT_CODE_WAIT_S
        conmon = conmon_pid(bundle)
        while conmon is not None and is_alive(conmon) and time.monotonic() < deadline_s:
            if read_exit_code(bundle, instance_id) is not None:
                break
            await asyncio.sleep(0.01)
        # conmon begins to look after the container has; the control group knows from the beginning.
        out_of_memory = (bundle / "oom").exists() or self._layout.oom_kills(self.cgroup(instance_id)) > 0
        return Exit(read_exit_code(bundle, instance_id), out_of_memory=out_of_memory)


def _read_line(fd: int, *, what: str) -> bytes:
    """One line of conmon's pipe, empty when it ended without one."""
    deadline_s = time.monotonic() + _CREATE_TIMEOUT_S
    line = b""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    while not line.endswith(b"\n"):
        left_s = deadline_s - time.monotonic()
        if left_s <= 0 or not poll.poll(left_s * 1000):
            raise DeadlineError(f"{what} was not created within {_CREATE_TIMEOUT_S:g} s")
        if not (data := os.read(fd, 65536)):
            break
        line += data
    return line


def exit_file(bundle: Path, instance_id: str) -> Path:
    """Where conmon writes the exit code."""
    return bundle / "exit" / instance_id


def read_exit_code(bundle: Path, instance_id: str) -> int | None:
    """The exit code conmon noted; 128 + N after signal N. None when there is none (yet)."""
    try:
        return int(exit_file(bundle, instance_id).read_text())
    except (FileNotFoundError, ValueError):
        return None


def conmon_pid(bundle: Path) -> int | None:
    """Pid of the container's conmon; None when it was never noted."""
    try:
        return int((bundle / "conmon.pid").read_bytes())
    except (FileNotFoundError, ValueError):
        return None


def describe_exit(code: int | None, *, out_of_memory: bool) -> str:
    """In words for a status: "exited with 3", "killed by SIGKILL (137), out of memory"."""
    if code is None:
        return "ended while nobody watched, its exit code is not known"
    if code <= 128:
        return f"exited with {code}"
    with contextlib.suppress(ValueError):
        name = signal.Signals(code - 128).name
        return f"killed by {name} ({code}){', out of memory' if out_of_memory else ''}"
    return f"exited with {code}"


def _words(log: Path) -> str:
    """The last line of a log file; empty when there is none."""
    try:
        return _last_line(log.read_bytes())
    except FileNotFoundError:
        return ""


def _last_line(output: bytes) -> str:
    lines = output.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else ""
