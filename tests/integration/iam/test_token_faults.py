"""A token that is not there, full, locked or hangs while IAM runs: who needs it hears why, all others are served."""

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf.empty_pb2 import Empty

from aoscore._pb.iamanager.v6 import iamanager_pb2 as pb
from tests.support.badlibrary import build_library
from tests.support.iam import Client
from tests.support.pki import TestCa
from tests.support.softhsm import SoftHsm
from tests.support.tokeniam import TokenIam

pytestmark = pytest.mark.timeout(180)


@pytest.fixture
def iam(tmp_path: Path, authority: TestCa) -> Iterator[TokenIam]:
    """IAM in provisioning mode; its library is a copy that a test can take away or replace."""
    library = tmp_path / "library.so"
    shutil.copy(SoftHsm(tmp_path / "probe").library, library)
    iam = TokenIam(tmp_path, authority, tls=False, library=library, types=("iam", "sm"))
    iam.start(provisioning=True)
    yield iam
    iam.kill()


def replace(iam: TokenIam, by: Path) -> None:
    """Another library in the place of the one that IAM uses."""
    fresh = iam.library.with_suffix(".new")
    shutil.copy(by, fresh)
    fresh.rename(iam.library)


def create(client: Client) -> tuple[int, int, str]:
    """Codes and message of a request for a key."""
    error = client.issue.CreateKey(pb.CreateKeyRequest(type="iam")).error
    return error.aos_code, error.exit_code, error.message


def still_served(client: Client, cert: pb.CertInfo) -> None:
    """What needs no token."""
    assert client.certs.GetCert(pb.GetCertRequest(type="iam")) == cert
    assert client.node.GetCurrentNodeInfo(Empty()).state == "unprovisioned"
    assert client.identity.GetSystemInfo(Empty()).system_id == "unit-1"


def test_library_goes_and_comes_back(iam: TokenIam) -> None:
    with iam.plain() as client:
        client.start_provisioning()
        cert = client.renew("iam", 10)
        real = iam.root / "kept.so"
        shutil.copy(iam.library, real)
        iam.library.unlink()
        code, exit_code, message = create(client)
        assert code == 1 and exit_code and f"can't use library {iam.library}" in message
        still_served(client, cert)
    # A start without it: what is known of the certificates is still told.
    iam.kill()
    iam.start(provisioning=True)
    assert "Can't use key storage: type=iam" in iam.log()
    with iam.plain() as client:
        still_served(client, cert)
        assert "key storage of iam can't be used" in create(client)[2]
        shutil.copy(real, iam.library)
        assert create(client) == (0, 0, ""), "nobody had to start IAM again"


def test_wrong_pin(iam: TokenIam) -> None:
    with iam.plain() as client:
        client.start_provisioning()
        cert = client.renew("iam", 10)
        pin = iam.hsm.pin_file.read_text()
        iam.hsm.pin_file.write_text("0" * 30)
        code, exit_code, message = create(client)
        assert (code, exit_code) == (2, 0xA0) and "wrong PIN" in message
        still_served(client, cert)
        assert pin not in iam.log() and "0" * 30 not in iam.log()
        iam.hsm.pin_file.write_text(pin)
        assert create(client) == (0, 0, "")


@pytest.mark.parametrize(
    ("fault", "codes", "text"),
    [("full", (2, 0x31), "the token is full"), ("crash", (1, 1), "crashed, its process ended by signal 11")],
)
def test_token_that_is_full_and_library_that_crashes(
    fault: str, codes: tuple[int, int], text: str, iam: TokenIam
) -> None:
    with iam.plain() as client:
        client.start_provisioning()
        cert = client.renew("iam", 10)
        real = iam.root / "kept.so"
        shutil.copy(iam.library, real)
        replace(iam, build_library(iam.root, fault))
        code, exit_code, message = create(client)
        assert (code, exit_code) == codes and text in message
        still_served(client, cert)
        replace(iam, real)
        assert create(client) == (0, 0, "")


def test_library_that_hangs(iam: TokenIam) -> None:
    with iam.plain() as client:
        client.start_provisioning()
        cert = client.renew("iam", 10)
    replace(iam, build_library(iam.root, "hang"))
    iam.kill()
    begin = time.monotonic()
    iam.start(provisioning=True)
    # Two types wait for one token once, not twice.
    assert time.monotonic() - begin < 25
    with iam.plain() as client:
        still_served(client, cert)
        code, exit_code, message = create(client)
        assert (code, exit_code) == (1, 1) and "did not answer within 10 s" in message
        still_served(client, cert)
    assert iam.stop() == 0
