"""Pages of code are given back, and everything goes on."""

import hashlib
import re
import ssl
import threading
from pathlib import Path

from aoscore._speedups import memory
from aoscore._speedups._plain import memory as plain


def mapped_kib(library: str) -> int:
    """What of a library's pages this process has mapped and has not changed."""
    found, here = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            here = library in line
        elif here and (match := re.match(r"(?:Shared|Private)_Clean:\s+(\d+) kB", line)):
            found += int(match[1])
    return found


def test_code_that_was_only_loaded_goes() -> None:
    ssl.create_default_context()
    before = mapped_kib("libcrypto")
    released = memory.release_code()
    assert mapped_kib("libcrypto") < before / 2
    assert released >= before * 1024


def test_what_is_used_again_comes_back() -> None:
    expected = hashlib.sha3_256(b"x" * 10_000).digest()
    memory.release_code()
    assert hashlib.sha3_256(b"x" * 10_000).digest() == expected
    assert ssl.create_default_context().get_ciphers()


def test_threads_at_work_meanwhile_do_not_notice() -> None:
    expected = hashlib.sha256(b"x" * 100_000).digest()
    stop = threading.Event()
    wrong = []

    def work() -> None:
        while not stop.is_set():
            if hashlib.sha256(b"x" * 100_000).digest() != expected:
                wrong.append(1)

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for _ in range(200):
        memory.release_code()
    stop.set()
    for worker in workers:
        worker.join()
    assert not wrong


def test_the_twin_does_nothing() -> None:
    assert plain.release_code() == 0
