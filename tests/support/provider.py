"""OpenSSL's provider `pkcs11` for test processes that have their TLS keys on a token.

Taken from the system (package pkcs11-provider: Debian 13, Ubuntu 24.04), from AOSCORE_PKCS11_PROVIDER, or, on Debian 12
which has none, out of Debian 13's package, which runs there too.
"""

import os
import shutil
import tarfile
from pathlib import Path

import pytest

from tests.support import debian

PACKAGE = "pkcs11-provider"
_MODULE = "ossl-modules/pkcs11.so"


def provider_module() -> Path:
    """The provider's module; the test is skipped where there is none.

    A test without a network asks for it by the marker `debian(PACKAGE)`.
    """
    given = os.environ.get("AOSCORE_PKCS11_PROVIDER")
    candidates = [Path(given)] if given else list(Path("/usr/lib").glob(f"*/{_MODULE}"))
    return next((path for path in candidates if path.exists()), None) or _from_package()


def _from_package() -> Path:
    """The module out of Debian's package, which is never installed."""
    if lacks := debian.fetch([PACKAGE]):
        pytest.skip(f"install {PACKAGE}, OpenSSL's provider of that name, or set AOSCORE_PKCS11_PROVIDER: {lacks}")
    layer = debian.layer_file(PACKAGE)
    target = layer.with_suffix(".so")
    if not target.exists():
        building = target.with_name(f"building-{os.getpid()}-{target.name}")
        with tarfile.open(layer) as archive:
            (found,) = (member for member in archive if member.name.endswith(_MODULE))
            content = archive.extractfile(found)
            assert content is not None
            with building.open("wb") as file:
                shutil.copyfileobj(content, file)
        building.rename(target)
    return target


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
