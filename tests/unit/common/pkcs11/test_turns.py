"""Processes take turns at a token."""

import threading
import time
from pathlib import Path

import pytest

from aoscore.common.pkcs11 import turns
from aoscore.common.pkcs11.turns import turn


def test_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "_LIMIT_S", 60)
    pin_file = tmp_path / "pin"
    pin_file.write_text("1234")
    inside, most = 0, 0

    def work() -> None:
        nonlocal inside, most
        for _ in range(20):
            with turn(pin_file):
                inside += 1
                most = max(most, inside)
                time.sleep(0.001)
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (inside, most) == (0, 1)


def test_who_waits_too_long_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "_LIMIT_S", 0.05)
    pin_file = tmp_path / "pin"
    pin_file.write_text("1234")
    with turn(pin_file), turn(pin_file):
        pass


@pytest.mark.parametrize("name", [None, "missing"])
def test_nothing_to_wait_for(name: str | None, tmp_path: Path) -> None:
    pin_file = tmp_path / name if name else None
    with turn(pin_file), turn(pin_file):
        pass
