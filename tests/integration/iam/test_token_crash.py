"""kill -9 of IAM at each change of a token: afterwards the step can be repeated, and nothing is lost or left over."""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from cryptography import x509

from aoscore._pb.iamanager.v6 import iamanager_pb2 as pb
from aoscore.common.certs import serial_hex
from aoscore.common.errors import NotFoundError, RuntimeFailure
from tests.support.iam import Client
from tests.support.pki import TestCa
from tests.support.softhsm import SoftHsm
from tests.support.spylibrary import build_spy
from tests.support.tokeniam import DISK, TokenIam

pytestmark = pytest.mark.timeout(400)

ONE = Counter(certificate=1, public=1, private=1)
PIN_NOT_SET = 0x102
TWO = Counter(certificate=2, public=2, private=2)


class Killer:
    """IAM in provisioning mode over a library that kills it when told so."""

    def __init__(self, root: Path, authority: TestCa) -> None:
        library = build_spy(root, SoftHsm(root / "probe").library)
        self.iam = TokenIam(root, authority, tls=False, library=library, types=("iam", "sm", DISK))
        self._plan = root / "kill-at"
        self.iam.environment["AOSCORE_TEST_KILL"] = str(self._plan)
        self.iam.start(provisioning=True)

    def at_every_point(
        self, step: Callable[[Client], object], check: Callable[[], None], before: Callable[[], None] = lambda: None
    ) -> int:
        """Do a step, killed at its first point, restart, check; then killed at its second, until it gets through.

        `before` makes each attempt begin alike. Returns the number of points.
        """
        point = 0
        while True:
            before()
            point += 1
            self._plan.write_text(f"{point}\n")
            try:
                with self.iam.plain() as client:
                    step(client)
            except grpc.RpcError:
                assert self.iam.process is not None
                assert self.iam.process.wait(timeout=20) == -9, self.iam.log()
                self.restart()
                check()
                continue
            assert self._plan.read_text().strip() != "0", "killed, and yet there was an answer"
            self._plan.unlink()
            check()
            return point - 1

    def resumed(self, step: Callable[[Client], object], check: Callable[[], None]) -> int:
        """Do a step that goes on where it was: killed before and after each change. Returns the number of kills."""
        kills = 0
        while True:
            self._plan.write_text(f"{kills % 2 + 1}\n")
            try:
                with self.iam.plain() as client:
                    step(client)
            except grpc.RpcError:
                kills += 1
                self.restart()
                check()
                continue
            self._plan.unlink()
            check()
            return kills

    def restart(self) -> None:
        self._plan.unlink(missing_ok=True)
        self.iam.kill()
        self.iam.start(provisioning=True)

    def serials(self, cert_type: str) -> set[str]:
        """Certificates that IAM gives out."""
        with self.iam.plain() as client:
            try:
                return {client.certs.GetCert(pb.GetCertRequest(type=cert_type)).serial.decode()}
            except grpc.RpcError:
                return set()


@pytest.fixture
def killer(tmp_path: Path, authority: TestCa) -> Iterator[Killer]:
    killer = Killer(tmp_path, authority)
    yield killer
    killer.iam.kill()


def nothing_loose(iam: TokenIam) -> None:
    """Every key has its other half, and every certificate its key."""
    try:
        counts = iam.hsm.counts()
    except (NotFoundError, RuntimeFailure) as error:
        # Between the token and its PIN: there is nothing on it, and nobody could read it.
        assert not isinstance(error, RuntimeFailure) or error.errno == PIN_NOT_SET
        return
    for cert_type in ("iam", "sm", DISK):
        found = counts.get(cert_type, Counter())
        assert found["public"] == found["private"] >= found["certificate"], counts


def test_start_of_provisioning(killer: Killer) -> None:
    iam = killer.iam
    # Three times C_InitToken and C_InitPIN, then the pair that signs itself, and its certificate; and what an attempt
    # finds of those before it is deleted first.
    assert killer.at_every_point(lambda client: client.start_provisioning(), lambda: nothing_loose(iam)) >= 16
    assert iam.hsm.counts() == {DISK: ONE}
    with iam.plain() as client:
        client.renew("iam", 10)


def test_keys_and_certificates(killer: Killer) -> None:
    iam = killer.iam
    with iam.plain() as client:
        client.start_provisioning()
    requests: list[str] = []

    def counts() -> Counter[str]:
        return iam.hsm.counts().get("iam", Counter())

    # A new key: whoever did not get its request does not leave it behind.
    def check_key() -> None:
        assert counts() == Counter(public=len(requests), private=len(requests)) or (
            not requests and counts() == Counter()
        )

    assert killer.at_every_point(lambda client: requests.append(client.create_key("iam")), check_key) == 2

    # Its certificate: two issuers and the leaf. The awaited key stays, whatever happens.
    pem = iam.authority.sign_request(requests[0], days=10)
    stored: list[pb.CertInfo] = []

    def check_certificate() -> None:
        found = counts()
        assert found["public"] == found["private"] == 1
        assert len(killer.serials("iam")) == found["certificate"]

    def apply(client: Client) -> None:
        stored.append(client.apply("iam", pem))

    assert killer.resumed(apply, check_certificate) == 6
    assert counts() == ONE and killer.serials("iam") == {stored[-1].serial.decode()}
    with iam.plain() as client:
        client.renew("iam", 20)
    assert counts() == TWO

    # Each further one makes the oldest go after it is stored. What a crash left half-done is completed at start.
    issued: list[str] = []

    def issue() -> None:
        with iam.plain() as client:
            issued.append(iam.authority.sign_request(client.create_key("iam"), days=30 + len(issued)))

    def check_renewal() -> None:
        found = counts()
        assert found["public"] == found["private"] >= found["certificate"] == 2
        assert killer.serials("iam")

    # One leaf is created; a certificate, a private and a public key are destroyed.
    assert killer.at_every_point(lambda client: client.apply("iam", issued[-1]), check_renewal, issue) == 8
    leaf = x509.load_pem_x509_certificate(issued[-1].encode())
    assert killer.serials("iam") == {serial_hex(leaf)}
    assert iam.hsm.counts()[""] == Counter(certificate=2)


def test_clear(killer: Killer) -> None:
    """A new start of provisioning, over keys that are in use."""
    iam = killer.iam
    with iam.plain() as client:
        client.start_provisioning()
        client.renew("iam", 10)
        client.create_key("sm")
    assert killer.at_every_point(lambda client: client.start_provisioning(), lambda: nothing_loose(iam)) >= 16
    assert iam.hsm.counts() == {DISK: ONE}
