"""A SoftHSM of the distribution with tokens in a directory of the test, and other eyes than ours to look at them."""

import os
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from aoscore.common.pkcs11.token import Token, TokenPlace, command

_CANDIDATES = ("/usr/lib/softhsm/libsofthsm2.so", "/usr/lib/x86_64-linux-gnu/softhsm/libsofthsm2.so")


class SoftHsm:
    """`environment` makes a process use these tokens."""

    def __init__(self, directory: Path) -> None:
        found = [Path(name) for name in _CANDIDATES if Path(name).exists()]
        if not found:
            pytest.skip("SoftHSM is not installed (package softhsm2)")
        self.library = found[0]
        self.directory = directory
        self.tokens = directory / "tokens"
        self.pin_file = directory / "pin" / ".usrpin"
        self.tokens.mkdir(parents=True)
        config = directory / "softhsm2.conf"
        config.write_text(f"directories.tokendir = {self.tokens}\nobjectstore.backend = file\nlog.level = ERROR\n")
        self.environment = {"SOFTHSM2_CONF": str(config)}

    def wipe(self) -> None:
        """Remove all tokens and their PIN, as a device does before it goes into provisioning mode (iam.md §1.2)."""
        shutil.rmtree(self.tokens)
        self.tokens.mkdir()
        self.pin_file.unlink(missing_ok=True)

    def params(self, label: str = "aoscore", **more: object) -> dict[str, object]:
        """Section params of a certificate module."""
        return {"library": str(self.library), "tokenLabel": label, "userPinPath": str(self.pin_file), **more}

    def objects(self, label: str = "aoscore") -> list[dict[str, Any]]:
        """All that is on a token."""
        token = Token(self.library, TokenPlace(label=label, pin_file=self.pin_file))
        with patch.dict(os.environ, self.environment):
            owned, *objects = token.run(command("owned"), command("objects"))
        return list(objects[0]) if owned else []

    def counts(self, label: str = "aoscore") -> dict[str, Counter[str]]:
        """Number of objects of each kind, by label; issuers have the label ""."""
        counts: dict[str, Counter[str]] = {}
        for entry in self.objects(label):
            counts.setdefault(entry["label"], Counter())[entry["kind"]] += 1
        return counts

    def tool(self, *arguments: str, label: str = "aoscore", login: bool = True) -> str:
        """What pkcs11-tool of OpenSC says."""
        words = ["pkcs11-tool", "--module", str(self.library), "--token-label", label, *arguments]
        if login:
            words += ["--login", "--pin", self.pin_file.read_text()]
        done = subprocess.run(
            words, capture_output=True, text=True, check=True, env={**os.environ, **self.environment}, timeout=30
        )
        return done.stdout
