"""The cloud's public tools, unchanged from PyPI; the fixtures `tools_cloud` and `tools` are in tests/integration.

aos-keys and aos-signer know port 10000 only and trust what their packages ship: tests that use them run in namespaces
of their own (marker `net`), where the port is free and the cloud's root is mounted over the shipped root files.
"""

import os
import subprocess
from pathlib import Path

from tests.support.devcloud import DevcloudProcess


class Tools:
    """Runs a tool in a home directory of its own."""

    def __init__(self, folder: Path, home: Path) -> None:
        self.folder = folder
        self.security = home / ".aos" / "security"
        self.security.mkdir(parents=True)
        names = ("PYTHONPATH", "REQUESTS_CA_BUNDLE")
        self._environment = {name: value for name, value in os.environ.items() if name not in names}
        self._environment |= {"HOME": str(home), "COLUMNS": "200"}

    def run(self, tool: str, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        """One command of a tool, output and errors together."""
        return subprocess.run(
            [self.folder / tool, *arguments],
            cwd=cwd,
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=90,
            check=False,
        )

    def succeed(self, tool: str, *arguments: str, cwd: Path | None = None) -> str:
        """Output of a command that must succeed."""
        done = self.run(tool, *arguments, cwd=cwd)
        assert done.returncode == 0, done.stdout
        return done.stdout


def new_user(cloud: DevcloudProcess, tools: Tools, role: str) -> Path:
    """A user certificate made by aos-keys with a one-time token."""
    token = cloud.run("token", "--role", role, "--name", f"{role}-user").strip()
    arguments = ["new-user", "-d", "localhost", "-t", token, f"--{role}"]
    quiet = ["--skip-browser-install", "--skip-check-version", "-o", str(tools.security)]
    tools.succeed("aos-keys", *arguments, *quiet)
    again = tools.run("aos-keys", *arguments, *quiet[:2], "-o", str(tools.security.parent / "again"))
    assert again.returncode != 0
    assert "already used" in again.stdout, "a token works once"
    return tools.security / f"aos-user-{role}.p12"
