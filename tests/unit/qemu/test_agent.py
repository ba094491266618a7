"""The agent in a guest, on a terminal in place of its virtio port."""

import base64
import contextlib
import json
import os
import subprocess
import sys
import tty
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qemu import agent

AGENT = Path(agent.__file__)


class Host:
    """Talks to an agent."""

    def __init__(self, descriptor: int) -> None:
        self._file = os.fdopen(descriptor, "r+b", buffering=0)
        self._buffer = b""

    def send(self, text: bytes) -> None:
        self._file.write(text)

    def ask(self, number: str, *args: str, **more: Any) -> None:
        self.send(json.dumps({"id": number, "args": args, **more}).encode() + b"\n")

    def answer(self) -> dict[str, Any]:
        while b"\n" not in self._buffer:
            self._buffer += self._file.read(65536)
        line, _, self._buffer = self._buffer.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer


@pytest.fixture
def host() -> Iterator[Host]:
    ours, theirs = os.openpty()
    tty.setraw(theirs)
    process = subprocess.Popen([sys.executable, "-I", AGENT, os.ttyname(theirs)])
    try:
        yield Host(ours)
    finally:
        process.kill()
        process.wait()
        with contextlib.suppress(OSError):
            os.close(theirs)


def test_programs_run_and_answer(host: Host) -> None:
    host.ask("1", "sh", "-c", "cat; echo wrong >&2; exit 3", input=base64.b64encode(b"in\0out").decode())
    answer = host.answer()
    assert (answer["id"], answer["code"]) == ("1", 3)
    assert base64.b64decode(answer["stdout"]) == b"in\0out"
    assert base64.b64decode(answer["stderr"]) == b"wrong\n"


def test_what_makes_no_sense_is_dropped(host: Host) -> None:
    host.send(b'half of a line"}\n[]\n{"id": "0"}\n\xff\n')
    host.ask("1", "true")
    assert host.answer()["id"] == "1"


def test_a_long_program_keeps_nobody_waiting(host: Host) -> None:
    host.ask("slow", "sleep", "600", timeout_s=1)
    host.ask("quick", "true")
    assert host.answer()["id"] == "quick"
    answer = host.answer()
    assert answer["id"] == "slow" and "timed out" in answer["error"]


def test_a_program_that_is_not_there_is_an_error(host: Host) -> None:
    host.ask("1", "/no/such/program")
    assert "No such file" in host.answer()["error"]
