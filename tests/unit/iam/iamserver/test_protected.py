import pytest

from aoscore.common.errors import RuntimeFailure, WrongStateError
from aoscore.iam.iamserver.protected import attempt, peer_of
from tests.support.pki import TestCa, pem


class Context:
    def __init__(self, certificate: bytes | None = None) -> None:
        self._certificate = certificate

    def peer(self) -> str:
        return "ipv4:1.2.3.4:5"

    def auth_context(self) -> dict[str, list[bytes]]:
        return {"x509_pem_cert": [self._certificate]} if self._certificate else {}


def test_peer(authority: TestCa) -> None:
    assert peer_of(Context()) == "ipv4:1.2.3.4:5"
    assert peer_of(Context(pem(authority.issue("unit").cert).encode())) == "ipv4:1.2.3.4:5 unit"


async def test_result_has_no_error(caplog: pytest.LogCaptureFixture, authority: TestCa) -> None:
    caplog.set_level("INFO")

    async def work() -> int:
        return 7

    assert await attempt("Do it", "n1", Context(pem(authority.issue("cm").cert).encode()), work) == (7, None)
    assert "Do it: nodeID=n1, peer=ipv4:1.2.3.4:5 cm" in caplog.text


@pytest.mark.parametrize(
    ("error", "codes", "message"),
    [
        (WrongStateError("not now"), (9, 9), "not now"),
        (RuntimeFailure("disk", 5), (2, 5), "disk"),
        (OSError(28, "No space left on device"), (2, 28), "[Errno 28] No space left on device"),
        (ValueError(), (1, 1), "ValueError"),
        (ExceptionGroup("some", [WrongStateError("inner")]), (9, 9), "inner"),
    ],
)
async def test_error_always_has_code_exit_code_and_message(
    error: Exception, codes: tuple[int, int], message: str
) -> None:
    """C++ clients look at the exit code only, aos-prov at the message only (iam.md §13, §6.4)."""

    async def work() -> None:
        raise error

    result, info = await attempt("Do it", "", Context(), work)
    assert result is None and info is not None
    assert (info.aos_code, info.exit_code) == codes
    assert message in info.message
