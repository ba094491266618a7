"""OpenSSL's provider `pkcs11` for test processes that have their TLS keys on a token.

Taken from the system (package pkcs11-provider: Debian 13, Ubuntu 24.04), from AOSCORE_PKCS11_PROVIDER, or, on Debian 12
which has none, out of Debian 13's package, which runs there too.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

_CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "aoscore"
_SUITE = "trixie"
_MODULE = "ossl-modules/pkcs11.so"


def _from_package() -> Path | None:
    """The module out of Debian's package, unpacked once into the cache and never installed."""
    target = _CACHE / f"pkcs11-provider-{_SUITE}"
    if not target.is_dir() and shutil.which("mmdebstrap"):
        building = _CACHE / f"building-provider-{os.getpid()}"
        command = ["mmdebstrap", "--variant=extract", "--include=pkcs11-provider", _SUITE, building]
        _CACHE.mkdir(parents=True, exist_ok=True)
        try:
            if subprocess.run(command, capture_output=True, check=False).returncode == 0:
                (found,) = building.rglob(_MODULE)
                kept = _CACHE / f"building-module-{os.getpid()}"
                kept.mkdir()
                shutil.copy(found, kept / "pkcs11.so")
                if not target.exists():
                    kept.rename(target)
        finally:
            shutil.rmtree(building, ignore_errors=True)
    return target / "pkcs11.so" if target.is_dir() else None


def provider_module() -> Path:
    """The provider's module; the test is skipped where there is none."""
    given = os.environ.get("AOSCORE_PKCS11_PROVIDER")
    candidates = [Path(given)] if given else list(Path("/usr/lib").glob(f"*/{_MODULE}"))
    module = next((path for path in candidates if path.exists()), None) or _from_package()
    if module is None:
        pytest.skip("OpenSSL's pkcs11 provider is not here: install pkcs11-provider or set AOSCORE_PKCS11_PROVIDER")
    return module


def provider_environment(directory: Path, library: Path, pin_file: Path) -> dict[str, str]:
    """Makes a process use the provider, as /etc/ssl/openssl-aos.cnf does on a device (iam.md §1.5).

    The PIN is needed beside that in URLs: the provider checks signatures of peers on the first token it finds.
    """
    config = directory / "openssl.cnf"
    config.write_text(f"""openssl_conf = openssl_init
[openssl_init]
providers = provider_sections
[provider_sections]
default = default_section
pkcs11 = pkcs11_section
[default_section]
activate = 1
[pkcs11_section]
module = {provider_module()}
pkcs11-module-path = {library}
pkcs11-module-token-pin = file:{pin_file}
pkcs11-module-cache-keys = false
pkcs11-module-quirks = no-deinit
activate = 1
""")
    return {"OPENSSL_CONF": str(config)}
