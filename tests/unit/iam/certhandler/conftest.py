"""Tokens for tests of the certificate modules."""

from pathlib import Path

import pytest

from tests.support.softhsm import SoftHsm


@pytest.fixture
def hsm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SoftHsm:
    hsm = SoftHsm(tmp_path / "hsm")
    for name, value in hsm.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("CKTEEC_LOGIN_TYPE", raising=False)
    return hsm
