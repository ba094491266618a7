import grpc
import grpc.aio
import pytest

from aoscore.common.errors import FailedError, NotFoundError
from aoscore.common.rpc import handler


class Context:
    """Behaves like a server context: a second abort is a misuse."""

    def __init__(self) -> None:
        self.status: tuple[grpc.StatusCode, str] | None = None

    async def abort(self, code: grpc.StatusCode, details: str) -> None:
        assert self.status is None, "aborted twice"
        self.status = (code, details)
        raise grpc.aio.AbortError


class LateError(FailedError):
    grpc_status = grpc.StatusCode.DEADLINE_EXCEEDED


class Servicer:
    @handler
    async def unary(self, request: str, context: Context) -> str:
        if request == "own status":
            await context.abort(grpc.StatusCode.UNAVAILABLE, "nobody there")
        if request == "error":
            raise NotFoundError("no such thing")
        if request == "late":
            raise LateError("too late")
        return request

    @handler
    async def stream(self, request: str, context: Context):  # type: ignore[no-untyped-def]
        yield request
        yield await self.unary.__wrapped__(self, request, context)  # type: ignore[attr-defined]


CASES = [
    ("own status", (grpc.StatusCode.UNAVAILABLE, "nobody there")),
    ("error", (grpc.StatusCode.INTERNAL, "no such thing")),
    ("late", (grpc.StatusCode.DEADLINE_EXCEEDED, "too late")),
]


@pytest.mark.parametrize(("request_", "status"), CASES)
async def test_errors_become_a_status(request_: str, status: tuple[grpc.StatusCode, str]) -> None:
    context = Context()
    with pytest.raises(grpc.aio.AbortError):
        await Servicer().unary(request_, context)
    assert context.status == status


@pytest.mark.parametrize(("request_", "status"), CASES)
async def test_errors_inside_of_a_stream_become_a_status(request_: str, status: tuple[grpc.StatusCode, str]) -> None:
    context = Context()
    answers = []
    with pytest.raises(grpc.aio.AbortError):
        async for answer in Servicer().stream(request_, context):
            answers.append(answer)
    assert answers == [request_]
    assert context.status == status


async def test_answers_pass() -> None:
    assert await Servicer().unary("hello", Context()) == "hello"
