"""The one place that runs programs."""

import asyncio
import contextlib
import os
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from aoscore.common.errors import DeadlineError, FailedError, NotFoundError

OUTPUT_LIMIT_BYTES = 1024 * 1024


class Finished(msgspec.Struct, frozen=True):
    """How a program ended; a negative code is the signal that ended it."""

    code: int
    stdout: bytes
    stderr: bytes

    def check(self, name: str) -> None:
        """Raise FailedError with the last words of the program `name` unless its code is 0."""
        if self.code != 0:
            raise FailedError(f"{name} failed with code {self.code}: {_last_words(self.stderr, self.stdout)}")


def _last_words(*outputs: bytes) -> str:
    """The last line of the first output that has any."""
    for output in outputs:
        if lines := output.strip().decode(errors="replace").splitlines():
            return lines[-1]
    return "no output"


async def run_program(
    args: Sequence[str | Path],
    *,
    timeout_s: float,
    stdin: bytes | None = None,
    check: bool = True,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    background: bool = False,
) -> Finished:
    """Run a program to its end and collect its output (at most 1 MiB of each stream, the rest is dropped).

    Raises NotFoundError when the program is missing, DeadlineError when it had to be killed after `timeout_s`
    (its whole process group is), and with `check` FailedError for a non-zero exit, with its last words.
    A program that leaves `background` children behind is not waited for beyond its own end, and they keep their
    output: stdout and stderr then come together, as stdout.
    """
    name = Path(args[0]).name
    # A pipe would end with the last child that holds it, and break under a child that writes after our return.
    with tempfile.TemporaryFile() if background else contextlib.nullcontext() as output:
        try:
            process = await asyncio.create_subprocess_exec(
                *args,
                stdin=asyncio.subprocess.PIPE if stdin is not None else asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE if output is None else output,
                stderr=asyncio.subprocess.PIPE if output is None else output,
                env=dict(env) if env is not None else None,
                cwd=cwd,
                start_new_session=True,
            )
        except FileNotFoundError:
            raise NotFoundError(f"program {args[0]} is not installed") from None
        try:
            async with asyncio.timeout(timeout_s):
                stdout, stderr, _ = await asyncio.gather(
                    _read_limited(process.stdout), _read_limited(process.stderr), _feed(process, stdin)
                )
                code = await process.wait()
            if output is not None:
                output.seek(0)
                stdout = output.read(OUTPUT_LIMIT_BYTES)
        except TimeoutError:
            text = f"{name} did not end within {timeout_s:g} s and was killed"
            if output is not None:
                output.seek(0)
                text += f": {_last_words(output.read(OUTPUT_LIMIT_BYTES))}"
            raise DeadlineError(text) from None
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                await process.wait()
    finished = Finished(code, stdout, stderr)
    if check:
        finished.check(name)
    return finished


def run_blocking(args: Sequence[str | Path], *, timeout_s: float, env: Mapping[str, str] | None = None) -> Finished:
    """`run_program` for a worker thread and a program that says little: it costs a third of the CPU time.

    Raises NotFoundError when the program is missing, DeadlineError when it had to be killed.
    """
    try:
        done = subprocess.run(
            args,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env=dict(env) if env is not None else None,
            timeout=timeout_s,
            check=False,
        )
    except FileNotFoundError:
        raise NotFoundError(f"program {args[0]} is not installed") from None
    except subprocess.TimeoutExpired:
        raise DeadlineError(f"{Path(args[0]).name} did not end within {timeout_s:g} s and was killed") from None
    return Finished(done.returncode, done.stdout, done.stderr)


async def start_program(
    args: Sequence[str | Path], *, stdout: int = subprocess.DEVNULL, stderr: int = subprocess.DEVNULL
) -> "subprocess.Popen[bytes]":
    """Start a program as `spawn` does, without blocking."""
    return await asyncio.to_thread(spawn, args, stdout=stdout, stderr=stderr)


def spawn(
    args: Sequence[str | Path],
    *,
    stdout: int = subprocess.DEVNULL,
    stderr: int = subprocess.DEVNULL,
    pass_fds: Sequence[int] = (),
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> "subprocess.Popen[bytes]":
    """Start a program that outlives the call and this process: in a session of its own, nothing inherited.

    `stdout` and `stderr` are file descriptors. Raises NotFoundError when the program is missing. Blocks, and is not
    asyncio's, whose processes are killed with the event loop.
    """
    try:
        return subprocess.Popen(
            args,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            pass_fds=pass_fds,
            env=dict(env) if env is not None else None,
            cwd=cwd,
            start_new_session=True,
        )
    except FileNotFoundError:
        raise NotFoundError(f"program {args[0]} is not installed") from None


async def _feed(process: asyncio.subprocess.Process, data: bytes | None) -> None:
    if data is None or process.stdin is None:
        return
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        process.stdin.write(data)
        await process.stdin.drain()
    process.stdin.close()


async def _read_limited(stream: asyncio.StreamReader | None) -> bytes:
    """All of a stream is read, so that the program never blocks; only the first part is kept."""
    kept = bytearray()
    if stream is None:
        return b""
    while chunk := await stream.read(65536):
        if len(kept) < OUTPUT_LIMIT_BYTES:
            kept += chunk[: OUTPUT_LIMIT_BYTES - len(kept)]
    return bytes(kept)
