import asyncio
import errno

import pytest

from aoscore.common import errors
from aoscore.common.errors import AosError, from_error_info, to_error_info
from aoscore.common.types import ErrorInfo


@pytest.mark.parametrize(
    ("error", "info"),
    [
        (errors.NotFoundError("no x"), ErrorInfo(5, 5, "no x")),
        (errors.NoSpaceError("full"), ErrorInfo(3, 3, "full")),
        (errors.RuntimeFailure("no", errno.EPERM), ErrorInfo(2, errno.EPERM, "no")),
        (OSError(errno.ENOSPC, "No space"), ErrorInfo(2, errno.ENOSPC, "[Errno 28] No space")),
        (TimeoutError("slow"), ErrorInfo(7, 7, "slow")),
        (asyncio.CancelledError(), ErrorInfo(14, 14, "canceled")),
        (ValueError("odd"), ErrorInfo(1, 1, "ValueError: odd")),
        (ExceptionGroup("g", [ExceptionGroup("h", [errors.ChecksumError("bad")])]), ErrorInfo(10, 10, "bad")),
    ],
)
def test_any_exception_becomes_an_error_info(error: BaseException, info: ErrorInfo) -> None:
    assert to_error_info(error) == info


def test_every_class_survives_the_wire() -> None:
    classes = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, AosError)]
    assert {cls.aos_code for cls in classes} == set(range(1, 15))
    for cls in classes:
        back = from_error_info(to_error_info(cls("text")))
        expected = errors.FailedError if cls is AosError else cls
        assert type(back) in expected.__mro__ and str(back) == "text"


def test_fine_is_none_and_a_bare_errno_is_a_runtime_failure() -> None:
    assert from_error_info(None) is None
    assert from_error_info(ErrorInfo()) is None
    back = from_error_info(ErrorInfo(0, 13, "denied"))
    assert isinstance(back, errors.RuntimeFailure) and back.errno == 13
    assert type(from_error_info(ErrorInfo(99, 1, "new"))) is errors.FailedError
