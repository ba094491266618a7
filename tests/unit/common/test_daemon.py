"""The daemon main routine as a process of its own: exit codes, readiness, stop order, arguments."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import asyncio, atexit, os, sys
from pathlib import Path
import msgspec
from aoscore.common.config import load_config
from aoscore.common.daemon import Option, Program, leave, run_daemon
from aoscore.common.errors import FailedError

class Config(msgspec.Struct, rename="camel"):
    mode: str = "run"

class Service:
    def __init__(self, name, mode):
        self.name, self.mode = name, mode
    async def run(self, started):
        print("start", self.name, flush=True)
        if self.mode == "fail":
            raise FailedError("no luck with the disk")
        if self.mode == "bug":
            {}["missing"]
        started()
        try:
            if self.mode == "die later":
                await asyncio.sleep(0.05)
                raise FailedError("lost it")
            await asyncio.Event().wait()
        finally:
            print("stop", self.name, flush=True)

async def build(config, options, stack):
    # Stands for libraries that crash when they are taken down.
    atexit.register(os.abort)
    stack.callback(print, "closed", flush=True)
    return [Service("a", "run"), Service("b", config.mode)]

program = Program("aos_test", "Test", "test.cfg", lambda path: load_config(path, Config), build,
                  options=(Option("provisioning", "p", "provisioning mode"),),
                  before=lambda config, options: 5 if options.provisioning else None)
leave(run_daemon(program))
"""


def start(tmp_path: Path, *args: str, config: str = "{}", env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    path = tmp_path / "test.cfg"
    path.write_text(config)
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *(args or ("-c", str(path)))],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path.cwd()), **(env or {})},
    )


def outcome(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = process.communicate(timeout=20)
    return process.returncode, output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT])
def test_ready_then_orderly_stop(tmp_path: Path, number: signal.Signals) -> None:
    address = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(address))
        sock.settimeout(20)
        process = start(tmp_path, env={"NOTIFY_SOCKET": str(address), "WATCHDOG_USEC": "200000"})
        seen = [sock.recv(100) for _ in range(4)]
        assert seen.count(b"READY=1") == 1 and seen.count(b"WATCHDOG=1") == 3
        process.send_signal(number)
        code, output = outcome(process)
        while (last := sock.recv(100)) == b"WATCHDOG=1":
            pass
        assert last == b"STOPPING=1"
    assert code == 0, output
    steps = [line for line in output.splitlines() if line.split()[0] in ("start", "stop", "closed")]
    assert steps == ["start a", "start b", "stop b", "stop a", "closed"]
    assert f"Stop Test: signal={number.name}" in output


@pytest.mark.parametrize(
    ("config", "code", "text"),
    [
        ('{"mode": "fail"}', 70, "Stopped by an error: no luck with the disk"),
        ('{"mode": "bug"}', 70, "KeyError: 'missing'"),
        ('{"mode": "die later"}', 70, "Stopped by an error: lost it"),
        ('{"mod": 1}', 78, "unknown key 'mod'"),
        ("{", 78, "test.cfg"),
    ],
)
def test_failures_have_a_code_and_a_reason(tmp_path: Path, config: str, code: int, text: str) -> None:
    result, output = outcome(start(tmp_path, config=config))
    assert result == code and text in output, output
    if code == 70:
        assert "closed" in output
    if "luck" in text:
        assert "Traceback" not in output


@pytest.mark.parametrize(
    ("args", "code", "text"),
    [
        (("--version",), 0, "AosCore Test version"),
        (("-version",), 0, "AosCore Test version"),
        (("--help",), 0, "--journal"),
        (("--nonsense",), 78, "unrecognized"),
        (("-v", "loud"), 78, "invalid choice"),
        (("-c", "/nowhere.cfg"), 78, "/nowhere.cfg does not exist"),
        (("-config=/nowhere.cfg", "-v", "warn"), 78, "/nowhere.cfg does not exist"),
        (("-provisioning", "-c", "CONFIG"), 5, ""),
        (("-p", "--config=CONFIG"), 5, ""),
    ],
)
def test_arguments(tmp_path: Path, args: tuple[str, ...], code: int, text: str) -> None:
    path = str(tmp_path / "test.cfg")
    result, output = outcome(start(tmp_path, *(arg.replace("CONFIG", path) for arg in args)))
    assert result == code and text in output, output
