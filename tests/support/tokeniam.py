"""An IAM process whose keys are on tokens of SoftHSM, and a client process with such a key."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc

from aoscore.common.keys import private_key_pem
from tests.support.iam import TYPES, Iam, KeyModule
from tests.support.pki import TestCa
from tests.support.provider import provider_environment
from tests.support.softhsm import SoftHsm

DISK = "diskencryption"


def token_of(cert_type: str) -> str:
    """Label of the token on which a type lies on shipped devices (iam.md §2.6)."""
    return "aoscloud" if cert_type in ("online", "offline") else "aoscore"


class TokenIam(Iam):
    """As Iam. Clients of the test itself show certificates with keys in files."""

    def __init__(
        self,
        root: Path,
        authority: TestCa,
        *,
        tls: bool = True,
        library: Path | None = None,
        types: Sequence[str] = (*TYPES, DISK),
        **config: Any,
    ) -> None:
        """`tls` False saves the search for the provider where all is in provisioning mode."""
        self.hsm = SoftHsm(root / "hsm")
        self.library = library or self.hsm.library
        self._types = types
        super().__init__(root, authority, **config)
        self.environment = {**self.hsm.environment}
        if tls:
            self.environment |= provider_environment(root, self.hsm.library, self.hsm.pin_file)

    def _config(self, host: str, keys: KeyModule) -> dict[str, Any]:
        config = super()._config(host, keys)
        disk = {"id": DISK, "algorithm": "rsa", "maxItems": 1, "selfSigned": True}
        config["certModules"] = [
            {
                **module,
                "plugin": "pkcs11module",
                "params": {**self.hsm.params(token_of(module["id"])), "library": str(self.library)},
            }
            for module in [*config["certModules"], disk]
            if module["id"] in self._types
        ]
        return config

    def credentials(self, cert_type: str) -> grpc.ChannelCredentials:
        """Those of a component with a certificate of the Unit's CA."""
        issued = self.authority.issue(cert_type)
        return grpc.ssl_channel_credentials(self.authority.root_pem, private_key_pem(issued.key), issued.pem)

    def client(self, *arguments: str) -> Any:
        """What the client program below prints, see its text."""
        words = [sys.executable, "-m", "tests.support.tokenclient", self.public, self.protected, str(self.ca_file)]
        done = subprocess.run(
            [*words, *arguments],
            env={**os.environ, **self.environment},
            cwd=Path(__file__).resolve().parents[2],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)
