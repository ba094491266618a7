"""The local AosCloud of a machine of namespaces, and the cloud's public tools at work on it.

What the user of an AosEdge cloud does by hand is done by the same public tools: `aos-prov` provisions a Unit,
`aos-signer` packs, signs and uploads items.
"""

import json
import shutil
import sysconfig
from pathlib import Path
from typing import Any

from aoscore.common.errors import NotFoundError
from aoscore.ctl.host import run
from aoscore.ctl.machine import Machine
from aoscore.ctl.sandbox import Program

_SCRIPTS = Path(sysconfig.get_path("scripts"))


class LocalCloud:
    """A cloud in `directory`, for the host name `domain`. `tools` is the virtual environment of the public tools."""

    def __init__(self, directory: Path, domain: str, tools: Path) -> None:
        self.directory = directory.absolute()
        self.domain = domain
        self._tools = tools.absolute()

    def program(self, host: str) -> Program:
        """The running cloud as a program of a machine, listening on the address `host`."""
        serve = ("serve", "--dir", str(self.directory), "--domain", self.domain, "--host", host)
        return Program("cloud", (str(_SCRIPTS / "aos-devcloud"), *serve), notifies=False)

    def command(self, name: str, *args: str | Path, timeout_s: float = 120) -> str:
        """Run a command of `aos-devcloud`; its output."""
        return run([_SCRIPTS / "aos-devcloud", name, "--dir", self.directory, *args], timeout_s)

    def call(self, operation: str, **arguments: Any) -> Any:
        """Run an operation of the running cloud's admin interface."""
        answer = self.command("call", operation, json.dumps(arguments))
        return json.loads(answer) if answer.strip() else None

    def root_file(self) -> Path:
        """File with the root certificate; the authority is made when it is not there."""
        return Path(self.command("ca", "--domain", self.domain).strip().splitlines()[-1])

    def user(self, role: str, name: str = "") -> Path:
        """PKCS#12 file of a user of the cloud, made when it is not there: the only `oem` or `sp`, or one by name."""
        name = name or role
        path = self.directory / "users" / f"{name}.p12"
        if not path.exists():
            self.command("user-cert", "--domain", self.domain, "--role", role, "--name", name, "--output", path)
        return path

    def check_tools(self) -> None:
        """Raises NotFoundError when a public tool is missing."""
        for tool in ("aos-prov", "aos-signer"):
            if not (self._tools / "bin" / tool).exists():
                raise NotFoundError(f"{tool} is not in {self._tools}; run make {self._tools.name}/.done")

    def provision(self, machine: Machine, address: str, *, nodes: int = 1, wait_s: int = 60) -> None:
        """Provision the Unit whose Main Node is at `address` (HOST:PORT) with aos-prov, run inside the machine."""
        python = self._tools / "bin" / "python"
        package = Path(run([python, "-c", "import aos_prov; print(aos_prov.__path__[0])"]).strip())
        # aos-prov trusts only the root certificate in its own package: it gets a copy of itself with ours.
        trusting = self.directory / "tools"
        shutil.copytree(package, trusting / package.name, dirs_exist_ok=True)
        shutil.copyfile(self.root_file(), trusting / package.name / "files" / "1rootCA.crt")
        main = f"import sys; sys.path.insert(0, {str(trusting)!r}); from aos_prov.main import main; main()"
        args = ["provision", "-u", address, "--nodes", str(nodes), "-w", str(wait_s), "--skip-check-version"]
        run(machine.enter(python, "-c", main, *args, "-p", self.user("oem")), 180 + 2 * wait_s)

    def sign_and_upload(self, machine: Machine, project: Path) -> None:
        """Pack, sign and upload the item project in a folder with aos-signer, run inside the machine."""
        command = machine.enter()
        command += [f"--wdns={project}", str(self._tools / "bin" / "aos-signer"), "--skip-check-version", "go"]
        run(command, 180, env={"REQUESTS_CA_BUNDLE": str(self.root_file())})
